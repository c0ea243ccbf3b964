"""Which strength an adapter layer gets from what the user wrote: a number or a schedule, or these by path prefix."""

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import TypeAlias, TypeVar

from diffadapt.errors import AdapterError
from diffadapt.strengths.schedules import Moment, Schedule

Amount: TypeAlias = float | Schedule
Strength: TypeAlias = Amount | Mapping[str, Amount]
NumericStrength: TypeAlias = float | Mapping[str, float]
A = TypeVar("A", bound=Amount)


class SharedStrengths(dict[str, A]):
    """Strengths by prefix that were not written for one adapter, such as lists of block weights that people share.

    It is no error that an adapter has no layer under some of the prefixes; it is if it has none under any of them.
    """


def check_strength(name: str, strength: object) -> None:
    """Refuse what is no strength for adapter `name`: a finite number, a schedule, or a mapping of prefixes to these."""
    values = list(strength.values()) if isinstance(strength, Mapping) else [strength]
    for value in values:
        if isinstance(value, Schedule):
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise AdapterError(f"scale of adapter {name!r} is {value!r}, expected a finite number")


def is_scheduled(strength: Strength) -> bool:
    """Whether it changes during a run."""
    values = strength.values() if isinstance(strength, Mapping) else (strength,)
    return any(isinstance(value, Schedule) for value in values)


def numbers_at(strength: Strength, moment: Moment) -> NumericStrength:
    """The numbers at a moment of a run."""

    def number(amount: Amount) -> float:
        return amount.at(moment) if isinstance(amount, Schedule) else float(amount)

    if isinstance(strength, Mapping):
        return {prefix: number(amount) for prefix, amount in strength.items()}
    return number(strength)


def resolve_prefixes(strength: NumericStrength, paths: Sequence[str]) -> tuple[list[float], set[str]]:
    """One strength per path, and the prefixes that had an effect.

    The longest matching prefix wins; a path that no prefix names has the strength 1. A prefix matches whole path
    components: "unet.up_blocks.1" covers "unet.up_blocks.1.resnets.0.conv1" and not "unet.up_blocks.10". The prefix ""
    is for what no other one covers, and is not among those that had an effect.

    Args:
        paths: sorted.
    """
    if not isinstance(strength, Mapping):
        return [float(strength)] * len(paths), set()
    values = [float(strength.get("", 1.0))] * len(paths)
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
