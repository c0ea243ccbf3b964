"""Asking a layer for the gradient to its input, which quantised layers may drop or get wrong without an error.

An adapter further down learns from this gradient alone. Nothing is assumed of a backend: the gradient on a few vectors
is compared with the one that the decoded weight gives, once for each class of layer and storage.
"""

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffadapt.errors import AdapterError
from diffadapt.weights import codec_of, decoded
from diffadapt.weights.codec import WeightCodec
from diffadapt.weights.plain import PLAIN
from diffadapt.weights.resting import resting_tensor

_TOLERANCE = 0.1
"""Relative error that a gradient may have: a backend may also quantise what it multiplies in the backward pass."""

_VECTORS = 4
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_ORDINARY = frozenset({torch.float64, torch.float32, torch.float16, torch.bfloat16})
_CONVOLUTIONS = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}


@dataclass(frozen=True)
class GradientProblem:
    """What is wrong with the gradient to the input of the layers of one class and storage.

    Attributes:
        text: continues a sentence whose subject is these layers ("pass no gradient to their input").
        silent: whether training would go on without an error.
        codec: how the layers store their weight.
    """

    text: str
    silent: bool
    codec: WeightCodec


_PROBED: dict[Hashable, GradientProblem | None] = {}
"""What was found, by class of layer, codec, storage and kind of device."""


def needs_probe(layer: nn.Module) -> bool:
    """Return whether a layer maps features and computes with something else than an ordinary floating-point weight."""
    features = getattr(layer, "in_features", None) or getattr(layer, "in_channels", None)
    if type(features) is not int:
        return False
    weight = layer._parameters.get("weight")
    try:
        codec = codec_of(layer, "weight")
    except AdapterError:
        return False
    return codec is not PLAIN or weight is None or weight.dtype not in _ORDINARY


def gradient_storage(layer: nn.Module) -> Hashable:
    """Return what decides how a layer that `needs_probe` computes gradients; equal for layers that do it alike."""
    tensor, codec = resting_tensor(layer, "weight"), codec_of(layer, "weight")
    flatten = getattr(tensor, "__tensor_flatten__", None)
    # One class of tensor stands for several ways to compute (torchao), and one layer may change in use (bitsandbytes).
    details = repr(flatten()[1]) if flatten is not None else ""
    layout = codec.layout(layer, "weight") if codec.layout is not None and tensor is not None else {}
    flags = frozenset((name, value) for name, value in layout.items() if isinstance(value, (bool, str)))
    kind = None if tensor is None else (type(tensor), tensor.dtype, _device(layer).type)
    return vars(type(layer)).get("_diffadapt_base", type(layer)), codec.name, kind, details, flags


def is_rewritten_in_use(layer: nn.Module) -> bool:
    """Return whether the backend of a layer may write its weight anew when it is used, to another place."""
    return codec_of(layer, "weight").layout is not None


def gradient_problem(layer: nn.Module) -> GradientProblem | None:
    """Return what is wrong with the gradient to the input of a layer that `needs_probe`; `None` if nothing is known.

    Runs the layer only if it is the first of its class and storage.
    """
    key = gradient_storage(layer)
    if key not in _PROBED:
        # Also where gradients are off, and under inference mode, whose tensors have none.
        with torch.inference_mode(False), torch.enable_grad():
            _PROBED[key] = _probe(layer)
    return _PROBED[key]


def _probe(layer: nn.Module) -> GradientProblem | None:
    codec = codec_of(layer, "weight")
    generator = torch.Generator().manual_seed(0)
    input = _input(layer, generator)
    dtype = next((dtype for dtype in _DTYPES if _runs(layer, input.to(dtype))), None)
    if dtype is None:
        return None
    input = input.to(dtype).requires_grad_(True)
    try:
        output: Tensor = layer.forward(input)
        sent = torch.randn(output.shape, generator=generator).to(output)
        found = torch.autograd.grad(output, input, sent, allow_unused=True)[0] if output.requires_grad else None
    except Exception as error:  # which errors a foreign backward raises depends on the backend
        text = f"cannot compute the gradient to their input here ({type(error).__name__}: {_first_line(error)})"
        return GradientProblem(text, codec is not PLAIN, codec)
    if found is None:
        return GradientProblem("pass no gradient to their input", True, codec)
    expected = _expected(layer, input.detach().float(), sent.float())
    if expected is None:
        return None
    error = float((found.float() - expected).norm() / expected.norm().clamp_min(torch.finfo(torch.float32).tiny))
    if error <= _TOLERANCE:
        return None
    return GradientProblem(f"pass a wrong gradient to their input (relative error {error:.2g})", True, codec)


def _input(layer: Any, generator: torch.Generator) -> Tensor:
    features = getattr(layer, "in_features", None)
    if features is not None:
        shape = (_VECTORS, features)
    else:
        sizes = [
            dilation * (kernel - 1) + 2 for kernel, dilation in zip(layer.kernel_size, layer.dilation, strict=True)
        ]
        shape = (1, layer.in_channels, *sizes)
    return torch.randn(shape, generator=generator).to(_device(layer))


def _runs(layer: nn.Module, input: Tensor) -> bool:
    """Return whether a layer can be run by itself in the dtype of an input."""
    try:
        # The input requires gradients, or bitsandbytes would take this for inference and repack the weight.
        with torch.no_grad():
            layer.forward(input.requires_grad_(True))
    except Exception:  # which errors a foreign forward raises for a dtype depends on the backend
        return False
    return True


def _expected(layer: Any, input: Tensor, sent: Tensor) -> Tensor | None:
    """Return the gradient to the input that the decoded weight gives; `None` if it is not known."""
    try:
        values = decoded(layer, "weight").to(input)
        input.requires_grad_(True)
        if values.ndim == 2:
            output = F.linear(input, values)
        elif getattr(layer, "padding_mode", "") == "zeros" and not getattr(layer, "transposed", False):
            geometry = layer.stride, layer.padding, layer.dilation, layer.groups
            output = _CONVOLUTIONS[values.ndim](input, values, None, *geometry)
        else:
            return None
        return torch.autograd.grad(output, input, sent)[0]
    except (AdapterError, RuntimeError):
        return None


def _device(layer: nn.Module) -> torch.device:
    tensors: list[Any] = [*layer.parameters(), *layer.buffers()]
    return next((tensor.device for tensor in tensors if tensor.device.type != "meta"), torch.device("cpu"))


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
