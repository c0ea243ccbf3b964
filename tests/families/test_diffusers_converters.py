"""Every conversion of diffusers is one that we read, or is listed here as one that we do not read yet."""

import inspect
from functools import cache
from types import FunctionType

import pytest
from diffusers.loaders import lora_conversion_utils as theirs
from torch import nn

from diffadapt.formats import prefixes
from diffadapt.formats.names import Names
from diffadapt.formats.verdicts import Place
from diffadapt.runtime.targets import Targets
from tests.support.denoisers import SMALL

READ: dict[str, tuple[str, list[str]]] = {
    "_convert_non_diffusers_lora_to_diffusers": (
        "sd",
        ["lora_unet_down_blocks_0_attentions_0_proj_in", "lora_te_text_model_encoder_layers_0_self_attn_q_proj"],
    ),
    "_convert_unet_lora_key": ("sd", ["lora_unet_input_blocks_1_1_proj_in", "lora_unet_middle_block_1_proj_in"]),
    "_convert_text_encoder_lora_key": ("sdxl", ["lora_te2_text_model_encoder_layers_0_mlp_fc1"]),
    "_convert_kohya_flux_lora_to_diffusers": ("flux", ["lora_unet_double_blocks_0_img_attn_qkv"]),
    "_convert_bfl_flux_control_lora_to_diffusers": ("flux", ["single_blocks.0.linear1", "img_in"]),
    "_convert_fal_kontext_lora_to_diffusers": ("flux", ["base_model.model.double_blocks.0.img_mod.lin"]),
    "_convert_hunyuan_video_lora_to_diffusers": (
        "hunyuan-video",
        ["diffusion_model.double_blocks.0.img_attn.qkv", "diffusion_model.single_blocks.0.linear1"],
    ),
    "_convert_non_diffusers_lumina2_lora_to_diffusers": ("lumina2", ["diffusion_model.layers.0.attention.qkv"]),
    "_convert_non_diffusers_wan_lora_to_diffusers": (
        "wan",
        ["diffusion_model.blocks.0.cross_attn.k_img", "diffusion_model.head.head", "diffusion_model.img_emb.proj.1"],
    ),
    "_convert_musubi_wan_lora_to_diffusers": ("wan", ["lora_unet_blocks_0_cross_attn_k_img"]),
    "_convert_non_diffusers_hidream_lora_to_diffusers": (
        "hidream",
        ["diffusion_model.double_stream_blocks.0.block.attn1.to_q"],
    ),
    "_convert_non_diffusers_ltxv_lora_to_diffusers": ("ltx", ["diffusion_model.transformer_blocks.0.attn1.to_q"]),
    "_convert_non_diffusers_ltx2_lora_to_diffusers": (
        "ltx2",
        ["diffusion_model.transformer_blocks.0.audio_attn1.to_q", "diffusion_model.patchify_proj"],
    ),
    "_convert_non_diffusers_qwen_lora_to_diffusers": (
        "qwen",
        ["lora_unet_transformer_blocks_0_attn_to_q", "diffusion_model.transformer_blocks.0.attn.to_out.0"],
    ),
    "_convert_non_diffusers_anima_lora_to_diffusers": (
        "anima",
        ["diffusion_model.blocks.0.self_attn.q_proj", "diffusion_model.llm_adapter.blocks.0.self_attn.q_proj"],
    ),
    "_convert_non_diffusers_flux2_lora_to_diffusers": ("flux2", ["diffusion_model.double_blocks.0.img_attn.qkv"]),
    "_convert_kohya_flux2_lora_to_diffusers": ("flux2", ["lora_unet_single_blocks_0_linear1"]),
    "_convert_non_diffusers_lokr_to_diffusers": ("zimage", ["diffusion_model.layers.0.attention.to_q"]),
    "_convert_non_diffusers_flux2_lokr_to_diffusers": ("flux2", ["diffusion_model.double_blocks.0.txt_attn.qkv"]),
    "_convert_lycoris_flux2_lokr_to_diffusers": ("flux2", ["lycoris_transformer_blocks_0_attn_to_q"]),
    "_convert_non_diffusers_z_image_lora_to_diffusers": (
        "zimage",
        ["diffusion_model.noise_refiner.0.attention.qkv", "lora_unet_layers_0_attention_out"],
    ),
    "_convert_non_diffusers_ideogram4_lora_to_diffusers": ("ideogram4", ["diffusion_model.layers.0.attention.qkv"]),
    "_convert_non_diffusers_krea2_lora_to_diffusers": ("krea2", ["diffusion_model.blocks.0.attn.wq"]),
}
"""Name of a function of diffusers -> a family, and names of layers as in the files that the function converts."""

READ_AS_A_FORMAT = {"_convert_xlabs_flux_lora_to_diffusers"}
"""Conversions of names that are a format of their own here, with tests of its own."""

NOT_YET = {
    "_convert_non_diffusers_flux3_lora_to_diffusers",
    "_convert_non_diffusers_ace_step_lora_to_diffusers",
    "_convert_non_diffusers_minimax_h3_lora_to_diffusers",
}


def test_every_conversion_of_diffusers_is_listed() -> None:
    found = {name for name, _ in inspect.getmembers(theirs, lambda it: isinstance(it, FunctionType))}
    present = {name for name in found if name.startswith("_convert_")}
    listed = READ.keys() | READ_AS_A_FORMAT | NOT_YET
    assert present <= listed, f"new in diffusers: {sorted(present - listed)}"


@cache
def small(family: str) -> dict[str, nn.Module]:
    return SMALL[family].build()


@pytest.mark.parametrize("name", READ)
def test_the_names_that_diffusers_converts_are_read(name: str) -> None:
    family, paths = READ[name]
    names = Names({component: Targets(model) for component, model in small(family).items()})
    missed = {path: verdict for path in paths if not isinstance(verdict := prefixes.place(path, "alpha", names), Place)}
    assert not missed
