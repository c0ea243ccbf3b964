"""The loss of a sample, and its weight at a noise level."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from diffadapt.errors import UsageError
from diffadapt.training.families import Process
from diffadapt.training.noise_levels import Noising

_LARGEST_SNR = 1000.0
_SMALLEST_SNR = 1e-8
"""Finite weights at zero terminal SNR; far below the ratio of any other step."""


def weighting(name: str | None, gamma: float | None, process: Process) -> Callable[[Noising, Tensor], Tensor]:
    """Return the function from levels to weights of the squared error of what the denoiser predicts.

    With s = sigma and SNR = ((1 - s) / s)^2 of a flow, or that of a diffusion:

    * min_snr: Hang et al., arXiv 2303.09556: min(SNR, gamma) on the error of x0. That is min(SNR, gamma) / SNR on
      epsilon, min(SNR, gamma) / (SNR + 1) on v, and min((1 - s)^2, gamma s^2) on the velocity of a flow.
    * debiased: Yu et al., arXiv 2310.08442: 1 / sqrt(SNR) on epsilon, so sqrt(SNR) / (SNR + 1) on v and s (1 - s) on
      the velocity of a flow.
    * cosmap and sigma_sqrt: Esser et al., arXiv 2403.03206: 2 / (pi (1 - 2 s + 2 s^2)) and 1 / s^2, for flows.

    Raises:
        UsageError: the weighting is not defined for this process, or an option has no effect with it.
    """
    name = name or ("none" if gamma is None else "min_snr")
    if gamma is not None and name != "min_snr":
        raise UsageError(f"--snr_gamma has no effect with --loss_weighting {name}")
    if name in ("cosmap", "sigma_sqrt") and process != "flow":
        raise UsageError(f"--loss_weighting {name} is for flow matching; this model predicts {process}; take min_snr")
    limit = 5.0 if gamma is None else gamma
    functions: dict[str, Callable[[Noising, Tensor], Tensor]] = {
        "none": lambda noising, level: torch.ones(level.shape, dtype=torch.float64),
        "min_snr": lambda noising, level: _min_snr(noising, level, limit),
        "debiased": _debiased,
        "cosmap": lambda noising, level: 2 / (math.pi * (1 - 2 * level.double() + 2 * level.double().square())),
        "sigma_sqrt": lambda noising, level: 1 / level.double().clamp(min=1e-3).square(),
    }
    return functions[name]


def _min_snr(noising: Noising, level: Tensor, gamma: float) -> Tensor:
    if noising.process == "flow":
        s = level.double()
        return torch.minimum((1 - s).square(), gamma * s.square())
    snr = noising.snr(level)
    if noising.process == "v":
        return snr.clamp(max=gamma) / (snr + 1)
    # In this form a ratio of 0, at zero terminal SNR, is no division of 0 by 0.
    return (gamma / snr).clamp(max=1)


def _debiased(noising: Noising, level: Tensor) -> Tensor:
    if noising.process == "flow":
        return level.double() * (1 - level.double())
    snr = noising.snr(level).clamp(_SMALLEST_SNR, _LARGEST_SNR)
    return snr.sqrt() / (snr + 1) if noising.process == "v" else snr.rsqrt()


def squared_errors(prediction: Tensor, target: Tensor, cover: Tensor | None = None) -> Tensor:
    """Return the mean squared error of each sample, of shape (batch,).

    Args:
        prediction: (batch, channels, rows, columns), float32.
        target: of the same shape.
        cover: weights of the latent pixels, of shape (batch, 1, rows, columns); the mean is over these weights, and a
            pixel of weight 0 has no gradient. A sample whose weights are all 0 has the loss 0.
    """
    errors = (prediction - target).square()
    if cover is None:
        return errors.mean(dim=(1, 2, 3))
    total = cover.sum(dim=(1, 2, 3)) * errors.shape[1]
    # `where` instead of a product: what is not covered may be infinite.
    covered = torch.where(cover > 0, errors * cover, torch.zeros_like(errors))
    return covered.sum(dim=(1, 2, 3)) / total.clamp(min=1e-12)


def cover_of(mask: Tensor, shape: torch.Size, unmasked_weight: float) -> Tensor:
    """Return the weights of latent pixels for a mask of pixels.

    Args:
        mask: (1, height, width) in 0..1.
        shape: the shape of the latents, (..., rows, columns).
        unmasked_weight: the weight where the mask is 0.

    Returns:
        (1, 1, rows, columns): what share of a latent pixel's area the mask covers, raised to the weight.
    """
    share = F.interpolate(mask[None], size=shape[-2:], mode="area")
    return unmasked_weight + (1 - unmasked_weight) * share
