"""Lumina 2."""

from typing import Any

from diffadapt.training.families.family import Caption, Pipeline, Step, Tensors, TrainingFamily
from diffadapt.training.families.packing import encode_prompt, negated, pixels, real_tokens
from diffadapt.training.families.pictures import sampled
from diffadapt.training.families.schedules import refuse_distilled, static_shift


def _encode(pipe: Pipeline, caption: Caption) -> Tensors:
    hidden, mask, *_ = encode_prompt(pipe, caption, do_classifier_free_guidance=False)
    return {"hidden": real_tokens(hidden, mask)}


def _encode_empty(pipe: Pipeline, caption: Caption) -> Tensors:
    """Return what the pipeline guides away from. Unlike a caption, it has no system prompt."""
    _, _, hidden, mask = encode_prompt(pipe, caption)
    return {"hidden": real_tokens(hidden, mask)}


def _inputs(step: Step) -> dict[str, Any]:
    return {
        "hidden_states": step.x,
        "timestep": 1 - step.level,
        "encoder_hidden_states": step["hidden"],
        "encoder_attention_mask": step.mask("hidden"),
    }


LUMINA2 = TrainingFamily(
    name="lumina2",
    pipelines=("Lumina2Pipeline",),
    encode=_encode,
    encode_empty=_encode_empty,
    encode_pictures=sampled,
    inputs=_inputs,
    read=negated,
    divisor=pixels(2),
    targets=("to_q", "to_k", "to_v", "to_out.0"),
    shift=static_shift,
    tokens=("hidden",),
    max_tokens=256,
    refusal=refuse_distilled,
)
