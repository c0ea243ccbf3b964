"""Single small models, smaller than those of `models`, and what they predict."""

from typing import Any

import torch
from diffusers import FluxTransformer2DModel, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel

from tests.support import models


def unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        down_block_types=("CrossAttnDownBlock2D",),
        mid_block_type=None,
        up_block_types=("UpBlock2D",),
        block_out_channels=(8,),
        layers_per_block=1,
        cross_attention_dim=models.WIDTH,
        attention_head_dim=2,
        norm_num_groups=4,
    ).eval()


def flux(blocks: int = 2) -> FluxTransformer2DModel:
    torch.manual_seed(0)
    return models.flux_transformer(blocks)


def clip() -> CLIPTextModel:
    torch.manual_seed(0)
    return models.clip_text(layers=1)


def predict(model: nn.Module, scale: float | None = None) -> Tensor:
    """Return the output of a UNet, a Flux transformer or a CLIP text encoder for a fixed input.

    Args:
        scale: The call scale, for denoisers.
    """
    if isinstance(getattr(model, "_orig_mod", model), CLIPTextModel):
        return model(torch.arange(14).reshape(2, 7) % 5).last_hidden_state
    generator = torch.Generator().manual_seed(6)
    options = None if scale is None else {"scale": scale}
    arguments: dict[str, Any]
    if isinstance(getattr(model, "_orig_mod", model), UNet2DConditionModel):
        arguments = {
            "sample": torch.randn(1, 4, 8, 8, generator=generator),
            "timestep": torch.tensor(7),
            "encoder_hidden_states": torch.randn(1, 4, models.WIDTH, generator=generator),
            "cross_attention_kwargs": options,
        }
    else:
        arguments = {
            "hidden_states": torch.randn(1, 4, 16, generator=generator),
            "encoder_hidden_states": torch.randn(1, 3, models.WIDTH, generator=generator),
            "pooled_projections": torch.randn(1, models.WIDTH, generator=generator),
            "timestep": torch.tensor([0.5]),
            "img_ids": torch.zeros(4, 3),
            "txt_ids": torch.zeros(3, 3),
            "joint_attention_kwargs": options,
        }
    return model(**arguments).sample
