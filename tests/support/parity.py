"""Comparison with the layers of another library, relative to what an adapter changes."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

import diffadapt

_LEAST_CHANGE = 0.02
"""What an adapter must change, relative to the largest output without it."""


def error(actual: Tensor, expected: Tensor, base: Tensor) -> float:
    """Return the error relative to the adapter's change, which must not be small."""
    actual, expected, base = actual.detach(), expected.detach(), base.detach()
    change = (expected - base).abs().max()
    assert change > _LEAST_CHANGE * base.abs().max()
    assert actual.isfinite().all()
    return float((actual - expected).abs().max() / change)


def assert_equal_and_sensitive(model: nn.Module, expected: Mapping[str, Tensor]) -> None:
    """Assert that our outputs, unmerged and merged, are `expected`, and that they are not at another strength.

    Args:
        model: what is called with the names of layers and returns their outputs; without arguments, its class makes one
            without adapters.
        expected: layer -> output.
    """
    make: Any = type(model)
    base, adapters = make()(*expected), diffadapt.adapters(model)
    with torch.no_grad():
        forward = model(*expected)
        adapters.merge()
        merged = model(*expected)
        adapters.unmerge()
        adapters.activate(dict.fromkeys(adapters.names, 1.001))
        other = model(*expected)
        adapters.activate(adapters.names)
    for name, tensor in expected.items():
        assert error(forward[name], tensor, base[name]) < 1e-5, name
        assert error(merged[name], tensor, base[name]) < 1e-5, name
        assert error(other[name], tensor, base[name]) > 5e-4, name
