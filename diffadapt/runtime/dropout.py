"""Dropout of adapter layers, which applies in training."""

from dataclasses import dataclass

import torch
from torch import Tensor

from diffadapt.types.adapter_type import AdapterType, Tensors


@dataclass(frozen=True)
class Dropout:
    """Dropout probabilities of an adapter layer, which apply in training; see `AdapterConfig` and `RankedConfig`.

    Attributes:
        input: for an element of the input or, if the type has `AdapterType.blocks`, for a block of a rotation.
        rank: for a component of the rank.
        module: for the whole adapter layer, once per call.
    """

    input: float = 0.0
    rank: float = 0.0
    module: float = 0.0

    @property
    def acts(self) -> bool:
        """Whether anything is dropped in training."""
        return bool(self.input or self.rank or self.module)

    def applied(self, adapter_type: AdapterType, tensors: Tensors, gate: Tensor) -> tuple[Tensors, Tensor]:
        """Return the prepared tensors and the gate of one call with rank, block and module dropout."""
        changed = dict(adapter_type.in_training(tensors))
        if self.rank:
            for name, axis in adapter_type.masked.items():
                if name in changed:
                    mask = _slice_mask(changed[name], axis, self.rank) / (1 - self.rank)
                    changed[name] = changed[name] * mask
        if self.input:
            for name, axis in adapter_type.blocks.items():
                if name in changed:
                    changed[name] = changed[name] * _slice_mask(changed[name], axis, self.input)
        if self.module:
            gate = gate * (torch.rand((), dtype=torch.float32, device=gate.device) >= self.module)
        return changed, gate


def _slice_mask(tensor: Tensor, axis: int, probability: float) -> Tensor:
    """Return ones, with zeros for slices dropped along `axis`, in a shape that broadcasts over `tensor`."""
    shape = [1] * tensor.ndim
    shape[axis] = tensor.shape[axis]
    return (torch.rand(shape, dtype=torch.float32, device=tensor.device) >= probability).to(tensor.dtype)
