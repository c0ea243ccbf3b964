"""Benchmark loading and managing adapters on an SDXL-shaped UNet against diffusers with peft.

Both libraries take turns in one run, with 560 LoRA layers of rank 16 (attention q, k, v, out), bf16, random weights.
Figures are CPU milliseconds of this process, medians over the rounds, so that other work on the machine distorts them
little. "Resolve" is the step after reading a kohya file of all 794 layers (2,382 keys): recognising the format and
finding the layer of every key.

    python scripts/bench_load.py [--rounds 5] [--json FILE]
"""

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel, UNet2DConditionModel
from diffusers.loaders import StableDiffusionXLLoraLoaderMixin
from safetensors.torch import save_file
from torch import Tensor, nn

import diffadapt
from diffadapt.files.read import read
from diffadapt.formats import detect
from diffadapt.formats.names import Names
from diffadapt.formats.verdicts import Place
from diffadapt.runtime.targets import Targets

SDXL = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280],
    "cross_attention_dim": 2048,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "projection_class_embeddings_input_dim": 2816,
    "sample_size": 128,
    "transformer_layers_per_block": [1, 2, 10],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "use_linear_projection": True,
}
RANK = 16
LARGE_RANK = 720
ENDINGS = (".to_q", ".to_k", ".to_v", ".to_out.0")
PACKAGES = ("torch", "diffusers", "transformers", "peft", "safetensors")

FLUX, LARGE = "flux.safetensors", "large.safetensors"

Figures = dict[str, list[float]]


def sdxl_unet() -> UNet2DConditionModel:
    """Return a UNet of the real shapes. Its memory is never touched, since loading does not read base weights."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**SDXL).to(torch.bfloat16)
    return unet.to_empty(device="cpu").requires_grad_(False)


def flux_transformer() -> FluxTransformer2DModel:
    """Return the transformer of Flux.1, without values."""
    with torch.device("meta"):
        return FluxTransformer2DModel(guidance_embeds=True).to(torch.bfloat16).requires_grad_(False)


def lora_file(unet: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a LoRA in the diffusers format, for every attention projection."""
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, Tensor] = {}
    for path, module in unet.named_modules():
        if isinstance(module, nn.Linear) and path.endswith(ENDINGS):
            out, columns = module.weight.shape
            down, up = (torch.randn(shape, generator=generator) for shape in ((RANK, columns), (out, RANK)))
            tensors[f"unet.{path}.lora_A.weight"] = down.bfloat16()
            tensors[f"unet.{path}.lora_B.weight"] = up.bfloat16()
    return tensors


def kohya_file(unet: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a LoRA of rank 1 in the kohya format, for every linear and convolutional layer."""
    tensors: dict[str, Tensor] = {}
    for path, module in unet.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            flat, (out, *columns) = f"lora_unet_{path.replace('.', '_')}", module.weight.shape
            tensors[f"{flat}.lora_down.weight"] = torch.zeros(1, *columns)
            tensors[f"{flat}.lora_up.weight"] = torch.zeros(out, 1, *(1,) * (len(columns) - 1))
            tensors[f"{flat}.alpha"] = torch.tensor(1.0)
    return tensors


def flux_file() -> dict[str, Tensor]:
    """Return the tensors of a LoRA of rank 4 in the kohya format for Flux.1: 304 layers, many of them fused."""
    width, tensors = 3072, dict[str, Tensor]()
    double = {"qkv": (1, 3), "proj": (1, 1), "mlp_0": (1, 4), "mlp_2": (4, 1), "mod_lin": (1, 6)}
    layers = {
        f"double_blocks_{block}_{stream}_{name if name[:1] == 'm' else f'attn_{name}'}": sizes
        for block in range(19)
        for stream in ("img", "txt")
        for name, sizes in double.items()
    }
    single = {"linear1": (1, 7), "linear2": (5, 1), "modulation_lin": (1, 3)}
    layers |= {f"single_blocks_{block}_{name}": sizes for block in range(38) for name, sizes in single.items()}
    for name, (columns, rows) in layers.items():
        flat = f"lora_unet_{name}"
        tensors[f"{flat}.lora_down.weight"] = torch.ones(4, columns * width, dtype=torch.bfloat16)
        tensors[f"{flat}.lora_up.weight"] = torch.ones(rows * width, 4, dtype=torch.bfloat16)
        tensors[f"{flat}.alpha"] = torch.tensor(4.0)
    return tensors


def write_large_file(unet: nn.Module, file: Path) -> None:
    """Write the header of a LoRA file of 2 GB. Its values are a hole in the file, since `inspect` reads none."""
    entries, end = dict[str, Any](), 0
    for key, tensor in lora_file(unet).items():
        shape = [size if size != RANK else LARGE_RANK for size in tensor.shape]
        begin, end = end, end + 2 * shape[0] * shape[1]
        entries[key] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    header = json.dumps(entries).encode()
    with file.open("wb") as opened:
        opened.write(len(header).to_bytes(8, "little") + header)
        opened.truncate(8 + len(header) + end)


def versions() -> str:
    """Return the versions of the libraries that influence the figures."""
    return ", ".join(f"{name} {version(name)}" for name in PACKAGES)


def cell(values: list[float]) -> str:
    """Return a table cell with median and minimum."""
    return f"{statistics.median(values):.1f} ({min(values):.1f})" if values else "-"


@contextmanager
def timed(figures: Figures, what: str) -> Generator[None, None, None]:
    """Append the CPU milliseconds of the `with` block to `figures[what]`; Python's garbage is collected before it."""
    gc.collect()
    start = time.process_time()
    yield
    figures.setdefault(what, []).append(1e3 * (time.process_time() - start))


def round_of_ours(
    unet: nn.Module, tensors: dict[str, Tensor], kohya: dict[str, Tensor], file: Path, figures: Figures
) -> None:
    """Measure loading, activating and removing adapters with diffadapt."""
    header = read(kohya).header
    with timed(figures, "resolve 2,382 keys of a kohya file"):
        verdicts = detect(header).locate(header, Names({"unet": Targets(unet)}))
    assert all(isinstance(verdict, Place) for verdict in verdicts.values())
    for number, name in enumerate("abc", 1):
        with timed(figures, f"load a parsed adapter, #{number}"):
            diffadapt.load_adapter(unet, tensors, name)
    adapters = diffadapt.adapters(unet)
    with timed(figures, "activate one of three"):
        adapters.activate({"a": 0.5})
    with timed(figures, "activate all three"):
        adapters.activate({"a": 0.5, "b": 0.3, "c": 1.0})
    with timed(figures, "remove one of three"):
        adapters.remove("b")
    with timed(figures, "remove the rest"):
        adapters.clear()
    with timed(figures, "load a safetensors file"):
        diffadapt.load_adapter(unet, file, "f")
    adapters.clear()
    with timed(figures, "inspect a file of 2 GB"):
        diffadapt.inspect(file.parent / LARGE)
    flux = flux_transformer()
    with timed(figures, "load a kohya file for Flux.1, 912 tensors"):
        diffadapt.load_adapter(flux, file.parent / FLUX, "f")


def round_of_diffusers(
    unet: nn.Module, tensors: dict[str, Tensor], kohya: dict[str, Tensor], file: Path, figures: Figures
) -> None:
    """Measure the same operations with diffusers and peft, which finds the layers of keys only while loading."""
    with timed(figures, "resolve 2,382 keys of a kohya file"):
        StableDiffusionXLLoraLoaderMixin.lora_state_dict(dict(kohya), unet_config=unet.config)
    for number, name in enumerate("abc", 1):
        with timed(figures, f"load a parsed adapter, #{number}"):
            unet.load_lora_adapter(dict(tensors), prefix="unet", adapter_name=name, low_cpu_mem_usage=True)
    with timed(figures, "activate one of three"):
        unet.set_adapters(["a"], [0.5])
    with timed(figures, "activate all three"):
        unet.set_adapters(["a", "b", "c"], [0.5, 0.3, 1.0])
    with timed(figures, "remove one of three"):
        unet.delete_adapters("b")
    with timed(figures, "remove the rest"):
        unet.unload_lora()
    with timed(figures, "load a safetensors file"):
        unet.load_lora_adapter(str(file), prefix="unet", adapter_name="f", low_cpu_mem_usage=True)
    unet.unload_lora()


def main() -> None:
    """Measure, print a table, and write the figures if asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="rounds to measure (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="also write all figures to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    unets = sdxl_unet(), sdxl_unet()
    tensors, kohya = lora_file(unets[0]), kohya_file(unets[0])
    figures: tuple[Figures, Figures] = {}, {}
    measures: tuple[Callable[..., None], ...] = (round_of_ours, round_of_diffusers)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "lora.safetensors"
        save_file(tensors, file)
        save_file(flux_file(), file.parent / FLUX)
        write_large_file(unets[0], file.parent / LARGE)
        for number in range(options.rounds + 1):
            print(f"round {number} of {options.rounds}", file=sys.stderr)
            for measure, unet, found in zip(measures, unets, figures, strict=True):
                # The first round fills caches and is not counted.
                measure(unet, tensors, kohya, file, found if number else {})
    print(f"{len(tensors) // 2} LoRA layers, rank {RANK}, bf16; {torch.get_num_threads()} thread; {versions()}\n")
    print("| CPU ms, median (minimum) | diffadapt | diffusers + peft | ratio |\n|---|---|---|---|")
    for what, ours in figures[0].items():
        theirs = figures[1].get(what, [])
        cells = map(cell, (ours, theirs))
        ratio = f"{statistics.median(theirs) / statistics.median(ours):.0f} x" if theirs else "-"
        print(f"| {what} | {' | '.join(cells)} | {ratio} |")
    if options.json:
        options.json.write_text(
            json.dumps({"versions": versions(), "ours": figures[0], "theirs": figures[1]}, indent=1)
        )


if __name__ == "__main__":
    main()
