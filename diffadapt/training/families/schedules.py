"""What families read from a scheduler: what is predicted, the shift of noise levels, signs of distillation."""

import math
import re
from typing import cast

from torch import Tensor

from diffadapt.errors import AdapterError
from diffadapt.training.families.family import Pipeline, Process


def shifted(level: Tensor, shift: float) -> Tensor:
    """Return the noise levels `k s / (1 + (k - 1) s)` of a flow with the shift k. A shift of `1 / k` is the inverse."""
    return shift * level / (1 + (shift - 1) * level)


def static_shift(pipe: Pipeline, latents: Tensor) -> float:
    """Return the shift in the config of the scheduler, which does not depend on the picture.

    The multi-step solvers have another name for it. An Euler scheduler that was read from the config of such a solver
    has both, and under its own name the default.
    """
    config = pipe.scheduler.config
    return float(config.get("flow_shift") or config.get("shift") or 1.0)


def _token_shift(pipe: Pipeline, latents: Tensor, patch: int) -> float:
    """Return the shift for tokens of `patch` x `patch` latent pixels: `e^mu` with mu linear in their number."""
    config = pipe.scheduler.config
    if not config.get("use_dynamic_shifting", False):
        return static_shift(pipe, latents)
    tokens = latents.shape[-2] * latents.shape[-1] // patch**2
    low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    start, end = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    return math.exp(start + (end - start) / (high - low) * (tokens - low))


def packed_shift(pipe: Pipeline, latents: Tensor) -> float:
    """Return the shift for a denoiser whose tokens are 2 x 2 latent pixels, or the static one."""
    return _token_shift(pipe, latents, 2)


def pixel_shift(pipe: Pipeline, latents: Tensor) -> float:
    """Return the shift for a denoiser whose tokens are single latent pixels, or the static one."""
    return _token_shift(pipe, latents, 1)


def diffusion_process(pipe: Pipeline) -> Process:
    """Return what the denoiser of a diffusion model predicts, by the scheduler's config.

    Raises:
        AdapterError: the denoiser predicts something else, or its noise is not described by `alphas_cumprod`.
    """
    kind, scheduler = pipe.scheduler.config.get("prediction_type", "epsilon"), type(pipe.scheduler).__name__
    processes: dict[str, Process] = {"epsilon": "epsilon", "v_prediction": "v"}
    if kind not in processes or not hasattr(pipe.scheduler, "alphas_cumprod"):
        raise AdapterError(
            f"cannot train for the scheduler {scheduler} with prediction_type {kind!r}: expected a scheduler with "
            f"alphas_cumprod and a prediction_type of {' or '.join(map(repr, processes))}"
        )
    return processes[kind]


_DISTILLED = ("turbo", "lightning", "schnell", "hyper", "lcm", "dmd", "dmd2", "distilled", "flash", "sprint")


def distilled(pipe: Pipeline, *further: str) -> str | None:
    """Return the sign by which a pipeline is recognised as distilled to few steps, or `None`.

    Args:
        pipe: The pipeline.
        further: More words in the names of distilled models.
    """
    scheduler = type(pipe.scheduler).__name__
    if "LCM" in scheduler or "TCD" in scheduler:
        return f"its scheduler is {scheduler}"
    for source in _names(pipe):
        words = re.split(r"[^a-z0-9]+", source.rstrip("/").rsplit("/", 1)[-1].lower())
        for word in (*_DISTILLED, *further):
            if word in words:
                return f"{word!r} is in its name {source!r}"
    return None


def refuse_distilled(pipe: Pipeline, *further: str, sign: str | None = None) -> str | None:
    """Return the reason to refuse a pipeline that is distilled to few steps, or `None`.

    Args:
        pipe: The pipeline.
        further: More words in the names of distilled models.
        sign: A sign in the configs by which the family knows that the model is distilled.
    """
    sign = sign or distilled(pipe, *further)
    if sign is None:
        return None
    return (
        f"this model is distilled to few steps ({sign}); the usual loss would undo that, and pictures would blur. "
        "Train on the model that it was distilled from, or with a frozen helper adapter made for training on this one"
    )


def _names(pipe: Pipeline) -> list[str]:
    """Return where a pipeline and its denoisers were loaded from."""
    parts = [pipe, *(getattr(pipe, name, None) for name in ("unet", "transformer"))]
    names = [getattr(getattr(part, "config", None), "_name_or_path", None) for part in parts]
    return [cast(str, name) for name in names if name]
