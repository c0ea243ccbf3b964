"""`convert`: from file to file, the same adapter under other names."""

from importlib import import_module
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

import diffadapt
from diffadapt import AdapterError
from diffadapt.cli import main
from tests.support import files, loras, models, spellings
from tests.support.listed import published_models

DOUBLE, SINGLE = "lora_unet_double_blocks_3", "lora_unet_single_blocks_37"


def lora(module: str, out: int, columns: int, rank: int = 2, alpha: float = 1.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(len(module) + out)
    return {
        f"{module}.lora_down.weight": torch.randn(rank, columns, generator=generator).bfloat16(),
        f"{module}.lora_up.weight": torch.randn(out, rank, generator=generator).bfloat16(),
        f"{module}.alpha": torch.tensor(alpha),
    }


def flux_file() -> dict[str, Tensor]:
    """Return a file in sd-scripts' names: fused projections, swapped halves, CLIP."""
    return {
        **lora(f"{DOUBLE}_img_attn_qkv", 9216, 3072),
        **lora(f"{DOUBLE}_txt_mlp_0", 12288, 3072, rank=3, alpha=6.0),
        **lora(f"{SINGLE}_linear1", 21504, 3072),
        **lora(f"{SINGLE}_linear2", 3072, 15360),
        **lora("lora_unet_final_layer_adaLN_modulation_1", 6144, 3072),
        **lora("lora_te1_text_model_encoder_layers_0_self_attn_q_proj", 768, 768),
    }


def sdxl_file() -> dict[str, Tensor]:
    return {
        **lora("lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k", 640, 2048),
        **lora("lora_unet_middle_block_1_proj_in", 1280, 1280),
        **lora("lora_te2_text_model_encoder_layers_31_mlp_fc1", 5120, 1280),
    }


def change(tensors: dict[str, Tensor], module: str) -> Tensor:
    down, up = (tensors[f"{module}.lora_{side}.weight"].float() for side in ("down", "up"))
    return up.flatten(1) @ down.flatten(1) * tensors[f"{module}.alpha"] / down.shape[0]


def test_a_flux_file_is_converted_to_diffusers_and_back(tmp_path: Path) -> None:
    tensors = flux_file()
    there = diffadapt.convert(tensors, tmp_path / "diffusers.safetensors", "diffusers")
    found = load_file(there)
    # With an alpha of 1 and a rank of 2, half is multiplied into the factors, without rounding.
    query = "transformer.transformer_blocks.3.attn.to_q"
    assert torch.equal(found[f"{query}.lora_B.weight"], tensors[f"{DOUBLE}_img_attn_qkv.lora_up.weight"][:3072] / 2)
    swapped = tensors["lora_unet_final_layer_adaLN_modulation_1.lora_up.weight"] / 2
    assert torch.equal(found["transformer.norm_out.linear.lora_B.weight"], torch.cat([swapped[3072:], swapped[:3072]]))
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    back = load_file(diffadapt.convert(there, tmp_path / "kohya.safetensors", "kohya"))
    assert back.keys() == tensors.keys()
    for module in (key.removesuffix(".alpha") for key in tensors if key.endswith(".alpha")):
        assert torch.equal(change(back, module), change(tensors, module)), module
        assert torch.equal(back[f"{module}.lora_down.weight"], tensors[f"{module}.lora_down.weight"]), module


def test_separate_projections_become_a_block_diagonal_fused_one(tmp_path: Path) -> None:
    path = "transformer.transformer_blocks.0.attn"
    tensors: dict[str, Tensor] = {}
    layers = {f"{path}.to_q": (3072, 2), f"{path}.to_v": (3072, 3)}
    # The attention alone could be that of another family.
    layers["transformer.single_transformer_blocks.0.attn.to_k"] = (3072, 1)
    for module, (out, rank) in layers.items():
        parts = lora(module, out, 3072, rank=rank)
        tensors[f"{module}.lora_A.weight"] = parts[f"{module}.lora_down.weight"].float()
        tensors[f"{module}.lora_B.weight"] = parts[f"{module}.lora_up.weight"].float()
    found = load_file(diffadapt.convert(tensors, tmp_path / "kohya.safetensors", "kohya"))
    whole = change(found, "lora_unet_double_blocks_0_img_attn_qkv")
    assert found["lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight"].shape == (5, 3072)
    for start, part in ((0, "to_q"), (6144, "to_v")):
        expected = tensors[f"{path}.{part}.lora_B.weight"] @ tensors[f"{path}.{part}.lora_A.weight"]
        torch.testing.assert_close(whole[start : start + 3072], expected)
    assert not whole[3072:6144].any()


@pytest.mark.parametrize("make", [flux_file, sdxl_file])
def test_metadata_and_dtype_are_kept(make: object, tmp_path: Path) -> None:
    tensors = flux_file() if make is flux_file else sdxl_file()
    metadata = {"ss_network_module": "networks.lora", "modelspec.trigger_phrase": "a sks", "ss_tag_frequency": "{}"}
    source = files.write(tmp_path / "in.safetensors", tensors, metadata)
    target = diffadapt.convert(source, tmp_path / "out.safetensors", "diffusers")
    with safe_open(target, framework="pt") as opened:
        kept = opened.metadata()
    assert metadata.items() <= kept.items()
    assert {tensor.dtype for tensor in load_file(target).values()} == {torch.bfloat16}


def test_an_sdxl_file_in_original_names_is_converted(tmp_path: Path) -> None:
    found = load_file(diffadapt.convert(sdxl_file(), tmp_path / "out.safetensors", "diffusers"))
    path = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
    original = sdxl_file()["lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k.lora_down.weight"]
    assert torch.equal(found[f"{path}.lora_A.weight"], original)
    assert "text_encoder_2.text_model.encoder.layers.31.mlp.fc1.lora_A.weight" in found


def test_a_fused_layer_that_cannot_be_split_stays_whole_if_the_format_allows_it(tmp_path: Path) -> None:
    module = f"{DOUBLE}_img_attn_qkv"
    tensors = {
        # HunyuanVideo has a projection of the same name and size.
        **lora(f"{DOUBLE}_img_mod_lin", 18432, 3072),
        f"{module}.lokr_w1": torch.randn(4, 4),
        f"{module}.lokr_w2": torch.randn(2304, 768),
        f"{module}.alpha": torch.tensor(1.0),
    }
    found = load_file(diffadapt.convert(tensors, tmp_path / "out.safetensors", "kohya"))
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in tensors.items())
    with pytest.raises(AdapterError, match="which diffusers cannot read"):
        diffadapt.convert(tensors, tmp_path / "refused.safetensors", "diffusers")
    assert not (tmp_path / "refused.safetensors").exists()


# Model -> original name of a layer -> its path in diffusers, outputs, inputs
MODELS: dict[str, dict[str, tuple[str, int, int]]] = {
    "anima": {
        "blocks.27.self_attn.q_proj": ("transformer.transformer_blocks.27.attn1.to_q", 2048, 2048),
        "blocks.0.cross_attn.k_proj": ("transformer.transformer_blocks.0.attn2.to_k", 2048, 1024),
        "blocks.3.adaln_modulation_mlp.2": ("transformer.transformer_blocks.3.norm3.linear_2", 6144, 256),
        "llm_adapter.blocks.5.cross_attn.k_proj": ("text_conditioner.blocks.5.cross_attn.k_proj", 1024, 1024),
        "llm_adapter.blocks.0.mlp.0": ("text_conditioner.blocks.0.mlp.0", 4096, 1024),
    },
    "cascade": {
        "down_blocks.1.2.attention.attn.in_proj.0": ("prior.down_blocks.1.2.attention.to_q", 2048, 2048),
        "up_blocks.0.71.attention.attn.out_proj": ("prior.up_blocks.0.71.attention.to_out.0", 2048, 2048),
        "down_blocks.1.0.channelwise.0": ("prior.down_blocks.1.0.channelwise.0", 8192, 2048),
    },
    "cascade, lite": {
        "up_blocks.0.35.attention.attn.in_proj.1": ("prior.up_blocks.0.35.attention.to_k", 1536, 1536),
    },
    "hidream": {
        "double_stream_blocks.15.block.attn1.to_q": (
            "transformer.double_stream_blocks.15.block.attn1.to_q", 2560, 2560
        ),
        "single_stream_blocks.31.block.ff_i.experts.3.w1": (
            "transformer.single_stream_blocks.31.block.ff_i.experts.3.w1", 6912, 2560
        ),
        "caption_projection.48.linear": ("transformer.caption_projection.48.linear", 2560, 4096),
    },
    "hunyuan-image": {
        "double_blocks.19.img_mlp.fc1": ("transformer.transformer_blocks.19.ff.net.0.proj", 14336, 3584),
        "single_blocks.39.modulation.linear": ("transformer.single_transformer_blocks.39.norm.linear", 10752, 3584),
        "byt5_in.fc1": ("transformer.context_embedder_2.linear_1", 2048, 1472),
        "guidance_in.mlp.0": ("transformer.time_guidance_embed.guidance_embedder.linear_1", 3584, 256),
    },
    "hunyuan-video15": {
        "double_blocks.53.txt_attn_proj": ("transformer.transformer_blocks.53.attn.to_add_out", 2048, 2048),
        "vision_in.proj.1": ("transformer.image_embedder.linear_1", 1152, 1152),
        "time_r_in.mlp.2": ("transformer.time_embed.timestep_embedder_r.linear_2", 2048, 2048),
    },
    "qwen21": {
        "transformer_blocks.31.img_mlp.out": ("transformer.transformer_blocks.31.img_mlp.out", 4096, 12288),
        "transformer_blocks.0.attn.to_q": ("transformer.transformer_blocks.0.attn.to_q", 4096, 4096),
        "txt_in.in_layer": ("transformer.txt_in.in_layer", 4096, 4096),
    },
    "wan": {
        "blocks.39.self_attn.q": ("transformer.blocks.39.attn1.to_q", 5120, 5120),
        "blocks.39.ffn.0": ("transformer.blocks.39.ffn.net.0.proj", 13824, 5120),
    },
    "wan, with an image": {
        "blocks.39.cross_attn.k_img": ("transformer.blocks.39.attn2.add_k_proj", 5120, 5120),
        "blocks.0.self_attn.o": ("transformer.blocks.0.attn1.to_out.0", 5120, 5120),
        "img_emb.proj.1": ("transformer.condition_embedder.image_embedder.ff.net.0.proj", 1280, 1280),
    },
    "wan, small": {"blocks.29.ffn.0": ("transformer.blocks.29.ffn.net.0.proj", 8960, 1536)},
    "wan, 5B": {"blocks.29.ffn.2": ("transformer.blocks.29.ffn.net.2", 3072, 14336)},
    "wan, vace": {
        "blocks.0.self_attn.q": ("transformer.blocks.0.attn1.to_q", 5120, 5120),
        "vace_blocks.7.after_proj": ("transformer.vace_blocks.7.proj_out", 5120, 5120),
    },
    "wan, small vace": {
        "blocks.0.self_attn.q": ("transformer.blocks.0.attn1.to_q", 1536, 1536),
        "vace_blocks.14.after_proj": ("transformer.vace_blocks.14.proj_out", 1536, 1536),
    },
    "ltx2": {
        "transformer_blocks.47.audio_attn1.to_q": ("transformer.transformer_blocks.47.audio_attn1.to_q", 2048, 2048),
        "patchify_proj": ("transformer.proj_in", 4096, 128),
        "video_embeddings_connector.transformer_1d_blocks.1.attn1.to_k": (
            "connectors.video_connector.transformer_blocks.1.attn1.to_k", 3840, 3840
        ),
        "text_embedding_projection.aggregate_embed": ("connectors.text_proj_in", 3840, 188160),
    },
    "ltx2.3": {
        "transformer_blocks.0.audio_attn1.to_gate_logits": (
            "transformer.transformer_blocks.0.audio_attn1.to_gate_logits", 32, 2048
        ),
        "audio_embeddings_connector.transformer_1d_blocks.7.ff.net.2": (
            "connectors.audio_connector.transformer_blocks.7.ff.net.2", 2048, 8192
        ),
        "text_embedding_projection.video_aggregate_embed": ("connectors.video_text_proj_in", 4096, 188160),
    },
    "cogview4": {
        "transformer_blocks.27.attn1.to_q": ("transformer.transformer_blocks.27.attn1.to_q", 4096, 4096),
    },
    "pixart": {
        "blocks.27.attn.proj": ("transformer.transformer_blocks.27.attn1.to_out.0", 1152, 1152),
        "blocks.27.mlp.fc1": ("transformer.transformer_blocks.27.ff.net.0.proj", 4608, 1152),
        "y_embedder.y_proj.fc1": ("transformer.caption_projection.linear_1", 1152, 4096),
        "csize_embedder.mlp.2": ("transformer.adaln_single.emb.resolution_embedder.linear_2", 384, 384),
    },
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_files_for_the_models_of_every_family_are_converted_there_and_back(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Build the published models of a family once for all conversions.
    monkeypatch.setattr(import_module("diffadapt.loading.conversion"), "published", published_models)
    tensors: dict[str, Tensor] = {}
    for original, (_, out, columns) in MODELS[name].items():
        outside = original.startswith("text_embedding_projection.")
        tensors.update(lora(original if outside else f"diffusion_model.{original}", out, columns, alpha=2.0))
    there = diffadapt.convert(tensors, tmp_path / "diffusers.safetensors", "diffusers")
    found = load_file(there)
    paths = {path: original for original, (path, _, _) in MODELS[name].items()}
    assert found.keys() == {f"{path}.lora_{side}.weight" for path in paths for side in "AB"}
    for path, original in paths.items():
        (key,) = (key for key in tensors if key.endswith(f"{original}.lora_up.weight"))
        assert torch.equal(found[f"{path}.lora_B.weight"], tensors[key])
    kohya = diffadapt.convert(there, tmp_path / "kohya.safetensors", "kohya")
    flat = {f"lora_unet_{original}".replace(".", "_") for original in MODELS[name]}
    if name.startswith("cascade"):
        assert len({key.partition(".")[0] for key in load_file(kohya)}) == len(flat)
    else:
        assert {key.partition(".")[0] for key in load_file(kohya)} == flat
    back = load_file(diffadapt.convert(kohya, tmp_path / "comfy.safetensors", "comfy"))
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[key], tensor) for key, tensor in tensors.items())


def test_a_file_for_both_denoisers_of_wan_is_converted_to_diffusers_only(tmp_path: Path) -> None:
    """Wan 2.2 has two denoisers; other formats have the same name for the layers of both."""
    both = ("diffusion_model.transformer_1.", "diffusion_model.transformer_2.")
    tensors: dict[str, Tensor] = {}
    for prefix in both:
        tensors.update(lora(f"{prefix}blocks.39.self_attn.q", 5120, 5120))
    found = load_file(diffadapt.convert(tensors, tmp_path / "a.safetensors"))
    assert {key.rsplit(".", 2)[0] for key in found} == {
        "transformer.blocks.39.attn1.to_q",
        "transformer_2.blocks.39.attn1.to_q",
    }
    with pytest.raises(AdapterError, match=r"transformer\.blocks\.39\.self_attn\.q has its name in this format"):
        diffadapt.convert(tensors, tmp_path / "b.safetensors", "kohya")
    assert not (tmp_path / "b.safetensors").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_change_that_was_multiplied_out_has_the_dtype_of_the_file(dtype: torch.dtype, tmp_path: Path) -> None:
    module = f"{DOUBLE}_img_attn_qkv"
    tensors = {
        # HunyuanVideo has a projection of the same name and size.
        f"{DOUBLE}_img_mod_lin.diff": torch.zeros(18432, 3072, dtype=dtype),
        f"{module}.lokr_w1": torch.randn(4, 4).to(dtype),
        f"{module}.lokr_w2": torch.randn(2304, 768).to(dtype),
    }
    path = "transformer_blocks_3_attn_to_k"
    found = load_file(diffadapt.convert(tensors, tmp_path / "a.safetensors", "onetrainer"))
    whole = torch.kron(tensors[f"{module}.lokr_w1"].float(), tensors[f"{module}.lokr_w2"].float())
    change = found[f"lora_transformer_{path}.diff"]
    assert change.dtype == dtype
    assert torch.equal(change, whole[3072:6144].to(dtype))


def test_a_change_too_small_for_half_precision_stays_in_float32(tmp_path: Path) -> None:
    module = f"{DOUBLE}_img_attn_qkv"
    tensors = {
        f"{DOUBLE}_img_mod_lin.diff": torch.zeros(18432, 3072, dtype=torch.float16),
        f"{module}.lokr_w1": (torch.randn(4, 4) * 1e-4).half(),
        f"{module}.lokr_w2": (torch.randn(2304, 768) * 1e-4).half(),
    }
    found = load_file(diffadapt.convert(tensors, tmp_path / "a.safetensors", "onetrainer"))
    whole = torch.kron(tensors[f"{module}.lokr_w1"].float(), tensors[f"{module}.lokr_w2"].float())
    assert whole.half().eq(0).any()
    change = found["lora_transformer_transformer_blocks_3_attn_to_k.diff"]
    assert change.dtype == torch.float32
    assert torch.equal(change, whole[3072:6144])


def test_a_refused_conversion_writes_nothing(tmp_path: Path) -> None:
    unknown = lora("lora_te_text_model_encoder_layers_0_mlp_fc1", 3072, 768)
    with pytest.raises(AdapterError, match="do not tell for which models it is"):
        diffadapt.convert(unknown, tmp_path / "a.safetensors")
    wrong = {**sdxl_file(), **lora("lora_unet_input_blocks_4_1_no_such_layer", 640, 640)}
    with pytest.raises(AdapterError, match="no layer 'input_blocks_4_1_no_such_layer'"):
        diffadapt.convert(wrong, tmp_path / "b.safetensors")
    with pytest.raises(AdapterError, match="cannot be written"):
        diffadapt.convert(sdxl_file(), tmp_path / "c.safetensors", "unheard of")
    assert list(tmp_path.iterdir()) == []


def test_the_convert_command_writes_a_file_or_reports_the_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = files.write(tmp_path / "in.safetensors", sdxl_file(), {})
    target = tmp_path / "out.safetensors"
    assert main(["convert", str(source), str(target), "--to", "diffusers"]) == 0
    assert capsys.readouterr().out.strip() == str(target)
    assert target.is_file()
    assert main(["convert", str(source), str(tmp_path / "x"), "--to", "unheard of"]) == 1
    assert "cannot be written" in capsys.readouterr().err


def test_the_caller_can_name_the_format_and_family_of_a_file(tmp_path: Path) -> None:
    pipe = models.sd15_full()
    tensors = spellings.peft_names(loras.parts_for(pipe, ("unet",), r"attn1\.to_q"))
    report = pipe.load_adapter(tensors, "a", format="diffusers")
    assert report.format == "diffusers"
    for wrong in ("kohya", "nonsense"):
        with pytest.raises(AdapterError, match=r"cannot be used|'nonsense' is not known"):
            pipe.load_adapter(tensors, "b", format=wrong)
    assert pipe.adapters.names == ["a"]
    full_size = {
        key: torch.zeros(4, 320) if "lora_A" in key else torch.zeros(320, 4)
        for key in tensors
        if "down_blocks.0." in key
    }
    assert diffadapt.inspect(full_size, family="sd", format="diffusers").unused == []
    assert len(diffadapt.inspect(full_size, family="flux").unused) == len(full_size)
    saved = diffadapt.convert(full_size, tmp_path / "sd.safetensors", "kohya", family="sd", source_format="diffusers")
    assert diffadapt.inspect(saved, family="sd").used > 0
    with pytest.raises(AdapterError, match="nonsense"):
        diffadapt.convert(full_size, tmp_path / "no.safetensors", "kohya", family="nonsense")
    assert not (tmp_path / "no.safetensors").exists()
