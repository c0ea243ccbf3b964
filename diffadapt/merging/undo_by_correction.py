"""The way back from a merged weight that needs no copy: predict the original, and put right what rounding lost."""

from dataclasses import dataclass

import torch
from torch import Tensor

from diffadapt.errors import AdapterError
from diffadapt.merging.corrections import Corrections
from diffadapt.merging.weight_update import AnyUpdate, Fixed, Layers, LowRankUpdate, WeightUpdate


@dataclass(frozen=True)
class UndoByCorrection:
    """See `undo.Undo`.

    Attributes:
        where: a path of the tensor, for messages.
        dtype: it had.
        layers: what is merged into it.
        fixed, steps: see `folding.AnyUpdate`.
        corrections: of its pieces.
    """

    tensor: Tensor
    where: str
    dtype: torch.dtype
    layers: Layers
    fixed: Fixed
    steps: int
    corrections: tuple[Corrections, ...]

    @property
    def nbytes(self) -> int:
        fixed = sum(tensor.nbytes for tensors in self.fixed.values() for tensor in tensors.values())
        return fixed + sum(chunk.nbytes for chunk in self.corrections)

    def restored(self) -> Tensor:
        # A model that was made wider since is wider without loss; narrower is told by the checksum.
        weight = self.tensor.detach().to(self.dtype, copy=True, memory_format=torch.contiguous_format)
        way: WeightUpdate = LowRankUpdate.of(self.layers, weight, back=True) or AnyUpdate(
            self.layers, self.fixed, self.steps
        )
        try:
            for rows, chunk in zip(way.chunks(), self.corrections, strict=True):
                way.predict_(weight[rows], rows)
                chunk.apply_(weight[rows])
        except (ArithmeticError, ValueError) as error:
            raise AdapterError(
                f"{self.where}: its weight cannot be restored, since it or a merged adapter has been changed since; "
                "load the model again"
            ) from error
        return weight
