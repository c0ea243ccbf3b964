"""The adapters that are loaded into some models at one moment, and names and strengths resolved against them."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeAlias

import torch
from torch import nn

from diffadapt.errors import AdapterError
from diffadapt.runtime.adapter import Adapter
from diffadapt.runtime.attach import refresh_
from diffadapt.runtime.bank import Bank, bank_of
from diffadapt.runtime.components import is_text_encoder
from diffadapt.runtime.locks import is_held_elsewhere
from diffadapt.strengths.by_prefix import (
    SampleStrengths,
    SharedStrengths,
    Strength,
    check_strength,
    numbers_at,
    resolve_prefixes,
)
from diffadapt.strengths.schedules import START, Moment
from diffadapt.tokens.learned_tokens import LearnedTokens, learned_tokens_of, vectors_by_token

Chosen: TypeAlias = str | Iterable[str] | Mapping[str, Strength]
"""One name, several names, or name -> strength; a name alone means the strength 1."""

_LONGEST_SCALE = 40
_MOST_NAMED = 6

LayerStrengths: TypeAlias = float | list[float] | list[list[float]]
"""One strength for all layers of an adapter on one model, or one per layer in the order of `Adapter.layers`, or a list
for every sample of a batch: of one strength for all layers, or of one per layer."""


@dataclass
class LoadedAdapter:
    """One loaded adapter, over all components.

    Attributes:
        name: name of the adapter.
        components: component -> the `Adapter` module on that model, which owns the parameters.
        rescale: gives the adapter another strength; `None` if it was not taken from `pipe.adapters`.
        retrain: makes its parameters trainable; `None` likewise.
    """

    name: str
    components: Mapping[str, Adapter]
    rescale: Callable[[Strength], None] | None = field(default=None, repr=False, compare=False)
    retrain: Callable[[], None] | None = field(default=None, repr=False, compare=False)

    def train_(self) -> "LoadedAdapter":
        """Make the parameters trainable: float32 tensors that require gradients. Return the adapter.

        Raises:
            AdapterError: it is merged, or a quantised layer passes no right gradient on.
        """
        if self.retrain is None:
            raise AdapterError(f"train_() of adapter {self.name!r}: call it on pipe.adapters[{self.name!r}]")
        self.retrain()
        return self

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield the parameters of all components."""
        for adapter in self.components.values():
            yield from adapter.parameters()

    @property
    def learned(self) -> tuple[LearnedTokens, ...]:
        """The learned tokens it brought, one entry per text encoder."""
        found = (learned_tokens_of(adapter) for adapter in self.components.values())
        return tuple(tokens for tokens in found if tokens is not None)

    @property
    def tokens(self) -> Mapping[str, int]:
        """Learned token -> number of vectors, for every token it brought."""
        return vectors_by_token(self.learned)

    @property
    def types(self) -> tuple[str, ...]:
        """Names of the adapter types it consists of, sorted."""
        return tuple(sorted({layer.adapter_type.name for a in self.components.values() for layer in a.layers.values()}))

    @property
    def ranks(self) -> tuple[int, ...]:
        """Ranks that occur in its layers, ascending; empty for types without a rank."""
        ranks = {layer.rank for adapter in self.components.values() for layer in adapter.layers.values()}
        return tuple(sorted(rank for rank in ranks if rank is not None))

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """Dtypes of its parameters."""
        dtypes = {parameter.dtype for adapter in self.components.values() for parameter in adapter.parameters()}
        return tuple(sorted(dtypes, key=str))

    @property
    def bytes(self) -> int:
        """Size of its parameters."""
        return sum(adapter.bytes for adapter in self.components.values())

    @property
    def metadata(self) -> Mapping[str, str]:
        """Metadata of its file, verbatim."""
        return next(iter(self.components.values())).metadata

    @property
    def active(self) -> bool:
        """Whether it acts, at run time or merged."""
        return any(adapter.active for adapter in self.components.values())

    @property
    def strength(self) -> Strength:
        """Strength that `activate` or `scale=` set last."""
        return next(iter(self.components.values())).strength

    @property
    def scale(self) -> Strength:
        """The strength. Assigning to it gives an active adapter another one, as `activate` does."""
        return self.strength

    @scale.setter
    def scale(self, strength: Strength) -> None:
        if self.rescale is None:
            raise AdapterError(f"scale of adapter {self.name!r}: set it on pipe.adapters[{self.name!r}]")
        self.rescale(strength)

    def __repr__(self) -> str:
        layers = ", ".join(f"{component} {len(one.layers)} layers" for component, one in self.components.items())
        return f"<LoadedAdapter {self.name!r}: {', '.join(self.types)}, {layers}, {'' if self.active else 'in'}active>"


def check_name(name: str) -> None:
    """Raise `AdapterError` if `name` cannot be the name of an adapter."""
    if not name.strip() or not name.isprintable() or "/" in name or "\\" in name:
        raise AdapterError(f"{name!r} is no name for an adapter: expected printable characters, without slashes")


class AdapterSnapshot:
    """The adapters that are loaded into some models. Take a new one after adapters were loaded or removed.

    Attributes:
        models: component -> model.
        banks: component -> bank, for models that have adapters or slots.
        adapters: name -> adapter, in the order of loading.
    """

    def __init__(self, models: Mapping[str, nn.Module], *, qualified: bool = True) -> None:
        """
        Args:
            models: component -> model.
            qualified: whether prefixes of module paths start with the name of a component.
        """
        self.models = models
        self.banks: dict[str, Bank] = {}
        found: dict[str, dict[str, Adapter]] = {}
        for component, model in models.items():
            bank = bank_of(model)
            if bank is not None:
                if not is_held_elsewhere(model):
                    # Layers may have been replaced since the last call of the model.
                    bank.find_layers(model)
                self.banks[component] = bank
                for name, adapter in bank.adapters.items():
                    found.setdefault(name, {})[component] = adapter
        self.adapters = {name: LoadedAdapter(name, components) for name, components in found.items()}
        self._qualified = qualified

    def __getitem__(self, name: str) -> LoadedAdapter:
        if name not in self.adapters:
            raise AdapterError(f"no adapter {name!r}; loaded are {', '.join(self.adapters) or 'none'}")
        return self.adapters[name]

    def __str__(self) -> str:
        """Return a table of all adapters."""
        header = ("name", "types", "components", "rank", "dtype", "size", "active", "scale")
        rows = [header, *map(self._row, self.adapters.values())]
        if len(rows) == 1:
            return "no adapters"
        widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
        return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)

    @property
    def line(self) -> str:
        """All adapters in one short line."""
        named = [
            f"{name} {_short(adapter.strength)}" if adapter.active else f"({name})"
            for name, adapter in self.adapters.items()
        ]
        more = [f"... {len(named) - _MOST_NAMED} more"] if len(named) > _MOST_NAMED else []
        return f"<Adapters: {', '.join([*named[:_MOST_NAMED], *more]) or 'none'}>"

    @property
    def active(self) -> dict[str, Strength]:
        """Name -> strength of every active adapter, as it was set."""
        return {name: adapter.strength for name, adapter in self.adapters.items() if adapter.active}

    def active_without(self, names: Iterable[str]) -> dict[str, Strength]:
        """Return the active adapters but for `names`, which must be loaded."""
        leaving = {self[name].name for name in names}
        return {name: strength for name, strength in self.active.items() if name not in leaving}

    @cached_property
    def merged(self) -> list[str]:
        """Names of the adapters that are merged into the weights."""
        merged = {name for bank in self.banks.values() for name in bank.merged}
        return [name for name in self.adapters if name in merged]

    @property
    def undo_bytes(self) -> int:
        """Bytes of memory that are kept to undo merges."""
        return sum(way.nbytes for bank in self.banks.values() for way in bank.undo)

    @property
    def running(self) -> list[str]:
        """Names of the active adapters that are not merged."""
        return [name for name in self.active if name not in self.merged]

    def refuse_merged(self, action: str) -> None:
        """Raise `AdapterError` if any adapter is merged."""
        if self.merged:
            raise AdapterError(f"{action}: {', '.join(self.merged)} is merged into the weights; call unmerge() first")

    def free_name(self) -> str:
        """Return a name that is not in use, for an adapter whose source has none."""
        names = (f"default_{number}" for number in range(len(self.adapters) + 1))
        return next(name for name in names if name not in self.adapters)

    def refuse_name(self, name: str) -> None:
        """Raise `AdapterError` if a new adapter cannot be called `name`."""
        check_name(name)
        if name in self.adapters:
            raise AdapterError(f"adapter {name!r} exists already; remove it first or pass another name=")

    def resolve(self, adapters: Chosen) -> tuple[dict[str, Strength], dict[str, dict[str, LayerStrengths]]]:
        """Return the chosen adapters as name -> strength, and as name -> component -> strengths of the layers.

        Raises:
            AdapterError: an unknown name, or a strength that does not suit its adapter.
        """
        adapters = [adapters] if isinstance(adapters, str) else adapters
        wanted: dict[str, Strength] = dict(adapters) if isinstance(adapters, Mapping) else dict.fromkeys(adapters, 1.0)
        return wanted, {name: self.strengths(name, amount, self[name].components) for name, amount in wanted.items()}

    def strengths(
        self,
        name: str,
        strength: Strength,
        components: Mapping[str, Adapter],
        *,
        strict: bool = True,
        moment: Moment = START,
    ) -> dict[str, LayerStrengths]:
        """Return component -> strengths of the layers of one adapter.

        Args:
            name: name of the adapter in messages; the adapter need not be loaded yet.
            strength: strength as the user wrote it.
            components: component -> the adapter on that model.
            strict: whether every prefix has to match a layer.
            moment: the moment of a run at which schedules are read; defaults to the start.

        Raises:
            AdapterError: the strength is not a finite number, or with `strict` a prefix matches no layer.
        """
        if isinstance(strength, SampleStrengths):
            samples = [self.strengths(name, one, components, strict=strict, moment=moment) for one in strength]
            return {c: _by_sample([sample[c] for sample in samples], len(a.layers)) for c, a in components.items()}
        check_strength(name, strength)
        numbers = numbers_at(strength, moment)
        if not isinstance(numbers, Mapping):
            return dict.fromkeys(components, numbers)
        strengths: dict[str, LayerStrengths] = {}
        matched: set[str] = set()
        for component, adapter in components.items():
            paths = [f"{component}.{path}" for path in adapter.layers] if self._qualified else list(adapter.layers)
            found, hits = resolve_prefixes(numbers, paths)
            strengths[component] = _by_embedding(adapter, paths, numbers, found)
            matched |= hits
        missed = sorted(set(numbers) - matched - {""})
        if missed and strict and not (isinstance(strength, SharedStrengths) and self._suits(strength, matched)):
            names = [*map(repr, missed[:4]), *(["..."] if len(missed) > 4 else [])]
            raise AdapterError(
                f"adapter {name!r} has no layer under {', '.join(names)}; "
                f"it has layers under {', '.join(self._prefixes(components))}"
            )
        return strengths

    def set_active_(self, names: Iterable[str]) -> None:
        """Make exactly the adapters `names` act."""
        names = set(names)
        for name, adapter in self.adapters.items():
            for one in adapter.components.values():
                one.active = name in names
        self.refresh_()

    def refresh_(self) -> None:
        """Make every model run the adapters that are active now; see `attach.refresh_`."""
        for component in self.banks:
            refresh_(self.models[component])

    def _suits(self, strength: SharedStrengths[Any], matched: set[str]) -> bool:
        """Return whether strengths that people share suit an adapter, although it has no layer under some prefixes.

        Another prefix has to match, and none may be of a denoiser that is not among the models.
        """
        others = (prefix for prefix in strength if prefix and not is_text_encoder(prefix.partition(".")[0]))
        return bool(matched or "" in strength) and {prefix.partition(".")[0] for prefix in others} <= set(self.models)

    def _prefixes(self, components: Mapping[str, Adapter]) -> list[str]:
        """Return prefixes of the adapter's layers, one module name long, for messages."""
        tops = {f"{component}.{path.split('.')[0]}" for component, a in components.items() for path in a.layers}
        return sorted(tops if self._qualified else {top.partition(".")[2] for top in tops})

    def _row(self, adapter: LoadedAdapter) -> tuple[str, ...]:
        """Return one row of the table."""
        ranks = adapter.ranks
        state = "merged" if adapter.name in self.merged else "yes" if adapter.active else "no"
        return (
            adapter.name,
            ",".join([*adapter.types, *(["tokens"] if adapter.learned else [])]),
            ", ".join(f"{name} {len(one.layers)}" for name, one in adapter.components.items()),
            str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]}-{ranks[-1]}" if ranks else "-",
            ",".join(str(dtype).removeprefix("torch.") for dtype in adapter.dtypes),
            f"{adapter.bytes / 2**20:.1f} MiB",
            state,
            _short(adapter.strength),
        )


def _by_embedding(adapter: Adapter, paths: Sequence[str], prefixes: Iterable[str], found: list[float]) -> list[float]:
    """Return the strengths of layers, with one for all names of an embedding: that of the longest prefix of any name.

    Args:
        paths: the layers' paths, as `prefixes` have them.
        found: the strengths by path.
    """
    layers = list(adapter.layers.items())
    if all(layer.twin_of is None for _, layer in layers):
        return found
    numbers = {path: number for number, (path, _) in enumerate(layers)}
    lengths = [max((len(p) for p in prefixes if not p or f"{path}.".startswith(f"{p}.")), default=-1) for path in paths]
    best = dict(numbers)
    for path, layer in layers:
        primary = layer.twin_of
        if primary is not None and layer.spec.kind == adapter.layers[primary].spec.kind == "embedding":
            best[primary] = max(best[primary], numbers[path], key=lambda number: lengths[number])
            best[path] = best[primary]
    return [found[best[path]] for path, _ in layers]


def _by_sample(strengths: Sequence[LayerStrengths], layers: int) -> list[list[float]]:
    """Return strengths of all samples in lists of the same length: 1, or the number of layers."""
    listed = any(isinstance(one, list) for one in strengths)
    return [one if isinstance(one, list) else [one] * (layers if listed else 1) for one in strengths]  # type: ignore[list-item]


def _short(strength: Strength) -> str:
    """Return a strength as text of bounded length."""
    text = str(strength)
    return text if len(text) <= _LONGEST_SCALE else f"{text[: _LONGEST_SCALE - 3]}..."
