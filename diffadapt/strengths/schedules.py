"""Strengths that change during a run: pure functions of where a denoising loop is.

A schedule goes wherever `pipe.adapters.activate` takes a number. The position it reads is one of

* "fraction": 0 at the first step of a run, 1 at its last, `i / (n - 1)` at step i of n;
* "step": i, from 0;
* "sigma": the noise level of the step as the scheduler counts it, from large to small.

A step is one of the scheduler's: the two evaluations that a second-order scheduler (Heun) needs for it are one step.
"""

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias, get_args

from diffadapt.errors import AdapterError

Axis: TypeAlias = Literal["fraction", "step", "sigma"]


@dataclass(frozen=True)
class Moment:
    """Where a run is.

    Attributes:
        step: from 0.
        steps: how many the run has, from the one it begins with.
        noise: gives sigma; a call, because reading it may wait for a GPU.
    """

    step: int
    steps: int
    noise: Callable[[], float] = field(compare=False)

    def on(self, axis: Axis) -> float:
        """Position on an axis."""
        if axis == "sigma":
            return self.noise()
        return self.step / max(1, self.steps - 1) if axis == "fraction" else self.step


START = Moment(0, 1, lambda: math.inf)
"""Before a run: what text encoders see, and what is set when a schedule is activated."""


@dataclass(frozen=True)
class Schedule:
    """A strength as a function of the position in a run."""

    def at(self, moment: Moment) -> float:
        """The strength at `moment`."""
        raise NotImplementedError


@dataclass(frozen=True)
class Linear(Schedule):
    """A straight ramp from `start` to `end`; before and after it the value stays.

    Attributes:
        between: the positions of `start` and `end`; default the whole run. Required on the other axes, and descending
            where positions are: `Linear(1.0, 0.2, between=(14.6, 0.5), over="sigma")`.
        over: the axis of the positions.
    """

    start: float
    end: float
    between: tuple[float, float] | None = None
    over: Axis = "fraction"

    def __post_init__(self) -> None:
        _check_axis(self.over)
        if self.between is None and self.over != "fraction":
            raise AdapterError(f"{type(self).__name__}: between=(first, last) expected with over={self.over!r}")
        ends = self._between
        _check_finite(type(self).__name__, (self.start, self.end, *ends))
        if len(ends) != 2 or ends[0] == ends[1]:
            raise AdapterError(f"{type(self).__name__}: between is {ends}, expected two different positions")

    @property
    def _between(self) -> tuple[float, float]:
        return (0.0, 1.0) if self.between is None else self.between

    def at(self, moment: Moment) -> float:
        first, last = self._between
        share = self._eased(min(1.0, max(0.0, (moment.on(self.over) - first) / (last - first))))
        return self.start * (1 - share) + self.end * share

    def _eased(self, share: float) -> float:
        return share


@dataclass(frozen=True)
class Cosine(Linear):
    """Like `Linear`, but slow at both ends: half a period of a cosine."""

    def _eased(self, share: float) -> float:
        return (1 - math.cos(math.pi * share)) / 2


@dataclass(frozen=True)
class Piecewise(Schedule):
    """Values at positions, and straight lines between them; before the first and after the last the value stays.

    Two values at one position are a jump: the second one counts from there on.

    Attributes:
        points: `(position, value)`, positions ascending on every axis.
        hold: keep each value up to the next position instead.
        over: the axis of the positions.
    """

    points: Sequence[tuple[float, float]]
    hold: bool = False
    over: Axis = "fraction"

    def __post_init__(self) -> None:
        _check_axis(self.over)
        points = tuple((position, value) for position, value in self.points)
        object.__setattr__(self, "points", points)
        _check_finite("Piecewise", [number for point in points for number in point])
        positions = [position for position, _ in points]
        if not points or positions != sorted(positions):
            raise AdapterError(f"Piecewise: points are {points}, expected at least one, with ascending positions")

    def at(self, moment: Moment) -> float:
        position, points = moment.on(self.over), self.points
        index = bisect_right(points, position, key=lambda point: point[0])
        if index == 0 or index == len(points) or self.hold:
            return points[max(0, index - 1)][1]
        (left, value), (right, following) = points[index - 1], points[index]
        share = (position - left) / (right - left)
        return value * (1 - share) + following * share


def _check_axis(axis: str) -> None:
    if axis not in get_args(Axis):
        raise AdapterError(f"over is {axis!r}, expected one of {', '.join(get_args(Axis))}")


def _check_finite(what: str, numbers: Sequence[object]) -> None:
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, (int, float)) or not math.isfinite(number):
            raise AdapterError(f"{what}: {number!r} is no finite number")
