"""Strengths as users write them: a number, a schedule, or a mapping from path prefixes to numbers and schedules."""

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import TypeAlias, TypeVar

from diffadapt.errors import AdapterError
from diffadapt.strengths.schedules import Moment, Schedule

Amount: TypeAlias = float | Schedule
NumericStrength: TypeAlias = float | Mapping[str, float]
AmountT = TypeVar("AmountT", bound=Amount)


class SampleStrengths(tuple["Strength", ...]):
    """The strengths of one adapter for the samples of a batch, one after the other."""

    __slots__ = ()

    def refuse_missing_steps(self, name: str, steps: int) -> None:
        """Raise `AdapterError` if the schedule of a sample names a step that a run of `steps` steps does not have.

        All rows of a batch are drawn in the same run, so a schedule over steps may be meant for another one.
        """
        for row, strength in enumerate(self):
            for amount in strength.values() if isinstance(strength, Mapping) else (strength,):
                last = amount.last_step if isinstance(amount, Schedule) else None
                if last is not None and last > steps - 1:
                    raise AdapterError(
                        f"per_sample: the schedule of {name!r} in mixes[{row}] goes up to step {last:g}, but this run, "
                        f"which all prompts of the batch share, has the steps 0 to {steps - 1}; give its positions as "
                        "fractions, or draw prompts with another number of steps in a call of their own"
                    )


Strength: TypeAlias = Amount | Mapping[str, Amount] | SampleStrengths


class SharedStrengths(dict[str, AmountT]):
    """Strengths by prefix that were not written for a particular adapter, such as the block weights that people share.

    An adapter need not have layers under every prefix. It is an error only if it has no layer under any of them.
    """


def check_strength(name: str, strength: object) -> None:
    """Check that `strength` is a finite number, a schedule, or a mapping from prefixes to these.

    Args:
        name: the name of the adapter, for the message.
        strength: the object to check.

    Raises:
        AdapterError: it is none of these.
    """
    values = list(strength.values()) if isinstance(strength, Mapping) else [strength]
    for value in values:
        if isinstance(value, Schedule):
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise AdapterError(f"scale of adapter {name!r} is {value!r}, expected a finite number")


def is_scheduled(strength: Strength) -> bool:
    """Return whether a strength changes during a run."""
    if isinstance(strength, SampleStrengths):
        return any(map(is_scheduled, strength))
    values = strength.values() if isinstance(strength, Mapping) else (strength,)
    return any(isinstance(value, Schedule) for value in values)


def numbers_at(strength: Amount | Mapping[str, Amount], moment: Moment) -> NumericStrength:
    """Return the strength with every schedule replaced by its value at `moment`."""

    def number(amount: Amount) -> float:
        return amount.at(moment) if isinstance(amount, Schedule) else float(amount)

    if isinstance(strength, Mapping):
        return {prefix: number(amount) for prefix, amount in strength.items()}
    return number(strength)


def resolve_prefixes(strength: NumericStrength, paths: Sequence[str]) -> tuple[list[float], set[str]]:
    """Resolve a strength to one number per path.

    The longest matching prefix applies; a path that no prefix matches has the strength 1. A prefix matches whole path
    components: "unet.up_blocks.1" matches "unet.up_blocks.1.resnets.0.conv1" but not "unet.up_blocks.10". The prefix ""
    applies to the paths that no other prefix matches.

    Args:
        strength: a number, or numbers by prefix.
        paths: the paths of the adapter layers, sorted.

    Returns:
        The strengths in the order of `paths`, and the set of prefixes that match a path. The prefix "" is never in it.
    """
    if not isinstance(strength, Mapping):
        return [float(strength)] * len(paths), set()
    values = [float(strength.get("", 1.0))] * len(paths)
    matched: set[str] = set()
    # Longer prefixes come later and overwrite shorter ones. Sorted paths under a prefix are contiguous: they start with
    # the prefix and a dot, and "/" is the character after the dot. The path equal to the prefix may stand apart.
    for prefix in sorted(strength, key=len):
        own, start, stop = (bisect_left(paths, prefix + end) for end in ("", ".", "/"))
        covered = [own, *range(start, stop)] if own < len(paths) and paths[own] == prefix else range(start, stop)
        for index in covered:
            values[index] = float(strength[prefix])
        if covered:
            matched.add(prefix)
    return values, matched
