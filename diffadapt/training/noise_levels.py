"""Noise levels, and the mixture of latents and noise at a level; see `families/family.py` for the notation."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from diffadapt.training.families import LevelSampling, Pipeline, Process, TrainingFamily, shifted
from diffadapt.training.randomness import chance

_MODE_SCALE = 1.29
"""The constant of mode sampling in Esser et al., arXiv 2403.03206, section 3.1."""


@dataclass(frozen=True)
class Levels:
    """The distribution of noise levels.

    Attributes:
        distribution: "uniform", "logit-normal" or "mode".
        mean: the mean of logit-normal; above 0 favours noise.
        std: its standard deviation.
        shift: the shift of a flow; `None` for that of the family.
        low: the lowest level, from 0 (clean) to 1 (noise).
        high: the highest level.
    """

    distribution: Literal["uniform", "logit-normal", "mode"] = "uniform"
    mean: float = 0.0
    std: float = 1.0
    shift: float | None = None
    low: float = 0.0
    high: float = 1.0

    def share(self, *key: object) -> float:
        """Return a number in (0, 1) with this distribution for a key, not shifted, 1 for noise."""
        random = chance(*key)
        if self.distribution == "logit-normal":
            return 1 / (1 + math.exp(-random.normal(self.mean, self.std)))
        drawn = float(random.random())
        if self.distribution == "mode":
            drawn = 1 - drawn - _MODE_SCALE * (math.cos(math.pi / 2 * drawn) ** 2 - 1 + drawn)
        return min(max(drawn, 0.0), 1.0)


def levels_of(sampling: str, family: LevelSampling, mean: float, std: float, **further: Any) -> Levels:
    """Return the distribution that `--timestep_sampling` names."""
    if sampling == "family":
        return Levels(family.distribution, family.mean, family.std, **further)
    return Levels({"logit_normal": "logit-normal"}.get(sampling, sampling), mean, std, **further)  # type: ignore[arg-type]


class Noising:
    """The noise process of a model.

    Attributes:
        process: what the denoiser predicts.
        levels: the distribution of levels.
    """

    def __init__(self, pipe: Pipeline, family: TrainingFamily, levels: Levels) -> None:
        self.pipe = pipe
        self.family = family
        self.levels = levels
        self.process: Process = family.process(pipe)
        self.alphas: Tensor | None = None if self.process == "flow" else pipe.scheduler.alphas_cumprod.double().cpu()

    def draw(self, latents: Tensor, *key: object) -> Tensor:
        """Return a level for latents of shape (1, channels, rows, columns): s as float32 for flow, t as int64 else."""
        return self.at(self.levels.share(*key), latents)

    def at(self, share: float, latents: Tensor) -> Tensor:
        """Return the level for a share of noise in 0..1 that is not shifted yet."""
        low, high = self.levels.low, self.levels.high
        if self.alphas is not None:
            steps = len(self.alphas)
            first, last = math.ceil(low * (steps - 1)), math.floor(high * (steps - 1))
            return torch.tensor(first + min(int(share * (last - first + 1)), last - first))
        shift = self.family.shift(self.pipe, latents) if self.levels.shift is None else self.levels.shift
        return low + (high - low) * shifted(torch.tensor(share, dtype=torch.float32), shift)

    def noise_share(self, level: Tensor) -> Tensor:
        """Return levels in 0 (clean) to 1 (noise), for reports."""
        return level.float() if self.alphas is None else level.float() / (len(self.alphas) - 1)

    def snr(self, level: Tensor) -> Tensor:
        """Return the signal-to-noise ratio at levels, float64."""
        if self.alphas is None:
            s = level.double()
            return ((1 - s) / s).square()
        alpha = self.alphas[level.cpu()]
        return (alpha / (1 - alpha)).to(level.device)

    def mix(self, latents: Tensor, noise: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
        """Return x and the target of the prediction, float32, for a batch."""
        if self.alphas is None:
            s = level.view(-1, 1, 1, 1).to(latents)
            return (1 - s) * latents + s * noise, noise - latents
        alpha = self.alphas[level.cpu()].to(latents.device).view(-1, 1, 1, 1)
        a, b = alpha.sqrt().to(latents), (1 - alpha).sqrt().to(latents)
        mixed = a * latents + b * noise
        return mixed, noise if self.process == "epsilon" else a * noise - b * latents
