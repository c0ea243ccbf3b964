"""Qwen-Image, Qwen-Image Edit and Edit Plus, and Qwen-Image 2.1."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from diffadapt.errors import AdapterError
from diffadapt.training.families.drawing import usual
from diffadapt.training.families.family import Caption, Pipeline, Size, Step, Tensors, TrainingFamily
from diffadapt.training.families.packing import (
    encode_prompt,
    encoder_device,
    encoding_references,
    flat,
    pack,
    pixels,
    real_tokens,
    reference_latents,
    unpacked,
)
from diffadapt.training.families.pictures import frame_most_likely, frame_sampled
from diffadapt.training.families.schedules import packed_shift, pixel_shift, refuse_distilled

_ENCODED_AREA = 384 * 384
"""Pixels of a reference that the text encoder of Edit Plus reads."""

_REFERENCE_AREA = 1024 * 1024
"""Pixels of a reference that the VAE reads."""


def _encode(pipe: Pipeline, caption: Caption) -> Tensors:
    hidden, mask = encode_prompt(pipe, caption)
    return {"hidden": real_tokens(hidden, mask)}


def _encode_edit(pipe: Pipeline, caption: Caption) -> Tensors:
    return _encode_with(pipe, caption, [_to_image(picture) for picture in caption.pictures])


def _encode_edit_plus(pipe: Pipeline, caption: Caption) -> Tensors:
    pictures = [_to_image(picture) for picture in caption.pictures]
    sizes = [_size_of_area((picture.height, picture.width), _ENCODED_AREA) for picture in pictures]
    resized = [pipe.image_processor.resize(picture, *size) for picture, size in zip(pictures, sizes, strict=True)]
    return _encode_with(pipe, caption, resized)


def _encode_with(pipe: Pipeline, caption: Caption, pictures: list[Image.Image]) -> Tensors:
    hidden, mask = encode_prompt(pipe, caption, image=pictures or None)
    return {"hidden": real_tokens(hidden, mask)}


def _inputs(step: Step) -> dict[str, Any]:
    """References are tokens behind those of the picture, told apart by the shapes."""
    latents = [step.x, *reference_latents(step)]
    shapes = [(1, each.shape[2] // 2, each.shape[3] // 2) for each in latents]
    return {
        "hidden_states": torch.cat([pack(each) for each in latents], dim=1),
        "timestep": step.level,  # the model multiplies by 1000
        "img_shapes": [shapes] * len(step.noisy),
        "encoder_hidden_states": step["hidden"],
        "encoder_hidden_states_mask": step.padding_mask("hidden"),
    }


def _to_image(picture: Tensor) -> Image.Image:
    """Return pixels in -1..1, of shape (3, height, width), as an image."""
    values = ((picture.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0)
    return Image.fromarray(values.cpu().numpy())


def _size_of_area(size: Size, area: int) -> Size:
    """Return the size of about `area` pixels with the proportions of `size`, in multiples of 32 as in the pipelines."""
    ratio = size[1] / size[0]
    width = math.sqrt(area * ratio)
    return round(width / ratio / 32) * 32, round(width / 32) * 32


def _reference_size(pipe: Pipeline, reference: Size, target: Size) -> Size:
    return _size_of_area(reference, _REFERENCE_AREA)


def _drawing(
    captions: Sequence[str], guidance: float | None, steps: int | None, references: Sequence[Image.Image]
) -> dict[str, Any]:
    """Without a negative prompt, the pipeline does not guide at all, and `guidance_scale` has no effect."""
    given = usual(captions, None, steps, references) | {"negative_prompt": [" "] * len(captions)}
    return given if guidance is None else given | {"true_cfg_scale": guidance}


QWEN = TrainingFamily(
    name="qwen-image",
    pipelines=("QwenImagePipeline",),
    encode=_encode,
    encode_pictures=frame_sampled,
    inputs=_inputs,
    read=unpacked,
    divisor=pixels(2),
    targets=("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
    shift=packed_shift,
    tokens=("hidden",),
    max_tokens=512,
    drawing=_drawing,
    refusal=refuse_distilled,
)

QWEN_EDIT = replace(
    QWEN,
    name="qwen-image-edit",
    pipelines=("QwenImageEditPipeline",),
    encode=_encode_edit,
    reads_pictures=True,
    encode_references=encoding_references(frame_most_likely),
    references=(1, 1),
    reference_size=_reference_size,
)

QWEN_EDIT_PLUS = replace(
    QWEN_EDIT,
    name="qwen-image-edit-plus",
    pipelines=("QwenImageEditPlusPipeline",),
    encode=_encode_edit_plus,
    references=(1, 3),
)


def _encode_21(pipe: Pipeline, caption: Caption) -> Tensors:
    pictures = [_to_image(picture).convert("RGBA") for picture in caption.pictures]
    hidden, mask, slots = pipe.encode_prompt([caption.text], image=pictures or None, device=encoder_device(pipe))
    return {"hidden": real_tokens(hidden, mask), "slots": real_tokens(slots, mask)}


def _opaque(pixels: Tensor) -> Tensor:
    """Return pixels with an alpha channel, which the VAE of Qwen-Image 2.1 reads."""
    return nn.functional.pad(pixels, (0, 0, 0, 0, 0, 1), value=1.0)


def _inputs_21(step: Step) -> dict[str, Any]:
    """References come before the picture. A slot stands for 2 x 2 tokens; captions have those of references."""
    latents = [*reference_latents(step), step.x]
    tokens = step.noisy.shape[2] * step.noisy.shape[3]
    slots = step["slots"]
    # The model reads the places of the references from the first caption.
    if (slots != slots[:1]).any():
        raise AdapterError(
            "qwen-image-2.1: the captions of a batch have their reference pictures at different places, but the model "
            "reads these places from the first caption only; use a batch size of 1"
        )
    shown, known = 4 * int(slots[0].sum()), sum(each.shape[2] * each.shape[3] for each in latents[:-1])
    if shown != known:
        raise AdapterError(
            f"qwen-image-2.1: the caption has places for {shown} tokens of reference pictures, but these have {known}; "
            "both need the same references, with sides that are multiples of 32 and an area of at least 256 x 256 "
            "pixels, because the text encoder enlarges smaller ones"
        )
    return {
        "hidden_states": torch.cat([flat(each) for each in latents], dim=1),
        "timestep": step.level,  # the model multiplies by 1000
        "img_shapes": [[(1, *each.shape[2:]) for each in latents]] * len(slots),
        "img_mask": torch.cat([slots, slots.new_ones(len(slots), tokens // 4)], dim=1),
        "encoder_hidden_states": step["hidden"],
        "encoder_hidden_states_mask": step.padding_mask("hidden"),
    }


def _read_21(step: Step, output: Any) -> Tensor:
    """The picture comes last."""
    rows, columns = step.noisy.shape[2:]
    return output[:, -rows * columns :].transpose(1, 2).reshape(step.noisy.shape)


def _references_21(pipe: Pipeline, pictures: Sequence[Tensor], mask: Tensor | None) -> Tensors:
    encode = encoding_references(frame_most_likely)
    return encode(pipe, [_opaque(picture) for picture in pictures], mask)


def _drawing_21(
    captions: Sequence[str], guidance: float | None, steps: int | None, references: Sequence[Image.Image]
) -> dict[str, Any]:
    """This model is meant to be drawn without guidance."""
    return (
        usual(captions, None, steps, references)
        if guidance is None
        else _drawing(captions, guidance, steps, references)
    )


QWEN_21 = TrainingFamily(
    name="qwen-image-2.1",
    pipelines=("QwenImage21Pipeline",),
    encode=_encode_21,
    encode_pictures=lambda pipe, pixels: frame_sampled(pipe, _opaque(pixels)),
    inputs=_inputs_21,
    read=_read_21,
    divisor=pixels(2),
    targets=("to_q", "to_k", "to_v", "to_out.0"),
    shift=pixel_shift,
    tokens=("hidden", "slots"),
    # Positions of the picture start behind the longest caption of a batch.
    mixed_lengths=False,
    drawing=_drawing_21,
    reads_pictures=True,
    encode_references=_references_21,
    references=(0, 3),
    refusal=refuse_distilled,
)
