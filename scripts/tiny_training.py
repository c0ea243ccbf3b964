"""The training loop that all stages of `train_tiny_pipeline.py` share: optimiser, learning rate, checkpoints."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

CHECKPOINT_EVERY = 250


@dataclass(frozen=True)
class Run:
    """Settings of all stages.

    Attributes:
        work: folder of checkpoints.
        device: device to train on.
        precision: dtype of autocast; float32 for none.
        seed: seed of weights, pictures and noise.
        batch: pictures per step.
    """

    work: Path
    device: torch.device
    precision: torch.dtype
    seed: int
    batch: int

    def autocast(self) -> torch.autocast:
        """Return the autocast context of a forward pass."""
        return torch.autocast(self.device.type, self.precision, enabled=self.precision != torch.float32)

    def generator(self, offset: int = 0) -> torch.Generator:
        """Return a generator on the CPU, so that the numbers are the same on every device."""
        return torch.Generator().manual_seed(self.seed + offset)


def train(
    name: str,
    model: nn.Module,
    loss_of: Callable[[int, torch.Generator], Tensor],
    steps: int,
    run: Run,
    learning_rate: float = 1e-3,
    average: AveragedModel | None = None,
) -> None:
    """Train a model with AdamW, warm-up and cosine decay. Resume from `work/name.pt` and save the final state there.

    Args:
        name: name of the checkpoint file.
        model: the model to train.
        loss_of: returns the loss of a step, given its number and the random generator.
        steps: number of steps in all.
        run: settings of all stages.
        learning_rate: the largest learning rate.
        average: moving average of the weights, updated in every step.
    """
    path = run.work / f"{name}.pt"
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, learning_rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    generator = run.generator()
    start = 0
    if path.exists():
        state = torch.load(path, map_location=run.device)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        generator.set_state(state["generator"].cpu())
        if average is not None:
            average.load_state_dict(state["average"])
        start = state["step"]
    running = None
    progress = tqdm(range(start, steps), name, initial=start, total=steps, mininterval=10)
    for step in progress:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * _schedule(step, steps)
        loss = loss_of(step, generator)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if average is not None:
            average.update_parameters(model)
        running = loss.item() if running is None else 0.99 * running + 0.01 * loss.item()
        progress.set_postfix(loss=f"{running:.4f}", refresh=False)
        if (step + 1) % CHECKPOINT_EVERY == 0 or step + 1 == steps:
            _save_checkpoint(path, step + 1, model, optimizer, generator, average)


def _schedule(step: int, steps: int, warm_up: int = 100) -> float:
    """Return the factor of the learning rate: linear warm-up, then cosine decay to 2 percent."""
    return min(1.0, (step + 1) / warm_up) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))


def _save_checkpoint(
    path: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
    average: AveragedModel | None,
) -> None:
    """Save everything that training needs to continue after `step` steps."""
    state = {
        "step": step,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "generator": generator.get_state(),
        "average": average.state_dict() if average is not None else None,
    }
    temporary = path.with_suffix(".partial")
    torch.save(state, temporary)
    temporary.replace(path)  # an interrupted save never destroys the last good checkpoint
