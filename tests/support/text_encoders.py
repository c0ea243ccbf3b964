"""Small text encoders of all classes that pipelines use, and the output of one call."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.support.versions import transformers

_SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 64,
    "max_position_embeddings": 64,
}
_GROUPED = _SIZES | {"num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_SECTIONS = {"rope_type": "default", "mrope_section": [1, 1, 2]}
_T5 = {"d_model": 32, "d_ff": 48, "d_kv": 8, "num_heads": 4, "num_layers": 2, "vocab_size": 64}
_VISION = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "out_hidden_size": 32}


def _of(model: str, config: str, **settings: Any) -> Callable[[], nn.Module]:
    return lambda: getattr(transformers, model)(getattr(transformers, config)(**settings))


def _mistral3() -> nn.Module:
    vision = transformers.PixtralVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, image_size=32, patch_size=8
    )
    return transformers.Mistral3ForConditionalGeneration(
        transformers.Mistral3Config(text_config=transformers.MistralConfig(**_GROUPED), vision_config=vision)
    )


TEXT_ENCODERS: dict[str, Callable[[], nn.Module]] = {
    "clip": _of("CLIPTextModel", "CLIPTextConfig", **_SIZES),
    "t5": _of("T5EncoderModel", "T5Config", **_T5, feed_forward_proj="gated-gelu"),
    "umt5": _of("UMT5EncoderModel", "UMT5Config", **_T5),
    "bert": _of("BertModel", "BertConfig", **_SIZES),
    "siglip": _of("SiglipTextModel", "SiglipTextConfig", **_SIZES),
    "llama": _of("LlamaForCausalLM", "LlamaConfig", **_GROUPED),
    "gemma": _of("GemmaModel", "GemmaConfig", **_GROUPED),
    "gemma2": _of("Gemma2Model", "Gemma2Config", **_GROUPED),
    "gemma3": _of("Gemma3TextModel", "Gemma3TextConfig", **_GROUPED),
    "qwen2": _of("Qwen2Model", "Qwen2Config", **_GROUPED),
    "qwen3": _of("Qwen3Model", "Qwen3Config", **_GROUPED),
    "glm": _of("GlmModel", "GlmConfig", **_GROUPED),
    "qwen2.5-vl": _of(
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen2_5_VLConfig",
        text_config=_GROUPED | {"rope_parameters": _SECTIONS},
        vision_config=_VISION | {"fullatt_block_indexes": [1]},
    ),
    "qwen3-vl": _of(
        "Qwen3VLForConditionalGeneration",
        "Qwen3VLConfig",
        text_config=_GROUPED | {"rope_parameters": _SECTIONS},
        vision_config=_VISION | {"deepstack_visual_indexes": [0], "num_position_embeddings": 16},
    ),
    "mistral3": _mistral3,
}


def hidden_states(model: nn.Module, rows: int) -> Tensor:
    """Return the hidden states of all layers for different prompts, of shape (rows, values)."""
    with torch.no_grad():
        found = model(input_ids=torch.arange(3, 3 + 7 * rows).reshape(rows, 7), output_hidden_states=True)
    return torch.cat([states.flatten(1) for states in found.hidden_states], 1)
