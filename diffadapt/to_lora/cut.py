"""The smallest factors that keep what is wanted of a change."""

from typing import NamedTuple

import torch
from torch import Tensor

from diffadapt.errors import AdapterError
from diffadapt.to_lora.change import Change, refuse_infinite
from diffadapt.to_lora.factors import Factors

_SMALL = 512  # Up to here a whole decomposition takes a fraction of a second.
_FIRST_RANK, _OVERSAMPLING, _POWER_ITERATIONS = 64, 16, 4


class Cut(NamedTuple):
    """Factors for a change, and whether nothing but rounding is missing."""

    factors: Factors
    exact: bool


def truncate(change: Change, rank: int | None, energy: float | None) -> Cut:
    """The smallest factors that keep `energy` of a change, of at most `rank`; see `conversion`."""
    refuse_infinite(change)
    groups, rows, columns = change.spec.groups, change.spec.out_features // change.spec.groups, change.spec.fan_in
    largest = min(rows, columns)
    if change.norm <= change.noise:
        return Cut(_empty(change), True)
    given = change.factors
    keeps_all = energy is None or energy == 1
    if given is not None and keeps_all and given.rank <= (largest if rank is None else min(rank, largest)):
        return Cut(given, True)
    most = largest if rank is None else min(rank, largest)
    if rank is None and energy is None and given is None:
        most = (rows * columns - 1) // (rows + columns)
    # All in squares: of what may be lost, and of what is lost with the first so many singular values kept.
    allowed = max((1 - (1.0 if energy is None else energy)) * change.norm**2, change.noise**2)
    if given is not None:
        u, s, vh = given.decomposed()
        rest = 0.0
    else:
        u, s, vh, rest = _decomposed(change.dense, most, allowed, rank or _FIRST_RANK)
    lost = s.square().sum(0).flip(0).cumsum(0).flip(0) + rest
    kept = min(int((lost > allowed).sum()), most)
    missing = float(lost[kept]) if kept < len(lost) else rest
    exact = missing <= change.noise**2
    if rank is None and energy is None and not exact:
        weight = f"the ({groups * rows}, {columns}) weight itself"
        raise AdapterError(
            f"no LoRA that is smaller than {weight} has the same effect; pass rank= or energy= (1.0 to keep everything)"
        )
    root = s[:, :kept].sqrt()
    return Cut(Factors(u[:, :, :kept] * root.unsqueeze(1), root.unsqueeze(2) * vh[:, :kept]), exact)


def _empty(change: Change) -> Factors:
    spec, like = change.spec, change.whole[0]
    return Factors(
        like.new_zeros(spec.groups, spec.out_features // spec.groups, 0), like.new_zeros(spec.groups, 0, spec.fan_in)
    )


def _decomposed(matrices: Tensor, most: int, allowed: float, first: int) -> tuple[Tensor, Tensor, Tensor, float]:
    """Singular value decomposition, as far as `most` values, or as it takes to lose no more than `allowed`.

    Returns:
        `u, s, v'`, and the squared Frobenius norm of what they leave out.
    """
    size, rank = min(matrices.shape[1:]), min(first, most)
    while matrices.shape[0] == 1 and size > _SMALL and 2 * (rank + _OVERSAMPLING) < size:
        u, s, vh, rest = _sketched(matrices[0], rank + _OVERSAMPLING)
        if rest <= allowed or rank == most:
            return u.unsqueeze(0), s.unsqueeze(0), vh.unsqueeze(0), rest
        rank = min(2 * rank, most)
    return *torch.linalg.svd(matrices, full_matrices=False), 0.0


def _sketched(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor, float]:
    """The largest singular values, from the range of the matrix on random vectors."""
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(matrix.shape[1], rank, generator=generator, dtype=torch.float64).to(matrix)
    basis = torch.linalg.qr(matrix @ probe).Q
    for _ in range(_POWER_ITERATIONS):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.mT @ basis).Q).Q
    inner = basis.mT @ matrix
    rest = float(torch.linalg.vector_norm(torch.addmm(matrix, basis, inner, alpha=-1)))
    u, s, vh = torch.linalg.svd(inner, full_matrices=False)
    return basis @ u, s, vh, rest**2
