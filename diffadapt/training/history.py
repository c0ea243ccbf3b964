"""What happened in a run, step by step: for the progress bar, trackers, checkpoints and the report page."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from diffadapt.errors import UsageError
from diffadapt.training.options import TrainingOptions
from diffadapt.training.processes import sum_of

BANDS = 4
"""Number of bands of noise levels, from clean to noise."""


@dataclass
class History:
    """The numbers of every step.

    Attributes:
        steps: one entry per step: "step", "loss", "lr", "gradient_norm", "prior" and "band_0" ... as far as there are.
        held_out: one entry per measurement: "step" and the loss at fixed noise, by share of noise.
        previews: one entry per sheet: "step" and the name of its file.
    """

    steps: list[dict[str, float]] = field(default_factory=list[dict[str, float]])
    held_out: list[dict[str, float]] = field(default_factory=list[dict[str, float]])
    previews: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])

    def state(self) -> dict[str, Any]:
        """Return the history as JSON can hold it."""
        return {"steps": self.steps, "held_out": self.held_out, "previews": self.previews}

    @classmethod
    def of(cls, state: dict[str, Any]) -> "History":
        """Return the history that `state` returned."""
        return cls(state["steps"], state["held_out"], state["previews"])


class Bands:
    """The mean loss in each band of noise levels, over the batches of one step of all processes."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.sums = [0.0] * BANDS
        self.counts = [0] * BANDS

    def add(self, levels: Tensor, losses: Tensor) -> None:
        """Add the losses of samples at noise levels from 0 to 1."""
        for level, loss in zip(levels.tolist(), losses.tolist(), strict=True):
            band = min(int(level * BANDS), BANDS - 1)
            self.sums[band] += loss
            self.counts[band] += 1

    def means(self) -> dict[str, float]:
        """Return band -> mean loss, for bands with samples."""
        totals = sum_of([*self.sums, *map(float, self.counts)], self.device)
        found = zip(totals[:BANDS], totals[BANDS:], strict=True)
        return {f"band_{number}": total / count for number, (total, count) in enumerate(found) if count}


class Smoothed:
    """The mean of the last values, for the progress bar."""

    def __init__(self, size: int = 50) -> None:
        self.values: deque[float] = deque(maxlen=size)

    def add(self, value: float) -> float:
        """Add a value and return the mean."""
        self.values.append(value)
        return sum(self.values) / len(self.values)


def tracker_names(options: TrainingOptions) -> list[str]:
    """Return the trackers to report to.

    Raises:
        UsageError: one that was asked for is not installed.
    """
    if options.report_to == "none":
        return []
    if options.report_to is None:
        return ["tensorboard"] if find_spec("tensorboard") else []
    names = [name.strip() for name in options.report_to.split(",")]
    for name in names:
        if find_spec(name) is None:
            raise UsageError(f"--report_to {name} needs the package {name}: pip install {name}; or pass none")
    return names


def start_trackers(
    accelerator: Accelerator, options: TrainingOptions, names: Sequence[str], config: dict[str, Any]
) -> None:
    """Start the trackers with the options of the run."""
    if names:
        plain = {
            name: value if isinstance(value, (int, float, str, bool)) else str(value) for name, value in config.items()
        }
        accelerator.init_trackers("diffadapt", plain)
