"""The files that the examples of the documents name, with small valid content for the embedded pipeline."""

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

import diffadapt

EXAMPLES = Path(__file__).parents[2] / "examples"
TINY = EXAMPLES / "tiny_pipeline"

SHIPPED: Mapping[str, Path] = {
    "critter.safetensors": TINY / "adapters" / "critter.safetensors",
    "ink.safetensors": TINY / "adapters" / "ink.safetensors",
    "pixel.safetensors": TINY / "adapters" / "pixel.safetensors",
    "ink_lokr.safetensors": EXAMPLES / "hotswap" / "ink_lokr.safetensors",
    "pixel_oft.safetensors": EXAMPLES / "hotswap" / "pixel_oft.safetensors",
    "sks-dog/pytorch_lora_weights.safetensors": TINY / "adapters" / "critter.safetensors",
    "style-1.safetensors": TINY / "adapters" / "ink.safetensors",
    "style-2.safetensors": TINY / "adapters" / "pixel.safetensors",
}
"""Name in the documents -> file of the repository."""


def write(folder: Path) -> None:
    """Put all files that the examples read into a folder."""
    for name, source in SHIPPED.items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    shutil.copytree(EXAMPLES / "dreambooth" / "data" / "critter", folder / "my-dog")
    shutil.copytree(TINY, folder / "base", ignore=shutil.ignore_patterns("adapters"))
    diffadapt.merge_files(folder / "base", [(SHIPPED["pixel.safetensors"], 1.0)], folder / "tuned")
    torch.save(load_file(SHIPPED["pixel.safetensors"]), folder / "old.bin")
    save_file(_flux(), folder / "flux-kohya.safetensors")
    pipe = StableDiffusionPipeline.from_pretrained(TINY)
    width: int = pipe.text_encoder.config.hidden_size
    save_file({"clip_l": _random(2, width)}, folder / "cat-lora_emb.safetensors")
    save_file({"emb_params": _random(3, width)}, folder / "easynegative.safetensors")
    settings = diffadapt.LoraConfig(rank=2, target_modules=["to_q", "to_v"], init=False)
    diffadapt.add_adapter(pipe.unet, settings, name="cat")
    path = folder / "cat-lora.safetensors"
    pipe.adapters.save("cat", path, format="kohya")
    save_file({**load_file(path), "bundle_emb.<cat>.clip_l": _random(4, width)}, path)


def _flux() -> dict[str, Tensor]:
    """A LoRA of rank 2 on layers of Flux that are several in diffusers, as sd-scripts writes it."""
    tensors: dict[str, Tensor] = {}
    for layer, outputs in {"double_blocks_0_img_attn_qkv": 9216, "single_blocks_0_linear1": 21504}.items():
        tensors[f"lora_unet_{layer}.lora_down.weight"] = _random(2, 3072)
        tensors[f"lora_unet_{layer}.lora_up.weight"] = _random(outputs, 2)
        tensors[f"lora_unet_{layer}.alpha"] = torch.tensor(2.0)
    return tensors


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))
