"""From file to file: other names, the same adapter."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

import diffadapt
from diffadapt import AdapterError
from diffadapt.cli import main
from tests import files

DOUBLE, SINGLE = "lora_unet_double_blocks_3", "lora_unet_single_blocks_37"


def lora(module: str, out: int, columns: int, rank: int = 2, alpha: float = 1.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(len(module) + out)
    return {
        f"{module}.lora_down.weight": torch.randn(rank, columns, generator=generator).bfloat16(),
        f"{module}.lora_up.weight": torch.randn(out, rank, generator=generator).bfloat16(),
        f"{module}.alpha": torch.tensor(alpha),
    }


def flux_file() -> dict[str, Tensor]:
    """sd-scripts' names: fused projections, swapped halves, CLIP and T5."""
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


def test_flux_to_diffusers_and_back(tmp_path: Path) -> None:
    tensors = flux_file()
    there = diffadapt.convert(tensors, tmp_path / "diffusers.safetensors", "diffusers")
    found = load_file(there)
    query = "transformer.transformer_blocks.3.attn.to_q"
    assert torch.equal(found[f"{query}.lora_B.weight"], tensors[f"{DOUBLE}_img_attn_qkv.lora_up.weight"][:3072])
    swapped = tensors["lora_unet_final_layer_adaLN_modulation_1.lora_up.weight"]
    assert torch.equal(found["transformer.norm_out.linear.lora_B.weight"], torch.cat([swapped[3072:], swapped[:3072]]))
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    back = load_file(diffadapt.convert(there, tmp_path / "kohya.safetensors", "kohya"))
    assert back.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert torch.equal(back[key], tensor), key


def test_projections_trained_one_by_one_become_block_diagonal(tmp_path: Path) -> None:
    path = "transformer.transformer_blocks.0.attn"
    tensors: dict[str, Tensor] = {}
    layers = {f"{path}.to_q": (3072, 2), f"{path}.to_v": (3072, 3)}
    # By itself the attention could be another family's.
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
def test_metadata_and_precision_stay(make: object, tmp_path: Path) -> None:
    tensors = flux_file() if make is flux_file else sdxl_file()
    metadata = {"ss_network_module": "networks.lora", "modelspec.trigger_phrase": "a sks", "ss_tag_frequency": "{}"}
    source = files.write(tmp_path / "in.safetensors", tensors, metadata)
    target = diffadapt.convert(source, tmp_path / "out.safetensors", "diffusers")
    with safe_open(target, framework="pt") as opened:
        kept = opened.metadata()
    assert metadata.items() <= kept.items()
    assert {tensor.dtype for tensor in load_file(target).values()} == {torch.bfloat16}


def test_sdxl_from_original_names(tmp_path: Path) -> None:
    found = load_file(diffadapt.convert(sdxl_file(), tmp_path / "out.safetensors", "diffusers"))
    path = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
    original = sdxl_file()["lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k.lora_down.weight"]
    assert torch.equal(found[f"{path}.lora_A.weight"], original)
    assert "text_encoder_2.text_model.encoder.layers.31.mlp.fc1.lora_A.weight" in found


def test_a_layer_that_cannot_be_taken_apart_stays_whole_where_it_may(tmp_path: Path) -> None:
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


def test_refusals_write_nothing(tmp_path: Path) -> None:
    unknown = lora("lora_te_text_model_encoder_layers_0_mlp_fc1", 3072, 768)
    with pytest.raises(AdapterError, match="do not tell for which models it is"):
        diffadapt.convert(unknown, tmp_path / "a.safetensors")
    wrong = {**sdxl_file(), **lora("lora_unet_input_blocks_4_1_no_such_layer", 640, 640)}
    with pytest.raises(AdapterError, match="no layer 'input_blocks_4_1_no_such_layer'"):
        diffadapt.convert(wrong, tmp_path / "b.safetensors")
    with pytest.raises(AdapterError, match="cannot be written"):
        diffadapt.convert(sdxl_file(), tmp_path / "c.safetensors", "unheard of")
    assert list(tmp_path.iterdir()) == []


def test_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = files.write(tmp_path / "in.safetensors", sdxl_file(), {})
    target = tmp_path / "out.safetensors"
    assert main(["convert", str(source), str(target), "--to", "diffusers"]) == 0
    assert capsys.readouterr().out.strip() == str(target)
    assert target.is_file()
    assert main(["convert", str(source), str(tmp_path / "x"), "--to", "unheard of"]) == 1
    assert "cannot be written" in capsys.readouterr().err
