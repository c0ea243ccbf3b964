"""Pixels to normalised latents of shape (batch, channels, rows, columns), for every kind of VAE."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from diffadapt.training.families.family import Pipeline, Tensors

Affine = tuple[Tensor | float, Tensor | float]
"""(shift, scale): x0 = (raw - shift) * scale."""


def sampled(pipe: Pipeline, pixels: Tensor) -> Tensors:
    """Encode with an `AutoencoderKL` whose latents are normalised by numbers; x0 is drawn from its distribution."""
    return normalised(_encode(pipe.vae, pixels), _by_numbers(pipe.vae), with_std=True)


def most_likely(pipe: Pipeline, pixels: Tensor) -> Tensors:
    """Encode like `sampled`, but always to the most likely latents."""
    return normalised(_encode(pipe.vae, pixels), _by_numbers(pipe.vae), with_std=False)


def frame_sampled(pipe: Pipeline, pixels: Tensor) -> Tensors:
    """Encode pictures as videos of one frame, normalised per channel; x0 is drawn from the VAE's distribution."""
    return normalised(_encode(pipe.vae, pixels.unsqueeze(2)), _per_channel(pipe.vae), with_std=True)


def frame_most_likely(pipe: Pipeline, pixels: Tensor) -> Tensors:
    """Encode like `frame_sampled`, but always to the most likely latents."""
    return normalised(_encode(pipe.vae, pixels.unsqueeze(2)), _per_channel(pipe.vae), with_std=False)


def batch_normalised(order: Callable[[Tensor], Tensor]) -> Callable[[Pipeline, Tensor], Tensors]:
    """Return an encoder for `AutoencoderKLFlux2`: 2 x 2 latent pixels become channels, which a batch norm normalises.

    Args:
        order: (batch, channels, rows, columns) -> the same with four times the channels and half the rows and columns.
    """

    def encode(pipe: Pipeline, pixels: Tensor) -> Tensors:
        norm, epsilon = pipe.vae.bn, pipe.vae.config.batch_norm_eps
        mean, variance = (x.float().view(1, -1, 1, 1) for x in (norm.running_mean, norm.running_var))
        raw = order(_encode(pipe.vae, pixels).latent_dist.mode().float())
        return {"mean": (raw - mean.to(raw.device)) / (variance.to(raw.device) + epsilon).sqrt()}

    return encode


def normalised(output: Any, affine: Affine, *, with_std: bool) -> Tensors:
    """Return the mean and, if wanted, the standard deviation of the normalised latents, float32.

    Args:
        output: What the VAE returned. Latents with a dimension for frames lose it.
        affine: (shift, scale); tensors of shape (1, channels, 1, 1), or numbers.
        with_std: Whether to return the standard deviation.
    """
    shift, scale = (x.float() if isinstance(x, Tensor) else x for x in affine)
    distribution = output.latent_dist
    mean, std = (x.squeeze(2) if x.ndim == 5 else x for x in (distribution.mode().float(), distribution.std.float()))
    encoded = {"mean": (mean - shift) * scale}
    return {**encoded, "std": std * scale} if with_std else encoded


def _encode(vae: Any, pixels: Tensor) -> Any:
    """Call the VAE in its own dtype; in float32 if it would overflow in float16, as the pipelines do."""
    overflows = vae.dtype == torch.float16 and vae.config.get("force_upcast", False)
    if not overflows:
        return vae.encode(pixels.to(vae.device, vae.dtype))
    vae.to(torch.float32)
    try:
        return vae.encode(pixels.to(vae.device, torch.float32))
    finally:
        vae.to(torch.float16)


def _by_numbers(vae: Any) -> Affine:
    """Return the normalisation by two numbers, or by the means and deviations that Playground 2.5 has besides them."""
    config = vae.config
    mean, std = (config.get(name) for name in ("latents_mean", "latents_std"))
    if mean is None or std is None:
        return config.get("shift_factor") or 0.0, config.scaling_factor
    mean, std = (torch.tensor(x).view(1, -1, 1, 1).to(vae.device) for x in (mean, std))
    return mean, config.scaling_factor / std


def _per_channel(vae: Any) -> Affine:
    mean, std = (
        torch.tensor(vae.config[name]).view(1, -1, 1, 1).to(vae.device) for name in ("latents_mean", "latents_std")
    )
    return mean, 1 / std


def frame_by_buffers(pipe: Pipeline, pixels: Tensor) -> Tensors:
    """Encode like `frame_sampled` with the VAE of LTX, which keeps means and deviations in buffers."""
    vae = pipe.vae
    mean, std = (buffer.float().view(1, -1, 1, 1) for buffer in (vae.latents_mean, vae.latents_std))
    return normalised(_encode(vae, pixels.unsqueeze(2)), (mean, vae.config.scaling_factor / std), with_std=True)
