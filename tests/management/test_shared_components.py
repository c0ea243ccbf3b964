"""Two pipelines that share a text encoder, as SDXL's base and refiner do."""

import pytest
import torch
from diffusers import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline
from torch import Tensor

from diffadapt import AdapterError
from tests.support import models

LAYERS = {
    "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q": 16,
    "text_encoder_2.text_model.encoder.layers.0.self_attn.q_proj": models.WIDTH,
}


def pipelines() -> tuple[StableDiffusionXLPipeline, StableDiffusionXLImg2ImgPipeline]:
    base = models.sdxl()
    shared = {name: base.components[name] for name in ("vae", "text_encoder_2", "tokenizer_2", "scheduler")}
    refiner = StableDiffusionXLImg2ImgPipeline(
        **shared, text_encoder=None, tokenizer=None, unet=models.unet_sdxl(), add_watermarker=False
    )
    return base, refiner


def file(seed: int = 0) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    shapes = {"lora_A": lambda size: (2, size), "lora_B": lambda size: (size, 2)}
    return {
        f"{path}.{name}.weight": torch.randn(shape(size))
        for path, size in LAYERS.items()
        for name, shape in shapes.items()
    }


def test_the_same_file_loads_into_both_pipelines() -> None:
    base, refiner = pipelines()
    base.load_adapter(file(), "style")
    on_shared = base.adapters["style"].components["text_encoder_2"]
    report = refiner.load_adapter(file(), "style")
    assert report.components == {"unet": 1, "text_encoder_2": 1}
    for pipe in (base, refiner):
        assert set(pipe.adapters["style"].components) == {"unet", "text_encoder_2"}
        assert pipe.adapters["style"].components["text_encoder_2"] is on_shared


def test_another_adapter_of_that_name_is_refused() -> None:
    base, refiner = pipelines()
    base.load_adapter(file(), "style")
    with pytest.raises(AdapterError, match="adapter 'style' exists already"):
        refiner.load_adapter(file(seed=1), "style")
    with pytest.raises(AdapterError, match="adapter 'style' exists already"):
        base.load_adapter(file(), "style")
    assert set(refiner.adapters["style"].components) == {"text_encoder_2"}
