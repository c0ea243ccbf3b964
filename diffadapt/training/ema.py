"""An exponential moving average of the trained parameters."""

from collections.abc import Sequence

import torch
from torch import Tensor


class Average:
    """The average of parameters, with the decay min(decay, (1 + k) / (10 + k)) after k steps, as in diffusers.

    Attributes:
        values: the averages, float32, in the order of the parameters.
        steps: the number of updates.
    """

    def __init__(self, parameters: Sequence[Tensor], decay: float) -> None:
        self.parameters = list(parameters)
        self.decay = decay
        self.values = [parameter.detach().clone() for parameter in self.parameters]
        self.steps = 0

    @torch.no_grad()
    def update(self) -> None:
        """Take the present parameters into the average."""
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        for value, parameter in zip(self.values, self.parameters, strict=True):
            value.lerp_(parameter.detach(), 1 - decay)

    def write(self) -> None:
        """Put the averages into the parameters for good."""
        write_values(self.parameters, self.values)

    def state_dict(self) -> dict[str, object]:
        """Return the averages and the number of updates."""
        return {"values": self.values, "steps": self.steps}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Continue from what `state_dict` returned."""
        values, steps = state["values"], state["steps"]
        assert isinstance(values, list)
        assert isinstance(steps, int)
        write_values(self.values, values)
        self.steps = steps


@torch.no_grad()
def write_values(targets: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Write `values` into `targets`."""
    for target, value in zip(targets, values, strict=True):
        target.copy_(value)
