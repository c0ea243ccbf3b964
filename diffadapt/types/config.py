"""What the settings of all adapter types have in common. Each type's own are in its file in `types/`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch

from diffadapt.errors import AdapterError
from diffadapt.types import patterns
from diffadapt.types.layer_spec import LayerSpec


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """Settings of every type.

    Attributes:
        target_modules: "all-linear", "all-conv", a regular expression for whole paths, or a list of path endings.
        exclude_modules: the same, taken out again.
        init: whether the adapter starts as one that changes nothing; `False` gives random tensors, for tests.
        dropout: probability, while training: elements of the adapter's input (of rotations: whole blocks) are zeroed.
        module_dropout: probability, while training, that a layer's adapter does nothing for one call.
        generator: draws the initial tensors; default a fresh one seeded with 0, never the global one.
    """

    target_modules: str | Sequence[str]
    exclude_modules: str | Sequence[str] = ()
    init: bool | str = True
    dropout: float = 0.0
    module_dropout: float = 0.0
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        for name in ("dropout", "module_dropout", "rank_dropout"):
            probability = getattr(self, name, 0.0)
            if not 0 <= probability < 1:
                raise AdapterError(f"{name} is {probability}, expected 0 <= {name} < 1")
        if self.init not in self._inits():
            known = ", ".join(map(repr, self._inits()))
            raise AdapterError(f"init is {self.init!r}; {type(self).__name__} knows {known}")

    def _inits(self) -> tuple[bool | str, ...]:
        return (True, False)

    @property
    def settings(self) -> dict[str, float]:
        """The type's numbers that are no tensors, see `AdapterType.settings`."""
        return {}

    def alpha_of(self) -> float | None:
        """Alpha of a layer; `None` for types without one."""
        return None

    def at(self, path: str) -> "AdapterConfig":
        """The settings of the layer at `path`, with what patterns say of it filled in."""
        return self

    def refuse_idle(self, specs: Mapping[str, LayerSpec]) -> None:
        """Raise `AdapterError` for a setting that has no effect on any of the layers, given by path."""


@dataclass(frozen=True, kw_only=True)
class RankedConfig(AdapterConfig):
    """Settings of types with a rank and an alpha.

    Attributes:
        rank: of the factors, at least 1.
        alpha: scale is `alpha / rank`; default the rank. Not zero: that adapter could not learn.
        rank_stabilized: scale `alpha / sqrt(rank)` (Kalajdzievski, arXiv 2312.03732).
        rank_pattern: other ranks, by layer: names or regular expressions for whole path components at the end of the
            path, with `^` for the whole path; the first that matches counts.
        alpha_pattern: other alphas, likewise.
        rank_dropout: probability, while training, that a component of the rank is left out.
        use_dora: also train the length of every row or column of the weight (Liu et al., arXiv 2402.09353).
        dora_axis: "output" for one length per output (the paper, PEFT, LyCORIS since 3.2); "input" for one per input
            (LyCORIS before, OneTrainer).
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
        super().__post_init__()
        for rank in (self.rank, *self.rank_pattern.values()):
            if rank < 1:
                raise AdapterError(f"rank is {rank}, expected at least 1")
        for alpha in (self.alpha, *self.alpha_pattern.values()):
            if alpha == 0:
                raise AdapterError("alpha is 0, which makes the scale 0: the adapter could not learn; leave it out")
        if self.dora_axis not in ("output", "input"):
            raise AdapterError(f"dora_axis is {self.dora_axis!r}, expected 'output' or 'input'")
        if self.dora_axis != "output" and not self.use_dora:
            raise AdapterError("dora_axis has no effect without use_dora=True")

    def alpha_of(self) -> float | None:
        """Alpha such that `alpha / rank` is the scale."""
        alpha = self.rank if self.alpha is None else self.alpha
        return alpha * self.rank**0.5 if self.rank_stabilized else float(alpha)

    def at(self, path: str) -> "RankedConfig":
        """The settings of the layer at `path`."""
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

    def refuse_idle(self, specs: Mapping[str, LayerSpec]) -> None:
        """Every pattern has to name a layer, and a Tucker core needs a kernel."""
        for name in ("rank_pattern", "alpha_pattern"):
            for pattern in getattr(self, name):
                if not any(patterns.matches(pattern, path) for path in specs):
                    raise AdapterError(f"{name}: {pattern!r} names none of the {len(specs)} adapted layers")
        if getattr(self, "use_tucker", False) and not any(layer.has_kernel for layer in specs.values()):
            raise AdapterError("use_tucker has no effect: none of the adapted layers has a kernel larger than one")
