"""Masks of a picture, as users have them: tensors, arrays and images."""

import math
from typing import Any

import torch
from torch import Tensor

from diffadapt.errors import AdapterError

_SHAPES = "(height, width), (1, height, width) or (prompts, height, width)"


def as_mask(name: str, mask: Any) -> Tensor:
    """Return a mask as a new tensor of shape (prompts or 1, height, width), in float64.

    Args:
        name: the name of the adapter in messages.
        mask: numbers from 0 to 1, or booleans: a tensor, an array or nested lists of shape (height, width), (prompts,
            height, width) or (prompts, 1, height, width); or a grey or black and white PIL image, where white is 1.

    Raises:
        AdapterError: it is none of these, empty, or has values that are not from 0 to 1.
    """
    subject = f"regions: the mask of {name!r}"
    tensor = _of_image(subject, mask) if hasattr(mask, "getbands") else _of_numbers(subject, mask)
    tensor = tensor.detach().to("cpu", torch.float64)
    shape = tuple(tensor.shape)
    if tensor.ndim == 4 and tensor.shape[1] == 1:
        tensor = tensor.squeeze(1)
    if tensor.ndim == 2:
        tensor = tensor.unsqueeze(0)
    if tensor.ndim != 3 or not tensor.numel():
        raise AdapterError(f"{subject} has the shape {shape}, expected {_SHAPES}")
    least, most = float(tensor.min()), float(tensor.max())
    if math.isnan(least) or math.isnan(most):
        raise AdapterError(f"{subject} has values that are not numbers (NaN), expected 0 to 1")
    if least < 0 or most > 1:
        remedy = "; divide it by 255" if least >= 0 and 1 < most <= 255 else ""
        raise AdapterError(f"{subject} has values from {least:g} to {most:g}, expected 0 to 1{remedy}")
    return tensor.clone()


def _of_image(subject: str, image: Any) -> Tensor:
    """Return a PIL image as a tensor (height, width) with values from 0 to 1."""
    if image.mode not in ("1", "L", "RGB"):
        raise AdapterError(
            f"{subject} is an image of mode {image.mode!r}, expected a grey one; call convert('L'), or getchannel('A') "
            "to use its transparency"
        )
    grey = image.convert("L")
    if image.mode == "RGB" and image.tobytes() != grey.convert("RGB").tobytes():
        raise AdapterError(f"{subject} is an image with colours, expected a grey one; call convert('L')")
    return torch.frombuffer(bytearray(grey.tobytes()), dtype=torch.uint8).view(grey.height, grey.width).double() / 255


def _of_numbers(subject: str, mask: Any) -> Tensor:
    """Return a tensor, an array or nested lists as a tensor."""
    try:
        tensor = torch.as_tensor(mask)
    except (TypeError, ValueError, RuntimeError) as error:
        raise AdapterError(
            f"{subject} is a {type(mask).__name__} that is no mask ({error}); expected a tensor, an array or a PIL "
            f"image of shape {_SHAPES}"
        ) from error
    if tensor.is_complex() or tensor.is_meta:
        raise AdapterError(f"{subject} has no real numbers; expected values from 0 to 1")
    return tensor
