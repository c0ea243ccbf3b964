"""Flux.2: dev and klein."""

import math
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from diffadapt.training.families.family import Caption, Pipeline, Size, Step, Tensors, TrainingFamily
from diffadapt.training.families.packing import (
    encode_prompt,
    encoding_references,
    flat,
    pixels,
    positions,
    reference_latents,
    unflattened,
)
from diffadapt.training.families.pictures import batch_normalised
from diffadapt.training.families.schedules import pixel_shift, refuse_distilled

_LARGEST_REFERENCE = 1024 * 1024


def _encode(pipe: Pipeline, caption: Caption) -> Tensors:
    # Padding is attended to on purpose, so nothing is left out.
    hidden, _ = encode_prompt(pipe, caption)
    return {"hidden": hidden[0]}


def _inputs(step: Step) -> dict[str, Any]:
    """References are tokens behind those of the picture, with the first coordinates 10, 20 and so on."""
    hidden, references = step["hidden"], reference_latents(step)
    text = torch.zeros(hidden.shape[1], 4, device=hidden.device)
    text[:, 3] = torch.arange(hidden.shape[1], device=hidden.device)
    ids = [positions(step.noisy, axes=4)]
    ids += [positions(latents, axes=4, first=10 * (n + 1)) for n, latents in enumerate(references)]
    return {
        "hidden_states": torch.cat([flat(step.x), *map(flat, references)], dim=1),
        "timestep": step.level,  # the model multiplies by 1000
        "guidance": step.told_guidance() if step.pipe.transformer.config.guidance_embeds else None,
        "encoder_hidden_states": hidden,
        "txt_ids": text.expand(len(hidden), -1, -1),
        "img_ids": torch.cat(ids).expand(len(hidden), -1, -1),
    }


def _reference_size(pipe: Pipeline, reference: Size, target: Size) -> Size:
    """Return the size of a reference itself, up to a megapixel, which is what the pipeline uses."""
    height, width = reference
    scale = min(1.0, math.sqrt(_LARGEST_REFERENCE / (height * width)))
    multiple = 2 * pipe.vae_scale_factor

    def rounded(side: int) -> int:
        return max(multiple, int(side * scale) // multiple * multiple)

    return rounded(height), rounded(width)


_encode_pictures = batch_normalised(lambda raw: nn.functional.pixel_unshuffle(raw, 2))

FLUX2 = TrainingFamily(
    name="flux2",
    pipelines=("Flux2Pipeline",),
    encode=_encode,
    encode_pictures=_encode_pictures,
    inputs=_inputs,
    read=unflattened,
    divisor=pixels(2),
    targets=("to_q", "to_k", "to_v", "to_out.0", "to_qkv_mlp_proj", "attn.to_out"),
    # Flux.1's: the pipeline draws with a higher shift than the model was trained with.
    shift=pixel_shift,
    guidance=1.0,
    max_tokens=512,
    encode_references=encoding_references(_encode_pictures),
    references=(0, 10),
    reference_size=_reference_size,
    refusal=refuse_distilled,
)


def _refusal_klein(pipe: Pipeline) -> str | None:
    return refuse_distilled(pipe, sign="is_distilled in its config" if pipe.config.is_distilled else None)


FLUX2_KLEIN = replace(
    FLUX2, name="flux2-klein", pipelines=("Flux2KleinPipeline",), guidance=None, refusal=_refusal_klein
)
