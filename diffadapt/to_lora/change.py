"""What adapters change together in one layer."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from diffadapt.errors import AdapterError
from diffadapt.runtime import compose
from diffadapt.runtime.adapter_layer import AdapterLayer, PreparedLayer
from diffadapt.runtime.base_weights import decoded, resting_tensor
from diffadapt.to_lora.factors import Factors, joined
from diffadapt.types.layer_spec import LayerSpec
from diffadapt.types.lora import LORA

_ROUNDING = 8  # A change is known to so many units in the last place.


@dataclass(frozen=True)
class Change:
    """What adapters change in one layer, in the wide dtype.

    Attributes:
        whole: the change: factors, or a tensor (groups, out / groups, in / groups x kernel).
        bias: change of the bias, or `None`.
        dtype: of the adapters it comes from; of several, one that holds them all.
        reference: Frobenius norm of what the change is a small difference of (the base weight, other changes).
    """

    spec: LayerSpec
    whole: Factors | Tensor
    bias: Tensor | None
    dtype: torch.dtype
    reference: float = 0.0

    @property
    def factors(self) -> Factors | None:
        """The change as factors, if it is known as such."""
        return self.whole if isinstance(self.whole, Factors) else None

    @property
    def dense(self) -> Tensor:
        """The change as one matrix per group."""
        return self.whole.up @ self.whole.down if isinstance(self.whole, Factors) else self.whole

    @functools.cached_property
    def norm(self) -> float:
        """Frobenius norm."""
        return self.whole.norm() if isinstance(self.whole, Factors) else float(torch.linalg.vector_norm(self.whole))

    @property
    def noise(self) -> float:
        """Frobenius norm of what rounding may have put into the change: less than this is nothing."""
        eps = torch.finfo(torch.promote_types(self.dtype, torch.float32)).eps
        terms = math.prod(float(torch.linalg.vector_norm(factor)) for factor in self.factors or ())
        return _ROUNDING * eps * (self.reference + (terms if self.factors else self.norm))

    def distance(self, factors: Factors) -> float:
        """Frobenius norm of the difference to a product."""
        if isinstance(self.whole, Factors):
            return joined([self.whole, Factors(-factors.up, factors.down)]).norm()
        return float(torch.linalg.vector_norm(self.whole - factors.up @ factors.down))


@dataclass(frozen=True)
class WeightedLayer:
    """An adapter layer with a strength.

    Attributes:
        originals: `id` of a base tensor -> what gives its content before merging, see `Bank.ways`.
    """

    layer: AdapterLayer
    strength: float
    originals: Mapping[int, Callable[[], Tensor]]

    @property
    def dtype(self) -> torch.dtype:
        """Of the adapter's parameters."""
        return next(iter(self.layer.parameters())).dtype

    @property
    def reads_base(self) -> bool:
        """Whether the change depends on the base weight."""
        return not self.layer.is_additive or self.layer.adapter_type.is_prepared

    def base(self, name: str) -> Tensor | None:
        """The layer's own weight or bias as it is without any adapter, or `None` if it has none."""
        tensor = resting_tensor(self.layer.host, name)
        if tensor is None:
            return None
        return self.originals[id(tensor)]() if id(tensor) in self.originals else decoded(self.layer.host, name)

    def ready(self, weight: Tensor) -> PreparedLayer:
        """As `compose.with_weight`, with this strength in place of the present one."""
        gate = torch.tensor(self.layer.scale * self.strength, dtype=torch.float64).to(weight)
        return compose.with_weight(self.layer, weight)._replace(gate=gate)


Sources: TypeAlias = Mapping[str, Mapping[str, Sequence[WeightedLayer]]]
"""component -> module path -> the adapters there that take part."""


def change_of(parts: Sequence[WeightedLayer]) -> Change:
    """What adapters on one layer change together."""
    spec = parts[0].layer.spec
    if spec.kind not in LORA.layers:
        raise AdapterError(f"a {spec.kind} cannot carry a LoRA; give the layer a strength of 0 to leave it out")
    dtype = functools.reduce(torch.promote_types, (part.dtype for part in parts))
    device = next(iter(parts[0].layer.parameters())).device
    wide = torch.float64 if device.type == "cpu" else torch.promote_types(dtype, torch.float32)
    weight = torch.zeros((), dtype=wide, device=device).expand(spec.weight_shape)
    reference = 0.0
    if any(part.reads_base for part in parts):
        stored = parts[0].base("weight")
        assert stored is not None
        weight = spec.to_stored(stored).to(weight)
        reference = float(torch.linalg.vector_norm(weight))
    ready = [part.ready(weight) for part in parts]
    factors = [_own_factors(r) for r in ready]
    known = [pair for pair in factors if pair is not None]
    if len(known) == len(ready):
        return Change(spec, joined(known), _bias_change(parts[0], ready, weight), dtype)
    change = compose.weight(ready, weight) - weight
    groups = change.reshape(spec.groups, spec.out_features // spec.groups, spec.fan_in)
    return Change(spec, groups, _bias_change(parts[0], ready, weight), dtype, reference)


def _own_factors(ready: PreparedLayer) -> Factors | None:
    """The change of one adapter as factors, gate included, if its type knows them."""
    layer, spec = ready.layer, ready.layer.spec
    found = layer.adapter_type.as_low_rank(ready.tensors, spec) if layer.is_additive else None
    if found is None:
        return None
    down, up = spec._per_group(*found), found[1]
    return Factors(
        (up * ready.gate).reshape(spec.groups, spec.out_features // spec.groups, -1),
        down.reshape(spec.groups, -1, spec.fan_in),
    )


def _bias_change(part: WeightedLayer, ready: Sequence[PreparedLayer], like: Tensor) -> Tensor | None:
    stored = part.base("bias") if any(r.layer.adapter_type.gains_bias for r in ready) else None
    if not compose.changes_bias(((r.layer, r.tensors) for r in ready), stored is not None):
        return None
    bias = like.new_zeros(part.layer.spec.out_features) if stored is None else stored.to(like)
    return compose.bias(ready, bias) - bias


def refuse_infinite(change: Change) -> None:
    whole = change.whole if isinstance(change.whole, Factors) else (change.whole,)
    bias = () if change.bias is None else (change.bias,)
    if not all(tensor.isfinite().all() for tensor in (*whole, *bias)):
        raise AdapterError("the change has NaN or infinite values")
