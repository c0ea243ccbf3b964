"""From the learned vectors of a file to the tokens that text encoders and tokenizers will get."""

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from diffadapt.errors import AdapterError
from diffadapt.files.checkpoint import Checkpoint
from diffadapt.formats.embeddings import OUTPUT
from diffadapt.formats.verdicts import Vectors
from diffadapt.tokens import vocabulary
from diffadapt.tokens.encoders import component_meant, text_encoders, token_embedding
from diffadapt.tokens.learned_tokens import LearnedTokens, Token, tokens_by_adapter
from diffadapt.types.layer_spec import LayerSpec

_PIVOTAL_FILE = re.compile(r"embeddings|.*_emb")
"""Names that diffusers' pivotal tuning gives the file beside the LoRA; its tokens are `<s0>`, `<s1>`, ... ."""

_MOST_VECTORS = 4096
"""For one text encoder; most prompts have no more than 77 or 512 tokens."""


class _Found(NamedTuple):
    """Vectors (count, width) of a file, and the text encoder that they are for."""

    component: str
    verdict: Vectors
    vectors: Tensor


@dataclass(frozen=True)
class Resolved:
    """Learned vectors of a file, resolved against text encoders by their names and shapes alone.

    Attributes:
        found: by key.
        faults, ignored: as in `load.Plan`.
    """

    found: dict[str, _Found] = field(default_factory=dict[str, _Found])
    faults: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])
    ignored: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])

    @property
    def values(self) -> Iterator[tuple[str, Tensor]]:
        """Key and vectors."""
        return ((key, found.vectors) for key, found in self.found.items())


@dataclass(frozen=True)
class Learned:
    """What a file says of tokens, resolved against tokenizers and text encoders; nothing is installed yet.

    Attributes:
        components: text encoder -> the tokens it gets.
        faults, ignored: as in `load.Plan`.
    """

    components: dict[str, LearnedTokens] = field(default_factory=dict[str, LearnedTokens])
    used: int = 0
    faults: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])
    ignored: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])


def resolve_vectors(
    learned: Mapping[str, Vectors],
    checkpoint: Checkpoint,
    models: Mapping[str, nn.Module] | None,
    wanted: set[str] | None,
) -> Resolved:
    """Decide for every tensor of learned vectors which text encoder it is for. Reads no values.

    Args:
        models: component -> model; `None` to believe the names in the file.
        wanted: components that were asked for, `None` for all.
    """
    encoders = text_encoders(models)
    resolved = Resolved()
    sizes: dict[str, tuple[int, int]] = {}
    for key, verdict in learned.items():
        if wanted is not None and encoders is not None and wanted.isdisjoint(encoders):
            resolved.ignored.append((key, "no text encoder was asked for"))
            continue
        try:
            vectors = _matrix(checkpoint.tensors[key])
            written = verdict.written.removesuffix(OUTPUT) if verdict.output else verdict.written
            component = written if encoders is None else component_meant(written, vectors, encoders)
            if wanted is not None and component not in wanted:
                resolved.ignored.append((key, f"component {component} was not asked for"))
                continue
            (count, width), (before, known) = vectors.shape, sizes.get(component, (0, vectors.shape[1]))
            if width != known:
                raise AdapterError(f"vectors of width {width} beside others of width {known} for {component}")
            if before + count > _MOST_VECTORS:
                raise AdapterError(f"{before + count} vectors for {component}, expected at most {_MOST_VECTORS}")
        except AdapterError as error:
            resolved.faults.append((key, str(error)))
            continue
        sizes[component] = before + count, width
        resolved.found[key] = _Found(component, verdict, vectors)
    return resolved


def plan_tokens(
    resolved: Resolved,
    checkpoint: Checkpoint,
    models: Mapping[str, nn.Module] | None,
    tokenizers: Mapping[str, Any] | None,
    *,
    broken: Collection[str],
    settled: Callable[[str, Tensor], Tensor],
    leaving: str | None = None,
) -> Learned:
    """Decide for every token of a file what its name is and whether it can have it. Touches no tokenizer and no model.

    Args:
        models: see `resolve`.
        tokenizers: by their text encoder; `None` if tokens are not to be installed.
        broken: keys of tensors with values that are not finite.
        settled: `(component, vectors)` -> vectors in the dtype and on the device to keep them.
        leaving: an adapter whose tokens will be gone.
    """
    encoders = text_encoders(models)
    faults = list(resolved.faults)
    rooms: dict[str, _Vocabulary] = {}
    used = 0
    for keys, inward, outward in _paired(resolved):
        component, verdict, vectors = inward or outward  # type: ignore[misc]
        try:
            if any(key in broken for key in keys):
                raise AdapterError("holds NaN or infinite values")
            if component not in rooms:
                encoder = None if encoders is None else encoders[component]
                rooms[component] = _Vocabulary.of(component, encoder, tokenizers, leaving)
            tokens = _named(verdict, checkpoint, len(vectors))
            if outward is not None:
                written = "" if inward is None else inward.verdict.written
                tokens = [token._replace(written=written, output=outward.verdict.written) for token in tokens]
            output = None if outward is None else outward.vectors
            rooms[component].take(tokens, torch.zeros_like(vectors) if inward is None else vectors, output)
        except AdapterError as error:
            faults += ((key, str(error)) for key in keys)
            continue
        used += len(keys)
    components = {component: room.filled(settled) for component, room in rooms.items() if room.tokens}
    return Learned(components, used, faults, list(resolved.ignored))


@dataclass
class _Vocabulary:
    """What one text encoder gets from a file, and what its tokenizer has already.

    Attributes:
        vocabulary: all that the tokenizer knows.
        added: tokens that diffusers may take for further vectors of one, those of the file among them.
        held: of the adapters that are loaded.
    """

    component: str
    tokenizer: Any
    vocabulary: Collection[str]
    added: set[str]
    held: Mapping[str, LearnedTokens]
    scale: float = 1.0
    tokens: list[Token] = field(default_factory=list[Token])
    vectors: list[Tensor] = field(default_factory=list[Tensor])
    outputs: list[Tensor | None] = field(default_factory=list[Tensor | None])

    @classmethod
    def of(
        cls, component: str, model: nn.Module | None, tokenizers: Mapping[str, Any] | None, leaving: str | None
    ) -> "_Vocabulary":
        if model is None or tokenizers is None:
            return cls(component, None, (), set(), {})
        if component not in tokenizers:
            raise AdapterError(f"{component} has no tokenizer to know the token; load it with the pipeline")
        tokenizer, spec = tokenizers[component], LayerSpec.of(token_embedding(model))
        assert spec is not None
        held = tokens_by_adapter(model)
        gone = set(held.pop(leaving).names) if leaving in held else set[str]()
        gone -= {name for tokens in held.values() for name in tokens.names}
        known, added = set(tokenizer.get_vocab()) - gone, set(vocabulary.added(tokenizer)) - gone
        return cls(component, tokenizer, known, added, held, spec.output_scale)

    def take(self, tokens: Sequence[Token], vectors: Tensor, output: Tensor | None) -> None:
        """Add tokens, with the rows of `vectors` and of `output`; all of them or, by an `AdapterError`, none."""
        if output is not None and output.shape != vectors.shape:
            raise AdapterError(f"{len(vectors)} vectors, and {len(output)} for what the text encoder gives for them")
        if len(vectors) > getattr(self.tokenizer, "model_max_length", len(vectors)):
            raise AdapterError(
                f"{len(vectors)} vectors do not fit into the {self.tokenizer.model_max_length} tokens of a prompt"
            )
        for token, part in zip(tokens, vectors.split([token.rows for token in tokens]), strict=True):
            self._refuse_taken(token, part, output)
        for token in tokens:
            self.added.update(vocabulary.names_of(token.name, token.rows))
        self.tokens += tokens
        self.vectors.append(vectors)
        self.outputs.append(output)

    def filled(self, settled: Callable[[str, Tensor], Tensor]) -> LearnedTokens:
        """The tokens taken, with their vectors settled as `plan` says."""
        outputs = None
        if any(output is not None for output in self.outputs):
            pairs = zip(self.vectors, self.outputs, strict=True)
            every = [torch.zeros_like(vectors) if output is None else output for vectors, output in pairs]
            outputs = _joined([settled(self.component, part) for part in every])
        vectors = _joined([settled(self.component, part) for part in self.vectors])
        return LearnedTokens(self.tokens, vectors, outputs, self.tokenizer, self.scale)

    def _refuse_taken(self, token: Token, vectors: Tensor, output: Tensor | None) -> None:
        """Raise `AdapterError` if the prompt could mean something else by the token."""
        name, names = token.name, vocabulary.names_of(token.name, token.rows)
        where = f"token {name!r}: the tokenizer of {self.component}"
        if any(other.name == name for other in self.tokens):
            raise AdapterError(f"token {name!r} has vectors for {self.component} under another key already")
        held = ((owner, *item) for owner, tokens in self.held.items() for item in tokens.by_token.items())
        owner, others = next(((owner, others) for owner, other, others in held if other.name == name), (None, None))
        if others is not None:
            if _alike(others[0], vectors) and _alike(others[1], output):
                return
            raise AdapterError(
                f"{where} knows it from adapter {owner!r}, with other vectors; remove that one first, or load this one "
                f"as a state dict with another token in its keys (bundle_emb.<token>.{token.written})"
            )
        taken = [other for other in names if other in self.vocabulary or other in self.added]
        if taken:
            raise AdapterError(
                f"{where} has {', '.join(map(repr, taken))} already; load it as a state dict with another token in its "
                f"keys (bundle_emb.<token>.{token.written}), or rename the file where that gives the token"
            )
        stem, _, number = name.rpartition("_")
        # No more names than there are: the number may be any.
        counts = number.isdecimal() and int(number) <= len(self.added)
        follows = counts and self.added.issuperset(vocabulary.names_of(stem, int(number)))
        if f"{name}_{token.rows}" in self.added or (stem and follows):
            raise AdapterError(f"{where} has a token that differs in its number only, so prompts would get both")


def _paired(resolved: Resolved) -> Iterator[tuple[tuple[str, ...], _Found | None, _Found | None]]:
    """Keys and content of every tensor of vectors, and of that for the output of the text encoder, if there is one."""
    outward: dict[tuple[str, str | None], list[str]] = {}
    for key, found in resolved.found.items():
        if found.verdict.output:
            outward.setdefault((found.component, found.verdict.token), []).append(key)
    for key, found in resolved.found.items():
        if not found.verdict.output:
            others = outward.get((found.component, found.verdict.token))
            other = others.pop(0) if others and not found.verdict.apart else None
            yield (key,) if other is None else (key, other), found, None if other is None else resolved.found[other]
    for key in (key for keys in outward.values() for key in keys):
        yield (key,), None, resolved.found[key]


def _alike(tensor: Tensor | None, other: Tensor | None) -> bool:
    """Whether two are equal in the dtype of the first, or both are missing."""
    if tensor is None or other is None:
        return tensor is other
    return tensor.shape == other.shape and torch.equal(tensor, other.to(tensor))


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Their rows one after the other, of several dtypes in float32 or wider: torch has no common one for float8."""
    mixed = len({part.dtype for part in parts}) > 1
    return torch.cat([part.float() if mixed and part.dtype != torch.float64 else part for part in parts])


def _matrix(tensor: Tensor) -> Tensor:
    """Vectors as rows."""
    if not tensor.is_floating_point() or tensor.ndim not in (1, 2) or not tensor.numel():
        raise AdapterError(
            f"has shape {tuple(tensor.shape)} and dtype {tensor.dtype}, expected vectors (count, width) of a token"
        )
    return tensor if tensor.ndim == 2 else tensor.unsqueeze(0)


def _named(verdict: Vectors, checkpoint: Checkpoint, count: int) -> list[Token]:
    """The tokens of a tensor of `count` vectors."""
    in_pivotal_file = verdict.token is None and _PIVOTAL_FILE.fullmatch(Path(checkpoint.origin).stem)
    if verdict.apart or in_pivotal_file:
        return [Token(f"<s{row}>", verdict.written, 1) for row in range(count)]
    name = verdict.token or checkpoint.name
    if name is None:
        raise AdapterError(
            f"does not say its token; pass it as name=, or in the key (bundle_emb.<token>.{verdict.written})"
        )
    return [Token(name, verdict.written, count)]
