"""A way back from a merged weight without a copy: predict the original, and correct what rounding lost."""

from dataclasses import dataclass

import torch
from torch import Tensor

from diffadapt.errors import AdapterError
from diffadapt.merging.corrections import Corrections
from diffadapt.merging.weight_update import AnyUpdate, Layers, LowRankUpdate, Recorded, WeightUpdate


@dataclass(frozen=True)
class UndoByCorrection:
    """A way back (see `Undo`) that predicts the original from the merged weight and corrects the prediction.

    Attributes:
        where: path of the tensor, for messages.
        dtype: dtype of the original.
        layers: the adapter layers that are merged into the tensor.
        recorded, iterations: see `AnyUpdate`.
        corrections: one for each of the update's chunks.
    """

    tensor: Tensor
    where: str
    dtype: torch.dtype
    layers: Layers
    recorded: Recorded
    iterations: int
    corrections: tuple[Corrections, ...]

    @property
    def nbytes(self) -> int:
        recorded = sum(tensor.nbytes for tensors in self.recorded.values() for tensor in tensors.values())
        return recorded + sum(chunk.nbytes for chunk in self.corrections)

    def restored(self) -> Tensor:
        # If the model has been cast to a larger dtype since, casting back is exact; else the checksum differs.
        weight = self.tensor.detach().to(self.dtype, copy=True, memory_format=torch.contiguous_format)
        update: WeightUpdate = LowRankUpdate.of(self.layers, weight, back=True) or AnyUpdate(
            self.layers, self.recorded, self.iterations
        )
        try:
            for rows, chunk in zip(update.chunks(), self.corrections, strict=True):
                update.predict_(weight[rows], rows)
                chunk.apply_(weight[rows])
        except (ArithmeticError, ValueError) as error:
            raise AdapterError(
                f"{self.where}: the original weight cannot be restored, because the weight or a merged adapter has "
                "been changed since merging; load the model again"
            ) from error
        return weight
