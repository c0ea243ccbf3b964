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
    """Say how far values (out, in) are from what a linear layer computes; `None` if they agree, or nobody can tell."""
    inputs = values.shape[1]
    numbers = torch.linspace(0, inputs - 1, min(_COLUMNS, inputs), dtype=torch.float64).long().tolist()
    try:
        own = columns_of(layer, numbers)
    except AdapterError:
        return None
    decoded = values[:, numbers].to(own)
    error = float((decoded - own).norm() / own.norm().clamp_min(torch.finfo(own.dtype).tiny))
    if error <= _TOLERANCE:
        return None
    return (
        f"the weight of a {type(layer).__name__} reads as numbers that its own forward does not compute with (relative "
        f"error {error:.2g} on {len(numbers)} columns)"
    )


def _device(layer: nn.Module) -> torch.device:
    tensors: list[Any] = [*layer.parameters(), *layer.buffers()]
    return next((tensor.device for tensor in tensors if tensor.device.type != "meta"), torch.device("cpu"))
