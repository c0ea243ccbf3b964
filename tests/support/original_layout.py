"""State dicts of models in the layout in which they were published."""

import re
from typing import Any

import torch
from torch import Tensor, nn

from tests.support.dialects import original_names


def in_original_layout(model: nn.Module, prefix: str) -> dict[str, Tensor]:
    """Return a model's state dict with the names and fused layers of its original layout."""
    state, found = model.state_dict(), dict[str, Tensor]()
    for name, (parts, swapped) in original_names(model).items():
        for kind in ("weight", "bias"):
            tensors = [state.pop(key) for part in parts if (key := f"{part}.{kind}") in state]
            if tensors:
                joined = torch.cat(tensors)
                found[f"{prefix}{name}.{kind}"] = joined.roll(len(joined) // 2, 0) if swapped else joined
    return found | {prefix + key: tensor for key, tensor in state.items()}


def single_file_of(pipe: Any) -> dict[str, Tensor]:
    """Return the weights of a Stable Diffusion 1 pipeline as its single file has them."""
    text = {
        f"cond_stage_model.transformer.{key if key.startswith('text_model.') else f'text_model.{key}'}": tensor
        for key, tensor in pipe.text_encoder.state_dict().items()
    }
    blocks = len(pipe.vae.config.block_out_channels)
    vae = {f"first_stage_model.{_in_ldm_vae(key, blocks)}": tensor for key, tensor in pipe.vae.state_dict().items()}
    whole = {**in_original_layout(pipe.unet, "model.diffusion_model."), **vae, **text}
    return {key: tensor.contiguous().clone() for key, tensor in whole.items()}


def _in_ldm_vae(key: str, blocks: int) -> str:
    key = re.sub(r"up_blocks\.(\d+)\.", lambda found: f"up.{blocks - 1 - int(found[1])}.", key)
    for pattern, name in _LDM_VAE.items():
        key = re.sub(pattern, name, key)
    return re.sub(r"mid\.block_(\d)", lambda found: f"mid.block_{int(found[1]) + 1}", key)


_LDM_VAE = {
    r"down_blocks\.": "down.",
    r"mid_block\.resnets\.": "mid.block_",
    r"mid_block\.attentions\.0\.": "mid.attn_1.",
    r"attn_1\.group_norm": "attn_1.norm",
    r"attn_1\.to_([qkv])": r"attn_1.\1",
    r"attn_1\.to_out\.0": "attn_1.proj_out",
    r"\.resnets\.": ".block.",
    r"\.downsamplers\.0\.": ".downsample.",
    r"\.upsamplers\.0\.": ".upsample.",
    "conv_norm_out": "norm_out",
    "conv_shortcut": "nin_shortcut",
}
"""Name of a part of an autoencoder in diffusers -> name in the original code."""
