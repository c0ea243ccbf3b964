"""Which strength an adapter layer gets from what the user wrote: a number, or numbers by path prefix."""

import math
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
    """
    if not isinstance(strength, Mapping):
        return [float(strength)] * len(paths), set()
    values: list[float] = []
    matched: set[str] = set()
    for path in paths:
        prefix = path
        while prefix:
            if prefix in strength:
                matched.add(prefix)
            prefix = prefix.rpartition(".")[0]
        longest = max((key for key in matched if _covers(key, path)), key=len, default=None)
        values.append(1.0 if longest is None else float(strength[longest]))
    return values, matched


def _covers(prefix: str, path: str) -> bool:
    return path == prefix or path.startswith(f"{prefix}.")
