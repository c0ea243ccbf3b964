"""HunyuanImage 2.1."""

from typing import Any

from diffadapt.training.families.family import Caption, Pipeline, Step, Tensors, TrainingFamily
from diffadapt.training.families.packing import encoder_device, real_tokens
from diffadapt.training.families.pictures import sampled
from diffadapt.training.families.schedules import refuse_distilled, static_shift


def _refusal(pipe: Pipeline) -> str | None:
    config = pipe.transformer.config
    distilled = config.use_meanflow or config.guidance_embeds
    return refuse_distilled(pipe, sign="its transformer is told the guidance scale or two times" if distilled else None)


def _encode(pipe: Pipeline, caption: Caption) -> Tensors:
    # Text in quotes is encoded by characters, too. Without any, nothing of it is attended to.
    hidden, mask, glyphs, glyph_mask = pipe.encode_prompt([caption.text], device=encoder_device(pipe))
    return {"hidden": real_tokens(hidden, mask), "glyphs": real_tokens(glyphs, glyph_mask)}


def _inputs(step: Step) -> dict[str, Any]:
    config = step.pipe.transformer.config
    # In the dtype of the weights, which the model does not cast it to.
    told = (1000 * step.level).to(step.dtype)
    return {
        "hidden_states": step.x,
        "timestep": told,
        # A mean velocity over no time is the velocity itself, which is what the loss compares with.
        "timestep_r": told if config.use_meanflow else None,
        "guidance": (1000 * step.told_guidance()).to(step.dtype) if config.guidance_embeds else None,
        "encoder_hidden_states": step["hidden"],
        "encoder_attention_mask": step.mask("hidden"),
        "encoder_hidden_states_2": step["glyphs"],
        "encoder_attention_mask_2": step.mask("glyphs"),
    }


def _divisor(pipe: Pipeline) -> int:
    return pipe.vae_scale_factor * max(pipe.transformer.config.patch_size)


HUNYUAN_IMAGE = TrainingFamily(
    name="hunyuan-image",
    pipelines=("HunyuanImagePipeline",),
    encode=_encode,
    encode_pictures=sampled,
    inputs=_inputs,
    divisor=_divisor,
    targets=("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
    shift=static_shift,
    guidance=3.25,
    tokens=("hidden", "glyphs"),
    refusal=_refusal,
)
