"""Stable Diffusion 3 and 3.5."""

from typing import Any

from diffadapt.training.families.family import Caption, Pipeline, Step, Tensors, TrainingFamily
from diffadapt.training.families.packing import encode_prompt
from diffadapt.training.families.pictures import sampled
from diffadapt.training.families.schedules import packed_shift, refuse_distilled


def _encode(pipe: Pipeline, caption: Caption) -> Tensors:
    # Padding of both CLIP and T5 is attended to, so nothing is left out.
    hidden, _, pooled, _ = encode_prompt(pipe, caption, None, None, do_classifier_free_guidance=False)
    return {"hidden": hidden[0], "pooled": pooled[0]}


def _inputs(step: Step) -> dict[str, Any]:
    return {
        "hidden_states": step.x,
        "timestep": 1000 * step.level,
        "encoder_hidden_states": step["hidden"],
        "pooled_projections": step["pooled"],
    }


def _divisor(pipe: Pipeline) -> int:
    return pipe.vae_scale_factor * pipe.transformer.config.patch_size


SD3 = TrainingFamily(
    name="sd3",
    pipelines=("StableDiffusion3Pipeline",),
    encode=_encode,
    encode_pictures=sampled,
    inputs=_inputs,
    divisor=_divisor,
    targets=(
        *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
        *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
    ),
    shift=packed_shift,
    max_tokens=256,
    refusal=refuse_distilled,
)
