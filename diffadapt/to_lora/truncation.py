"""Truncation of a change to the smallest factors that keep a wanted share of it."""

from typing import NamedTuple

import torch
from torch import Tensor

from diffadapt.errors import AdapterError
from diffadapt.to_lora.change import Change
from diffadapt.to_lora.factors import Factors

_SMALL = 512  # Up to this size a full decomposition takes a fraction of a second.
_FIRST_RANK, _OVERSAMPLING, _POWER_ITERATIONS = 64, 16, 4


class Approximation(NamedTuple):
    """Factors that stand for a change.

    Attributes:
        exact: whether only rounding separates them from the change.
    """

    factors: Factors
    exact: bool


def check_limits(rank: object, energy: object) -> None:
    """Raise `AdapterError` unless `rank` is an integer >= 1, or `None`, and `energy` is in (0, 1], or `None`."""
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise AdapterError(f"rank is {rank!r}, expected an integer of at least 1")
    if energy is not None and (isinstance(energy, bool) or not isinstance(energy, (int, float)) or not 0 < energy <= 1):
        raise AdapterError(f"energy is {energy!r}, expected 0 < energy <= 1")


def truncate(change: Change, rank: int | None, energy: float | None) -> Approximation:
    """Return the smallest factors that keep the share `energy` of a change, with a rank of at most `rank`.

    If the change is known as factors that meet the limits, these are returned unchanged.

    Args:
        rank: largest rank per group; `None` for no limit.
        energy: share of the squared Frobenius norm, in (0, 1]; `None` for all of it. If both limits are `None`, the
            factors of a change that is known as a tensor must be exact and smaller than the weight.

    Raises:
        AdapterError: the change is not finite, or both limits are `None` and there are no such factors.
    """
    _refuse_non_finite(change)
    groups, rows, columns = change.spec.groups, change.spec.out_features // change.spec.groups, change.spec.fan_in
    largest = min(rows, columns)
    if change.norm <= change.noise:
        return Approximation(_empty(change), True)
    given = change.factors
    keeps_all = energy is None or energy == 1
    most = largest if rank is None else min(rank, largest)
    if given is not None and keeps_all and given.rank <= most:
        return Approximation(given, True)
    if rank is None and energy is None and given is None:
        most = (rows * columns - 1) // (rows + columns)
    # Squared Frobenius norms: the loss that is allowed, and the loss when only the first n singular values are kept.
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
    return Approximation(Factors(u[:, :, :kept] * root.unsqueeze(1), root.unsqueeze(2) * vh[:, :kept]), exact)


def _refuse_non_finite(change: Change) -> None:
    tensors = change.value if isinstance(change.value, Factors) else (change.value,)
    bias = () if change.bias is None else (change.bias,)
    if not all(tensor.isfinite().all() for tensor in (*tensors, *bias)):
        raise AdapterError("the change has NaN or infinite values")


def _empty(change: Change) -> Factors:
    """Return factors of rank 0."""
    spec, like = change.spec, change.value[0]
    return Factors(
        like.new_zeros(spec.groups, spec.out_features // spec.groups, 0), like.new_zeros(spec.groups, 0, spec.fan_in)
    )


def _decomposed(matrices: Tensor, most: int, allowed: float, first: int) -> tuple[Tensor, Tensor, Tensor, float]:
    """Return a singular value decomposition, perhaps only of the largest singular values.

    Args:
        matrices: (groups, rows, columns).
        most: number of singular values that suffices in any case.
        allowed: squared Frobenius norm that may be left out.
        first: number of singular values to try first.

    Returns:
        `u`, `s`, `v'`, and the squared Frobenius norm of what they leave out.
    """
    size, rank = min(matrices.shape[1:]), min(first, most)
    while matrices.shape[0] == 1 and size > _SMALL and 2 * (rank + _OVERSAMPLING) < size:
        u, s, vh, rest = _sketched(matrices[0], rank + _OVERSAMPLING)
        if rest <= allowed or rank == most:
            return u.unsqueeze(0), s.unsqueeze(0), vh.unsqueeze(0), rest
        rank = min(2 * rank, most)
    return *torch.linalg.svd(matrices, full_matrices=False), 0.0


def _sketched(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor, float]:
    """Return the largest `rank` singular values of a matrix, from its range on random vectors; see `_decomposed`."""
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(matrix.shape[1], rank, generator=generator, dtype=torch.float64).to(matrix)
    basis = torch.linalg.qr(matrix @ probe).Q
    for _ in range(_POWER_ITERATIONS):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.mT @ basis).Q).Q
    inner = basis.mT @ matrix
    rest = float(torch.linalg.vector_norm(torch.addmm(matrix, basis, inner, alpha=-1)))
    u, s, vh = torch.linalg.svd(inner, full_matrices=False)
    return basis @ u, s, vh, rest**2
