"""Stable Diffusion 1, 2 and XL."""

from typing import Any

import torch

from diffadapt.errors import AdapterError
from diffadapt.training.families.family import Caption, LevelSampling, Pipeline, Process, Step, Tensors, TrainingFamily
from diffadapt.training.families.packing import encoder_device, pixels
from diffadapt.training.families.pictures import sampled
from diffadapt.training.families.schedules import diffusion_process, refuse_distilled

_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


def _unet(pipe: Pipeline) -> dict[str, tuple[float, float]]:
    return {"unet": (0.0, 1.0)}


def _process(pipe: Pipeline) -> Process:
    if pipe.unet.config.in_channels != pipe.vae.config.latent_channels:
        raise AdapterError(
            f"cannot train this UNet: it reads {pipe.unet.config.in_channels} channels, but latents have "
            f"{pipe.vae.config.latent_channels}; expected a text-to-image model"
        )
    return diffusion_process(pipe)


def _refusal(pipe: Pipeline) -> str | None:
    if pipe.unet.config.get("time_cond_proj_dim") is not None:
        return refuse_distilled(pipe, sign="its UNet is told the guidance scale, as in latent consistency models")
    # The turbo models are published with this scheduler, and other models are not.
    scheduler = pipe.scheduler
    trailing = scheduler.config.get("timestep_spacing") == "trailing"
    if type(scheduler).__name__ == "EulerAncestralDiscreteScheduler" and trailing:
        return refuse_distilled(pipe, sign="an ancestral scheduler with trailing timesteps")
    return refuse_distilled(pipe)


def _encode(pipe: Pipeline, caption: Caption) -> Tensors:
    hidden = pipe.encode_prompt([caption.text], encoder_device(pipe), 1, do_classifier_free_guidance=False)[0]
    return {"hidden": hidden[0]}


def _encode_xl(pipe: Pipeline, caption: Caption) -> Tensors:
    device = encoder_device(pipe)
    hidden, _, pooled, _ = pipe.encode_prompt([caption.text], device=device, do_classifier_free_guidance=False)
    return {"hidden": hidden[0], "pooled": pooled[0]}


def _encode_empty_xl(pipe: Pipeline, caption: Caption) -> Tensors:
    """Without a negative prompt, the pipeline guides away from zeros and not from an encoded empty caption."""
    encoded = _encode_xl(pipe, caption)
    zeros = pipe.config.force_zeros_for_empty_prompt
    return {name: torch.zeros_like(value) for name, value in encoded.items()} if zeros else encoded


def _inputs(step: Step) -> dict[str, Any]:
    return {"sample": step.x, "timestep": step.level, "encoder_hidden_states": step["hidden"]}


def _inputs_xl(step: Step) -> dict[str, Any]:
    sizes = step.told_sizes(step.pipe.vae_scale_factor)
    return {**_inputs(step), "added_cond_kwargs": {"text_embeds": step["pooled"], "time_ids": sizes}}


SD = TrainingFamily(
    name="sd",
    pipelines=("StableDiffusionPipeline",),
    encode=_encode,
    encode_pictures=sampled,
    inputs=_inputs,
    divisor=pixels(1),
    targets=_ATTENTION,
    process=_process,
    experts=_unet,
    levels=LevelSampling("uniform"),
    refusal=_refusal,
)

SDXL = TrainingFamily(
    name="sdxl",
    pipelines=("StableDiffusionXLPipeline",),
    encode=_encode_xl,
    encode_empty=_encode_empty_xl,
    encode_pictures=sampled,
    inputs=_inputs_xl,
    divisor=pixels(1),
    targets=_ATTENTION,
    process=_process,
    experts=_unet,
    levels=LevelSampling("uniform"),
    refusal=_refusal,
)
