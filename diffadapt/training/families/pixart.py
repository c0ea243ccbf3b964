"""PixArt-Alpha and PixArt-Sigma."""

from dataclasses import replace
from importlib.util import find_spec
from typing import Any

from torch import Tensor

from diffadapt.training.families.drawing import usual_with
from diffadapt.training.families.family import Caption, LevelSampling, Pipeline, Step, Tensors, TrainingFamily
from diffadapt.training.families.packing import call_default, encoder_device, real_tokens
from diffadapt.training.families.pictures import sampled
from diffadapt.training.families.schedules import diffusion_process, refuse_distilled


def _encode(pipe: Pipeline, caption: Caption) -> Tensors:
    hidden, mask, *_ = pipe.encode_prompt(
        [caption.text],
        device=encoder_device(pipe),
        do_classifier_free_guidance=False,
        max_sequence_length=caption.max_tokens,
        # The pipeline cleans captions by default, if the packages for it are installed.
        clean_caption=call_default(pipe, "clean_caption") and all(map(find_spec, ("bs4", "ftfy"))),
    )
    return {"hidden": real_tokens(hidden, mask)}


def _inputs(step: Step) -> dict[str, Any]:
    added: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
    if step.pipe.transformer.config.use_additional_conditions:
        drawn = step.told_sizes(step.pipe.vae_scale_factor)[:, 4:]
        added = {"resolution": drawn, "aspect_ratio": drawn[:, :1] / drawn[:, 1:]}
    return {
        "hidden_states": step.x,
        "timestep": step.level,
        "encoder_hidden_states": step["hidden"],
        "encoder_attention_mask": step.padding_mask("hidden"),
        "added_cond_kwargs": added,
    }


def _read(step: Step, output: Any) -> Tensor:
    """The second half of the channels is a variance."""
    return output[:, : step.noisy.shape[1]]


def _divisor(pipe: Pipeline) -> int:
    return pipe.vae_scale_factor * pipe.transformer.config.patch_size


PIXART_SIGMA = TrainingFamily(
    name="pixart",
    pipelines=("PixArtSigmaPipeline",),
    encode=_encode,
    encode_pictures=sampled,
    inputs=_inputs,
    read=_read,
    divisor=_divisor,
    targets=("to_q", "to_k", "to_v", "to_out.0"),
    process=diffusion_process,
    levels=LevelSampling("uniform"),
    tokens=("hidden",),
    max_tokens=300,
    # Otherwise, some other size of about that area is drawn.
    drawing=usual_with(use_resolution_binning=False),
    refusal=refuse_distilled,
)

PIXART_ALPHA = replace(PIXART_SIGMA, name="pixart-alpha", pipelines=("PixArtAlphaPipeline",), max_tokens=120)
