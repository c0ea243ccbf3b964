"""Which strength an adapter layer gets from what the user wrote: a number, or numbers by path prefix."""

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import TypeAlias

from diffadapt.errors import AdapterError

Strength: TypeAlias = float | Mapping[str, float]


def check(name: str, strength: object) -> None:
    """Refuse what is no strength for adapter `name`: a finite number, or a mapping of prefixes to finite numbers."""
    values = list(strength.values()) if isinstance(strength, Mapping) else [strength]
    for value in values:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise AdapterError(f"scale of adapter {name!r} is {value!r}, expected a finite number")


def resolve(strength: Strength, paths: Sequence[str]) -> tuple[list[float], set[str]]:
    """One strength per path, and the prefixes that had an effect.

    The longest matching prefix wins; a path that no prefix names has the strength 1. A prefix matches whole path
    components: "unet.up_blocks.1" covers "unet.up_blocks.1.resnets.0.conv1" and not "unet.up_blocks.10".

    Args:
        paths: sorted.
    """
    if not isinstance(strength, Mapping):
        return [float(strength)] * len(paths), set()
    values = [1.0] * len(paths)
    matched: set[str] = set()
    # Longer prefixes come later and overwrite. What a prefix covers stands together in sorted paths: itself, and what
    # begins with it and a dot, up to the character after the dot.
    for prefix in sorted(strength, key=len):
        own, start, stop = (bisect_left(paths, prefix + end) for end in ("", ".", "/"))
        here = [own, *range(start, stop)] if own < len(paths) and paths[own] == prefix else range(start, stop)
        for index in here:
            values[index] = float(strength[prefix])
        if here:
            matched.add(prefix)
    return values, matched
