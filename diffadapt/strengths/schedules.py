"""Schedules: strengths that are pure functions of the position in a denoising run.

`pipe.adapters.activate` accepts a schedule wherever it accepts a number. A schedule reads its position on one of three
axes:

* "fraction": 0 at the first step of a run and 1 at the last, so `i / (n - 1)` at step i of n;
* "step": the number i of the step, from 0;
* "sigma": the noise level of the step in the scheduler's units, which decreases during the run.

Steps are those of the scheduler. The two evaluations of the denoiser that a second-order scheduler (Heun) makes for a
step count as one step.
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
    """A position in a run.

    Attributes:
        step: the number of the current step, from 0.
        steps: the number of steps in the run, without any that it skips at the start.
        noise: returns sigma. It is a function because reading sigma may have to wait for the GPU.
        begins: whether the run begins now.
    """

    step: int
    steps: int
    noise: Callable[[], float] = field(compare=False)
    begins: bool = field(default=False, compare=False)

    def on(self, axis: Axis) -> float:
        """Return the position on an axis."""
        if axis == "sigma":
            return self.noise()
        return self.step / max(1, self.steps - 1) if axis == "fraction" else self.step


START = Moment(0, 1, lambda: math.inf)
"""The moment before a run. Text encoders get the strength at this moment, and so does a newly activated schedule."""


@dataclass(frozen=True)
class Schedule:
    """A strength as a function of the position in a run."""

    def at(self, moment: Moment) -> float:
        """Return the strength at `moment`."""
        raise NotImplementedError

    @property
    def last_step(self) -> float | None:
        """The last step that the schedule names; `None` if its positions are no steps."""
        return None


@dataclass(frozen=True)
class Linear(Schedule):
    """A straight ramp from `start` to `end`, constant before and after it.

    Attributes:
        start: the strength at the first position and before it.
        end: the strength at the second position and after it.
        between: the positions of `start` and `end`. Defaults to the whole run, which is possible only over "fraction".
            Sigma decreases during a run: `Linear(1.0, 0.2, between=(14.6, 0.5), over="sigma")`.
        over: the axis of the positions.

    Raises:
        AdapterError: a number is not finite, the axis is unknown, or the positions are missing, equal, in the wrong
            order (a run goes up in fractions and steps, and down in sigma) or in no run.
    """

    start: float
    end: float
    between: tuple[float, float] | None = None
    over: Axis = "fraction"

    def __post_init__(self) -> None:
        _check_axis(self.over)
        if self.between is None and self.over != "fraction":
            raise AdapterError(f"{type(self).__name__}: between=(first, last) expected with over={self.over!r}")
        positions = self._positions
        _check_finite(type(self).__name__, (self.start, self.end, *positions))
        if len(positions) != 2 or positions[0] == positions[1]:
            raise AdapterError(f"{type(self).__name__}: between is {positions}, expected two different positions")
        _check_range(type(self).__name__, positions, self.over)
        if (positions[0] > positions[1]) != (self.over == "sigma"):
            raise AdapterError(
                f"{type(self).__name__}: between is {positions}, expected the earlier position first, and so "
                + ("the larger sigma" if self.over == "sigma" else f"the smaller {self.over}")
            )

    @property
    def _positions(self) -> tuple[float, float]:
        return (0.0, 1.0) if self.between is None else self.between

    @property
    def last_step(self) -> float | None:
        return self._positions[1] if self.over == "step" else None

    def at(self, moment: Moment) -> float:
        first, last = self._positions
        progress = self._eased(min(1.0, max(0.0, (moment.on(self.over) - first) / (last - first))))
        return self.start * (1 - progress) + self.end * progress

    def _eased(self, progress: float) -> float:
        return progress


@dataclass(frozen=True)
class Cosine(Linear):
    """A ramp like `Linear`, but shaped as half a period of a cosine, so that it is slow at both ends."""

    def _eased(self, progress: float) -> float:
        return (1 - math.cos(math.pi * progress)) / 2


@dataclass(frozen=True)
class Piecewise(Schedule):
    """Values at positions, with straight lines between them, constant before the first and after the last position.

    Two values at the same position are a jump: the second one applies from that position on.

    Attributes:
        points: pairs `(position, value)`, with ascending positions on every axis, also on "sigma".
        hold: whether each value stays constant up to the next position, instead of the straight line.
        over: the axis of the positions.

    Raises:
        AdapterError: a number is not finite, the axis is unknown, or the points are missing, not in order or in no run.
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
        _check_range("Piecewise", positions, self.over)

    @property
    def last_step(self) -> float | None:
        return self.points[-1][0] if self.over == "step" else None

    def at(self, moment: Moment) -> float:
        position, points = moment.on(self.over), self.points
        index = bisect_right(points, position, key=lambda point: point[0])
        if index == 0 or index == len(points) or self.hold:
            return points[max(0, index - 1)][1]
        (left, left_value), (right, right_value) = points[index - 1], points[index]
        progress = (position - left) / (right - left)
        return left_value * (1 - progress) + right_value * progress


def _check_axis(axis: str) -> None:
    """Raise `AdapterError` if there is no such axis."""
    if axis not in get_args(Axis):
        raise AdapterError(f"over is {axis!r}, expected one of {', '.join(get_args(Axis))}")


def _check_range(schedule: str, positions: Sequence[float], axis: Axis) -> None:
    """Raise `AdapterError` if a run has no such positions."""
    most = 1.0 if axis == "fraction" else math.inf
    for position in positions:
        if not 0 <= position <= most:
            found = f"{schedule}: the position {position!r} over {axis!r} is in no run, expected "
            raise AdapterError(found + ("0 to 1" if axis == "fraction" else "at least 0"))


def _check_finite(schedule: str, numbers: Sequence[object]) -> None:
    """Raise `AdapterError` for an argument of `schedule` that is not a finite number."""
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, (int, float)) or not math.isfinite(number):
            raise AdapterError(f"{schedule}: {number!r} is no finite number")
