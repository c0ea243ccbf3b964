"""Benchmark loading, swapping, merging and removing adapters at run time against diffusers with peft.

Both libraries take turns in one run. The first table has CPU milliseconds on an SDXL-shaped UNet with 560 LoRA layers
of rank 16 in bf16: medians over the rounds, and minima in brackets. The second counts how often a compiled tiny UNet is
compiled anew (backend aot_eager, which recompiles when inductor does).

    python scripts/bench_hotswap.py [--rounds 5] [--skip speed|graphs]
"""

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from bench_load import ENDINGS, RANK, Figures, cell, lora_file, sdxl_unet, timed, versions
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import diffadapt

RESIDENT = 25
BASE = "base.safetensors"
Tensors = dict[str, Tensor]


def speed_of_ours(unet: nn.Module, sources: list[Tensors], file: Path, figures: Figures) -> None:
    """Measure everything but merging, with slots for two adapters, and with 2 and 25 adapters loaded."""
    adapters = diffadapt.adapters(unet)
    with timed(figures, "prepare"):
        adapters.prepare_hotswap(sources[:1], slots=2)
    diffadapt.load_adapter(unet, sources[0], "a")
    diffadapt.load_adapter(unet, sources[1], "b")
    parsed = [adapters.prefetch(source) for source in sources]
    for number, source in enumerate((*parsed, parsed[0])):
        with timed(figures if number else {}, "hotswap, parsed (prefetched)"):
            adapters.hotswap("a", source)
    with timed(figures, "hotswap, from tensors in memory"):
        adapters.hotswap("a", sources[1])
    with timed(figures, "hotswap, from a safetensors file"):
        adapters.hotswap("a", file)
    for resident in (2, RESIDENT):
        for number in range(len(adapters), resident):
            diffadapt.load_adapter(unet, sources[0], f"n{number}", activate=False)
        adapters.activate({"a": 1.0})
        where = f", {resident} resident"
        with timed(figures, f"rescale{where}"):
            adapters.activate({"a": 0.5})
        with timed(figures, f"rescale by block{where}"):
            adapters.activate({"a": {"down_blocks": 0.5, "up_blocks.0": 0.3}})
        with timed(figures, f"activate another{where}"):
            adapters.activate({"b": 0.5})
        with timed(figures, f"disable and enable{where}"), adapters.disabled():
            pass
    with timed(figures, "remove one"):
        adapters.remove("b")
    for name in adapters.names[2:]:
        adapters.remove(name)
    with timed(figures, "clear, of two"):
        adapters.clear()
    adapters.release_slots()


def speed_of_diffusers(unet: nn.Module, sources: list[Tensors], file: Path, figures: Figures) -> None:
    """Measure the same operations as `speed_of_ours`, as far as diffusers has them."""
    with timed(figures, "prepare"):
        unet.enable_lora_hotswap(target_rank=RANK)
    for name, source in zip("ab", sources, strict=False):
        unet.load_lora_adapter(dict(source), prefix="unet", adapter_name=name)
    with timed(figures, "hotswap, from tensors in memory"):
        unet.load_lora_adapter(dict(sources[1]), prefix="unet", adapter_name="a", hotswap=True)
    with timed(figures, "hotswap, from a safetensors file"):
        unet.load_lora_adapter(str(file), prefix="unet", adapter_name="a", hotswap=True)
    unet.set_adapters(["a"], [1.0])
    where = ", 2 resident"
    with timed(figures, f"rescale{where}"):
        unet.set_adapters(["a"], [0.5])
    with timed(figures, f"activate another{where}"):
        unet.set_adapters(["b"], [0.5])
    with timed(figures, f"disable and enable{where}"):
        unet.disable_lora()
        unet.enable_lora()
    with timed(figures, "remove one"):
        unet.delete_adapters("b")
    unet.load_lora_adapter(dict(sources[1]), prefix="unet", adapter_name="c")
    with timed(figures, "clear, of two"):
        unet.unload_lora()


def merge_of_ours(unet: nn.Module, sources: list[Tensors], file: Path, figures: Figures) -> None:
    """Measure merging, swapping the merged adapter and unmerging, and the memory kept, for every way of undoing."""
    adapters = diffadapt.adapters(unet)
    # Scaled to the usual size of a change: random factors of unit size change a weight by many times its size.
    diffadapt.load_adapter(unet, sources[0], "a", scale=3e-5)
    other = adapters.prefetch(sources[1])
    after: Any = [other, sources[0], sources[1]]
    ways: dict[str, dict[str, Any]] = {
        "": {},
        ", keeping copies": {"compact": False},
        ", reading the base file": {"base_files": file.parent / BASE},
    }
    for (how, options), source in zip(ways.items(), after, strict=True):
        with timed(figures, f"merge{how}"):
            adapters.merge("a", **options)
        figures.setdefault(f"memory kept, MiB{how}", []).append(adapters.undo_bytes / 2**20)
        with timed(figures, f"hotswap of the merged one{how}"):
            adapters.hotswap("a", source)
        with timed(figures, f"unmerge, exact{how}"):
            adapters.unmerge()
    adapters.clear()


def merge_of_diffusers(unet: nn.Module, sources: list[Tensors], file: Path, figures: Figures) -> None:
    """Measure merging in diffusers, which undoes it by subtraction."""
    unet.load_lora_adapter(dict(sources[0]), prefix="unet", adapter_name="a")
    unet.set_adapters(["a"], [3e-5])
    with timed(figures, "merge"):
        unet.fuse_lora()
    with timed(figures, "unmerge, not exact"):
        unet.unfuse_lora()
    unet.fuse_lora()
    with timed(figures, "hotswap of the merged one"):
        unet.unfuse_lora()
        unet.load_lora_adapter(dict(sources[1]), prefix="unet", adapter_name="a", hotswap=True)
        unet.fuse_lora()
    unet.unfuse_lora()
    unet.unload_lora()


def speed(rounds: int) -> None:
    """Measure times and print the first table.

    Args:
        rounds: how often everything is measured, after one round to warm up.
    """
    unets = sdxl_unet(), sdxl_unet()
    weights: Tensors = {}
    for path, module in unets[0].named_modules():
        if path.endswith(ENDINGS) and isinstance(module, nn.Linear):
            weights[f"{path}.weight"] = module.weight.data.normal_(std=module.in_features**-0.5)
            unets[1].get_parameter(f"{path}.weight").data.copy_(module.weight)
    tensors = lora_file(unets[0])
    sources = [tensors, {key: tensor.flip(0) for key, tensor in tensors.items()}]
    figures: tuple[Figures, Figures] = {}, {}
    pairs = ((speed_of_ours, speed_of_diffusers), (merge_of_ours, merge_of_diffusers))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "lora.safetensors"
        save_file(tensors, file)
        save_file(weights, file.parent / BASE)
        for number in range(rounds + 1):
            print(f"round {number} of {rounds}", file=sys.stderr)
            for pair in pairs:
                for measure, unet, found in zip(pair, unets, figures, strict=True):
                    # The first round fills caches and is not counted.
                    measure(unet, sources, file, found if number else {})
    print(f"{len(tensors) // 2} LoRA layers, rank {RANK}, bf16; {torch.get_num_threads()} thread; {versions()}\n")
    print("| CPU ms, median (minimum) | diffadapt | diffusers + peft |\n|---|---|---|")
    for what in dict.fromkeys((*figures[0], *figures[1])):
        cells = (cell(found.get(what, [])) for found in figures)
        print(f"| {what} | {' | '.join(cells)} |")


def tiny_unet() -> UNet2DConditionModel:
    """Return a small UNet with attention at two depths, and convolutions."""
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(16, 32),
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=4,
        norm_num_groups=4,
    ).requires_grad_(False)


def tiny_file(rank: int, endings: Iterable[str] = (".to_q", ".to_v"), alpha: float | None = None) -> Tensors:
    """Return the tensors of a LoRA for the layers of the tiny UNet with these endings of their paths."""
    generator = torch.Generator().manual_seed(rank)
    tensors: Tensors = {}
    for path, module in tiny_unet().named_modules():
        if path.endswith(tuple(endings)) and isinstance(module, (nn.Linear, nn.Conv2d)):
            down, up = (
                (rank, *module.weight.shape[1:]),
                (module.weight.shape[0], rank, *(1,) * (module.weight.ndim - 2)),
            )
            tensors[f"unet.{path}.lora_A.weight"] = torch.randn(down, generator=generator) * 0.1
            tensors[f"unet.{path}.lora_B.weight"] = torch.randn(up, generator=generator) * 0.1
            if alpha is not None:
                tensors[f"unet.{path}.alpha"] = torch.tensor(alpha)
    return tensors


SMALL, LARGE, FEWER = tiny_file(4), tiny_file(16), tiny_file(4, [".to_q"])
MORE, CONV = tiny_file(8, [".to_q", ".to_v", ".net.2"]), tiny_file(8, [".to_q", ".to_v", ".conv1"])
Steps = list[tuple[str, Callable[[nn.Module], object]]]


def _swap(name: str, source: Tensors) -> tuple[Callable[[nn.Module], object], Callable[[nn.Module], object]]:
    """Return how diffadapt and diffusers replace adapter `name`."""
    return (
        lambda unet: diffadapt.adapters(unet).hotswap(name, source),
        lambda unet: unet.load_lora_adapter(dict(source), prefix="unet", adapter_name=name, hotswap=True),
    )


def _scale(scales: dict[str, float]) -> tuple[Callable[[nn.Module], object], Callable[[nn.Module], object]]:
    """Return how diffadapt and diffusers set strengths."""
    return (
        lambda unet: diffadapt.adapters(unet).activate(scales),
        lambda unet: unet.set_adapters(list(scales), list(scales.values())),
    )


def graphs() -> None:
    """Count recompilations and print the second table: both libraries are prepared for rank 16 and then make the same
    changes one after the other.
    """
    changes = {
        "rank 4 -> 16": _swap("a", LARGE),
        "-> fewer layers": _swap("a", FEWER),
        "-> more layers": _swap("a", MORE),
        "-> convolutions, too": _swap("a", CONV),
        "another strength": _scale({"a": 0.5}),
        "a second adapter": (
            lambda unet: diffadapt.load_adapter(unet, SMALL, "b"),
            lambda unet: unet.load_lora_adapter(dict(SMALL), prefix="unet", adapter_name="b"),
        ),
        "both active": _scale({"a": 0.5, "b": 0.3}),
        "the second one swapped": _swap("b", LARGE),
        "only one active": _scale({"b": 1.0}),
        "none active": (lambda unet: diffadapt.adapters(unet).activate({}), lambda unet: unet.disable_lora()),
        "one active again": (
            lambda unet: diffadapt.adapters(unet).activate({"a": 1.0}),
            lambda unet: unet.enable_lora(),
        ),
        "one removed": (lambda unet: diffadapt.adapters(unet).remove("b"), lambda unet: unet.delete_adapters("b")),
    }
    results: list[list[str]] = []
    for ours in (True, False):
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")
        unet = tiny_unet()
        if ours:
            diffadapt.adapters(unet).prepare_hotswap([LARGE, MORE, CONV], slots=2)
            diffadapt.load_adapter(unet, SMALL, "a")
        else:
            unet.enable_lora_hotswap(target_rank=RANK, check_compiled="ignore")
            unet.load_lora_adapter(dict(SMALL), prefix="unet", adapter_name="a")
        unet.compile(backend=counter)
        results.append([])
        run(unet)
        for what, pair in changes.items():
            print(what, file=sys.stderr)
            before = counter.frame_count
            try:
                pair[0 if ours else 1](unet)
                run(unet)
                results[-1].append(str(counter.frame_count - before))
            except Exception as error:
                results[-1].append(f"fails ({type(error).__name__})")
    print("\n| graphs compiled anew | diffadapt | diffusers + peft |\n|---|---|---|")
    for what, ours, theirs in zip(changes, *results, strict=True):
        print(f"| {what} | {ours} | {theirs} |")


@torch.no_grad()
def run(unet: nn.Module) -> None:
    """Call the tiny UNet once."""
    unet(torch.ones(1, 4, 8, 8), 1, torch.ones(1, 3, 16))


def main() -> None:
    """Measure and print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="rounds to measure (default: %(default)s)")
    parser.add_argument("--skip", choices=("speed", "graphs"), help="table to leave out")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.skip != "speed":
        speed(options.rounds)
    if options.skip != "graphs":
        graphs()


if __name__ == "__main__":
    main()
