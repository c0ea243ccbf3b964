"""The settings that adapter types have in common. Each type's own settings are in the module of the type."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from numbers import Integral, Real
from types import NoneType
from typing import Literal, get_args, get_origin

import torch

from diffadapt.errors import AdapterError
from diffadapt.types import patterns
from diffadapt.types.layer_spec import LayerSpec


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """Settings of a new adapter that all adapter types have.

    Attributes:
        target_modules: the layers to adapt: "all-linear", "all-conv", a regular expression for whole module paths, or
            one path ending ("to_q") or a list of them. "all-linear" leaves output layers alone, and the vision towers
            of text encoders.
        exclude_modules: layers to leave out of `target_modules`, specified in the same way.
        layers_to_transform: the numbers of the blocks to adapt; `None` for all. A block's number is the first number
            in the path of a layer.
        layers_pattern: the names of the lists of blocks that `layers_to_transform` counts in, such as
            "single_transformer_blocks"; defaults to any.
        target_parameters: bare parameters to adapt, too, by their names or path endings ("experts.gate_up_proj"): the
            weights of fused experts, (experts, a, b), or tables, (a, b). Only LoRA has them.
        ensure_weight_tying: whether layers with the same weight (an embedding and the output layer of a language
            model) get one set of parameters, whichever of them `target_modules` names. Without it, an adapter on one of
            them does not act on the other. Two names of one embedding are always the same layer.
        init: whether the adapter starts without an effect. With `False` all its tensors are random, for tests.
        dropout: probability that training zeroes an element of the adapter's input (for rotations: a whole block).
        module_dropout: probability that training skips an adapter layer for one call.
        generator: the random generator for the initial tensors. Defaults to a new one with seed 0; the global generator
            is never used.

    Raises:
        AdapterError: a value is out of range or has no effect.
    """

    target_modules: str | Sequence[str] = ()
    exclude_modules: str | Sequence[str] = ()
    layers_to_transform: int | Sequence[int] | None = None
    layers_pattern: str | Sequence[str] = ()
    target_parameters: Sequence[str] = ()
    ensure_weight_tying: bool = False
    init: bool | str = True
    dropout: float = 0.0
    module_dropout: float = 0.0
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        for name in ("dropout", "module_dropout", "rank_dropout"):
            probability = getattr(self, name, 0.0)
            if not _is_number(probability) or not 0 <= probability < 1:
                raise AdapterError(f"{name} is {probability!r}, expected 0 <= {name} < 1")
        self._refuse_wrong_kinds()
        if self.init not in self._inits():
            known = ", ".join(map(repr, self._inits()))
            raise AdapterError(f"init is {self.init!r}; {type(self).__name__} knows {known}")
        for name in ("target_modules", "exclude_modules"):
            given: object = getattr(self, name)
            if given is not None and not isinstance(given, Iterable):
                raise AdapterError(f"{name} is {given!r}, expected names of layers, such as 'to_q' or ['to_q', 'to_v']")
        if not self.target_modules and self._needs_targets:
            raise AdapterError('target_modules is missing: name the layers to adapt, or pass "all-linear"')
        for block in self.block_numbers or ():
            refuse_unless_whole("layers_to_transform", block, least=0)
        if self.layers_pattern and self.layers_to_transform is None:
            raise AdapterError("layers_pattern has no effect without layers_to_transform")

    def _refuse_wrong_kinds(self) -> None:
        """Raise `AdapterError` if a setting is no number, truth value or mapping although its annotation says so."""
        for entry in fields(self):
            value: object = getattr(self, entry.name)
            kinds = set(get_args(entry.type)) or {entry.type}
            if (value is None and NoneType in kinds) or (bool in kinds and str in kinds):
                continue
            if bool in kinds and not isinstance(value, bool):
                raise AdapterError(f"{entry.name} is {value!r}, expected True or False")
            if kinds <= {float, int, NoneType} and not _is_number(value):
                raise AdapterError(f"{entry.name} is {value!r}, expected a finite number")
            if kinds <= {int, NoneType} and not isinstance(value, Integral):
                raise AdapterError(f"{entry.name} is {value!r}, expected a whole number")
            if get_origin(entry.type) is Mapping and not isinstance(value, Mapping):
                raise AdapterError(f"{entry.name} is {value!r}, expected a dictionary")

    @property
    def block_numbers(self) -> tuple[int, ...] | None:
        """The numbers in `layers_to_transform`."""
        numbers = self.layers_to_transform
        return numbers if numbers is None else tuple(numbers) if isinstance(numbers, Sequence) else (numbers,)

    @property
    def _needs_targets(self) -> bool:
        """Whether `target_modules` has to name a layer."""
        return not self.target_parameters

    def _inits(self) -> tuple[bool | str, ...]:
        return (True, False)

    @property
    def settings(self) -> dict[str, float]:
        """The numbers of the adapter type that are not tensors; see `AdapterType.settings`."""
        return {}

    def alpha_of(self) -> float | None:
        """Return the alpha of every adapter layer, or `None` if the type has no alpha."""
        return None

    def at(self, path: str) -> "AdapterConfig":
        """Return the settings of the layer at `path`, with the values that patterns give it."""
        return self

    def refuse_idle(self, specs: Mapping[str, LayerSpec]) -> None:
        """Raise `AdapterError` if a setting has no effect on any of the layers, given as path -> spec."""


@dataclass(frozen=True, kw_only=True)
class SizedConfig(AdapterConfig):
    """Settings of adapter types with a rank, and without an alpha.

    Attributes:
        rank: the rank of the factors, at least 1.
        rank_pattern: the ranks of layers that differ from `rank`, with keys as in `RankedConfig`.
    """

    rank: int
    rank_pattern: Mapping[str, int] = field(default_factory=dict[str, int])

    def __post_init__(self) -> None:
        refuse_unless_whole("rank", self.rank)
        super().__post_init__()
        for rank in self.rank_pattern.values():
            refuse_unless_whole("rank", rank)

    def at(self, path: str) -> "SizedConfig":
        """Return the settings of the layer at `path`, with the rank that a pattern gives it."""
        rank = patterns.value(self.rank_pattern, path)
        return self if rank is None else replace(self, rank=rank, rank_pattern={})

    def refuse_idle(self, specs: Mapping[str, LayerSpec]) -> None:
        """Raise `AdapterError` if a pattern names no layer."""
        for pattern in self.rank_pattern:
            if not any(patterns.matches(pattern, path) for path in specs):
                raise AdapterError(f"rank_pattern: {pattern!r} names none of the {len(specs)} adapted layers")


@dataclass(frozen=True, kw_only=True)
class RankedConfig(AdapterConfig):
    """Settings of adapter types with a rank and an alpha.

    Attributes:
        rank: the rank of the factors, at least 1.
        alpha: the numerator of the scale `alpha / rank`. Defaults to the rank. It must not be 0, because such an
            adapter could not learn.
        rank_stabilized: whether the scale is `alpha / sqrt(rank)` instead (Kalajdzievski, arXiv 2312.03732).
        rank_pattern: the ranks of layers that differ from `rank`. A key is a name or a regular expression that matches
            whole path components at the end of a path or, with a leading `^`, the whole path. The first match counts.
        alpha_pattern: the alphas of layers that differ from `alpha`, with keys as in `rank_pattern`.
        rank_dropout: probability that training leaves out a component of the rank.
        use_dora: whether to train the magnitude of every row or column of the weight, too (Liu et al., "DoRA",
            arXiv 2402.09353).
        dora_axis: "output" for one magnitude per output, as in the paper, in PEFT and in LyCORIS since 3.2; "input" for
            one per input, as in LyCORIS before 3.2 and in OneTrainer.
    """

    rank: int
    alpha: float | None = None
    rank_stabilized: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict[str, int])
    alpha_pattern: Mapping[str, float] = field(default_factory=dict[str, float])
    rank_dropout: float = 0.0
    use_dora: bool = False
    dora_axis: Literal["output", "input"] = "output"

    def __post_init__(self) -> None:
        refuse_unless_whole("rank", self.rank)
        super().__post_init__()
        for rank in self.rank_pattern.values():
            refuse_unless_whole("rank", rank)
        for alpha in (self.alpha, *self.alpha_pattern.values()):
            if alpha is not None and not _is_number(alpha):
                raise AdapterError(f"alpha is {alpha!r}, expected a finite number")
            if alpha == 0:
                raise AdapterError("alpha is 0, which makes the scale 0: the adapter could not learn; leave it out")
        if self.dora_axis not in ("output", "input"):
            raise AdapterError(f"dora_axis is {self.dora_axis!r}, expected 'output' or 'input'")
        if self.dora_axis != "output" and not self.use_dora:
            raise AdapterError("dora_axis has no effect without use_dora=True")

    def alpha_of(self) -> float | None:
        """Return the alpha for which `alpha / rank` is the scale."""
        alpha = self.rank if self.alpha is None else self.alpha
        return alpha * self.rank**0.5 if self.rank_stabilized else float(alpha)

    def at(self, path: str) -> "RankedConfig":
        """Return the settings of the layer at `path`, with the rank and alpha that patterns give it."""
        rank, alpha = patterns.value(self.rank_pattern, path), patterns.value(self.alpha_pattern, path)
        if rank is None and alpha is None:
            return self
        return replace(
            self,
            rank=self.rank if rank is None else rank,
            alpha=self.alpha if alpha is None else alpha,
            rank_pattern={},
            alpha_pattern={},
        )

    def most_rank(self, spec: LayerSpec) -> int | None:
        """Return the largest rank that means anything on a layer, or `None` if there is no such limit."""
        rows, *columns = spec.weight_shape
        return max(rows, math.prod(columns))

    def refuse_idle(self, specs: Mapping[str, LayerSpec]) -> None:
        """Raise `AdapterError` if a pattern names no layer, if a rank is larger than all its layers, or if no layer has
        a kernel for a Tucker core.
        """
        for name in ("rank_pattern", "alpha_pattern"):
            for pattern in getattr(self, name):
                if not any(patterns.matches(pattern, path) for path in specs):
                    raise AdapterError(f"{name}: {pattern!r} names none of the {len(specs)} adapted layers")
        largest: dict[int, tuple[int, str]] = {}
        for path, spec in specs.items():
            rank, most = self.at(path).rank, self.most_rank(spec)
            if most is not None:
                largest[rank] = max(largest.get(rank, (0, "")), (most, path))
        for rank, (most, path) in largest.items():
            # Among the layers of a model there may be tiny ones, on which the rank of all others does no harm.
            if rank > most:
                raise AdapterError(
                    f"{path}: rank is {rank}, expected at most {most} for a weight of shape "
                    f"{specs[path].weight_shape}, and no adapted layer with this rank is larger"
                )
        if getattr(self, "use_tucker", False) and not any(spec.has_kernel for spec in specs.values()):
            raise AdapterError("use_tucker has no effect: none of the adapted layers has a kernel larger than one")


def refuse_unless_whole(name: str, value: object, least: int = 1) -> None:
    """Raise `AdapterError` if the setting `name` is no whole number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise AdapterError(f"{name} is {value!r}, expected a whole number, at least {least}")
    if value < least:
        raise AdapterError(f"{name} is {value}, expected at least {least}")


def _is_number(value: object) -> bool:
    return not isinstance(value, bool) and isinstance(value, Real) and math.isfinite(value)
