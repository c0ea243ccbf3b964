"""Flux.1 (dev, schnell, Kontext, Fill, control models) and Chroma."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from diffadapt.training.families.drawing import usual
from diffadapt.training.families.family import Caption, Pipeline, Step, Tensors, TrainingFamily
from diffadapt.training.families.packing import (
    encode_prompt,
    encoding_references,
    pack,
    pixels,
    positions,
    reference_latents,
    unpacked,
)
from diffadapt.training.families.pictures import most_likely, sampled
from diffadapt.training.families.schedules import packed_shift, refuse_distilled


def _refusal(pipe: Pipeline) -> str | None:
    config = pipe.scheduler.config
    # Only schnell has neither an embedding of the guidance nor a schedule that depends on the resolution.
    if not pipe.transformer.config.guidance_embeds and not config.get("use_dynamic_shifting", False):
        return refuse_distilled(pipe, sign="no guidance embedding and a schedule without dynamic shift, as in schnell")
    return refuse_distilled(pipe)


def _encode(pipe: Pipeline, caption: Caption) -> Tensors:
    # The padding of T5 is attended to, so nothing is left out.
    hidden, pooled, _ = encode_prompt(pipe, caption, None)
    return {"hidden": hidden[0], "pooled": pooled[0]}


def _call(step: Step, tokens: Tensor, ids: Tensor) -> dict[str, Any]:
    hidden = step["hidden"]
    return {
        "hidden_states": tokens,
        "timestep": step.level,  # the model multiplies by 1000
        "guidance": step.told_guidance() if step.pipe.transformer.config.guidance_embeds else None,
        "pooled_projections": step["pooled"],
        "encoder_hidden_states": hidden,
        "txt_ids": torch.zeros(hidden.shape[1], 3, device=hidden.device),
        "img_ids": ids,
    }


def _inputs(step: Step) -> dict[str, Any]:
    return _call(step, pack(step.x), positions(step.noisy, 2))


def _inputs_kontext(step: Step) -> dict[str, Any]:
    """References are tokens behind those of the picture; their first coordinate is 1."""
    references = reference_latents(step)
    tokens = [pack(step.x), *map(pack, references)]
    ids = [positions(step.noisy, 2), *(positions(reference, 2, first=1) for reference in references)]
    return _call(step, torch.cat(tokens, 1), torch.cat(ids))


def _inputs_in_channels(step: Step) -> dict[str, Any]:
    """References, and the mask of an inpainting model, are further channels of the picture's own tokens."""
    names = [name for name in ("reference_0", "mask") if name in step]
    tokens = torch.cat([pack(step.x), *(pack(step[name]) for name in names)], dim=2)
    return _call(step, tokens, positions(step.noisy, 2))


def _encode_masked(pipe: Pipeline, pictures: Sequence[Tensor], mask: Tensor | None) -> Tensors:
    """Return the latents of the picture without what is painted, and the mask with its pixels as channels."""
    assert mask is not None
    kept = pictures[0] * (1 - mask)
    return {
        "reference_0": most_likely(pipe, kept)["mean"],
        "mask": nn.functional.pixel_unshuffle(mask.float(), pipe.vae_scale_factor),
    }


_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
_FEED_FORWARD = ("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2")

FLUX = TrainingFamily(
    name="flux",
    pipelines=("FluxPipeline",),
    encode=_encode,
    encode_pictures=sampled,
    inputs=_inputs,
    read=unpacked,
    divisor=pixels(2),
    targets=(*_ATTENTION, *_FEED_FORWARD),
    shift=packed_shift,
    guidance=1.0,
    max_tokens=512,
    refusal=_refusal,
)

FLUX_KONTEXT = replace(
    FLUX,
    name="flux-kontext",
    pipelines=("FluxKontextPipeline",),
    inputs=_inputs_kontext,
    encode_references=encoding_references(most_likely),
    references=(0, 1),
)

FLUX_FILL = replace(
    FLUX,
    name="flux-fill",
    pipelines=("FluxFillPipeline",),
    inputs=_inputs_in_channels,
    encode_references=_encode_masked,
    references=(1, 1),
    needs_mask=True,
)


def _drawing_control(
    captions: Sequence[str], guidance: float | None, steps: int | None, references: Sequence[Image.Image]
) -> dict[str, Any]:
    return usual(captions, guidance, steps, ()) | {"control_image": list(references)}


FLUX_CONTROL = replace(
    FLUX,
    name="flux-control",
    pipelines=("FluxControlPipeline",),
    inputs=_inputs_in_channels,
    encode_references=encoding_references(most_likely),
    references=(1, 1),
    drawing=_drawing_control,
)


def _encode_chroma(pipe: Pipeline, caption: Caption) -> Tensors:
    hidden, _, mask, *_ = encode_prompt(pipe, caption, do_classifier_free_guidance=False)
    # Real tokens and one token of padding, as Chroma was trained.
    return {"hidden": hidden[0, mask[0].bool()]}


def _inputs_chroma(step: Step) -> dict[str, Any]:
    tokens, hidden = pack(step.x), step["hidden"]
    # The pipeline of diffusers passes this mask as numbers, which attention adds to its scores, so that padding is
    # hardly masked (diffusers issues 12116 and 13619). A bool mask is exact, and what the model was trained with.
    mask = step.padding_mask("hidden")
    return {
        "hidden_states": tokens,
        "timestep": step.level,
        "encoder_hidden_states": hidden,
        "txt_ids": torch.zeros(hidden.shape[1], 3, device=hidden.device),
        "img_ids": positions(step.noisy, 2),
        "attention_mask": None if mask is None else torch.cat([mask, mask.new_ones(tokens.shape[:2])], dim=1),
    }


CHROMA = TrainingFamily(
    name="chroma",
    pipelines=("ChromaPipeline",),
    encode=_encode_chroma,
    encode_pictures=sampled,
    inputs=_inputs_chroma,
    read=unpacked,
    divisor=pixels(2),
    targets=(*_ATTENTION, "ff.net.0.proj", "ff.net.2", "proj_mlp"),
    tokens=("hidden",),
    max_tokens=512,
    refusal=refuse_distilled,
)
