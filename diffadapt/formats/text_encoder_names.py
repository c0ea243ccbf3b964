"""What ComfyUI calls the text encoders of each family, and the layers in them.

A layer is `text_encoders.<text encoder>.transformer.<path>`. Source: ComfyUI `comfy/lora.py` (`model_lora_keys_clip`)
and the models in `comfy/text_encoders/`; OneTrainer 23df383 `modules/model/*Model.py` names the same ones.
"""

import re
from collections.abc import Mapping

from diffadapt.types.layer_state import LayerState

_NAMES: dict[str, dict[str, str]] = {
    "sd": {"text_encoder": "clip_l"},
    "sd2": {"text_encoder": "clip_h"},
    "sdxl": {"text_encoder": "clip_l", "text_encoder_2": "clip_g"},
    "cascade": {"text_encoder": "clip_g", "prior_text_encoder": "clip_g"},
    "sd3": {"text_encoder": "clip_l", "text_encoder_2": "clip_g", "text_encoder_3": "t5xxl"},
    "flux": {"text_encoder": "clip_l", "text_encoder_2": "t5xxl"},
    "chroma": {"text_encoder": "t5xxl"},
    "pixart": {"text_encoder": "t5xxl"},
    "ltx": {"text_encoder": "t5xxl"},
    "auraflow": {"text_encoder": "pile_t5xl"},
    "wan": {"text_encoder": "umt5xxl"},
    "helios": {"text_encoder": "umt5xxl"},
    "lumina2": {"text_encoder": "gemma2_2b"},
    "ltx2": {"text_encoder": "gemma3_12b"},
    "qwen": {"text_encoder": "qwen25_7b"},
    "anima": {"text_encoder": "qwen3_06b"},
    "zimage": {"text_encoder": "qwen3_4b"},
    "krea2": {"text_encoder": "qwen3vl_4b"},
    "ideogram4": {"text_encoder": "qwen3vl_8b"},
    "hunyuan-video": {"text_encoder": "llama", "text_encoder_2": "clip_l"},
    "hunyuan-video15": {"text_encoder": "qwen25_7b", "text_encoder_2": "byt5_small"},
    "hunyuan-image": {"text_encoder": "qwen25_7b", "text_encoder_2": "byt5_small"},
    "hidream": {
        "text_encoder": "clip_l",
        "text_encoder_2": "clip_g",
        "text_encoder_3": "t5xxl",
        "text_encoder_4": "llama",
    },
}
_OF_FLUX2 = {5120: "mistral3_24b", 2560: "qwen3_4b", 4096: "qwen3_8b"}
"""Hidden size -> the text encoder of that size; Flux.2 comes with any of them."""

_READS_HIDDEN = re.compile(r".*layers\.\d+\.(?:self_attn\.[qkv]_proj|mlp\.(?:gate|up)_proj)")
_LANGUAGE_MODEL = re.compile(r"(?:(?:model|language_model)\.)*(?=(?:layers\.\d|embed_tokens|norm)(?:\.|\d|$))")
_VISION_MODEL = re.compile(r"(?:model\.)?(?=visual\.)")


def comfy_text_encoder(family: str | None, component: str, layers: Mapping[str, LayerState]) -> str | None:
    """Return ComfyUI's name of a text encoder, or `None` if it is unknown.

    Args:
        family: the family of the pipeline.
        component: the name of the component.
        layers: the adapter layers of the component, by path.
    """
    if family == "flux2" and component == "text_encoder":
        widths = {layer.inputs for path, layer in layers.items() if _READS_HIDDEN.fullmatch(path)}
        return next((_OF_FLUX2[width] for width in widths if width in _OF_FLUX2), None)
    return _NAMES.get(family or "", {}).get(component)


def comfy_path(path: str) -> str:
    """Return the path of a text encoder's layer in ComfyUI.

    There, a language model is always inside a module `model`, and its vision model beside it. In transformers that
    depends on the class and on the version.
    """
    language = _LANGUAGE_MODEL.match(path)
    if language is not None:
        return f"model.{path[language.end() :]}"
    vision = _VISION_MODEL.match(path)
    return path if vision is None else path[vision.end() :]
