"""Learned tokens of an adapter (textual inversions): installed into tokenizers and text encoders, and removed again.

A token's vectors belong to the adapter, like all its parameters: they hang beside its layers in the bank of the text
encoder, and the token embedding looks the new ids up there (`attach.Extended`). The weight of the embedding keeps its
rows, so adapters on it, casting, offloading, merging and the model's own state dict see nothing of them. The result is
that of a weight with these rows at its end, which is what diffusers' `load_textual_inversion` makes. A token may also
have vectors that replace what the text encoder gives where it stands, in all its hidden states but the first
(`Bank.after_call`).

Tokens are known as long as their adapter is loaded; no strength and no `activate` changes them. A token of several
vectors has the names diffusers gives it (`token`, `token_1`, ...), to which the tokenizer spells a prompt out, as most
pipelines do before.
"""

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffadapt import vocabulary
from diffadapt.adapter import BANK, Adapter
from diffadapt.attach import Extended, bank_of, extend_
from diffadapt.errors import AdapterError
from diffadapt.formats.embeddings import OUTPUT
from diffadapt.formats.format import Vectors
from diffadapt.io import Checkpoint
from diffadapt.layer import LayerSpec

_CHILD = "learned tokens"
"""Name of an adapter's child that holds its tokens; no module path of a model has such a part."""

_PIVOTAL_FILE = re.compile(r"embeddings|.*_emb")
"""Names that diffusers' pivotal tuning gives the file beside the LoRA; its tokens are `<s0>`, `<s1>`, ... ."""

_MOST_VECTORS = 4096
"""For one text encoder; most prompts have no more than 77 or 512 tokens."""

_KINDS = {"clip": "clip", "t5": "t5", "t5xxl": "t5", "llama": "llama", "gemma": "gemma", "qwen": "qwen"}
"""First part of what files call a text encoder -> what transformers has in the `model_type` of its config."""


class Token(NamedTuple):
    """One token: its name, what files call its text encoder, and its number of rows.

    Attributes:
        written: "" for a token that the text encoder reads zeros for.
        output: what files call the text encoder's output, "" for a token that has no vectors for it.
    """

    name: str
    written: str
    rows: int
    output: str = ""


class LearnedTokens(nn.Module):
    """The tokens that one adapter brings to one text encoder.

    Attributes:
        tokens: in the order of their rows.
        tokenizer: that knows them while they are installed; `None` where there is only a file.
        vectors: (rows, width), a row for every name.
        outputs: the same for the output of the text encoder, `None` where no token has any.
        ids: (rows,), the tokenizer's present ids of the names, -1 for one that it does not know.
        scale: constant that the embedding multiplies with what it looks up.
    """

    ids: Tensor
    _replaced: Tensor

    def __init__(
        self,
        tokens: Sequence[Token],
        vectors: Tensor,
        outputs: Tensor | None = None,
        tokenizer: Any = None,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.scale = scale
        self.tokens = tuple(tokens)
        self.tokenizer = tokenizer
        self.names = tuple(name for token in tokens for name in vocabulary.names_of(token.name, token.rows))
        self.vectors = nn.Parameter(vectors, requires_grad=False)
        self.outputs = None if outputs is None else nn.Parameter(outputs, requires_grad=False)
        replaced = torch.tensor([bool(token.output) for token in tokens for _ in range(token.rows)])
        self.register_buffer("_replaced", replaced.to(vectors.device), persistent=False)
        self._numbers = [-1] * len(self.names)
        self.register_buffer("ids", torch.full((len(self.names),), -1, device=vectors.device), persistent=False)

    def number(self) -> None:
        """Read the ids from the tokenizer."""
        known = vocabulary.added(self.tokenizer)
        numbers = [known.get(name, -1) for name in self.names]
        if numbers != self._numbers:
            # In place, as a compiled text encoder holds the tensor.
            self.ids.copy_(torch.tensor(numbers))
            self._numbers = numbers

    def holds(self, ids: Tensor) -> Tensor:
        """Whether each of `ids` is one of these."""
        return (ids.unsqueeze(-1) == self.ids.to(ids.device)).any(-1)

    def forward(self, ids: Tensor, embedded: Tensor) -> Tensor:
        """`embedded` (*ids.shape, width) with the vectors of these tokens where `ids` are theirs."""
        found = ids.unsqueeze(-1) == self.ids.to(ids.device)
        rows = F.embedding(found.int().argmax(-1), self.vectors.to(embedded.device, embedded.dtype))
        return torch.where(found.any(-1, keepdim=True), rows if self.scale == 1.0 else rows * self.scale, embedded)

    def replaced(self, ids: Tensor, output: Any) -> Any:
        """What a text encoder gives for `ids`, its hidden states with the vectors of these tokens in their places."""
        if isinstance(output, tuple):
            return tuple(self._replaced_in(ids, value) for value in output)  # type: ignore[misc]
        for name, value in output.items():
            output[name] = self._replaced_in(ids, value)
        return output

    def _replaced_in(self, ids: Tensor, value: Any) -> Any:
        assert self.outputs is not None
        if isinstance(value, tuple):
            # The first of the hidden states are the embeddings.
            first, *others = value  # type: ignore[misc]
            return (first, *(self._replaced_in(ids, state) for state in others))  # type: ignore[misc]
        if not isinstance(value, Tensor) or value.shape != (*ids.shape, self.outputs.shape[1]):
            return value  # type: ignore[misc]
        found = (ids.unsqueeze(-1) == self.ids.to(ids.device)) & self._replaced.to(ids.device)
        found = found.to(value.device)
        rows = F.embedding(found.int().argmax(-1), self.outputs.to(value.device, value.dtype))
        return torch.where(found.any(-1, keepdim=True), rows, value)

    @property
    def by_token(self) -> dict[Token, tuple[Tensor, Tensor | None]]:
        """The vectors of each token, (rows, width), for the text encoder and for its output."""
        sizes = [token.rows for token in self.tokens]
        given = (None,) * len(sizes) if self.outputs is None else self.outputs.detach().split(sizes)
        return {
            token: (vectors, output if token.output else None)
            for token, vectors, output in zip(self.tokens, self.vectors.detach().split(sizes), given, strict=True)
        }

    @property
    def state(self) -> dict[tuple[str, str], Tensor]:
        """What a file would say of them, as in `AdapterState.embeddings`."""
        found: dict[tuple[str, str], Tensor] = {}
        for token, (vectors, output) in self.by_token.items():
            if token.written:
                found[token.name, token.written] = vectors.clone()
            if output is not None:
                found[token.name, token.output] = output.clone()
        return found

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        # A state dict of the text encoder is the base model's and says nothing of adapters.
        if BANK not in prefix.split("."):
            super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


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


def resolve(
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
    encoders = _encoders(models)
    resolved = Resolved()
    sizes: dict[str, tuple[int, int]] = {}
    for key, verdict in learned.items():
        if wanted is not None and encoders is not None and wanted.isdisjoint(encoders):
            resolved.ignored.append((key, "no text encoder was asked for"))
            continue
        try:
            vectors = _matrix(checkpoint.tensors[key])
            written = verdict.written.removesuffix(OUTPUT) if verdict.output else verdict.written
            component = written if encoders is None else _component(written, vectors, encoders)
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


def plan(
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
    encoders = _encoders(models)
    faults = list(resolved.faults)
    rooms: dict[str, _Room] = {}
    used = 0
    for keys, inward, outward in _paired(resolved):
        component, verdict, vectors = inward or outward  # type: ignore[misc]
        try:
            if any(key in broken for key in keys):
                raise AdapterError("holds NaN or infinite values")
            if component not in rooms:
                encoder = None if encoders is None else encoders[component]
                rooms[component] = _Room.of(component, encoder, tokenizers, leaving)
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


def install_(models: Mapping[str, nn.Module], name: str, learned: Mapping[str, LearnedTokens]) -> None:
    """Make tokenizers and text encoders know the tokens of adapter `name`, which has to be attached to the latter.

    Raises:
        AdapterError: a tokenizer does not take a token. `uninstall_` takes out what has been installed until then.
    """
    for component, tokens in learned.items():
        bank = bank_of(models[component])
        assert bank is not None
        bank.adapters[name]._modules[_CHILD] = tokens
        known = vocabulary.added(tokens.tokenizer)
        vocabulary.add_(tokens.tokenizer, (token for token in tokens.names if token not in known))
        spelled = {t.name: vocabulary.names_of(t.name, t.rows)[1:] for t in tokens.tokens if t.rows > 1}
        vocabulary.spell_out_(tokens.tokenizer, spelled)
        refused = sorted(set(tokens.names) - set(vocabulary.added(tokens.tokenizer)))
        if refused:
            raise AdapterError(f"the tokenizer of {component} does not take {', '.join(map(repr, refused))} as tokens")
        refresh_(models[component])


def uninstall_(models: Mapping[str, nn.Module], name: str) -> None:
    """Take the tokens of adapter `name` out of tokenizers and text encoders; those of others keep their vectors.

    Raises:
        AdapterError: someone else has added tokens since, whose ids would change. Nothing has changed then.
    """
    owners = {(component, owner): t for component, m in models.items() for owner, t in _held(m).items()}
    leaving = {component: tokens for (component, owner), tokens in owners.items() if owner == name}
    if not leaving:
        return
    staying = [tokens for (_, owner), tokens in owners.items() if owner != name]
    removals: dict[int, tuple[Any, set[str]]] = {}
    for component, tokens in leaving.items():
        kept = {other for t in staying if t.tokenizer is tokens.tokenizer for other in t.names}
        # Two text encoders may share a tokenizer.
        _, gone = removals.setdefault(id(tokens.tokenizer), (tokens.tokenizer, set()))
        gone |= set(tokens.names) - kept
        _refuse_to_move(component, tokens.tokenizer, gone, kept)
    for tokenizer, names in removals.values():
        vocabulary.remove_(tokenizer, names)
    for component in leaving:
        bank = bank_of(models[component])
        assert bank is not None
        del bank.adapters[name]._modules[_CHILD]
    for model in models.values():
        refresh_(model)


def refresh_(model: nn.Module) -> None:
    """Make the token embedding of `model` look up exactly the tokens of its adapters, under their present ids.

    Ids change when tokens are removed, and diffusers' `unload_textual_inversion` puts another embedding in place.
    """
    held = tuple(_held(model).values())
    bank = bank_of(model)
    if bank is not None:
        bank.replacing = tuple(tokens for tokens in held if tokens.outputs is not None)
    hosts = _hosts(model) if held else []
    for tokens in held:
        tokens.number()
    for module in model.modules():
        if isinstance(module, Extended) and all(module is not host for host in hosts):
            extend_(module, ())
    for host in hosts:
        extend_(host, held)


def is_extended(model: nn.Module) -> bool:
    """Whether an adapter has brought tokens to this model."""
    return bool(_held(model))


def of(adapter: Adapter) -> LearnedTokens | None:
    """The tokens that an adapter brings to its model."""
    tokens = adapter._modules.get(_CHILD)
    return tokens if isinstance(tokens, LearnedTokens) else None


def counted(learned: Iterable[LearnedTokens]) -> dict[str, int]:
    """Token -> its number of vectors, in the text encoder where it has most."""
    counts: dict[str, int] = {}
    for tokens in learned:
        for token in tokens.tokens:
            counts[token.name] = max(token.rows, counts.get(token.name, 0))
    return counts


@dataclass
class _Room:
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
    ) -> "_Room":
        if model is None or tokenizers is None:
            return cls(component, None, (), set(), {})
        if component not in tokenizers:
            raise AdapterError(f"{component} has no tokenizer to know the token; load it with the pipeline")
        tokenizer, spec = tokenizers[component], LayerSpec.of(_embedding(model))
        assert spec is not None
        held = _held(model)
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


def _encoders(models: Mapping[str, nn.Module] | None) -> dict[str, nn.Module] | None:
    """The text encoders among the models, by component."""
    return None if models is None else {name: models[name] for name in sorted(models) if "text_encoder" in name}


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


def _component(written: str, vectors: Tensor, encoders: Mapping[str, nn.Module]) -> str:
    """The text encoder that a file means: by its name there or, where it has none, by the width of the vectors."""
    width = vectors.shape[1]
    widths = {component: _embedding(model).embedding_dim for component, model in encoders.items()}
    present = ", ".join(f"{c} ({_kind(m)}, width {widths[c]})" for c, m in encoders.items()) or "none"
    kind = _KINDS.get(written.partition("_")[0])
    if kind is None:
        fitting = [component for component in encoders if widths[component] == width]
        if not fitting:
            raise AdapterError(f"vectors of width {width} fit no text encoder; there are {present}")
        return fitting[0]
    alike = [component for component, model in encoders.items() if kind in _kind(model)]
    if not alike:
        raise AdapterError(f"there is no text encoder {written!r}; there are {present}")
    component = alike[1] if written == "clip_g" and len(alike) > 1 else alike[0]
    if widths[component] != width:
        raise AdapterError(f"vectors of width {width} do not fit {component}, which has {widths[component]}")
    return component


def _kind(model: nn.Module) -> str:
    return getattr(getattr(model, "config", None), "model_type", "")


def _embedding(model: nn.Module) -> nn.Embedding:
    """The embedding of a text encoder's tokens."""
    try:
        embedding = model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        embedding = None
    if not isinstance(embedding, nn.Embedding):
        raise AdapterError(f"a {type(model).__name__} has no token embedding that could look up further tokens")
    return embedding


def _hosts(model: nn.Module) -> list[nn.Module]:
    """The layers that look tokens up: the embedding, and those that share its weight (T5 calls one of them only).

    Told by their size, as offloading unties weights.
    """
    embedding = _embedding(model)
    size = (embedding.num_embeddings, embedding.embedding_dim)
    return [
        module
        for module in model.modules()
        if isinstance(module, nn.Embedding) and (module.num_embeddings, module.embedding_dim) == size
    ]


def _held(model: nn.Module) -> dict[str, LearnedTokens]:
    """Tokens by adapter."""
    bank = bank_of(model)
    adapters = {} if bank is None else bank.adapters
    return {name: tokens for name, adapter in adapters.items() if (tokens := of(adapter)) is not None}


def _refuse_to_move(component: str, tokenizer: Any, gone: Collection[str], kept: Collection[str]) -> None:
    """Raise `AdapterError` if without `gone` tokens of others would move, whose vectors are rows of the weight."""
    known = vocabulary.added(tokenizer)
    first = min((index for name, index in known.items() if name in gone), default=len(tokenizer))
    after = [name for name, index in known.items() if index > first and name not in gone and name not in kept]
    if after:
        raise AdapterError(
            f"the tokenizer of {component} has got {', '.join(map(repr, after))} after this adapter's tokens; "
            "take them out first (pipe.unload_textual_inversion)"
        )
