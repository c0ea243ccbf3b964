"""Sana."""

from typing import Any

from torch import Tensor

from diffadapt.training.families.drawing import usual_with
from diffadapt.training.families.family import Caption, Pipeline, Step, Tensors, TrainingFamily
from diffadapt.training.families.packing import call_default, encode_prompt, pixels, real_tokens
from diffadapt.training.families.schedules import refuse_distilled, static_shift


def _encode(pipe: Pipeline, caption: Caption) -> Tensors:
    """The pipeline puts an instruction before captions, which `encode_prompt` itself leaves out."""
    return _encode_after(pipe, caption, call_default(pipe, "complex_human_instruction"))


def _encode_empty(pipe: Pipeline, caption: Caption) -> Tensors:
    """Return what the pipeline guides away from, which has no instruction."""
    return _encode_after(pipe, caption, None)


def _encode_after(pipe: Pipeline, caption: Caption, instruction: list[str] | None) -> Tensors:
    hidden, mask, *_ = encode_prompt(
        pipe, caption, do_classifier_free_guidance=False, complex_human_instruction=instruction
    )
    return {"hidden": real_tokens(hidden, mask)}


def _encode_pictures(pipe: Pipeline, pixels: Tensor) -> Tensors:
    """The autoencoder has no distribution."""
    latents = pipe.vae.encode(pixels.to(pipe.vae.device, pipe.vae.dtype)).latent
    return {"mean": latents.float() * pipe.vae.config.scaling_factor}


def _inputs(step: Step) -> dict[str, Any]:
    return {
        "hidden_states": step.x,
        "timestep": 1000 * step.level * step.pipe.transformer.config.timestep_scale,
        "encoder_hidden_states": step["hidden"],
        "encoder_attention_mask": step.padding_mask("hidden"),
    }


def _read(step: Step, output: Any) -> Tensor:
    """Some models predict a variance, too."""
    return output[:, : step.noisy.shape[1]]


SANA = TrainingFamily(
    name="sana",
    pipelines=("SanaPipeline",),
    encode=_encode,
    encode_empty=_encode_empty,
    encode_pictures=_encode_pictures,
    inputs=_inputs,
    read=_read,
    divisor=pixels(1),
    targets=("to_q", "to_k", "to_v", "to_out.0"),
    shift=static_shift,
    tokens=("hidden",),
    max_tokens=300,
    # Otherwise, some other size of about that area is drawn.
    drawing=usual_with(use_resolution_binning=False),
    refusal=refuse_distilled,
)
