"""Ideogram 4."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from diffadapt.errors import AdapterError
from diffadapt.training.families.drawing import usual
from diffadapt.training.families.family import Caption, LevelSampling, Pipeline, Step, Tensors, TrainingFamily
from diffadapt.training.families.packing import encoder_device, flat, unflat
from diffadapt.training.families.pictures import batch_normalised
from diffadapt.training.families.schedules import refuse_distilled


def _encode(pipe: Pipeline, caption: Caption) -> Tensors:
    """The pipeline pads captions to 2048 tokens, which is exact to leave out, and saves most of the time."""
    messages = [{"role": "user", "content": [{"type": "text", "text": caption.text}]}]
    text = pipe.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    length = len(pipe.tokenizer(text, add_special_tokens=False)["input_ids"])
    if length > caption.max_tokens:
        raise AdapterError(
            f"the caption {caption.text!r} has {length} tokens, and max_sequence_length is {caption.max_tokens}; this "
            "pipeline refuses longer captions instead of cutting them, so shorten it"
        )
    # The pipeline packs caption and picture into one sequence. The caption's part does not depend on the picture.
    hidden, _, segments, _ = pipe.encode_prompt([caption.text], 1, 1, length, encoder_device(pipe))
    return {"hidden": hidden[0, :length][segments[0, :length] == 1]}


def _inputs(step: Step) -> dict[str, Any]:
    """The sequence is padding, caption, picture; segments keep attention away from the padding."""
    hidden, mask, tokens = step["hidden"], step.mask("hidden"), flat(step.x)
    lengths, longest = mask.sum(dim=1).tolist(), hidden.shape[1]
    packed = hidden.new_zeros(len(hidden), longest + tokens.shape[1], hidden.shape[2])
    for row, length in enumerate(lengths):
        packed[row, longest - length : longest] = hidden[row, :length]
    places, segments, kinds = step.pipe._prepare_ids(lengths, *step.noisy.shape[2:], longest, hidden.device)
    return {
        "hidden_states": torch.cat([tokens.new_zeros(len(tokens), longest, tokens.shape[2]), tokens], dim=1),
        # In the dtype of the weights, which the model does not cast it to.
        "timestep": (1 - step.level).to(step.dtype),
        "encoder_hidden_states": packed,
        "position_ids": places,
        "segment_ids": segments,
        "indicator": kinds,
    }


def _read(step: Step, output: Any) -> Tensor:
    longest = step["hidden"].shape[1]
    return -unflat(output[:, longest:], step.noisy)


def _to_channels(raw: Tensor) -> Tensor:
    """2 x 2 latent pixels become channels in the order (row, column, channel), unlike Flux.2's with the same VAE."""
    batch, channels, rows, columns = raw.shape
    squares = raw.view(batch, channels, rows // 2, 2, columns // 2, 2).permute(0, 3, 5, 1, 2, 4)
    return squares.reshape(batch, 4 * channels, rows // 2, columns // 2)


def _divisor(pipe: Pipeline) -> int:
    return pipe.vae_scale_factor * pipe.patch_size


def _shift(pipe: Pipeline, latents: Tensor) -> float:
    """The schedule is the sigmoid of a normal variable whose mean grows by half the logarithm of the area."""
    pixels = latents.shape[2] * latents.shape[3] * _divisor(pipe) ** 2
    return math.sqrt(pixels) / 512


_GUIDANCE, _LAST_GUIDANCE, _LAST = 7.0, 3.0, 16
"""The pipeline's default schedule: guidance 7, and 3 in the last sixteenth of the steps."""


def _drawing(
    captions: Sequence[str], guidance: float | None, steps: int | None, references: Sequence[Image.Image]
) -> dict[str, Any]:
    """The pipeline wants a guidance for every step, or one for all."""
    given = usual(captions, guidance, steps, references)
    if guidance is not None:
        return given | {"guidance_schedule": None}
    if steps is None:
        return given
    last = steps // _LAST
    return given | {"guidance_schedule": [_GUIDANCE] * (steps - last) + [_LAST_GUIDANCE] * last}


IDEOGRAM4 = TrainingFamily(
    name="ideogram4",
    pipelines=("Ideogram4Pipeline",),
    encode=_encode,
    encode_pictures=batch_normalised(_to_channels),
    inputs=_inputs,
    read=_read,
    divisor=_divisor,
    targets=("to_q", "to_k", "to_v", "to_out.0", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3"),
    levels=LevelSampling("logit-normal", 0.0, 1.5),
    shift=_shift,
    tokens=("hidden",),
    max_tokens=2048,
    drawing=_drawing,
    # Diffusers' own training example found grey or noisy predictions under autocast.
    autocast=False,
    refusal=refuse_distilled,
)
