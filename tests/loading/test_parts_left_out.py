"""Parts of a file that the pipeline is built without: they are no fault, and the report names them."""

from pathlib import Path

import diffusers
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import diffadapt
from diffadapt import AdapterError, LoadError
from diffadapt.files.read import read
from diffadapt.loading.plan import plan
from tests.support import models
from tests.support.denoisers import SMALL

Tensors = dict[str, Tensor]


def lora(stem: str, inputs: int = 32, outputs: int = 32) -> Tensors:
    return {f"{stem}.lora_A.weight": torch.ones(2, inputs), f"{stem}.lora_B.weight": torch.ones(outputs, 2)}


def kohya(stem: str, size: int = 32) -> Tensors:
    return {f"{stem}.lora_down.weight": torch.ones(2, size), f"{stem}.lora_up.weight": torch.ones(size, 2)}


UNET = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
TEXT = "text_model_encoder_layers_0_self_attn_q_proj"


def wan_without_image_branch() -> nn.Module:
    return diffusers.WanTransformer3DModel(
        in_channels=8,
        out_channels=8,
        text_dim=64,
        freq_dim=16,
        ffn_dim=48,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=16,
        rope_max_seq_len=32,
    )


# Components that are not loaded


@pytest.mark.parametrize("prefix", ["lora_te_", "lora_te1_"])
def test_a_text_encoder_that_is_none_is_named_in_the_report(prefix: str) -> None:
    pipe = models.sd15()
    pipe.register_modules(text_encoder=None)
    report = pipe.load_adapter({**kohya(UNET, 8), **kohya(f"{prefix}{TEXT}")}, "a")
    assert (report.used, len(report.unused)) == (2, 2)
    assert {fault.reason for fault in report.unused} == {"the pipeline has no text_encoder loaded (it is None)"}
    assert pipe.adapters["a"].active


@pytest.mark.parametrize(
    "stem", [f"lora_te3_{'encoder_block_0_layer_0_SelfAttention_q'}", "text_encoder_3.encoder.x.q"]
)
def test_stable_diffusion_3_without_t5_takes_the_rest(stem: str) -> None:
    pipe = models.sd3()
    pipe.register_modules(text_encoder_3=None)
    report = pipe.load_adapter(
        {
            **lora("transformer.transformer_blocks.0.attn.to_q"),
            **(kohya(stem) if stem.startswith("lora") else lora(stem)),
        }
    )
    assert report.used == 2
    assert {fault.reason for fault in report.unused} == {"the pipeline has no text_encoder_3 loaded (it is None)"}


def test_inspect_knows_the_components_that_are_none() -> None:
    pipe = models.sd15()
    pipe.register_modules(text_encoder=None)
    report = diffadapt.inspect({**kohya(UNET, 8), **kohya(f"lora_te_{TEXT}")}, pipe)
    assert (report.used, report.unused[0].reason) == (2, "the pipeline has no text_encoder loaded (it is None)")


def test_learned_tokens_of_a_text_encoder_that_is_none_are_named_in_the_report() -> None:
    pipe = models.sd15()
    pipe.register_modules(text_encoder=None)
    report = pipe.load_adapter({**kohya(UNET, 8), "bundle_emb.pix.clip_l": torch.ones(2, models.WIDTH)}, "a")
    assert report.used == 2
    (fault,) = report.unused
    assert fault.reason == "there is no text encoder 'clip_l'; there are none; text_encoder is not loaded"


def test_a_file_for_what_is_not_loaded_only_is_refused() -> None:
    pipe = models.sd15()
    pipe.register_modules(text_encoder=None)
    with pytest.raises(LoadError, match=r"2 of 2 tensors cannot be used(.|\n)*no text_encoder loaded"):
        pipe.load_adapter(kohya(f"lora_te_{TEXT}"))


def test_a_component_that_the_pipeline_has_no_room_for_stays_a_fault() -> None:
    with pytest.raises(LoadError, match="there is no component 'text_encoder_2'"):
        models.sd15().load_adapter({**kohya(UNET, 8), **kohya(f"lora_te2_{TEXT}")})


def test_the_second_expert_of_a_file_is_not_left_out_silently() -> None:
    denoiser = wan_without_image_branch()
    tensors = {**lora("transformer.blocks.0.attn1.to_q"), **lora("transformer_2.blocks.0.attn1.to_q")}
    found = plan(read(tensors), {"transformer": denoiser}, empty=["transformer_2", "image_encoder"])
    assert [fault.reason for fault in found.faults] == ["there is no component 'transformer_2' (only transformer)"] * 2


# Parts of a denoiser


@pytest.mark.parametrize("prefix", ["diffusion_model.", "lora_unet_"])
def test_the_image_branch_of_wan_is_left_out_where_the_model_has_none(prefix: str) -> None:
    def key(path: str) -> str:
        return prefix + (path if prefix.endswith(".") else path.replace(".", "_"))

    tensors = {**lora(key("blocks.0.cross_attn.q")), **lora(key("blocks.0.cross_attn.k_img"))}
    tensors |= {f"{key('blocks.0.cross_attn.norm_k_img')}.diff": torch.ones(32)}
    tensors |= lora(key("img_emb.proj.1"), 40, 40)
    found = plan(read(tensors), {"transformer": wan_without_image_branch()})
    assert (found.used, found.faults, len(found.ignored)) == (2, [], 5)
    reasons = {"a layer of the image branch, which this transformer is built without"}
    assert {fault.reason for fault in found.ignored} == reasons


def test_a_layer_that_an_existing_image_branch_lacks_is_a_fault() -> None:
    tensors = {**lora("diffusion_model.blocks.0.cross_attn.q"), **lora("diffusion_model.blocks.7.cross_attn.k_img")}
    found = plan(read(tensors), SMALL["wan"].build())
    assert len(found.faults) == 2


@pytest.mark.parametrize(
    "stem", ["transformer.time_text_embed.guidance_embedder.linear_1", "lora_unet_guidance_in_in_layer"]
)
def test_the_guidance_embedder_is_left_out_on_schnell(stem: str) -> None:
    pipe = models.flux()
    assert not pipe.transformer.config.guidance_embeds
    tensors = {**lora("transformer.transformer_blocks.0.attn.to_q"), **lora(stem, 256)}
    report = pipe.load_adapter(tensors)
    assert report.used == 2
    assert {fault.reason for fault in report.unused} == {
        "a layer of the guidance embedder, which this transformer is built without"
    }


def test_a_change_of_the_modulation_is_named_in_the_report_where_the_model_has_none() -> None:
    change = {"diffusion_model.transformer_blocks.0.diff_m": torch.ones(1, 6, 32)}
    tensors = {**lora("diffusion_model.transformer_blocks.0.attn.to_q"), **change}
    found = plan(read(tensors), SMALL["qwen"].build())
    assert not found.faults
    assert [fault.reason for fault in found.ignored] == [
        "a change of the block's own modulation (lightx2v), a parameter that this model does not have; it is left out"
    ]
    with pytest.raises(LoadError, match="tensors cannot be used"):
        plan(read(change), SMALL["qwen"].build()).refuse_faults(True)


# Files that are written


def test_a_conversion_keeps_the_image_branch(tmp_path: Path) -> None:
    tensors = {**lora("diffusion_model.blocks.0.cross_attn.q", 5120, 5120)}
    tensors |= lora("diffusion_model.blocks.0.cross_attn.k_img", 5120, 5120)
    path = diffadapt.convert(tensors, tmp_path / "out.safetensors", "diffusers")
    assert len(read(path).tensors) == 4


def test_a_conversion_loses_no_modulation(tmp_path: Path) -> None:
    tensors = lora("diffusion_model.blocks.0.cross_attn.q", 5120, 5120)
    source = tmp_path / "in.safetensors"
    save_file({**tensors, "diffusion_model.blocks.0.diff_m": torch.ones(1, 6, 5120)}, source)
    with pytest.raises(
        AdapterError, match=r"blocks\.0\.scale_shift_table is of type full, which diffusers cannot read"
    ):
        diffadapt.convert(source, tmp_path / "out.safetensors", "diffusers")
    assert not (tmp_path / "out.safetensors").exists()
    saved = read(diffadapt.convert(source, tmp_path / "out.safetensors", "comfy"))
    assert saved.tensors["diffusion_model.blocks.0.modulation.diff"].shape == (1, 6, 5120)
