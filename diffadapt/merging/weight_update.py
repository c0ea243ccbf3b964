"""The arithmetic of merging: compute a merged weight, and predict the original from it, with bounds.

A merged weight is `W' = round(W + D)`; the sum is computed in float32 (float64 for float64 weights) and rounded once.
The original is predicted as `round(W' - D)`, which is right except for what rounding lost. The corrections are recorded
at merging and must suit the prediction at unmerging, which may run on another device, with another number of threads,
or on factors in another order. D then differs in its last bits. So merging computes bounds that hold for every order of
summation, and elements for which the bounds round to different values are stored as well. They are few.

For sums of low-rank changes on weights of up to 32 bits (`LowRankUpdate`) it is enough to bound D, because rounding is
monotone. Every entry of `up @ down` is off by at most `gamma |row of up| |column of down|` (Higham, "Accuracy and
Stability of Numerical Algorithms", section 3.1, with the Cauchy-Schwarz inequality), which takes one more rank in the
product. For everything else (`AnyUpdate`) the equation is solved for W in float64, with a margin far above the errors
of float64 and far below a unit in the last place of the weight.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

from diffadapt.merging.memory import Scratch
from diffadapt.runtime import compose
from diffadapt.runtime.adapter_layer import AdapterLayer, TermOf
from diffadapt.runtime.prepared_layer import PreparedLayer
from diffadapt.types.adapter_type import Tensors
from diffadapt.types.tensor_ops import converted

Layers: TypeAlias = tuple[AdapterLayer, ...]
"""The adapter layers that are merged into the weight of one layer."""

Recorded: TypeAlias = Mapping[int, Tensors]
"""Index of an adapter layer -> its prepared tensors that depend on the original weight and cannot be computed from the
merged one (the norms of a DoRA)."""

_CHUNK_BYTES = 1 << 23
"""Bytes of a chunk in the dtype `total`; its intermediate results should stay in the processor's cache."""
_LARGE = 1 << 14
_MAX_RANK = 512
_MAX_ITERATIONS = 40


class WeightUpdate(Protocol):
    """The computation that merges adapter layers into one base tensor, and its inverse.

    Tensors are contiguous and in the layout that the model stores, and are processed in `chunks` of rows.
    """

    def chunks(self) -> list[slice]:
        """Return the ranges of rows."""
        ...

    def merge(self, original: Tensor, rows: slice, out: Tensor) -> None:
        """Write the merged weight `W'` to `out`, which may be `original`."""
        ...

    def record(self, original: Tensor, merged: Tensor) -> bool:
        """Record what `predict_` needs besides the merged weight. Return whether it can predict at all."""
        ...

    def predict_(self, weight: Tensor, rows: slice) -> None:
        """Replace the merged weight with the original, up to rounding."""
        ...

    def bounds(self, merged: Tensor, rows: slice, scratch: Scratch) -> tuple[Tensor, Tensor]:
        """Return a lower and an upper bound of every prediction, on whatever machine it is computed.

        Where the two are equal, the prediction is equal to them. The buffers 1 and 2 of `scratch` may be overwritten.
        """
        ...


@dataclass(frozen=True)
class LowRankUpdate:
    """A sum of low-rank changes, `scale * up @ down`.

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
        """Return the update by `layers` of a base tensor like `like`, or `None` if they are not such a sum.

        Args:
            back: for `predict_`, which computes float32 weights in float64.
        """
        total = merge_dtype(like)
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
            # Factors that were computed from other tensors have been rounded.
            if factors is not None and all(id(factor) in own for factor in factors) and len(factors[0]) <= _MAX_RANK:
                return cls(*_stored_factors(layer, *factors), float(layer.gate), total)
        product_dtype, factor_dtype = _product_dtype(like, total), _largest_dtype(like)
        pairs: list[tuple[Tensor, Tensor]] = []
        for layer in layers:
            # In float64, so that computed factors too are the same for every order of their ranks.
            factors = layer.adapter_type.as_low_rank(_cast(layer, factor_dtype, like.device), layer.spec)
            if factors is None:
                return None
            down, up = factors
            pairs.append(_stored_factors(layer, down.to(product_dtype), (up * layer.gate.to(up)).to(product_dtype)))
        ups, downs = zip(*pairs, strict=True)
        return cls(torch.cat(ups, 1), torch.cat(downs), 1.0, total)

    def chunks(self) -> list[slice]:
        count = -(-len(self.up) * self.down.shape[1] * self.total.itemsize // _CHUNK_BYTES)
        rows = -(-len(self.up) // max(count, 1))
        return [slice(start, start + rows) for start in range(0, len(self.up), rows)]

    def merge(self, original: Tensor, rows: slice, out: Tensor) -> None:
        self._add(original, self.scale, self.up[rows], self.down, out)

    def record(self, original: Tensor, merged: Tensor) -> bool:
        return True

    def predict_(self, weight: Tensor, rows: slice) -> None:
        self._add(weight, -self.scale, self.up[rows], self.down, weight)

    def bounds(self, merged: Tensor, rows: slice, scratch: Scratch) -> tuple[Tensor, Tensor]:
        low, high = scratch.like(merged, 1), scratch.like(merged, 2)
        up, more, less = self._with_slack
        for bound, down in ((low, more), (high, less)):
            self._add(merged, -self.scale, up[rows], down, bound)
        return low, high

    @cached_property
    def _with_slack(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return `up`, and `down` for the largest and for the smallest possible change, with one more rank."""
        # Four times the bound in the module's docstring, for what is rounded outside the sum. The slack is never zero,
        # because the sign of a zero may differ as well.
        gamma = 2 * (self.up.shape[1] + 8) * torch.finfo(self.total).eps
        up = self.up.to(self.total).square().sum(1, keepdim=True).sqrt_().mul_(gamma).add_(2.0**-40)
        down = self.down.to(self.total).square().sum(0, keepdim=True).sqrt_().add_(2.0**-40)
        up, down = torch.cat([self.up, up.to(self.up.dtype)], 1), down.to(self.down.dtype)
        return up, torch.cat([self.down, down]), torch.cat([self.down, -down])

    def _add(self, weight: Tensor, scale: float, up: Tensor, down: Tensor, out: Tensor) -> None:
        """Write `weight + scale * up @ down`, added once in the dtype `total`, to `out`, which may be `weight`."""
        matrix, target = weight.flatten(1), out.flatten(1)
        if up.dtype == weight.dtype != self.total:
            torch.addmm(matrix, up, down, alpha=scale, out=target)
        else:
            change = torch.mm(up, down).to(self.total)
            target.copy_(matrix.to(self.total, copy=True).add_(change, alpha=scale))


class AnyUpdate:
    """The update by adapter layers of any type, computed with `compose.weight`."""

    def __init__(
        self,
        layers: Layers,
        recorded: Recorded | None = None,
        iterations: int = 0,
        *,
        term_of: TermOf | None = None,
    ) -> None:
        """
        Args:
            recorded, iterations: what `record` found when the weight was merged: tensors, and the number of iterations
                that `predict_` takes.
            term_of: see `AdapterLayer.prepare`; needed only to merge and to record.
        """
        self.layers = layers
        self._term_of = term_of
        self.recorded: dict[int, Tensors] = dict(recorded or {})
        self.iterations = iterations
        self._solution: Tensor | None = None

    def chunks(self) -> list[slice]:
        return [slice(None)]

    def merge(self, original: Tensor, rows: slice, out: Tensor) -> None:
        base = self._to_canonical(original.to(merge_dtype(original)))
        prepared = [compose.prepare_for_weight(layer, base, self._term_of) for layer in self.layers]
        is_copy = base.data_ptr() != original.data_ptr()
        out.copy_(self._to_stored(compose.weight(prepared, base, overwrite=is_copy)))

    def record(self, original: Tensor, merged: Tensor) -> bool:
        if original.dtype == torch.float64 or _largest_dtype(original) != torch.float64:
            return False
        wanted, bound = merged.double(), self._margin(merged) / 8
        prepared = self._prepare(original.double(), recording=True)
        is_sum = all(layer.is_additive for layer in self.layers)
        estimate = wanted
        for self.iterations in range(1, _MAX_ITERATIONS + 1):
            error = self._error(estimate, wanted, prepared)
            estimate = estimate - error
            largest = error.abs().amax()
            if is_sum or largest <= bound:
                self._solution = estimate
                return bool(largest.isfinite())
        return False

    def predict_(self, weight: Tensor, rows: slice) -> None:
        weight.copy_(self._solve(weight))

    def bounds(self, merged: Tensor, rows: slice, scratch: Scratch) -> tuple[Tensor, Tensor]:
        original, margin = self._solve(merged) if self._solution is None else self._solution, self._margin(merged)
        return (original - margin).to(merged.dtype), (original + margin).to(merged.dtype)

    @staticmethod
    def _margin(merged: Tensor) -> Tensor:
        """Return a number far above the errors of float64 and far below the last digit of the weight."""
        digits = 30 if merged.element_size() < 4 else 43
        return merged.double().abs().amax() * 2.0**-digits

    def _solve(self, merged: Tensor) -> Tensor:
        """Solve `F(W) = W'` for W by fixed-point iteration: one step for a sum, a few where F is near the identity."""
        estimate = wanted = merged.double()
        prepared = self._prepare(wanted)
        for _ in range(self.iterations):
            estimate = estimate - self._error(estimate, wanted, prepared)
        return estimate

    def _error(self, estimate: Tensor, wanted: Tensor, prepared: Sequence[PreparedLayer]) -> Tensor:
        """Return the approximate difference of `estimate` to the weight that merging turns into `wanted`."""
        change = compose.weight(prepared, self._to_canonical(estimate)) - self._to_canonical(wanted)
        return self._to_stored(compose.base_change(prepared, change))

    def _prepare(self, weight: Tensor, *, recording: bool = False) -> list[PreparedLayer]:
        """Return the layers prepared in float64, with the recorded tensors where there are any.

        Args:
            weight: the merged weight, or the original one if `recording`.
            recording: record the prepared tensors that depend on the weight.
        """
        layers: list[PreparedLayer] = []
        for index, layer in enumerate(self.layers):
            tensors: Tensors = _cast(layer, torch.float64, weight.device)
            if index in self.recorded:
                tensors = {**tensors, **{n: t.to(weight.device) for n, t in self.recorded[index].items()}}
            else:
                prepared, reads_weight = _prepared_tensors(layer, tensors, weight, self._term_of)
                if recording and reads_weight:
                    self.recorded[index] = {n: t for n, t in prepared.items() if n not in tensors}
                tensors = prepared
            layers.append(PreparedLayer(layer, tensors, layer.gate.to(weight), torch.float64))
        return layers

    def _to_canonical(self, stored: Tensor) -> Tensor:
        # Layers store the canonical weight or its transpose, so the conversion is its own inverse.
        return self.layers[0].spec.to_stored(stored)

    def _to_stored(self, canonical: Tensor) -> Tensor:
        return self.layers[0].spec.to_stored(canonical)


class Updates(NamedTuple):
    """One update in two forms.

    Attributes:
        forth: for `merge`.
        back: for the way back: `record`, `predict_` and `bounds`; its `chunks` suit both.
    """

    forth: WeightUpdate
    back: WeightUpdate


def weight_updates(layers: Layers, like: Tensor, term_of: TermOf | None = None) -> Updates:
    """Return the update by `layers` of a base tensor with the shape, dtype and device of `like`.

    Args:
        term_of: see `AdapterLayer.prepare`.
    """
    forth = LowRankUpdate.of(layers, like)
    if forth is None:
        update = AnyUpdate(layers, term_of=term_of)
        return Updates(update, update)
    back = LowRankUpdate.of(layers, like, back=True) if like.dtype == torch.float32 else forth
    return Updates(forth, back or forth)


def merge_dtype(weight: Tensor) -> torch.dtype:
    """Return the dtype in which the merged weight is computed before it is rounded to the dtype of `weight`."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def _stored_factors(layer: AdapterLayer, down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Return factors (rows, rank) and (rank, columns) of the change in the layout that the layer stores."""
    down = down.flatten(1)
    return (down.t(), up.t()) if layer.spec.transposed else (up, down)


def _cast(layer: AdapterLayer, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    return {name: converted(tensor.detach(), dtype, device) for name, tensor in layer.tensors.items()}


def _prepared_tensors(
    layer: AdapterLayer, tensors: Tensors, weight: Tensor, term_of: TermOf | None
) -> tuple[Tensors, bool]:
    """Return the prepared tensors, and whether they depend on the weight, which is in the layout the model stores."""
    reads: list[Tensor] = []

    def read() -> Tensor:
        reads.append(layer.spec.to_stored(weight))
        return reads[-1]

    prepared = layer.adapter_type.prepare(tensors, layer.spec, layer.surroundings(read, term_of))
    return prepared, bool(reads)


def _largest_dtype(like: Tensor) -> torch.dtype:
    """Return the largest floating-point dtype that the device has."""
    return torch.float32 if like.device.type == "mps" else torch.float64


def _product_dtype(like: Tensor, total: torch.dtype) -> torch.dtype:
    """Return the dtype in which to multiply factors.

    Depending on settings, float32 products are computed with less precision (TF32, bfloat16).
    """
    if total == torch.float64 or like.device.type == "mps":
        return total
    return total if like.device.type == "cpu" and _multiplies_in_float32() else torch.float64


def _multiplies_in_float32() -> bool:
    # Measured, because too many settings, old and new, ask for less.
    factor = torch.full((64, 64), 1 + 2.0**-12, dtype=torch.float32)
    return bool(torch.mm(factor, factor)[0, 0] > 64)


def _rounds_once(like: Tensor) -> bool:
    """Return whether `addmm` on `like` multiplies bfloat16 in float32, adds in float32 and rounds once.

    oneDNN does; small products are not left to it.
    """
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
