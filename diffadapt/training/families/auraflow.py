"""AuraFlow."""

from typing import Any

from diffadapt.training.families.family import Caption, Pipeline, Step, Tensors, TrainingFamily
from diffadapt.training.families.packing import encode_prompt, pixels
from diffadapt.training.families.pictures import sampled
from diffadapt.training.families.schedules import refuse_distilled, static_shift


def _encode(pipe: Pipeline, caption: Caption) -> Tensors:
    # Padding is zeros, which are attended to, so nothing is left out.
    hidden, *_ = encode_prompt(pipe, caption, do_classifier_free_guidance=False)
    return {"hidden": hidden[0]}


def _inputs(step: Step) -> dict[str, Any]:
    return {"hidden_states": step.x, "timestep": step.level, "encoder_hidden_states": step["hidden"]}


AURAFLOW = TrainingFamily(
    name="auraflow",
    pipelines=("AuraFlowPipeline",),
    encode=_encode,
    encode_pictures=sampled,
    inputs=_inputs,
    divisor=pixels(2),
    targets=("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
    shift=static_shift,
    max_tokens=256,
    refusal=refuse_distilled,
)
