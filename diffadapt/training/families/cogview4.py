"""CogView4."""

from typing import Any

from torch import Tensor

from diffadapt.training.families.family import Caption, Pipeline, Step, Tensors, TrainingFamily
from diffadapt.training.families.packing import encode_prompt
from diffadapt.training.families.pictures import sampled
from diffadapt.training.families.schedules import refuse_distilled, shifted, static_shift


def _encode(pipe: Pipeline, caption: Caption) -> Tensors:
    # Padded on the left to a multiple of 16, and the padding is attended to.
    hidden, _ = encode_prompt(pipe, caption, do_classifier_free_guidance=False)
    return {"hidden": hidden[0]}


def _shift(pipe: Pipeline, latents: Tensor) -> float:
    """Return the dynamic shift, which is linear in the square root of the number of tokens."""
    config = pipe.scheduler.config
    if not config.get("use_dynamic_shifting", False):
        return static_shift(pipe, latents)
    tokens = latents.shape[2] * latents.shape[3] // pipe.transformer.config.patch_size**2
    growth = (tokens / config.get("base_image_seq_len", 256)) ** 0.5
    return growth * config.get("max_shift", 0.75) + config.get("base_shift", 0.25)


def _inputs(step: Step) -> dict[str, Any]:
    sizes = step.told_sizes(step.pipe.vae_scale_factor)
    # The model is told the step of a schedule that is not shifted.
    unshifted = shifted(step.level, 1 / _shift(step.pipe, step.noisy))
    return {
        "hidden_states": step.x,
        "timestep": 1000 * unshifted,
        "encoder_hidden_states": step["hidden"],
        "original_size": sizes[:, :2],
        "crop_coords": sizes[:, 2:4],
        "target_size": sizes[:, 4:],
    }


def _divisor(pipe: Pipeline) -> int:
    return pipe.vae_scale_factor * pipe.transformer.config.patch_size


COGVIEW4 = TrainingFamily(
    name="cogview4",
    pipelines=("CogView4Pipeline",),
    encode=_encode,
    encode_pictures=sampled,
    inputs=_inputs,
    divisor=_divisor,
    targets=("to_q", "to_k", "to_v", "to_out.0"),
    shift=_shift,
    tokens=("hidden",),
    # Padding is not masked.
    mixed_lengths=False,
    max_tokens=1024,
    refusal=refuse_distilled,
)
