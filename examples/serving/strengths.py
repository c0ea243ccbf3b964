"""Strengths as JSON spells them, read into what `pipe.adapters.activate` takes.

| JSON | strength |
|---|---|
| `0.8` | everywhere |
| `[[0, 1.0], [0.5, 0.0]]` | values at positions, as in `parse_prompt`, with straight lines between them |
| `{"unet.up_blocks": 0.8, "": 0}` | by prefix, each a number or values at positions |
| `{"block_weights": [1, 0, ...]}` | the lists of block weights that people share (`diffadapt.block_weights`) |
"""

import math
from collections.abc import Mapping
from typing import Any

import diffadapt

LARGEST = 10.0
"""The largest strength in either direction. Beyond it pictures are noise."""


def read_strength(value: Any) -> Any:
    """Return the strength that a JSON value spells.

    Raises:
        ValueError: the value spells none, or one that is too large. The message starts with what is wrong.
    """
    if not isinstance(value, dict):
        return _amount(value)
    if list(value) == ["block_weights"]:
        weights = value["block_weights"]
        if not isinstance(weights, list):
            raise ValueError(f"block_weights is {weights!r}, expected a list of numbers")
        return diffadapt.block_weights([_number(weight) for weight in weights])
    if not value:
        raise ValueError(f'{value!r} has no prefix, expected such as {{"unet.up_blocks": 0.8, "": 0}}')
    return {prefix: _amount(amount) for prefix, amount in value.items()}


def refuse_large(strength: Any) -> None:
    """Raise `ValueError` if a strength is nowhere within `LARGEST`; tags in prompts can spell any number."""
    for amount in strength.values() if isinstance(strength, Mapping) else [strength]:
        values = [value for _, value in amount.points] if isinstance(amount, diffadapt.Piecewise) else [amount]
        for value in values:
            _number(value)


def _amount(value: Any) -> float | diffadapt.Piecewise:
    """Return a number, or values at positions."""
    if not isinstance(value, list):
        return _number(value)
    if not value or any(not isinstance(point, list) or len(point) != 2 for point in value):
        raise ValueError(f"{value!r} is no list of [position, strength]")
    points = [(_finite(position), _number(amount)) for position, amount in value]
    return diffadapt.Piecewise(points, over="step" if max(points)[0] > 1 else "fraction")


def _number(value: Any) -> float:
    """Return a strength that is a number."""
    number = _finite(value)
    if abs(number) > LARGEST:
        raise ValueError(f"{value!r} is too large, expected -{LARGEST:g} to {LARGEST:g}")
    return number


def _finite(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{value!r} is no finite number")
    return float(value)
