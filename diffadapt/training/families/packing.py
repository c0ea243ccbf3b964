"""Parts that families share: devices, real tokens, divisors, packed latents, positions, references."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diffadapt.training.families.family import Caption, Pipeline, Step, Tensors


def encoder_device(pipe: Pipeline) -> torch.device:
    """Return the device for the inputs of the text encoders.

    A pipeline's own idea of its device is that of its first component, which need not be a text encoder.
    """
    for name, part in pipe.components.items():
        if name.startswith("text_encoder") and isinstance(part, nn.Module):
            device = next(part.parameters()).device
            return pipe._execution_device if device.type == "meta" else device
    return pipe._execution_device


def encode_prompt(pipe: Pipeline, caption: Caption, *unused: None, **further: Any) -> Any:
    """Return what `encode_prompt` of a pipeline returns for a caption, at the length that captions are trained with.

    Args:
        unused: the second caption of pipelines that take several, and so on.
        further: further arguments.
    """
    device = encoder_device(pipe)
    return pipe.encode_prompt([caption.text], *unused, device=device, max_sequence_length=caption.max_tokens, **further)


def call_default(pipe: Pipeline, name: str) -> Any:
    """Return the default of an argument of the pipeline's call. That of `encode_prompt` may differ."""
    return inspect.signature(type(pipe).__call__).parameters[name].default


def real_tokens(hidden: Tensor, mask: Tensor | None) -> Tensor:
    """Return the hidden states of the real tokens of one caption, (tokens, ...).

    Args:
        hidden: Hidden states of shape (1, tokens, ...).
        mask: Not zero for real tokens, of shape (1, tokens); `None` if all are.
    """
    return hidden[0] if mask is None else hidden[0, mask[0].bool()]


def pixels(factor: int) -> Callable[[Pipeline], int]:
    """Return a divisor of heights and widths: `factor` times the pixels of one latent pixel."""
    return lambda pipe: factor * pipe.vae_scale_factor


def pack(latents: Tensor) -> Tensor:
    """Return (batch, channels, rows, columns) as tokens of 2 x 2 pixels with features (channel, row, column)."""
    return flat(nn.functional.pixel_unshuffle(latents, 2))


def unpack(packed: Tensor, like: Tensor) -> Tensor:
    """Return packed tokens as a tensor of the shape of `like`. Tokens behind them, of references, are dropped."""
    batch, channels, rows, columns = like.shape
    squares = packed[:, : rows * columns // 4].view(batch, rows // 2, columns // 2, channels, 2, 2)
    return squares.permute(0, 3, 1, 4, 2, 5).reshape(like.shape)


def flat(latents: Tensor) -> Tensor:
    """Return (batch, channels, rows, columns) as tokens of single pixels, (batch, rows * columns, channels)."""
    return latents.flatten(2).transpose(1, 2)


def unflat(tokens: Tensor, like: Tensor) -> Tensor:
    """Return tokens of single pixels as a tensor of the shape of `like`. Tokens behind them are dropped."""
    return tokens[:, : like.shape[2] * like.shape[3]].transpose(1, 2).reshape(like.shape)


def positions(latents: Tensor, patch: int = 1, axes: int = 3, first: int = 0) -> Tensor:
    """Return the positions of the tokens of latents, (tokens, axes): `first`, row, column and zeros.

    Args:
        latents: (batch, channels, rows, columns).
        patch: The number of rows and columns of a token.
        axes: The number of coordinates.
        first: The first coordinate, by which reference pictures differ from the picture that is drawn.
    """
    rows, columns = latents.shape[2] // patch, latents.shape[3] // patch
    ids = torch.zeros(rows, columns, axes, device=latents.device)
    ids[..., 0] = first
    ids[..., 1] = torch.arange(rows, device=latents.device)[:, None]
    ids[..., 2] = torch.arange(columns, device=latents.device)
    return ids.flatten(0, 1)


def negated(step: Step, output: Any) -> Tensor:
    """Return the prediction of a denoiser that predicts x0 - n."""
    return -output


def unpacked(step: Step, output: Any) -> Tensor:
    """Return the prediction of a denoiser whose tokens are 2 x 2 latent pixels."""
    return unpack(output, step.noisy)


def unflattened(step: Step, output: Any) -> Tensor:
    """Return the prediction of a denoiser whose tokens are single latent pixels."""
    return unflat(output, step.noisy)


def encoding_references(
    encode: Callable[[Pipeline, Tensor], Tensors],
) -> Callable[[Pipeline, Sequence[Tensor], Tensor | None], Tensors]:
    """Return a function that encodes reference pictures to their most likely latents, named by number."""

    def encode_references(pipe: Pipeline, pictures: Sequence[Tensor], mask: Tensor | None) -> Tensors:
        return {f"reference_{number}": encode(pipe, picture)["mean"] for number, picture in enumerate(pictures)}

    return encode_references


def reference_latents(step: Step) -> list[Tensor]:
    """Return the latents of the reference pictures in their order, in the dtype of the denoiser."""
    names = [f"reference_{number}" for number in range(len(step.references))]
    return [step[name] for name in names if name in step.references]
