"""Video models, trained on single frames: Wan and LTX."""

from typing import Any

from torch import Tensor

from diffadapt.training.families.drawing import usual_with
from diffadapt.training.families.family import Caption, Pipeline, Step, Tensors, TrainingFamily
from diffadapt.training.families.packing import encode_prompt, flat, real_tokens, unflattened
from diffadapt.training.families.pictures import frame_by_buffers, frame_sampled
from diffadapt.training.families.schedules import pixel_shift, refuse_distilled, static_shift


def _encode_wan(pipe: Pipeline, caption: Caption) -> Tensors:
    # Padding is zeros, which are attended to, so nothing is left out.
    hidden, _ = encode_prompt(pipe, caption, do_classifier_free_guidance=False)
    return {"hidden": hidden[0]}


def _inputs_wan(step: Step) -> dict[str, Any]:
    told = 1000 * step.level
    if step.pipe.config.expand_timesteps:
        # Wan 2.2 5B is told the time of every token, because it can continue from a frame without noise.
        tokens = step.noisy.shape[2] * step.noisy.shape[3] // 4
        told = told[:, None].expand(-1, tokens)
    return {"hidden_states": step.x.unsqueeze(2), "timestep": told, "encoder_hidden_states": step["hidden"]}


def _read_wan(step: Step, output: Any) -> Tensor:
    return output.squeeze(2)


def _experts_wan(pipe: Pipeline) -> dict[str, tuple[float, float]]:
    boundary = pipe.config.boundary_ratio
    if boundary is None:
        return {"transformer": (0.0, 1.0)}
    experts = {"transformer": (boundary, 1.0), "transformer_2": (0.0, boundary)}
    return {name: levels for name, levels in experts.items() if getattr(pipe, name) is not None}


def _divisor_wan(pipe: Pipeline) -> int:
    denoiser = getattr(pipe, next(iter(_experts_wan(pipe))))
    return pipe.vae_scale_factor_spatial * max(denoiser.config.patch_size[1:])


WAN = TrainingFamily(
    name="wan",
    pipelines=("WanPipeline",),
    encode=_encode_wan,
    encode_pictures=frame_sampled,
    inputs=_inputs_wan,
    read=_read_wan,
    divisor=_divisor_wan,
    targets=("to_q", "to_k", "to_v", "to_out.0"),
    experts=_experts_wan,
    shift=static_shift,
    max_tokens=512,
    drawing=usual_with(num_frames=1),
    refusal=refuse_distilled,
)


def _encode_ltx(pipe: Pipeline, caption: Caption) -> Tensors:
    hidden, mask, *_ = encode_prompt(pipe, caption, do_classifier_free_guidance=False)
    return {"hidden": real_tokens(hidden, mask)}


_FRAMES_PER_SECOND = 25
"""The pipeline's default `frame_rate`."""


def _inputs_ltx(step: Step) -> dict[str, Any]:
    pipe, space = step.pipe, step.pipe.vae_spatial_compression_ratio
    return {
        "hidden_states": flat(step.x),
        "timestep": 1000 * step.level,
        "encoder_hidden_states": step["hidden"],
        "encoder_attention_mask": step.padding_mask("hidden"),
        "num_frames": 1,
        "height": step.noisy.shape[2],
        "width": step.noisy.shape[3],
        # Seconds and pixels of a latent frame, row and column.
        "rope_interpolation_scale": (pipe.vae_temporal_compression_ratio / _FRAMES_PER_SECOND, space, space),
    }


LTX = TrainingFamily(
    name="ltx",
    pipelines=("LTXPipeline",),
    encode=_encode_ltx,
    encode_pictures=frame_by_buffers,
    inputs=_inputs_ltx,
    read=unflattened,
    divisor=lambda pipe: pipe.vae_spatial_compression_ratio,
    targets=("to_q", "to_k", "to_v", "to_out.0"),
    shift=pixel_shift,
    tokens=("hidden",),
    max_tokens=128,
    drawing=usual_with(num_frames=1),
    refusal=refuse_distilled,
)
