"""Adapters merged into the files of a model."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import diffadapt
from diffadapt import AdapterError, merge_files
from tests.support.compare import relative_error
from tests.support.denoisers import SMALL
from tests.support.dialects import original_names
from tests.support.original_layout import in_original_layout

TINY = Path(__file__).parents[2] / "examples" / "tiny_pipeline"
HOTSWAP = TINY.parent / "hotswap"
CONFIGS = {
    "lora": diffadapt.LoraConfig(rank=4, target_modules="all-linear", init=False),
    "dora": diffadapt.LoraConfig(rank=4, target_modules="all-linear", use_dora=True, init=False),
    "lokr": diffadapt.LoKrConfig(rank=4, target_modules="all-linear", init=False),
    "oft": diffadapt.OFTConfig(block_size=4, target_modules="all-linear", init=False),
}


def merged_in_memory(pipe: StableDiffusionPipeline) -> dict[str, Tensor]:
    pipe.load_adapter(HOTSWAP / "pixel_oft.safetensors", "pixel")
    pipe.load_adapter(TINY / "adapters" / "ink.safetensors", "ink", scale=0.5)
    pipe.adapters.merge()
    return pipe.unet.state_dict()


def test_a_pipeline_folder_equals_the_merged_pipeline(tmp_path: Path) -> None:
    base = StableDiffusionPipeline.from_pretrained(TINY)
    # Shards, and a variant that must not stay behind unmerged.
    base.save_pretrained(tmp_path / "base", max_shard_size="300KB")
    save_file({"stale": torch.zeros(1)}, tmp_path / "base" / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    adapters = [(HOTSWAP / "pixel_oft.safetensors", 1.0), (TINY / "adapters" / "ink.safetensors", 0.5)]
    written = merge_files(tmp_path / "base", adapters, tmp_path / "merged")
    assert written == tmp_path / "merged"
    shards = {path.name for path in (tmp_path / "base" / "unet").iterdir() if "fp16" not in path.name}
    assert shards == {path.name for path in (written / "unet").iterdir()}
    assert len(shards) > 3
    found = StableDiffusionPipeline.from_pretrained(written)
    original, wanted = (
        base.unet.state_dict(),
        merged_in_memory(StableDiffusionPipeline.from_pretrained(tmp_path / "base")),
    )
    changed = 0
    for key, tensor in found.unet.state_dict().items():
        torch.testing.assert_close(tensor, wanted[key], rtol=1e-6, atol=1e-6)
        changed += not torch.equal(tensor, original[key])
    assert changed > 100
    for name in ("vae", "text_encoder"):
        for path in (tmp_path / "base" / name).glob("*.safetensors"):
            assert path.read_bytes() == (written / name / path.name).read_bytes()


@pytest.mark.parametrize("family", ["sdxl", "flux", "hunyuan-video"])
def test_a_single_file_in_the_original_layout(family: str, tmp_path: Path) -> None:
    component = next(iter(SMALL[family].components))
    model = SMALL[family].build()[component].float()
    single = in_original_layout(model, "model.diffusion_model.")
    save_file(single, tmp_path / "base.safetensors", metadata={"format": "pt", "modelspec.hash_sha256": "0x1"})
    for number, (kind, config) in enumerate(CONFIGS.items()):
        torch.manual_seed(number)
        diffadapt.add_adapter(model, config, kind)
        diffadapt.adapters(model).save(kind, tmp_path / kind, format="peft")
        diffadapt.adapters(model).remove(kind)
        merge_files(
            tmp_path / "base.safetensors",
            [(tmp_path / kind, 0.7)],
            tmp_path / f"merged-{kind}.safetensors",
            models={component: model},
        )
        found = load_file(tmp_path / f"merged-{kind}.safetensors")
        diffadapt.load_adapter(model, tmp_path / kind, kind, scale=0.7)
        diffadapt.adapters(model).merge()
        wanted = model.state_dict()
        for name, (parts, swapped) in original_names(model).items():
            key = f"model.diffusion_model.{name}.weight"
            if key in found and all(f"{part}.weight" in wanted for part in parts):
                joined = torch.cat([wanted[f"{part}.weight"] for part in parts])
                joined = joined.roll(len(joined) // 2, 0) if swapped else joined
                assert relative_error(found[key], joined) < 1e-5, key
        assert any(relative_error(found[key], single[key]) > 1e-2 for key in single)
        diffadapt.adapters(model).clear()
    with safe_open(tmp_path / "merged-lora.safetensors", "pt") as opened:
        assert json.loads(opened.metadata()["merged_adapters"]) == {"lora": 0.7}
        assert "modelspec.hash_sha256" not in opened.metadata()


def linear(tmp_path: Path) -> tuple[nn.Module, Path]:
    torch.manual_seed(0)
    model = nn.Module()
    model.add_module("layer", nn.Linear(32, 16, bias=False))
    adapter = diffadapt.add_adapter(model, diffadapt.LoraConfig(rank=2, target_modules=["layer"], init=False))
    diffadapt.adapters(model).save("default", tmp_path / "lora.safetensors")
    assert adapter.active
    diffadapt.adapters(model).clear()
    return model, tmp_path / "lora.safetensors"


def test_scaled_float8_is_encoded_again(tmp_path: Path) -> None:
    model, lora = linear(tmp_path)
    weight = model.layer.weight.detach()
    scale = weight.abs().max() / 448
    stored = {"layer.weight": (weight / scale).to(torch.float8_e4m3fn), "layer.weight_scale": scale}
    save_file(stored, tmp_path / "base.safetensors")
    merge_files(tmp_path / "base.safetensors", [(lora, 1.0)], tmp_path / "out.safetensors", models={"model": model})
    found = load_file(tmp_path / "out.safetensors")
    assert found["layer.weight"].dtype == torch.float8_e4m3fn
    diffadapt.load_adapter(model, lora)
    diffadapt.adapters(model).merge()
    values = found["layer.weight"].float() * found["layer.weight_scale"]
    assert relative_error(values, model.layer.weight.detach()) < 0.06
    assert relative_error(stored["layer.weight"].float() * scale, model.layer.weight.detach()) > 0.3


def test_what_is_refused_leaves_nothing_behind(tmp_path: Path) -> None:
    model, lora = linear(tmp_path)
    base, out = tmp_path / "base.safetensors", tmp_path / "out.safetensors"
    save_file({"layer.weight": model.layer.weight.detach().contiguous(), "other.bias": torch.zeros(3)}, base)
    models = {"model": model}
    with pytest.raises(AdapterError, match="no adapters to merge"):
        merge_files(base, [], out, models=models)
    with pytest.raises(AdapterError, match="exists already; pass the path of a new file"):
        merge_files(base, [(lora, 1.0)], base, models=models)
    with pytest.raises(AdapterError, match="cannot be used, nothing was loaded"):
        merge_files(base, [({"elsewhere.lora_A.weight": torch.ones(2, 32)}, 1.0)], out, models=models)
    save_file({"layer.weight": model.layer.weight.detach().half().contiguous()}, base)
    with pytest.raises(AdapterError, match=r"torch\.float16 cannot hold"):
        merge_files(base, [(lora, 1e9)], out, models=models)
    save_file({"other.weight": torch.zeros(3)}, base)
    with pytest.raises(AdapterError, match=r"has no weight for model\.layer, which an adapter changes"):
        merge_files(base, [(lora, 1.0)], out, models=models)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base.safetensors", "lora.safetensors"]
