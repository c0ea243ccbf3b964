"""Starts of a LoRA that are taken out of the base weight: factors `down` and `up` computed from it.

Training with such a start runs on the rest of the weight, `W - scale * up @ down`, which equals `W` at first. On the
untouched base, the same adapter is the difference of the trained factors and the start.

Sources: PiSSA (Meng et al., arXiv 2404.02948), OLoRA (Büyükakyüz, arXiv 2406.01775), as in PEFT 0.21.2
`tuners/lora/layer.py`.
"""

import re

import torch
from torch import Tensor

_ITERATIONS = re.compile(r"pissa_niter_([1-9]\d?)")


def pissa(weight: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """Return `down` (rank, in) and `up` (out, rank) whose product, times `scale`, is the principal part of a weight.

    Args:
        weight: the weight, (out, in), in float32 or float64.
        rank: the number of singular values.
        scale: `alpha / rank`.
    """
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    roots = (values[:rank] / scale).sqrt()
    return roots.unsqueeze(1) * right[:rank], left[:, :rank] * roots


def randomised_pissa(
    weight: Tensor, rank: int, scale: float, iterations: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Return what `pissa` does, from a randomised decomposition (Halko et al., arXiv 0909.4061, 4.4 and 5.1).

    Args:
        weight, rank, scale: see `pissa`.
        iterations: the number of subspace iterations.
        generator: draws the vectors whose span is refined.
    """
    probe = torch.randn(weight.shape[1], rank, generator=generator, dtype=torch.float64).to(weight)
    basis = torch.linalg.qr(weight @ probe).Q
    for _ in range(iterations):
        basis = torch.linalg.qr(weight @ torch.linalg.qr(weight.mT @ basis).Q).Q
    down, up = pissa(basis.mT @ weight, rank, scale)
    return down, basis @ up


def olora(weight: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """Return `down` (rank, in) and `up` (out, rank): the first rows and columns of the QR decomposition of a weight."""
    orthogonal, triangular = torch.linalg.qr(weight)
    return triangular[:rank], orthogonal[:, :rank]


STARTS = {"pissa": pissa, "olora": olora}
"""Name in `init_lora_weights` of PEFT's config -> the function that computes the start."""


def is_start(init: object) -> bool:
    """Return whether the initialisation of this name takes the start out of the base weight."""
    return isinstance(init, str) and (init in STARTS or _ITERATIONS.fullmatch(init) is not None)


def start_of_weight(
    init: str, weight: Tensor, rank: int, scale: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Return `down` (rank, in) and `up` (out, rank) of the start with this name.

    Args:
        init: "pissa", "olora" or "pissa_niter_N" with the number of subspace iterations.
        weight: the weight, (out, in), in float32 or float64.
        rank: the rank, at most the smaller side of the weight.
        scale: `alpha / rank`.
        generator: for randomised decompositions.
    """
    iterations = _ITERATIONS.fullmatch(init)
    if iterations is not None:
        return randomised_pissa(weight, rank, scale, int(iterations[1]), generator)
    return STARTS[init](weight, rank, scale)
