"""Low-rank products of two factors, one product for every group of a layer."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Factors(NamedTuple):
    """A change of a weight as one product `up @ down` per group.

    Attributes:
        up: (groups, out / groups, rank).
        down: (groups, rank, in / groups x kernel).
    """

    up: Tensor
    down: Tensor

    @property
    def rank(self) -> int:
        """The rank of each group."""
        return self.up.shape[2]

    def decomposed(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the singular value decomposition `u, s, v'` of the products without computing them."""
        up, inner_up = torch.linalg.qr(self.up)
        down, inner_down = torch.linalg.qr(self.down.mT)
        u, s, vh = torch.linalg.svd(inner_up @ inner_down.mT, full_matrices=False)
        return up @ u, s, vh @ down.mT

    def norm(self) -> float:
        """Return the Frobenius norm of the products without computing them."""
        inner_up, inner_down = torch.linalg.qr(self.up).R, torch.linalg.qr(self.down.mT).R
        return float(torch.linalg.vector_norm(inner_up @ inner_down.mT))


def joined(pairs: Sequence[Factors]) -> Factors:
    """Return the sum of several products as one, whose rank is the sum of their ranks."""
    return Factors(torch.cat([pair.up for pair in pairs], 2), torch.cat([pair.down for pair in pairs], 1))
