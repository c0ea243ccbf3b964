"""Krea 2."""

from typing import Any

import torch

from diffadapt.training.families.family import Caption, Pipeline, Step, Tensors, TrainingFamily
from diffadapt.training.families.packing import encode_prompt, pack, pixels, positions, real_tokens, unpacked
from diffadapt.training.families.pictures import frame_sampled
from diffadapt.training.families.schedules import packed_shift, refuse_distilled


def _refusal(pipe: Pipeline) -> str | None:
    return refuse_distilled(pipe, sign="is_distilled in its config" if pipe.config.is_distilled else None)


def _encode(pipe: Pipeline, caption: Caption) -> Tensors:
    # Twelve layers of 512 tokens are 31 MB in bfloat16, and most tokens are padding.
    hidden, mask = encode_prompt(pipe, caption)
    return {"hidden": real_tokens(hidden, mask)}


def _inputs(step: Step) -> dict[str, Any]:
    hidden = step["hidden"]
    text = torch.zeros(hidden.shape[1], 3, device=hidden.device)
    return {
        "hidden_states": pack(step.x),
        "timestep": step.level,  # the model multiplies by 1000
        "position_ids": torch.cat([text, positions(step.noisy, 2)]),
        "encoder_hidden_states": hidden,
        "encoder_attention_mask": step.padding_mask("hidden"),
    }


KREA2 = TrainingFamily(
    name="krea2",
    pipelines=("Krea2Pipeline",),
    encode=_encode,
    encode_pictures=frame_sampled,
    inputs=_inputs,
    read=unpacked,
    divisor=pixels(2),
    targets=r"transformer_blocks\.\d+\.(attn\.to_(q|k|v|gate|out\.0)|ff\.(up|down|gate))",
    shift=packed_shift,
    tokens=("hidden",),
    max_tokens=512,
    refusal=_refusal,
)
