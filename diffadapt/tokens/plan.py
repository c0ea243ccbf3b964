"""Planning learned tokens: from the vectors in a file to the tokens that text encoders and tokenizers get.

As with layers, shapes come first: `resolve_vectors` needs only names and shapes, `plan_tokens` reads values.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from diffadapt.errors import AdapterError, Fault
from diffadapt.files.checkpoint import Checkpoint
from diffadapt.formats.embeddings import OUTPUT, PIVOTAL_FILE
from diffadapt.formats.verdicts import Vectors
from diffadapt.runtime.components import is_text_encoder
from diffadapt.tokens import vocabulary
from diffadapt.tokens.encoders import NoTextEncoder, component_for, text_encoders, token_embedding
from diffadapt.tokens.learned_tokens import LearnedTokens, Token, tokens_by_adapter
from diffadapt.types.layer_spec import LayerSpec

_MOST_VECTORS = 4096
"""Vectors for one text encoder; most prompts have no more than 77 or 512 tokens."""


class _Found(NamedTuple):
    """One tensor of learned vectors.

    Attributes:
        key: the tensor's key in the file.
        component: the text encoder that the vectors are for.
        verdict: what the format says of the key.
        vectors: the vectors, of shape (count, width).
    """

    key: str
    component: str
    verdict: Vectors
    vectors: Tensor


@dataclass(frozen=True)
class Resolved:
    """The learned vectors of a file, resolved against text encoders; no values have been read.

    Attributes:
        found: the tensors of vectors that can be used.
        faults, ignored: see `loading.plan.Plan`.
    """

    found: list[_Found] = field(default_factory=list[_Found])
    faults: list[Fault] = field(default_factory=list[Fault])
    ignored: list[Fault] = field(default_factory=list[Fault])

    @property
    def values(self) -> Iterator[tuple[str, Tensor]]:
        """The key and the vectors of every tensor."""
        return ((found.key, found.vectors) for found in self.found)


@dataclass(frozen=True)
class PlannedTokens:
    """The learned tokens of a file, checked against tokenizers and text encoders; nothing is installed yet.

    Attributes:
        components: text encoder -> the tokens it gets.
        used: the number of tensors that are used.
        faults, ignored: see `loading.plan.Plan`.
    """

    components: dict[str, LearnedTokens]
    used: int
    faults: list[Fault]
    ignored: list[Fault]


def resolve_vectors(
    learned: Mapping[str, Vectors],
    checkpoint: Checkpoint,
    models: Mapping[str, nn.Module] | None,
    wanted: Collection[str] | None,
    empty: Collection[str] = (),
) -> Resolved:
    """Find the text encoder for every tensor of learned vectors. Reads no values.

    Args:
        learned: key -> what the format says of it.
        checkpoint: the content of the file.
        models: the models by component; `None` to trust the names in the file.
        wanted: the components that were asked for; `None` for all.
        empty: components that the pipeline has room for, but that are not loaded. Vectors for them are no fault.
    """
    encoders, missing = text_encoders(models), ", ".join(filter(is_text_encoder, empty))
    resolved = Resolved()
    sizes: dict[str, tuple[int, int]] = {}
    for key, verdict in learned.items():
        if wanted is not None and encoders is not None and encoders.keys().isdisjoint(wanted):
            resolved.ignored.append(Fault(key, "no text encoder was asked for"))
            continue
        try:
            vectors = _matrix(checkpoint.tensors[key])
            written = verdict.written.removesuffix(OUTPUT) if verdict.output else verdict.written
            component = written if encoders is None else component_for(written, vectors, encoders)
            if wanted is not None and component not in wanted:
                resolved.ignored.append(Fault(key, f"component {component} was not asked for"))
                continue
            count, width = vectors.shape
            before, expected = sizes.get(component, (0, width))
            if width != expected:
                raise AdapterError(f"vectors of width {width} beside others of width {expected} for {component}")
            if before + count > _MOST_VECTORS:
                raise AdapterError(f"{before + count} vectors for {component}, expected at most {_MOST_VECTORS}")
        except NoTextEncoder as error:
            faults = resolved.ignored if missing else resolved.faults
            faults.append(Fault(key, f"{error}; {missing} is not loaded" if missing else str(error)))
            continue
        except AdapterError as error:
            resolved.faults.append(Fault(key, str(error)))
            continue
        sizes[component] = before + count, width
        resolved.found.append(_Found(key, component, verdict, vectors))
    return resolved


def plan_tokens(
    resolved: Resolved,
    checkpoint: Checkpoint,
    models: Mapping[str, nn.Module] | None,
    tokenizers: Mapping[str, Any] | None,
    *,
    broken: Collection[str],
    moved: Callable[[str, Tensor], Tensor],
    leaving: str | None = None,
) -> PlannedTokens:
    """Name the tokens of a file, and check that tokenizers can accept them. Changes no tokenizer and no model.

    Args:
        resolved: the learned vectors of the file.
        checkpoint: the content of the file.
        models: the models by component; `None` to trust the names in the file.
        tokenizers: the tokenizer of each text encoder; `None` if the tokens are not to be installed.
        broken: the keys of tensors that hold NaN or infinite values.
        moved: `(component, vectors)` -> the vectors in the dtype and on the device in which to keep them.
        leaving: the name of an adapter that is about to be removed, along with its tokens.
    """
    encoders = text_encoders(models)
    drafts: dict[str, Draft] = {}
    faults: list[Fault] = []
    used = 0
    for inputs, outputs in _paired(resolved.found):
        pair = [found for found in (inputs, outputs) if found is not None]
        component = pair[0].component
        try:
            if any(found.key in broken for found in pair):
                raise AdapterError("holds NaN or infinite values")
            if component not in drafts:
                encoder = None if encoders is None else encoders[component]
                drafts[component] = Draft.of(component, encoder, tokenizers, leaving)
            tokens = _named(pair[0], checkpoint)
            if outputs is not None:
                written = "" if inputs is None else inputs.verdict.written
                tokens = [token._replace(written=written, output=outputs.verdict.written) for token in tokens]
            vectors = torch.zeros_like(pair[0].vectors) if inputs is None else inputs.vectors
            drafts[component].add(tokens, vectors, None if outputs is None else outputs.vectors)
        except AdapterError as error:
            faults += [Fault(found.key, str(error)) for found in pair]
            continue
        used += len(pair)
    components = {component: draft.finished(moved) for component, draft in drafts.items() if draft.tokens}
    return PlannedTokens(components, used, [*resolved.faults, *faults], resolved.ignored)


@dataclass
class Draft:
    """The tokens that one text encoder gets from a file, and what its tokenizer knows already.

    Attributes:
        component: the text encoder.
        tokenizer: its tokenizer; `None` if the tokens are not to be installed.
        vocabulary: everything that the tokenizer knows.
        added: the added tokens, with those of the file: diffusers spells out a token if it finds further names here.
        present: the learned tokens of each adapter that is loaded.
        scale: see `LearnedTokens`.
        tokens: the tokens of the file.
        vectors, outputs: their vectors for the text encoder and for its output, tensor by tensor.
    """

    component: str
    tokenizer: Any
    vocabulary: Collection[str]
    added: set[str]
    present: Mapping[str, LearnedTokens]
    scale: float = 1.0
    tokens: list[Token] = field(default_factory=list[Token])
    vectors: list[Tensor] = field(default_factory=list[Tensor])
    outputs: list[Tensor | None] = field(default_factory=list[Tensor | None])

    @classmethod
    def of(
        cls, component: str, model: nn.Module | None, tokenizers: Mapping[str, Any] | None, leaving: str | None
    ) -> "Draft":
        """Return a draft without tokens for a text encoder; see `plan_tokens`."""
        if model is None or tokenizers is None:
            return cls(component, None, (), set(), {})
        if component not in tokenizers:
            raise AdapterError(f"{component} has no tokenizer to know the token; load it with the pipeline")
        tokenizer, spec = tokenizers[component], LayerSpec.of(token_embedding(model))
        assert spec is not None
        present = tokens_by_adapter(model)
        removed = set(present.pop(leaving).names) if leaving in present else set[str]()
        removed -= {name for tokens in present.values() for name in tokens.names}
        known, added = set(tokenizer.get_vocab()) - removed, set(vocabulary.added(tokenizer)) - removed
        return cls(component, tokenizer, known, added, present, spec.output_scale)

    def add(self, tokens: Sequence[Token], vectors: Tensor, output: Tensor | None) -> None:
        """Add tokens, with their rows of `vectors` and `output`. If one raises `AdapterError`, none is added."""
        if output is not None and output.shape != vectors.shape:
            raise AdapterError(
                f"{len(vectors)} vectors, and {len(output)} for what the text encoder gives for them; expected as many"
            )
        if len(vectors) > getattr(self.tokenizer, "model_max_length", len(vectors)):
            raise AdapterError(
                f"{len(vectors)} vectors do not fit into the {self.tokenizer.model_max_length} tokens of a prompt"
            )
        sizes = [token.rows for token in tokens]
        outputs = (None,) * len(sizes) if output is None else output.split(sizes)
        for token, own, own_output in zip(tokens, vectors.split(sizes), outputs, strict=True):
            self._refuse_taken(token, own, own_output)
        for token in tokens:
            self.added.update(vocabulary.names_of(token.name, token.rows))
        self.tokens += tokens
        self.vectors.append(vectors)
        self.outputs.append(output)

    def finished(self, moved: Callable[[str, Tensor], Tensor]) -> LearnedTokens:
        """Return the tokens as a module, with their vectors `moved`; see `plan_tokens`."""
        outputs = None
        if any(output is not None for output in self.outputs):
            pairs = zip(self.vectors, self.outputs, strict=True)
            filled = [torch.zeros_like(vectors) if output is None else output for vectors, output in pairs]
            outputs = _joined([moved(self.component, tensor) for tensor in filled])
        vectors = _joined([moved(self.component, tensor) for tensor in self.vectors])
        return LearnedTokens(self.tokens, vectors, outputs, self.tokenizer, self.scale)

    def _refuse_taken(self, token: Token, vectors: Tensor, output: Tensor | None) -> None:
        """Raise `AdapterError` if a name of the token is taken, or could be confused with that of another token."""
        name, names = token.name, vocabulary.names_of(token.name, token.rows)
        where = f"token {name!r}: the tokenizer of {self.component}"
        if any(other.name == name for other in self.tokens):
            raise AdapterError(f"token {name!r} has vectors for {self.component} under another key already")
        known = self._known(name)
        if known is not None:
            owner, known_vectors, known_output = known
            if _are_equal(known_vectors, vectors) and _are_equal(known_output, output):
                return
            raise AdapterError(
                f"{where} knows it from adapter {owner!r}, with other vectors; remove that one first, or load this one "
                f"as a state dict with another token in its keys (bundle_emb.<token>.{token.written})"
            )
        taken = [other for other in names if other in self.vocabulary or other in self.added]
        if taken:
            raise AdapterError(
                f"{where} has {', '.join(map(repr, taken))} already; load it as a state dict with another token in its "
                f"keys (bundle_emb.<token>.{token.written}), or rename the file if its name is the token"
            )
        stem, _, number = name.rpartition("_")
        # The number may be huge; there cannot be more further names than there are added tokens.
        is_number = number.isdecimal() and int(number) <= len(self.added)
        is_further_name = bool(stem) and is_number and self.added.issuperset(vocabulary.names_of(stem, int(number)))
        if f"{name}_{token.rows}" in self.added or is_further_name:
            raise AdapterError(f"{where} has a token that differs in its number only, so a prompt would get both")

    def _known(self, name: str) -> tuple[str, Tensor, Tensor | None] | None:
        """Return the adapter that has brought token `name`, and the token's vectors; `None` if there is none."""
        for owner, learned in self.present.items():
            for token, (vectors, output) in learned.by_token.items():
                if token.name == name:
                    return owner, vectors, output
        return None


def _paired(found: Sequence[_Found]) -> Iterator[tuple[_Found | None, _Found | None]]:
    """Yield the vectors of each token for the text encoder and for its output; one of the two may be missing."""
    outputs: dict[tuple[str, str | None], list[_Found]] = {}
    for each in found:
        if each.verdict.output:
            outputs.setdefault((each.component, each.verdict.token), []).append(each)
    for each in found:
        if not each.verdict.output:
            own = outputs.get((each.component, each.verdict.token))
            yield each, own.pop(0) if own and not each.verdict.apart else None
    for left in outputs.values():
        for each in left:
            yield None, each


def _are_equal(first: Tensor | None, second: Tensor | None) -> bool:
    """Return whether two tensors are equal in the dtype of the first, or both are missing."""
    if first is None or second is None:
        return first is second
    return first.shape == second.shape and torch.equal(first, second.to(first))


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    """Return the rows of all tensors as one tensor; in float32 or wider if their dtypes differ.

    PyTorch has no common dtype for different float8 dtypes.
    """
    mixed = len({tensor.dtype for tensor in tensors}) > 1
    return torch.cat([tensor.float() if mixed and tensor.dtype != torch.float64 else tensor for tensor in tensors])


def _matrix(tensor: Tensor) -> Tensor:
    """Return learned vectors in the shape (count, width). Raise `AdapterError` if they cannot be such vectors."""
    if not tensor.is_floating_point() or tensor.ndim not in (1, 2) or not tensor.numel():
        raise AdapterError(
            f"has shape {tuple(tensor.shape)} and dtype {tensor.dtype}, expected vectors (count, width) of a token"
        )
    return tensor if tensor.ndim == 2 else tensor.unsqueeze(0)


def _named(found: _Found, checkpoint: Checkpoint) -> list[Token]:
    """Return the tokens of a tensor of vectors: one, or one for each vector in a file of diffusers' pivotal tuning."""
    verdict, count = found.verdict, len(found.vectors)
    in_pivotal_file = verdict.token is None and PIVOTAL_FILE.fullmatch(Path(checkpoint.origin).stem)
    if verdict.apart or in_pivotal_file:
        return [Token(f"<s{row}>", verdict.written, 1) for row in range(count)]
    name = verdict.token or checkpoint.name
    if name is None:
        raise AdapterError(
            f"does not say its token; pass it as name=, or in the key (bundle_emb.<token>.{verdict.written})"
        )
    return [Token(name, verdict.written, count)]
