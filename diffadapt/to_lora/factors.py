"""Products of two factors, one for every group of a layer."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Factors(NamedTuple):
    """A change as the product `up @ down` of every group.

    Attributes:
        up: (groups, out / groups, rank).
        down: (groups, rank, in / groups x kernel).
    """

    up: Tensor
    down: Tensor

    @property
    def rank(self) -> int:
        """Rank of one group."""
        return self.up.shape[2]

    def decomposed(self) -> tuple[Tensor, Tensor, Tensor]:
        """Singular value decomposition `u, s, v'` at the cost of the factors."""
        up, inner_up = torch.linalg.qr(self.up)
        down, inner_down = torch.linalg.qr(self.down.mT)
        u, s, vh = torch.linalg.svd(inner_up @ inner_down.mT, full_matrices=False)
        return up @ u, s, vh @ down.mT

    def norm(self) -> float:
        """Frobenius norm of the product."""
        inner_up, inner_down = torch.linalg.qr(self.up).R, torch.linalg.qr(self.down.mT).R
        return float(torch.linalg.vector_norm(inner_up @ inner_down.mT))


def joined(pairs: Sequence[Factors]) -> Factors:
    """The sum of several products as one."""
    return Factors(torch.cat([pair.up for pair in pairs], 2), torch.cat([pair.down for pair in pairs], 1))
