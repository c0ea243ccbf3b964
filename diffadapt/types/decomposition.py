"""Singular value decompositions of base weights, as PEFT and LyCORIS compute them."""

import torch
from torch import Tensor


def decomposed(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return U (rows, n), the singular values (n) and V' (n, columns), with n the smaller side of the matrix.

    The largest singular values come first. On the meta device, the result has no values.
    """
    if matrix.is_meta:
        rows, columns = matrix.shape
        least = min(rows, columns)
        return matrix.new_empty(rows, least), matrix.new_empty(least), matrix.new_empty(least, columns)
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return left, values, right


def principal(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the `rank` largest singular values of a matrix and their vectors; see `decomposed` for the shapes."""
    left, values, right = decomposed(matrix)
    return left[:, :rank], values[:rank], right[:rank]


def randomised_principal(matrix: Tensor, rank: int, iterations: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return what `principal` does, by PyTorch's randomised decomposition, whose random numbers follow from a seed."""
    if matrix.is_meta:
        return principal(matrix, rank)
    with torch.random.fork_rng(devices=[] if matrix.device.type == "cpu" else [matrix.device]):
        torch.manual_seed(seed)
        left, values, right = torch.svd_lowrank(matrix, q=rank, niter=iterations)
    return left, values, right.t()
