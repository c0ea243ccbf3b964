"""Models for `gpu_check`: a UNet shaped like SDXL's and a transformer shaped like Flux', in two sizes, with LoRAs."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import FluxTransformer2DModel, UNet2DConditionModel
from torch import Tensor, nn

ENDINGS = (".to_q", ".to_k", ".to_v", ".to_out.0")
RANK = 16


@dataclass(frozen=True)
class Subject:
    """A model with an input.

    Attributes:
        name: the name in the table.
        component: the prefix of the model's layers in files.
        model: the model.
        inputs: the arguments of a call.
    """

    name: str
    component: str
    model: Any
    inputs: dict[str, Any]

    @torch.no_grad()
    def __call__(self) -> Tensor:
        """Return the output of a call."""
        return self.model(**self.inputs, return_dict=False)[0]

    def lora(self, seed: int = 0, rank: int = RANK) -> dict[str, Tensor]:
        """Return a LoRA for every attention projection, in the format of diffusers, in CPU memory.

        Its change has about a tenth of the size of a weight.
        """
        generator = torch.Generator().manual_seed(seed)
        tensors: dict[str, Tensor] = {}
        for path, layer in self.model.named_modules():
            if isinstance(layer, nn.Linear) and path.endswith(ENDINGS):
                out, columns = layer.out_features, layer.in_features
                down = torch.randn(rank, columns, generator=generator) / columns**0.5
                up = torch.randn(out, rank, generator=generator) / (10 * rank**0.5)
                tensors[f"{self.component}.{path}.lora_A.weight"] = down
                tensors[f"{self.component}.{path}.lora_B.weight"] = up
        return tensors


def unet(device: torch.device, dtype: torch.dtype, *, tiny: bool = False) -> Subject:
    """Return a UNet of SDXL's shape, for two pictures of 1024 x 1024 pixels."""
    channels = (32, 64) if tiny else (320, 640, 1280)
    cross, pooled, ids, pixels, tokens = (32, 16, 8, 8, 7) if tiny else (2048, 1280, 256, 128, 77)
    config: dict[str, Any] = {
        "sample_size": pixels,
        "down_block_types": ("DownBlock2D", *["CrossAttnDownBlock2D"] * (len(channels) - 1)),
        "up_block_types": (*["CrossAttnUpBlock2D"] * (len(channels) - 1), "UpBlock2D"),
        "block_out_channels": channels,
        "layers_per_block": 1 if tiny else 2,
        "transformer_layers_per_block": (1, 1) if tiny else (1, 2, 10),
        "cross_attention_dim": cross,
        "attention_head_dim": (1, 2) if tiny else (5, 10, 20),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": ids,
        "projection_class_embeddings_input_dim": pooled + 6 * ids,
    }
    model = _random(lambda: UNet2DConditionModel(**config), device, dtype)
    draw = _Draw(device, dtype)
    inputs = {
        "sample": draw(2, 4, pixels, pixels),
        "timestep": torch.tensor(500, device=device),
        "encoder_hidden_states": draw(2, tokens, cross),
        "added_cond_kwargs": {"text_embeds": draw(2, pooled), "time_ids": draw(2, 6)},
    }
    return Subject("SDXL-shaped UNet", "unet", model, inputs)


def flux(device: torch.device, dtype: torch.dtype, *, tiny: bool = False) -> Subject:
    """Return a transformer with layers of Flux' sizes, 4 + 8 blocks of its 19 + 38, for a picture of 1024 x 1024."""
    heads, blocks, text, pooled, image, tokens = (2, 1, 32, 16, 16, 8) if tiny else (24, 4, 4096, 768, 4096, 512)
    config: dict[str, Any] = {
        "in_channels": 16 if tiny else 64,
        "num_layers": blocks,
        "num_single_layers": 2 * blocks,
        "num_attention_heads": heads,
        "attention_head_dim": 16 if tiny else 128,
        "joint_attention_dim": text,
        "pooled_projection_dim": pooled,
        "axes_dims_rope": (4, 4, 8) if tiny else (16, 56, 56),
        "guidance_embeds": True,
    }
    model = _random(lambda: FluxTransformer2DModel(**config), device, dtype)
    draw = _Draw(device, dtype)
    inputs = {
        "hidden_states": draw(1, image, config["in_channels"]),
        "encoder_hidden_states": draw(1, tokens, text),
        "pooled_projections": draw(1, pooled),
        "timestep": torch.tensor([0.5], device=device, dtype=dtype),
        "guidance": torch.tensor([3.5], device=device, dtype=torch.float32),
        "img_ids": torch.zeros(image, 3, device=device, dtype=dtype),
        "txt_ids": torch.zeros(tokens, 3, device=device, dtype=dtype),
    }
    return Subject("Flux-shaped transformer, 4 + 8 blocks", "transformer", model, inputs)


class _Draw:
    """Returns random tensors on a device, the same ones on all devices."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._device, self._dtype = device, dtype
        self._generator = torch.Generator().manual_seed(1)

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator).to(self._device, self._dtype)


def _random(build: Callable[[], nn.Module], device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Return a model with weights that keep the size of activations, without making them in CPU memory."""
    with torch.device("meta"):
        # Not the method of diffusers' models, which warns.
        model = nn.Module.to(build(), dtype)
    model = model.to_empty(device=device).eval().requires_grad_(False)
    generator = torch.Generator(device=device).manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=parameter[0].numel() ** -0.5, generator=generator)
        else:
            parameter.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
    for name, buffer in model.named_buffers():
        raise AssertionError(f"{name} {tuple(buffer.shape)} has no values")
    return model
