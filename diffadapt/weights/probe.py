"""Asking a layer what it computes, to settle doubts about what its stored weight means."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diffadapt.errors import AdapterError

_TOLERANCE = 0.05
"""Share of the columns' norm that may differ: layers that also quantise their activations are up to two percent off."""

_COLUMNS = 8
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@torch.no_grad()
def columns_of(layer: nn.Module, numbers: Sequence[int]) -> Tensor:
    """Return columns of the weight that a linear layer computes with, (out, columns), from its own forward.

    Raises:
        AdapterError: the layer cannot be run by itself.
    """
    inputs: int = layer.in_features  # type: ignore[assignment]
    units = torch.zeros(len(numbers) + 1, inputs)
    units[torch.arange(len(numbers)), torch.tensor(list(numbers))] = 1.0
    device = _device(layer)
    problem: Exception | None = None
    for dtype in _DTYPES:
        try:
            output: Tensor = layer.forward(units.to(device, dtype))
        except Exception as error:  # which errors a foreign forward raises for a dtype depends on the backend
            problem = problem or error
            continue
        output = output.float()
        return (output[:-1] - output[-1]).mT
    raise AdapterError(f"a {type(layer).__name__} cannot be run by itself to find out its weight ({problem})")


def disagreement(layer: nn.Module, values: Tensor) -> str | None:
    """Say how far a decoded weight is from what a layer computes; `None` if they agree, or nobody can tell.

    Args:
        layer: a linear layer, an embedding, or a convolution of torch's classes.
        values: its weight, in the orientation that the layer stores.
    """
    try:
        own, decoded = _compared(layer, values)
    except AdapterError:
        return None
    if own.shape != decoded.shape:
        found = f"outputs of shape {tuple(own.shape)}, expected {tuple(decoded.shape)}"
    else:
        error = float((decoded.to(own) - own).norm() / own.norm().clamp_min(torch.finfo(own.dtype).tiny))
        if error <= _TOLERANCE:
            return None
        found = f"relative error {error:.2g}"
    return (
        f"the weight of a {type(layer).__name__} reads as numbers that its own forward does not compute with ({found})"
    )


@torch.no_grad()
def _compared(layer: Any, values: Tensor) -> tuple[Tensor, Tensor]:
    """Return what a layer computes for a few inputs, and what it would with a decoded weight.

    Raises:
        AdapterError: the layer cannot be run by itself.
    """
    if isinstance(layer, nn.Embedding):
        ids = torch.tensor(_spaced(len(values)), device=_device(layer))
        own = _alone(layer, ids)
        # Word embeddings may scale what they return.
        return own / own.norm().clamp_min(1e-30), values[ids] / values[ids].norm().clamp_min(1e-30)
    if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        sizes = [2 * dilation * kernel for dilation, kernel in zip(layer.dilation, layer.kernel_size, strict=True)]
        generator = torch.Generator().manual_seed(0)
        input = torch.randn(1, layer.in_channels, *sizes, generator=generator).to(_device(layer))
        own = _alone(layer, input) - _alone(layer, torch.zeros_like(input))
        return own, layer._conv_forward(input, values.to(input), None)
    numbers = _spaced(values.shape[1])
    return columns_of(layer, numbers), values[:, numbers]


def _alone(layer: nn.Module, input: Tensor) -> Tensor:
    try:
        return layer.forward(input).as_subclass(Tensor).float()
    except Exception as error:  # which errors a foreign forward raises depends on the backend
        raise AdapterError(f"a {type(layer).__name__} cannot be run by itself ({error})") from error


def _spaced(count: int) -> list[int]:
    return torch.linspace(0, count - 1, min(_COLUMNS, count), dtype=torch.float64).long().tolist()


def _device(layer: nn.Module) -> torch.device:
    tensors: list[Any] = [*layer.parameters(), *layer.buffers()]
    return next((tensor.device for tensor in tensors if tensor.device.type != "meta"), torch.device("cpu"))
