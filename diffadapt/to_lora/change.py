"""The change that several adapters make together in one layer."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor

from diffadapt.errors import AdapterError
from diffadapt.runtime import compose
from diffadapt.runtime.adapter_layer import AdapterLayer
from diffadapt.runtime.prepared_layer import PreparedLayer
from diffadapt.to_lora.factors import Factors, joined
from diffadapt.types.layer_spec import LayerSpec
from diffadapt.types.lora import LORA
from diffadapt.weights import decoded
from diffadapt.weights.resting import resting_tensor

_ROUNDING = 8  # Rounding errors of a change, in units in the last place.


@dataclass(frozen=True)
class Change:
    """The change that adapters make in one layer: in float64 on a CPU, elsewhere in float32 (float64 for float64).

    Attributes:
        spec: the layer.
        value: the change of the weight, as factors or as a tensor (groups, out / groups, in / groups x kernel).
        bias: the change of the bias, (out,), or `None`.
        dtype: the promoted dtype of the adapters.
        reference: Frobenius norm of the tensors from which the change is computed as a small difference (the base
            weight, other changes); 0 if it is not.
    """

    spec: LayerSpec
    value: Factors | Tensor
    bias: Tensor | None
    dtype: torch.dtype
    reference: float = 0.0

    @property
    def factors(self) -> Factors | None:
        """The change as factors, or `None` if it is a tensor."""
        return self.value if isinstance(self.value, Factors) else None

    @property
    def dense(self) -> Tensor:
        """The change as a tensor with one matrix per group."""
        return self.value.up @ self.value.down if isinstance(self.value, Factors) else self.value

    @functools.cached_property
    def norm(self) -> float:
        """The Frobenius norm of the change."""
        return self.value.norm() if isinstance(self.value, Factors) else float(torch.linalg.vector_norm(self.value))

    @property
    def noise(self) -> float:
        """The Frobenius norm that rounding errors may have; a change below it counts as zero."""
        eps = torch.finfo(torch.promote_types(self.dtype, torch.float32)).eps
        terms = math.prod(float(torch.linalg.vector_norm(factor)) for factor in self.factors or ())
        return _ROUNDING * eps * (self.reference + (terms if self.factors else self.norm))

    def distance(self, factors: Factors) -> float:
        """Return the Frobenius norm of the difference between the change and a product."""
        if isinstance(self.value, Factors):
            return joined([self.value, Factors(-factors.up, factors.down)]).norm()
        return float(torch.linalg.vector_norm(self.value - factors.up @ factors.down))


@dataclass(frozen=True)
class WeightedLayer:
    """An adapter layer with a strength.

    Attributes:
        originals: `id` of a base tensor -> function that returns its content before merging; see `Bank.ways`.
    """

    adapter_layer: AdapterLayer
    strength: float
    originals: Mapping[int, Callable[[], Tensor]]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the adapter's parameters."""
        return self.adapter_layer.dtype

    @property
    def reads_base(self) -> bool:
        """Whether the change depends on the base weight."""
        return not self.adapter_layer.is_additive or self.adapter_layer.adapter_type.is_prepared

    def base(self, name: str) -> Tensor | None:
        """Return the layer's own weight or bias without any adapter, or `None` if it has none."""
        tensor = resting_tensor(self.adapter_layer.host, name)
        if tensor is None:
            return None
        return self.originals[id(tensor)]() if id(tensor) in self.originals else decoded(self.adapter_layer.host, name)

    def prepare_for_weight(self, weight: Tensor) -> PreparedLayer:
        """Return the adapter layer as `compose.prepare_for_weight` does, but at this strength, not the current one."""
        # Gates are float32 everywhere, so that the LoRA has exactly the effect that the adapter has.
        gate = torch.tensor(self.adapter_layer.scale * self.strength, dtype=torch.float32).to(weight)
        return compose.prepare_for_weight(self.adapter_layer, weight, self._term_of)._replace(gate=gate)

    def _term_of(self, sibling: AdapterLayer) -> Tensor:
        """Return the `joint_term` of a sibling for its own weight without any adapter."""
        weight = replace(self, adapter_layer=sibling).base("weight")
        assert weight is not None
        return sibling.joint_term(sibling.spec.to_stored(weight))


Sources: TypeAlias = Mapping[str, Mapping[str, Sequence[WeightedLayer]]]
"""component -> module path -> the adapter layers there that take part."""


def change_of(layers: Sequence[WeightedLayer]) -> Change:
    """Return the change that adapters make together in one layer.

    Raises:
        AdapterError: the layer cannot carry a LoRA.
    """
    spec = layers[0].adapter_layer.spec
    if spec.kind not in LORA.layers:
        raise AdapterError(f"a {spec.kind} cannot carry a LoRA; give the layer a strength of 0 to leave it out")
    dtype = functools.reduce(torch.promote_types, (layer.dtype for layer in layers))
    device = next(iter(layers[0].adapter_layer.parameters())).device
    compute_dtype = torch.float64 if device.type == "cpu" else torch.promote_types(dtype, torch.float32)
    weight = torch.zeros((), dtype=compute_dtype, device=device).expand(spec.weight_shape)
    reference = 0.0
    if any(layer.reads_base for layer in layers):
        stored = layers[0].base("weight")
        assert stored is not None
        weight = spec.to_stored(stored).to(weight)
        reference = float(torch.linalg.vector_norm(weight))
    prepared = [layer.prepare_for_weight(weight) for layer in layers]
    pairs = [pair for pair in map(_own_factors, prepared) if pair is not None]
    if len(pairs) == len(prepared):
        return Change(spec, joined(pairs), _bias_change(layers[0], prepared, weight), dtype)
    change = compose.weight(prepared, weight) - weight
    by_group = change.reshape(spec.groups, spec.out_features // spec.groups, spec.fan_in)
    return Change(spec, by_group, _bias_change(layers[0], prepared, weight), dtype, reference)


def _own_factors(prepared: PreparedLayer) -> Factors | None:
    """Return the change of one adapter as factors, with its gate, or `None` if the type cannot tell them."""
    layer, spec = prepared.layer, prepared.layer.spec
    found = layer.adapter_type.as_low_rank(prepared.tensors, spec) if layer.is_additive else None
    if found is None:
        return None
    down, up = spec._per_group(*found), found[1]
    return Factors(
        (up * prepared.gate).reshape(spec.groups, spec.out_features // spec.groups, -1),
        down.reshape(spec.groups, -1, spec.fan_in),
    )


def _bias_change(layer: WeightedLayer, prepared: Sequence[PreparedLayer], like: Tensor) -> Tensor | None:
    """Return the change of the bias, in the dtype of `like`, or `None` if the adapters do not change it.

    Args:
        layer: any of the adapter layers.
        prepared: all of them.
    """
    stored = layer.base("bias") if any(p.layer.adapter_type.gains_bias for p in prepared) else None
    if not compose.changes_bias(((p.layer, p.tensors) for p in prepared), stored is not None):
        return None
    bias = like.new_zeros(layer.adapter_layer.spec.out_features) if stored is None else stored.to(like)
    return compose.bias(prepared, bias) - bias
