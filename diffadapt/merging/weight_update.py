"""The arithmetic of merging: the weight with adapters in it, and bounds for the weight that it was before.

A merged weight is `W' = round(W + D)`, the sum taken in float32 (float64 for float64 weights) and rounded once. The way
back is a prediction `round(W' - D)`, right but for what rounding lost. What is kept of that at merging has to suit the
prediction that is made at unmerging, perhaps on another device, with other threads, of factors in another order: then D
has another last bit. So the prediction comes with bounds. Whatever order D is summed up in, it lies between them; an
element for which they round to different values is kept, too. There are few of those.

For sums of low-rank changes on weights of up to 32 bits (`LowRank`), rounding is monotone, so it is enough to bound D:
every entry of `up @ down` is off by at most `gamma |row of up| |column of down|` (Higham, "Accuracy and Stability of
Numerical Algorithms", section 3.1, with the inequality of Cauchy and Schwarz), which is one rank more in the product.
Anything else (`General`) is solved for W in float64, with a margin far above the errors of that and far below a unit
in the last place of the weight.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from diffadapt.merging.memory import Scratch
from diffadapt.runtime import compose
from diffadapt.runtime.adapter_layer import AdapterLayer, PreparedLayer
from diffadapt.types.adapter_type import Surroundings, Tensors

Layers: TypeAlias = tuple[AdapterLayer, ...]
"""The adapter layers that are merged into the weight of one layer."""

Fixed: TypeAlias = Mapping[int, Tensors]
"""Number of an adapter layer -> what was prepared with the help of the original weight, which the merged one cannot
give again (the norms of a DoRA)."""

_CHUNK_BYTES = 1 << 23
"""Bytes of a piece in `total`: what is computed of it should stay in the processor's cache."""
_LARGE = 1 << 14
_MOST_RANKS = 512
_MOST_STEPS = 40


class WeightUpdate(Protocol):
    """How adapter layers get into one base tensor and out again. Tensors are as the model stores them, contiguous, and
    cut into the `chunks` that are computed one by one."""

    def chunks(self) -> list[slice]:
        """Ranges of rows."""
        ...

    def merge(self, original: Tensor, rows: slice, out: Tensor) -> None:
        """Write `W'`.

        Args:
            out: where to, maybe into the original itself.
        """
        ...

    def settle(self, original: Tensor, merged: Tensor) -> bool:
        """Find out what `predict_` needs beside the merged weight; whether it can be done at all."""
        ...

    def predict_(self, weight: Tensor, rows: slice) -> None:
        """Make the original, up to rounding, of `W'`."""
        ...

    def bounds(self, merged: Tensor, rows: slice, scratch: Scratch) -> tuple[Tensor, Tensor]:
        """Every prediction, wherever it is made, is between these: where they are the same, it is that.

        Args:
            scratch: its numbers 1 and 2 may be used.
        """
        ...


@dataclass(frozen=True)
class LowRankUpdate:
    """Sums of low-rank changes: `scale * up @ down` over all of them.

    Attributes:
        up: (rows, rank).
        down: (rank, columns).
        total: the dtype in which the change is added.
    """

    up: Tensor
    down: Tensor
    scale: float
    total: torch.dtype

    @classmethod
    def of(cls, layers: Layers, like: Tensor, *, back: bool = False) -> "LowRankUpdate | None":
        """That of adapter layers on a base tensor `like` this one, or `None` if they are no such sum.

        Args:
            back: for `predict_`, which takes a float32 weight in float64.
        """
        total = wide_dtype(like)
        if back and like.dtype == torch.float32:
            total = torch.float64
        if like.ndim < 2 or any(
            not layer.is_additive or layer.adapter_type.is_prepared or layer.spec.groups > 1 for layer in layers
        ):
            return None
        if len(layers) == 1 and _rounds_once(like):
            layer = layers[0]
            factors = layer.adapter_type.as_low_rank(layer.tensors, layer.spec)
            own = [id(t) for t in layer.tensors.values() if (t.dtype, t.device) == (like.dtype, like.device)]
            # Those that are computed of others have been rounded.
            if factors is not None and all(id(factor) in own for factor in factors) and len(factors[0]) <= _MOST_RANKS:
                return cls(*_stored(layer, *factors), float(layer.gate), total)
        product, wide = _product_dtype(like, total), _widest(like)
        parts: list[tuple[Tensor, Tensor]] = []
        for layer in layers:
            # In float64, so that the factors too come out the same in whatever order they are computed.
            factors = layer.adapter_type.as_low_rank(_on(layer, wide, like.device), layer.spec)
            if factors is None:
                return None
            down, up = factors
            parts.append(_stored(layer, down.to(product), (up * layer.gate.to(up)).to(product)))
        ups, downs = zip(*parts, strict=True)
        return cls(torch.cat(ups, 1), torch.cat(downs), 1.0, total)

    def chunks(self) -> list[slice]:
        count = -(-len(self.up) * self.down.shape[1] * self.total.itemsize // _CHUNK_BYTES)
        rows = -(-len(self.up) // max(count, 1))
        return [slice(start, start + rows) for start in range(0, len(self.up), rows)]

    def merge(self, original: Tensor, rows: slice, out: Tensor) -> None:
        self._sum(original, self.scale, self.up[rows], self.down, out)

    def settle(self, original: Tensor, merged: Tensor) -> bool:
        return True

    def predict_(self, weight: Tensor, rows: slice) -> None:
        self._sum(weight, -self.scale, self.up[rows], self.down, weight)

    def bounds(self, merged: Tensor, rows: slice, scratch: Scratch) -> tuple[Tensor, Tensor]:
        low, high = scratch.like(merged, 1), scratch.like(merged, 2)
        up, more, less = self._with_slack
        for bound, down in ((low, more), (high, less)):
            self._sum(merged, -self.scale, up[rows], down, bound)
        return low, high

    @cached_property
    def _with_slack(self) -> tuple[Tensor, Tensor, Tensor]:
        """`up`, and `down` for the largest and for the least change that there can be: with one rank more."""
        # Four times the bound that the module's docstring names, for what is rounded beside the sum. A little more than
        # zero, since the sign of a zero is not to be relied on either.
        gamma = 2 * (self.up.shape[1] + 8) * torch.finfo(self.total).eps
        up = self.up.to(self.total).square().sum(1, keepdim=True).sqrt_().mul_(gamma).add_(2.0**-40)
        down = self.down.to(self.total).square().sum(0, keepdim=True).sqrt_().add_(2.0**-40)
        up, down = torch.cat([self.up, up.to(self.up.dtype)], 1), down.to(self.down.dtype)
        return up, torch.cat([self.down, down]), torch.cat([self.down, -down])

    def _sum(self, weight: Tensor, scale: float, up: Tensor, down: Tensor, out: Tensor) -> None:
        """Write `weight + scale * up @ down`: one addition in `total`, in whatever order the product is summed up.

        Args:
            out: where to, maybe the weight itself.
        """
        matrix, target = weight.flatten(1), out.flatten(1)
        if up.dtype == weight.dtype != self.total:
            torch.addmm(matrix, up, down, alpha=scale, out=target)
        else:
            change = torch.mm(up, down).to(self.total)
            target.copy_(matrix.to(self.total, copy=True).add_(change, alpha=scale))


class AnyUpdate:
    """Any adapter layers, by `compose.weight`."""

    def __init__(self, layers: Layers, fixed: Fixed | None = None, steps: int = 0) -> None:
        """
        Args:
            fixed, steps: what `settle` found out.
        """
        self.layers = layers
        self.fixed: dict[int, Tensors] = dict(fixed or {})
        self.steps = steps
        self._settled: Tensor | None = None

    def chunks(self) -> list[slice]:
        return [slice(None)]

    def merge(self, original: Tensor, rows: slice, out: Tensor) -> None:
        base = self._canonical_or_stored(original.to(wide_dtype(original)))
        ready = [compose.with_weight(layer, base) for layer in self.layers]
        own = base.data_ptr() != original.data_ptr()
        out.copy_(self._canonical_or_stored(compose.weight(ready, base, overwrite=own)))

    def settle(self, original: Tensor, merged: Tensor) -> bool:
        if original.dtype == torch.float64 or _widest(original) != torch.float64:
            return False
        wanted, bound = merged.double(), self._margin(merged) / 8
        ready = self._ready(original.double(), settling=True)
        is_sum = all(layer.is_additive for layer in self.layers)
        total = wanted
        for self.steps in range(1, _MOST_STEPS + 1):
            change = self._change(total, wanted, ready)
            total = total - change
            largest = change.abs().amax()
            if is_sum or largest <= bound:
                self._settled = total
                return bool(largest.isfinite())
        return False

    def predict_(self, weight: Tensor, rows: slice) -> None:
        weight.copy_(self._solved(weight))

    def bounds(self, merged: Tensor, rows: slice, scratch: Scratch) -> tuple[Tensor, Tensor]:
        original, margin = self._solved(merged) if self._settled is None else self._settled, self._margin(merged)
        return (original - margin).to(merged.dtype), (original + margin).to(merged.dtype)

    @staticmethod
    def _margin(merged: Tensor) -> Tensor:
        """Far above what float64 gets wrong, far below a weight's last digit."""
        digits = 30 if merged.element_size() < 4 else 43
        return merged.double().abs().amax() * 2.0**-digits

    def _solved(self, merged: Tensor) -> Tensor:
        """The W of `F(W) = W'`, by fixed-point steps: one for a sum, a few where F is near the identity."""
        total = wanted = merged.double()
        ready = self._ready(wanted)
        for _ in range(self.steps):
            total = total - self._change(total, wanted, ready)
        return total

    def _change(self, total: Tensor, wanted: Tensor, ready: Sequence[PreparedLayer]) -> Tensor:
        change = compose.weight(ready, self._canonical_or_stored(total)) - self._canonical_or_stored(wanted)
        return self._canonical_or_stored(compose.nearly_undone(ready, change))

    def _ready(self, weight: Tensor, *, settling: bool = False) -> list[PreparedLayer]:
        """Prepared in float64, with what is `fixed`; if `settling`, with the original weight, to find that out."""
        made: list[PreparedLayer] = []
        for number, layer in enumerate(self.layers):
            tensors: Tensors = _on(layer, torch.float64, weight.device)
            if number in self.fixed:
                tensors = {**tensors, **{n: t.to(weight.device) for n, t in self.fixed[number].items()}}
            else:
                used: list[Tensor] = []
                prepared = _prepared(layer, tensors, weight, used)
                if settling and used:
                    self.fixed[number] = {n: t for n, t in prepared.items() if n not in tensors}
                tensors = prepared
            made.append(PreparedLayer(layer, tensors, layer.gate.to(weight), torch.float64))
        return made

    def _canonical_or_stored(self, weight: Tensor) -> Tensor:
        """Canonical for stored, and the other way round."""
        return self.layers[0].spec.to_stored(weight)


def wide_dtype(weight: Tensor) -> torch.dtype:
    """The dtype to compute a merged weight in."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def weight_updates(layers: Layers, like: Tensor) -> tuple[WeightUpdate, WeightUpdate]:
    """The way in and the way back for a base tensor `like` this one."""
    forth = LowRankUpdate.of(layers, like)
    if forth is None:
        general = AnyUpdate(layers)
        return general, general
    back = LowRankUpdate.of(layers, like, back=True) if like.dtype == torch.float32 else forth
    return forth, back or forth


def _stored(layer: AdapterLayer, down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Factors in two dimensions, in the orientation that the layer stores: (rows, rank), (rank, columns)."""
    down = down.flatten(1)
    return (down.t(), up.t()) if layer.spec.transposed else (up, down)


def _on(layer: AdapterLayer, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    return {name: tensor.detach().to(device, dtype) for name, tensor in layer.tensors.items()}


def _prepared(layer: AdapterLayer, tensors: Tensors, weight: Tensor, used: list[Tensor]) -> Tensors:
    """What the type prepares; `used` gets the weight if it is needed for that."""

    def read() -> Tensor:
        used.append(layer.spec.to_stored(weight))
        return used[-1]

    return layer.adapter_type.prepare(tensors, layer.spec, Surroundings(layer.settings, layer.scale, read))


def _widest(like: Tensor) -> torch.dtype:
    return torch.float32 if like.device.type == "mps" else torch.float64


def _product_dtype(like: Tensor, total: torch.dtype) -> torch.dtype:
    """The dtype to multiply factors in: float32 products may be less than that (TF32, bfloat16), as settings allow."""
    if total == torch.float64 or like.device.type == "mps":
        return total
    return total if like.device.type == "cpu" and _multiplies_in_float32() else torch.float64


def _multiplies_in_float32() -> bool:
    # What is asked for is in too many settings, old and new, to be looked up.
    factor = torch.full((64, 64), 1 + 2.0**-12)
    return bool(torch.mm(factor, factor)[0, 0] > 64)


def _rounds_once(like: Tensor) -> bool:
    """Whether this processor takes bfloat16 products in float32, adds in float32, and rounds once: oneDNN does, which
    small ones are not left to."""
    return (
        like.dtype == torch.bfloat16
        and like.device.type == "cpu"
        and like.numel() >= _LARGE
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
        and _has_bfloat16()
    )


@cache
def _has_bfloat16() -> bool:
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
