"""The oracle of training families: the pipeline's own loop.

While a pipeline draws, every prediction that it hands to its scheduler is recorded, to be compared with the family's
for the same latents, and replaced by the training target of a known picture. What reaches the decoder must then be the
latents of that picture.
"""

import functools
import importlib
import inspect
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image
from torch import Tensor

from diffadapt.training.families import Tensors, TrainingFamily, latents

STEPS = 2
TOKENS = 48
"""More than the template of any pipeline and the captions have together."""

CAPTIONS = ("a dog", 'a photo of sks dog on the beach, "red"')
EQUALLY_LONG = ("a dog", "the cat")
HEIGHT, WIDTH = 32, 64
"""Not a square, because rows and columns must not be mixed up."""

GUIDANCE = 3.5
SIZES = torch.tensor([[40.0, 80.0, 3.0, 5.0, HEIGHT, WIDTH]])
"""Sizes that SDXL and CogView4 are told, see `Step.sizes`."""

_OPTIONS: dict[str, dict[str, Any]] = {
    "chroma": {"guidance_scale": 1.0},
    "flux-kontext": {"max_area": HEIGHT * WIDTH, "_auto_resize": False},
    "qwen-image": {"true_cfg_scale": 1.0},
    "qwen-image-edit": {"true_cfg_scale": 1.0},
    "qwen-image-edit-plus": {"true_cfg_scale": 1.0},
    # References are resized to this area, in multiples of 32, which is the size that they have.
    "qwen-image-2.1": {"use_kv_cache": False, "output_resolution": 90},
    "z-image": {"guidance_scale": 0.0},
    "krea2": {"guidance_scale": 0.0},
    "sana": {"use_resolution_binning": False},
    "pixart": {"use_resolution_binning": False},
    "pixart-alpha": {"use_resolution_binning": False},
    "ideogram4": {"guidance_schedule": None},
    "wan": {"num_frames": 1},
    "ltx": {"num_frames": 1},
}


_PACKED = ("flux", "chroma", "qwen-image", "krea2")
_FLAT = ("flux2", "qwen-image-2.1", "ltx", "ideogram4")


@dataclass
class Trace:
    """What a pipeline did while it drew a known picture.

    Attributes:
        pipe: the pipeline.
        captions: what it was asked to draw.
        pictures: the reference pictures.
        steps: latents, level and the pipeline's prediction of every step, in the layout of the trainer.
        decoding_error: the difference between what was decoded and the latents of the picture, relative.
        shift: the factor by which the pipeline shifted noise levels.
        x0: the family's latents of the picture.
    """

    pipe: Any
    captions: Sequence[str]
    pictures: Sequence[Image.Image]
    steps: list[tuple[Tensor, Tensor, Tensor]]
    decoding_error: float
    shift: float
    x0: Tensor

    @torch.no_grad()
    def prediction_error(self, family: TrainingFamily) -> float:
        """Return the largest difference between the family's predictions and those of the pipeline, relative."""
        batch = len(self.captions)
        conditions = encode(family, self.pipe, self.captions, self.pictures)
        references = _encode_references(family, self.pipe, self.pictures, batch)
        errors: list[float] = []
        for noisy, level, expected in self.steps:
            found = family.predict(
                self.pipe,
                _expert(family, self.pipe, float(level)),
                noisy.float(),
                level.expand(batch).clone(),
                conditions,
                guidance=GUIDANCE,
                sizes=SIZES.expand(batch, -1),
                references=references,
            )
            errors.append(relative(found, expected))
        return max(errors)

    def shift_error(self, family: TrainingFamily) -> float:
        """Return the difference between the family's shift of noise levels and the pipeline's, relative.

        It is 0 for diffusion, and for Flux.2 and Ideogram 4, whose pipelines have schedules of their own.
        """
        if family.process(self.pipe) != "flow" or family.name.startswith(("flux2", "ideogram4")):
            return 0.0
        return abs(family.shift(self.pipe, self.x0) / self.shift - 1)


def captions_for(family: TrainingFamily) -> tuple[str, ...]:
    """Return captions that the pipeline and the family take as one batch."""
    if family.references[0] and family.reads_pictures:
        return CAPTIONS[1:]
    return CAPTIONS if family.mixed_lengths else EQUALLY_LONG


def pictures_for(family: TrainingFamily, count: int) -> list[Image.Image]:
    """Return different reference pictures, in the size in which the pipeline reads them."""
    generator = torch.Generator().manual_seed(5)
    size = (HEIGHT, WIDTH) if family.name in ("flux-fill", "flux-control") else (64, 128)
    values = torch.randint(256, (count, *size, 3), generator=generator, dtype=torch.uint8)
    return [Image.fromarray(each.numpy()) for each in values]


def encode(family: TrainingFamily, pipe: Any, captions: Sequence[str], pictures: Sequence[Image.Image]) -> Tensors:
    """Return the conditions of a batch."""
    seen = [_to_pixels(picture) for picture in pictures]
    return family.collate([family.encode_caption(pipe, text, pictures=seen, max_tokens=TOKENS) for text in captions])


@torch.no_grad()
def draw(family: TrainingFamily, pipe: Any, references: int = 0) -> Trace:
    """Let a pipeline draw a known picture.

    Args:
        family: The family, or one with a mistake in it.
        pipe: The pipeline.
        references: The number of reference pictures.
    """
    captions, pictures = captions_for(family), pictures_for(family, references)
    generator = torch.Generator().manual_seed(1)
    x0, raw = _encode_picture(family, pipe, generator, len(captions))
    noise = torch.randn(x0.shape, generator=generator)
    process = family.process(pipe)
    steps: list[tuple[Tensor, Tensor, Tensor]] = []
    decoded: list[Tensor] = []
    shifts: list[float] = []
    scheduler = pipe.scheduler
    step, set_timesteps, decode = scheduler.step, scheduler.set_timesteps, pipe.vae.decode

    @functools.wraps(step)
    def replaced(output: Tensor, time: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        noisy = _from_layout(family, sample, x0)
        level = (scheduler.sigmas if process == "flow" else scheduler.timesteps)[len(steps)]
        steps.append((noisy, level, _from_layout(family, output, x0)))
        target = _to_layout(family, _target(pipe, process, x0, noise, noisy, level))
        return step(target.to(output.dtype), time, sample, *args, **kwargs)

    @functools.wraps(set_timesteps)
    def with_shift(*args: Any, **kwargs: Any) -> Any:
        shifts.append(_pipeline_shift(pipe, kwargs.get("mu")))
        return set_timesteps(*args, **kwargs)

    def recorded(z: Tensor, *args: Any, **kwargs: Any) -> Any:
        decoded.append(z)
        return decode(z, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        # The DPM solvers make NumPy arrays of tensors in a way that it will not support.
        warnings.filterwarnings("ignore", "__array__", DeprecationWarning)
        patch.setattr(scheduler, "step", replaced)
        patch.setattr(scheduler, "set_timesteps", with_shift)
        patch.setattr(pipe.vae, "decode", recorded)
        # The pipelines of Fill and control models draw the latents of their references.
        patch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())
        _amend(patch, pipe)
        pipe(
            # Edit pipelines take one caption for their pictures.
            prompt=list(captions) if len(captions) > 1 else next(iter(captions)),
            height=HEIGHT,
            width=WIDTH,
            num_inference_steps=STEPS,
            latents=noise if family.name.startswith("flux2") else _to_layout(family, noise),
            output_type="pt",
            **_options(family, pipe),
            **_reference_options(family, pictures),
        )
    assert len(steps) == STEPS
    return Trace(pipe, captions, pictures, steps, relative(decoded[0], raw), shifts[0], x0)


def relative(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference as a share of the largest value; infinity where shapes differ or values are NaN."""
    if found.shape != expected.shape or not (found.isfinite().all() and expected.isfinite().all()):
        return math.inf
    return ((found - expected).abs().max() / expected.abs().max().clamp(min=1e-12)).item()


# Pictures


def _encode_picture(family: TrainingFamily, pipe: Any, generator: torch.Generator, batch: int) -> tuple[Tensor, Tensor]:
    """Return x0 of a random picture, and what the VAE itself made of it."""
    pixels = torch.rand(batch, 3, HEIGHT, WIDTH, generator=generator) * 2 - 1
    raw: list[Tensor] = []
    encode = pipe.vae.encode

    def recorded(*args: Any, **kwargs: Any) -> Any:
        output = encode(*args, **kwargs)
        raw.append(output.latent if hasattr(output, "latent") else output.latent_dist.mode())
        return output

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipe.vae, "encode", recorded)
        x0 = latents(family.encode_pictures(pipe, pixels))
    return x0, raw[0]


def _to_pixels(image: Image.Image) -> Tensor:
    return torch.tensor(numpy.array(image)).permute(2, 0, 1) / 127.5 - 1


def _mask(batch: int = 1) -> Tensor:
    mask = torch.zeros(batch, 1, HEIGHT, WIDTH)
    mask[..., : WIDTH // 2] = 1
    return mask


def _encode_references(family: TrainingFamily, pipe: Any, pictures: Sequence[Image.Image], batch: int) -> Tensors:
    if not pictures:
        return {}
    assert family.encode_references is not None
    pixels = [_to_pixels(picture).expand(batch, -1, -1, -1) for picture in pictures]
    return family.encode_references(pipe, pixels, _mask(batch) if family.needs_mask else None)


# The pipeline's side


def _reference_options(family: TrainingFamily, pictures: list[Image.Image]) -> dict[str, Any]:
    if not pictures:
        return {}
    if family.name == "flux-fill":
        mask = Image.fromarray((_mask()[0, 0] * 255).to(torch.uint8).numpy())
        return {"image": pictures[0], "mask_image": mask}
    if family.name == "flux-control":
        return {"control_image": pictures[0]}
    return {"image": pictures if family.references[1] > 1 else pictures[0]}


def _options(family: TrainingFamily, pipe: Any) -> dict[str, Any]:
    """Return the arguments with which a pipeline draws what is trained, in small."""
    known = inspect.signature(type(pipe).__call__).parameters
    options = {
        "max_sequence_length": TOKENS,
        "guidance_scale": GUIDANCE if family.guidance else 1.0,
        "original_size": tuple(SIZES[0, :2].int().tolist()),
        "crops_coords_top_left": tuple(SIZES[0, 2:4].int().tolist()),
    }
    if family.name.startswith("qwen-image"):
        del options["guidance_scale"]
    return {name: value for name, value in options.items() if name in known} | _OPTIONS.get(family.name, {})


def _amend(patch: pytest.MonkeyPatch, pipe: Any) -> None:
    """Keep a pipeline from scaling pictures to a megapixel and captions to 1000 tokens; mend the mask of Chroma."""
    name = type(pipe).__name__
    if name == "HiDreamImagePipeline":
        patch.setattr(pipe, "default_sample_size", 1.0001 * math.sqrt(HEIGHT * WIDTH) / pipe.vae_scale_factor)
    if name == "HunyuanImagePipeline":
        patch.setattr(pipe, "tokenizer_max_length", TOKENS)
    if name == "ChromaPipeline":
        # It passes numbers, which attention adds to its scores instead of masking.
        prepare = pipe._prepare_attention_mask
        patch.setattr(pipe, "_prepare_attention_mask", lambda **given: _as_bool(prepare(**given)))
    if name.startswith("QwenImageEdit"):
        module = importlib.import_module(type(pipe).__module__)
        original, large = module.calculate_dimensions, 1024 * 1024

        def kept(area: int, ratio: float) -> tuple[Any, ...]:
            return (128, 64, *original(area, ratio)[2:]) if area == large else original(area, ratio)

        patch.setattr(module, "calculate_dimensions", kept)


def _as_bool(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.bool()


def _layout(family: TrainingFamily) -> str:
    if family.name in ("flux2", "flux2-klein", *_FLAT):
        return "flat"
    if family.name == "wan":
        return "frame"
    return "packed" if family.name.startswith(_PACKED) else "image"


def _to_layout(family: TrainingFamily, x: Tensor) -> Tensor:
    """Return latents as the pipeline passes them to its scheduler."""
    match _layout(family):
        case "flat":
            return x.flatten(2).transpose(1, 2)
        case "frame":
            return x.unsqueeze(2)
        case "packed":
            batch, channels, rows, columns = x.shape
            squares = x.view(batch, channels, rows // 2, 2, columns // 2, 2).permute(0, 2, 4, 1, 3, 5)
            return squares.reshape(batch, rows * columns // 4, 4 * channels)
        case _:
            return x


def _from_layout(family: TrainingFamily, x: Tensor, like: Tensor) -> Tensor:
    batch, channels, rows, columns = like.shape
    match _layout(family):
        case "flat":
            return x.transpose(1, 2).reshape(like.shape)
        case "frame":
            return x.squeeze(2)
        case "packed":
            squares = x.view(batch, rows // 2, columns // 2, channels, 2, 2).permute(0, 3, 1, 4, 2, 5)
            return squares.reshape(like.shape)
        case _:
            return x


def _expert(family: TrainingFamily, pipe: Any, level: float) -> Any:
    experts = family.experts(pipe)
    if len(experts) == 1:
        return getattr(pipe, next(iter(experts)))
    return next(getattr(pipe, name) for name, (low, high) in experts.items() if low <= level <= high)


def _target(pipe: Any, process: str, x0: Tensor, noise: Tensor, noisy: Tensor, level: Tensor) -> Tensor:
    """Return what the denoiser is trained to predict."""
    if process == "flow":
        return noise - x0
    signal = pipe.scheduler.alphas_cumprod[level.long()].sqrt()
    amount = (1 - signal**2).sqrt()
    drawn = (noisy - signal * x0) / amount
    return drawn if process == "epsilon" else signal * drawn - amount * x0


def _pipeline_shift(pipe: Any, mu: float | None) -> float:
    config = pipe.scheduler.config
    if not config.get("use_dynamic_shifting", False) or mu is None:
        return config.get("shift", 1.0)
    return mu if config.time_shift_type == "linear" else math.exp(mu)
