"""What one call of a layer needs of an adapter layer: the formulas of its type, on prepared tensors and with the gate.

An adapter layer computes in the dtype of its parameters: the input is cast to that dtype, and only the result is cast
back. `compose.py` combines prepared layers into the output or the weight of the model's layer.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from diffadapt.runtime.adapter_layer import PATCH_DELTA, AdapterLayer, one
from diffadapt.runtime.regions.blending import blended
from diffadapt.types.adapter_type import UNTIL, Tensors
from diffadapt.types.lora import LORA
from diffadapt.types.tensor_ops import add


class PreparedLayer(NamedTuple):
    """An adapter layer prepared for one call of its host, or for one weight: the formulas of its type, gate included.

    Attributes:
        layer: the adapter layer.
        tensors: its prepared tensors, on the device to compute on.
        gate: scale x strength x call scale: 0-d, or (rows,) for an input whose rows have gates of their own. With
            `gates_ranks` it is (rank,) or (rows, rank).
        dtype: the dtype to compute in.
        field: a further factor for every position of the host's output (and rank with `gates_ranks`), or `None`.
    """

    layer: AdapterLayer
    tensors: Tensors
    gate: Tensor
    dtype: torch.dtype
    field: Tensor | None = None

    # Not properties: the compiler of torch 2.6 does not know those of a named tuple.
    def gates_ranks(self) -> bool:
        """Whether the gate has one element per rank."""
        return self.layer.gates_ranks or UNTIL in self.tensors

    def at(self, vectors: Tensor) -> "PreparedLayer":
        """Return the layer with the field for the positions of `vectors`, which the host gets or returns."""
        region = self.layer.region
        if region is None:
            return self
        return PreparedLayer(self.layer, self.tensors, self.gate, self.dtype, region.field(vectors, self.layer.spec))

    def everywhere(self) -> "PreparedLayer":
        """Return the layer without its field."""
        return self if self.field is None else PreparedLayer(self.layer, self.tensors, self.gate, self.dtype)

    def apply_map(self, vectors: Tensor, axis: int, transposed: bool = False, onto: Tensor | None = None) -> Tensor:
        """Return `onto + gate * (T - 1) vectors`, where the second term is computed in the adapter's dtype."""
        if self.field is not None and onto is not None:
            return blended(onto, self.everywhere().apply_map(vectors, axis, transposed, onto), self.field)
        layer, vectors = self.layer, vectors.to(self.dtype)
        if self.gate.ndim:
            change = layer.adapter_type.apply_map(
                self.tensors, layer.spec, vectors=vectors, axis=axis, gate=one(vectors), transposed=transposed
            )
            change = change * _per_row(self.gate, change)
            return change if onto is None else onto + change
        add_later = onto is not None and onto.dtype != vectors.dtype
        change = layer.adapter_type.apply_map(
            self.tensors,
            layer.spec,
            vectors=vectors,
            axis=axis,
            gate=self.gate,
            transposed=transposed,
            onto=None if add_later else onto,
        )
        return onto + change if add_later and onto is not None else change

    def gated_gain(self) -> Tensor:
        """Return `gate * (s - 1)` in float32 or wider, of shape (out,) or (rows, out)."""
        gain = self.layer.adapter_type.gain(self.tensors)
        return gain.to(torch.promote_types(gain.dtype, torch.float32)) * self.gate.unsqueeze(-1)

    def add_change(self, output: Tensor, input: Tensor) -> Tensor:
        """Return `output` plus the additive change for `input`. `output` may be overwritten."""
        layer = self.layer
        if self.field is not None and not self._gates_in_rank_space():
            return blended(output, self.everywhere().add_change(output.clone(), input), self.field)
        input = self.adapter_input(input)
        if self.field is not None:
            gate = layer.spec.along_channels(self.gate, output.ndim) if self.gate.ndim else self.gate
            return self._delta_output(input, gate * self.field, output)
        if self.gate.ndim and not self.gates_ranks():
            factors = self.as_low_rank() if layer.spec.groups == 1 else None
            if factors is not None:
                # In rank space, gates of rows cost next to nothing.
                return layer.spec.low_rank(input, *factors, self.rank_gates(len(factors[0])), output)
            change = self._delta_output(input, one(input), None)
            return add(change * _per_row(self.gate, change).to(change.dtype), output)
        if layer.picks is not None and self.gate.ndim > 1:
            return self._add_picked(layer.picks, output, input)
        return self._delta_output(input, self.gate, output)

    def _add_picked(self, picks: Tensor, output: Tensor, input: Tensor) -> Tensor:
        """Return `output` plus the change of a slot, of which every row meets its own ranks only."""
        layer, rows = self.layer, len(input)
        own = layer.call.spread(picks.to(input.device), rows)
        down = self.tensors["lora_down"].flatten(1).index_select(0, own.flatten()).unflatten(0, own.shape)
        up = self.tensors["lora_up"].index_select(1, own.flatten()).unflatten(1, own.shape).permute(1, 2, 0)
        return layer.spec.low_rank_by_row(input, down, up, self.gate.gather(1, own), output)

    def _gates_in_rank_space(self) -> bool:
        """Whether the type multiplies the gate in rank space, and so takes one per position."""
        layer = self.layer
        is_plain = layer.adapter_type is LORA and "lora_bias" not in self.tensors and not self.gate.ndim
        return self.gates_ranks() or is_plain

    def _delta_output(self, input: Tensor, gate: Tensor, onto: Tensor | None) -> Tensor:
        layer = self.layer
        if "patch" in layer.stages:
            return layer.spec.dense(input, self.tensors[PATCH_DELTA], gate, onto)
        return layer.adapter_type.delta_output(self.tensors, layer.spec, input=input, gate=gate, onto=onto)

    def rank_gates(self, rank: int) -> Tensor:
        """Return the gate of each rank, of shape (rank,) or (rows, rank)."""
        return self.gate if self.gates_ranks() else self.gate.unsqueeze(-1).expand(*self.gate.shape, rank)

    def adapter_input(self, input: Tensor) -> Tensor:
        """Return the input of the additive change: in the adapter's dtype and, in training, with dropout."""
        layer = self.layer
        if input.is_floating_point():
            input = input.to(self.dtype)
        if layer.training and layer.dropout.input and not layer.adapter_type.blocks:
            input = F.dropout(input, layer.dropout.input)
        return input

    def as_low_rank(self) -> tuple[Tensor, Tensor] | None:
        """Return the factors (down, up) of the additive change, or `None` if it cannot share a product with others."""
        return self.layer.as_low_rank(self.tensors)


def prepared_for_call(layer: AdapterLayer, device: torch.device, rows: int) -> PreparedLayer:
    """Return a layer prepared for a call of its host on `device`, with an input of `rows` rows."""
    tensors, gate = layer.prepared_tensors(), gate_for_call(layer, device, rows)
    if UNTIL in tensors:
        gate = gate.unsqueeze(-1) * layer.call.acting(tensors[UNTIL], rows).to(device)
    if next(iter(tensors.values())).device != device:
        # The host's weights are offloaded between calls; copy the adapter's to where they are for this call.
        tensors = {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}
    if layer.training:
        tensors, gate = layer.dropout.applied(layer.adapter_type, tensors, gate)
    return PreparedLayer(layer, tensors, gate, layer.dtype)


def gate_for_call(layer: AdapterLayer, device: torch.device, rows: int) -> Tensor:
    """Return the gate of a call, see `PreparedLayer`, without dropout."""
    gate, call = layer.gate, layer.call
    if gate.device != device:
        gate = gate.to(device)
    if gate.ndim > layer.gates_ranks:
        gate = call.spread(gate, rows)
    value = call.value
    if value is not None and (torch.compiler.is_compiling() or value is not call.neutral):
        return gate * value.to(device)
    # Autograd keeps the gate for the backward pass. Strengths may change before it: a loss may compare with the base.
    return gate.clone() if torch.is_grad_enabled() else gate


def _per_row(gates: Tensor, values: Tensor) -> Tensor:
    """Reshape (rows,) gates so that they broadcast over `values`, of shape (rows, ...)."""
    return gates.view(-1, *(1,) * (values.ndim - 1))
