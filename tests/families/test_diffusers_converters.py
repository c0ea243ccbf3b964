"""Every conversion of diffusers is one that we read, or is listed here as one that we do not read yet."""

import inspect
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest
import torch
from diffusers.loaders import lora_conversion_utils as theirs
from torch import Tensor, nn

import diffadapt
from diffadapt import families
from diffadapt.formats import prefixes
from diffadapt.formats.names import Names
from diffadapt.formats.verdicts import Place
from diffadapt.runtime.targets import Targets
from tests.support.compare import assert_same
from tests.support.denoisers import SMALL
from tests.support.versions import diffusers

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
    "_convert_non_diffusers_flux3_lora_to_diffusers": (
        "flux3",
        ["diffusion_model.content_mode_blocks.image_cond.0.q_proj", "diffusion_model.single_blocks.0.mlp_out"],
    ),
    "_convert_non_diffusers_ace_step_lora_to_diffusers": (
        "ace-step",
        ["base_model.model.layers.0.cross_attn.o_proj", "diffusion_model.decoder.layers.0.self_attn.q_proj"],
    ),
    "_convert_non_diffusers_minimax_h3_lora_to_diffusers": (
        "minimax-h3",
        ["token_refiner.blocks.0.attn.qkv_proj", "lora_unet_blocks_0_mlp_fc1", "diffusion_model.final_layer.audio_out"],
    ),
}
"""Name of a function of diffusers -> a family, and names of layers as in the files that the function converts."""

READ_AS_A_FORMAT = {"_convert_xlabs_flux_lora_to_diffusers"}
"""Conversions of names that are a format of their own here, with tests of its own."""


def test_every_conversion_of_diffusers_is_listed() -> None:
    found = {name for name, _ in inspect.getmembers(theirs, lambda it: isinstance(it, FunctionType))}
    present = {name for name in found if name.startswith("_convert_")}
    listed = READ.keys() | READ_AS_A_FORMAT
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


# The same weights as by diffusers' own conversion


def minimax_h3() -> nn.Module:
    """Return a small model with heads of 128 rows, a number that diffusers assumes."""
    torch.manual_seed(0)
    config: Any = SMALL["minimax-h3"].build()["transformer"].config
    return diffusers.MiniMaxH3Transformer3DModel(**{**config, "attention_head_dim": 128, "rope_freq_dim": 16})


def original_factors(model: nn.Module) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield the name of every linear layer in the original layout, with factors of rank 4."""
    for name, parts in families.layout(Targets(model)).items():
        hosts = [model.get_submodule(part.path) for part, _ in parts]
        if all(isinstance(host, nn.Linear) for host in hosts):
            out = sum(host.out_features for host in hosts)
            yield name, torch.randn(4, hosts[0].in_features), torch.randn(out, 4)


def dotted(before: str, infix: str = "") -> Callable[[str], tuple[str, str]]:
    return lambda name: (f"{before}{name}.lora_A{infix}.weight", f"{before}{name}.lora_B{infix}.weight")


def musubi(name: str) -> tuple[str, str]:
    flat = f"lora_unet_{name.replace('.', '_')}"
    return f"{flat}.lora_down.weight", f"{flat}.lora_up.weight"


CONVERSIONS: dict[str, tuple[str, Callable[[], nn.Module], Callable[[str], tuple[str, str]]]] = {
    "flux3": ("flux3", lambda: SMALL["flux3"].build()["transformer"], dotted("diffusion_model.")),
    "ace-step": ("ace_step", lambda: SMALL["ace-step"].build()["transformer"], dotted("base_model.model.")),
    "minimax-h3": ("minimax_h3", minimax_h3, dotted("")),
    "minimax-h3 of ai-toolkit": ("minimax_h3", minimax_h3, dotted("diffusion_model.")),
    "minimax-h3 of musubi": ("minimax_h3", minimax_h3, musubi),
    "minimax-h3 of DiffSynth": ("minimax_h3", minimax_h3, dotted("", ".default")),
}


@pytest.mark.parametrize("name", CONVERSIONS)
def test_files_become_what_the_conversion_of_diffusers_makes_of_them(name: str) -> None:
    converter, build, spell = CONVERSIONS[name]
    model = build()
    file: dict[str, Tensor] = {}
    for original, down, up in original_factors(model):
        file |= dict(zip(spell(original), (down, up), strict=True))
    convert = getattr(theirs, f"_convert_non_diffusers_{converter}_lora_to_diffusers")
    expected = convert({key: tensor.clone() for key, tensor in file.items()})
    report = diffadapt.load_adapter(model, file, name="a")
    assert (report.used, report.unused) == (len(file), [])
    (adapter,) = diffadapt.adapters(model)["a"].components.values()
    paths = {key.removeprefix("transformer.").rsplit(".lora_", 1)[0] for key in expected}
    assert set(adapter.layers) == paths
    for path, layer in adapter.layers.items():
        down, up = (expected[f"transformer.{path}.lora_{side}.weight"] for side in "AB")
        assert_same(layer.adapter_type.delta_weight(layer.tensors, layer.spec), up @ down)


def test_rows_in_the_order_of_heads_are_saved_in_the_usual_order(tmp_path: Path) -> None:
    model, again = minimax_h3(), minimax_h3()
    file: dict[str, Tensor] = {}
    for original, down, up in original_factors(model):
        file |= dict(zip(dotted("", ".default")(original), (down, up), strict=True))
    diffadapt.load_adapter(model, file, name="a")
    whole = diffadapt.convert(file, tmp_path / "kohya.safetensors", "kohya", models={"transformer": minimax_h3()})
    for saved in (whole, diffadapt.adapters(model).save("a", tmp_path / "comfy.safetensors", "comfy")):
        diffadapt.load_adapter(again, saved, name="a")
        for path, layer in next(iter(diffadapt.adapters(model)["a"].components.values())).layers.items():
            other = next(iter(diffadapt.adapters(again)["a"].components.values())).layers[path]
            assert_same(*(one.adapter_type.delta_weight(one.tensors, one.spec) for one in (other, layer)))
        diffadapt.adapters(again).clear()
