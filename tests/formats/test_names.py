"""Names that are not spelled exactly as any layer of the model is."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import diffusers
import peft
import pytest
import torch
from torch import nn

import diffadapt
from diffadapt import AdapterError, families
from diffadapt.files.read import read
from diffadapt.formats.names import Names
from diffadapt.formats.verdicts import Place, Unused
from diffadapt.loading.plan import plan
from diffadapt.runtime.targets import Targets
from tests.support import small_models
from tests.support.denoisers import SMALL


def layers_of(models: Mapping[str, nn.Module], key: str, size: int = 32) -> list[str]:
    """Return the layers of a model that a LoRA at `key` is for, or fail if there are none."""
    tensors = {f"{key}.lora_A.weight": torch.ones(2, size), f"{key}.lora_B.weight": torch.ones(size, 2)}
    found = plan(read(tensors), models)
    assert not found.faults, found.faults
    return sorted(path for layers in found.layers.values() for path in layers)


@pytest.mark.parametrize(
    ("family", "key", "path"),
    [
        ("wan", "diffusion_model.blocks.0.cross_attn.k.img", "blocks.0.attn2.add_k_proj"),
        ("wan", "diffusion_model.blocks.0.self.attn.q", "blocks.0.attn1.to_q"),
        ("wan", "transformer.blocks.0.attn2.add.k.proj", "blocks.0.attn2.add_k_proj"),
        ("wan", "blocks_0_attn2_add_k_proj", "blocks.0.attn2.add_k_proj"),
        ("wan", "base_model.model.blocks.0.attn2.add.k.proj", "blocks.0.attn2.add_k_proj"),
        ("wan", "lora_unet_blocks.0.cross_attn.k_img", "blocks.0.attn2.add_k_proj"),
        ("wan", "lycoris_blocks_0_cross_attn_to_out_0", "blocks.0.attn2.to_out.0"),
        ("zimage", "diffusion_model.noise.refiner.0.attention.to.q", "noise_refiner.0.attention.to_q"),
        ("zimage", "transformer.noise_refiner_0.attention.to_q", "noise_refiner.0.attention.to_q"),
        ("flux", "transformer.transformer.blocks.0.attn.add.k.proj", "transformer_blocks.0.attn.add_k_proj"),
        ("flux", "transformer.blocks.0.attn.add.k.proj", "transformer_blocks.0.attn.add_k_proj"),
        ("flux", "text_encoder.text.model.encoder.layers.0.self.attn.q.proj", "encoder.layers.0.self_attn.q_proj"),
    ],
)
def test_dots_and_underscores_are_the_same_where_one_layer_fits(family: str, key: str, path: str) -> None:
    (found,) = layers_of(SMALL[family].build(), key, 48 if family == "zimage" else 32)
    assert found.endswith(path)


def test_a_fused_layer_may_have_dots_for_underscores() -> None:
    tensors = {
        "diffusion_model.double.blocks.0.img.attn.qkv.lora_A.weight": torch.ones(2, 32),
        "diffusion_model.double.blocks.0.img.attn.qkv.lora_B.weight": torch.ones(96, 2),
    }
    found = plan(read(tensors), SMALL["flux"].build())
    assert not found.faults
    assert sorted(found.layers["transformer"]) == [f"transformer_blocks.0.attn.to_{letter}" for letter in "kqv"]


def test_two_layers_that_differ_in_dots_alone_are_found_by_their_own_names_only() -> None:
    inner = nn.Module()
    inner.b, inner.c = nn.Linear(8, 8), nn.Linear(8, 8)
    model = nn.Module()
    model.a, model.a_b = inner, nn.Linear(8, 8)
    names = Names({"unet": Targets(model)})
    assert names.dotted("unet", "a.b", "alpha") == Place("unet", "a.b", "alpha", "a.b")
    assert names.dotted("unet", "a_b", "alpha") == Place("unet", "a_b", "alpha", "a_b")
    assert isinstance(names.flat(["unet"], "a_b", "alpha"), Unused)
    assert names.flat(["unet"], "a_c", "alpha") == Place("unet", "a.c", "alpha", "a_c")


# Classes that are variants of a family's model


class OwnFlux(diffusers.FluxTransformer2DModel):
    """A user's subclass."""


def flux_net(build: Callable[..., nn.Module]) -> nn.Module:
    return build(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        num_attention_heads=2,
        attention_head_dim=16,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
    )


@pytest.mark.filterwarnings("ignore:.*FluxPosEmbed:FutureWarning")
@pytest.mark.parametrize("build", [OwnFlux, diffusers.FluxControlNetModel])
def test_subclasses_and_control_nets_have_the_names_of_their_family(build: Callable[..., nn.Module]) -> None:
    models = {"transformer": flux_net(build)}
    assert families.of_models(models) == "flux"
    keys = ["diffusion_model.double_blocks.0.img_attn.proj", "lora_unet_double_blocks_0_txt_attn_proj"]
    expected = ["transformer_blocks.0.attn.to_add_out", "transformer_blocks.0.attn.to_out.0"]
    assert [layers_of(models, key) for key in keys] == [[expected[1]], [expected[0]]]


def test_the_unet_of_animatediff_has_the_names_of_latent_diffusion() -> None:
    unet = diffusers.UNetMotionModel(
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
        up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"),
        cross_attention_dim=32,
        num_attention_heads=2,
        motion_num_attention_heads=2,
        norm_num_groups=8,
    )
    models = {"unet": unet}
    assert families.of_models(models) == "sd"
    names = Names({"unet": Targets(unet)})
    found = names.flat(["unet"], "input_blocks_1_1_transformer_blocks_0_attn1_to_q", "lora_down")
    assert isinstance(found, Place)
    assert found.path == "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("QwenImageEditPlusTransformer2DModel", "qwen"),
        ("QwenImage21ControlNetModel", "qwen21"),
        ("Flux2ControlNetModel", "flux2"),
        ("FluxInpaintTransformer2DModel", "flux"),
        ("SanaVideoTransformer3DModel", "sanavideo"),
        ("HunyuanDiT2DControlNetModel", None),
    ],
)
def test_a_variant_belongs_to_the_family_whose_model_it_is_named_after(name: str, family: str | None) -> None:
    assert families.of_models({"transformer": type(name, (nn.Module,), {})()}) == family


# XLabs' names with a prefix


@pytest.mark.parametrize("prefix", ["", "diffusion_model.", "transformer."])
def test_xlabs_names_may_have_a_prefix(prefix: str) -> None:
    block = f"{prefix}double_blocks.0.processor.qkv_lora1"
    single = f"{prefix}single_blocks.0.processor.qkv_lora"
    tensors = {f"{stem}.down.weight": torch.randn(2, 32) for stem in (block, single)}
    tensors |= {f"{stem}.up.weight": torch.randn(96, 2) for stem in (block, single)}
    found = plan(read(tensors), SMALL["flux"].build())
    assert (found.format, found.used, found.faults) == ("xlabs", 4, [])
    paths = [
        f"{block}.0.attn.to_{letter}"
        for block in ("single_transformer_blocks", "transformer_blocks")
        for letter in "kqv"
    ]
    assert sorted(found.layers["transformer"]) == paths
    query = found.layers["transformer"]["transformer_blocks.0.attn.to_q"].tensors
    assert torch.equal(
        query["lora_up"] @ query["lora_down"], tensors[f"{block}.up.weight"][:32] @ tensors[f"{block}.down.weight"]
    )


def test_a_name_unlike_xlabs_in_such_a_file_is_read_as_what_it_is() -> None:
    tensors = {
        "double_blocks.0.processor.proj_lora1.down.weight": torch.ones(2, 32),
        "double_blocks.0.processor.proj_lora1.up.weight": torch.ones(32, 2),
        "double_blocks.0.nothing.lora_A.weight": torch.ones(2, 32),
    }
    (fault,) = plan(read(tensors), SMALL["flux"].build()).faults
    assert re.search("has no layer 'double_blocks.0.nothing'", fault.reason)


@pytest.mark.parametrize("spelled", ["unet.{}", "{}", "diffusion_model.{}", "lora_unet_{}", "lycoris_{}"])
def test_a_layer_that_peft_stands_in_for_is_refused_for_that(spelled: str) -> None:
    unet = small_models.unet()
    unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q"]), "p")
    path = next(path for path, _ in unet.named_modules() if path.endswith("attn1.to_q"))
    wrapped: Any = unet.get_submodule(path)
    out, columns = wrapped.base_layer.weight.shape
    stem = spelled.format(path.replace(".", "_") if spelled.endswith("_{}") else path)
    tensors = {f"{stem}.lora_down.weight": torch.ones(2, columns), f"{stem}.lora_up.weight": torch.ones(out, 2)}
    with pytest.raises(AdapterError, match=r"peft has an adapter here .*call unload_lora_weights"):
        diffadapt.load_adapter(unet, tensors)
