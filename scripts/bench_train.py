"""Benchmark training steps on a UNet of about 140 M parameters against peft: time and memory.

A step is forward, mean squared error, backward and AdamW, float32, batch 1, with adapters on all attention and
feed-forward layers. The base is the frozen UNet with a gradient for its input and no optimiser. Times are ratios of
process CPU time, one thread, to the base in the same round: the median over the rounds, and in brackets the ratio of
the minima. As in bench_layers.py the process keeps the memory it frees. `MiB` is the peak resident memory of a fresh
process that takes two steps, minus that of the same process with the base; `build` is the peak before the first step,
minus that of the base.

    python scripts/bench_train.py [--rounds 3] [--only loha] [--json FILE]
"""

import argparse
import gc
import json
import resource
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import peft
import torch
import torch.nn.functional as F
from bench_layers import keep_memory, ratios
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

import diffadapt

SHAPE: dict[str, Any] = {
    "attention_head_dim": 8,
    "block_out_channels": [160, 320, 640],
    "cross_attention_dim": 768,
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "layers_per_block": 2,
    "sample_size": 32,
    "transformer_layers_per_block": 2,
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    "use_linear_projection": True,
}
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]
PACKAGES = ("torch", "diffusers", "peft")
BASE = "base"


@dataclass(frozen=True)
class Variant:
    """Settings of one adapter type in both libraries."""

    ours: Callable[..., Any]
    peft: Callable[..., Any]
    our_options: dict[str, Any]
    peft_options: dict[str, Any]


def _lora(**options: Any) -> Variant:
    return Variant(
        diffadapt.LoraConfig,
        peft.LoraConfig,
        {"rank": 16, **options},
        {"r": 16, "lora_alpha": 16, "init_lora_weights": False, **options},
    )


def _lokr(factor: int) -> Variant:
    return Variant(
        diffadapt.LoKrConfig,
        peft.LoKrConfig,
        {"rank": 8, "factor": factor},
        {"r": 8, "alpha": 8, "decompose_factor": factor, "init_weights": False},
    )


VARIANTS = {
    "LoRA r16": _lora(),
    "DoRA r16": _lora(use_dora=True),
    "LoHa r8": Variant(diffadapt.LoHaConfig, peft.LoHaConfig, {"rank": 8}, {"r": 8, "alpha": 8, "init_weights": False}),
    "LoKr r8 factor -1": _lokr(-1),
    "LoKr r8 factor 8": _lokr(8),
    "OFT b32": Variant(
        diffadapt.OFTConfig, peft.OFTConfig, {"block_size": 32}, {"r": 0, "oft_block_size": 32, "init_weights": False}
    ),
    "BOFT b32": Variant(
        diffadapt.BOFTConfig, peft.BOFTConfig, {"block_size": 32}, {"boft_block_size": 32, "init_weights": False}
    ),
}


@dataclass
class Trainer:
    """A UNet with an adapter of one library, or without.

    Attributes:
        library: "ours", "peft" or "base" for no adapter.
        seconds: CPU seconds of every measured step.
    """

    library: str
    seconds: list[float] = field(default_factory=list[float])

    def build(self, name: str) -> "Trainer":
        """Make the model with the adapter of variant `name`, its optimiser and its data."""
        torch.manual_seed(0)
        self.model = UNet2DConditionModel(**SHAPE).requires_grad_(False)
        before = {id(parameter) for parameter in self.model.parameters()}
        if self.library != BASE:
            variant = VARIANTS[name]
            if self.library == "ours":
                config = variant.ours(target_modules=TARGETS, init=False, **variant.our_options)
                diffadapt.add_adapter(self.model, config)
            else:
                self.model.add_adapter(variant.peft(target_modules=TARGETS, **variant.peft_options))
        self.parameters: list[nn.Parameter] = [p for p in self.model.parameters() if id(p) not in before]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-6) if self.parameters else None
        size, width = SHAPE["sample_size"], SHAPE["cross_attention_dim"]
        shapes = ((1, 4, size, size), (1, 77, width), (1, 4, size, size))
        self.sample, self.text, self.target = (torch.randn(shape) for shape in shapes)
        self.model.train()
        return self

    def step(self) -> Tensor:
        """Take one training step and return the loss."""
        sample = self.sample.detach().requires_grad_()
        loss = F.mse_loss(self.model(sample, 500, self.text).sample, self.target)
        loss.backward()
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()
        return loss

    def measure(self) -> None:
        """Measure the CPU seconds of one step."""
        gc.collect()
        start = time.process_time()
        self.step()
        self.seconds.append(time.process_time() - start)


def peak_memory() -> float:
    """Return the peak resident memory of this process in MiB."""
    status = Path("/proc/self/status")
    if status.exists():
        # `getrusage` would not do: on Linux it returns at least the peak of the process that started this one.
        return int(status.read_text().split("VmHWM:")[1].split()[0]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def memory_of(library: str, name: str) -> dict[str, float]:
    """Return the peak memory in MiB of a fresh process, after two steps ("peak") and before them ("build")."""
    command = [sys.executable, __file__, "--memory", library, "--only", name]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def measure_own_memory(library: str, name: str) -> None:
    """Measure the memory of this process and print it; runs in the fresh process of `memory_of`."""
    trainer = Trainer(library).build(name)
    found = {"build": peak_memory()}
    for _ in range(2):
        trainer.step()
    print(json.dumps({**found, "peak": peak_memory()}))


def main() -> None:
    """Measure, print a table, and write the figures if asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="rounds to measure (default: %(default)s)")
    parser.add_argument("--only", default="", help="measure only variants with this in their name")
    parser.add_argument("--json", type=Path, help="also write all figures to this file")
    parser.add_argument("--memory", choices=(BASE, "ours", "peft"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    names = [name for name in VARIANTS if options.only.lower() in name.lower()]
    if options.memory:
        measure_own_memory(options.memory, names[0])
        return
    keep_memory()
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    base = Trainer(BASE).build("")
    size = sum(parameter.numel() for parameter in base.model.parameters()) / 1e6
    print(f"UNet of {size:.0f} M parameters; {torch.get_num_threads()} thread; {options.rounds} rounds; {versions}\n")
    print("| | trained | ours | peft | ours MiB | peft MiB | ours build | peft build |\n|---|" + "---|" * 7)
    base_memory = memory_of(BASE, names[0])
    figures: dict[str, Any] = {BASE: {"memory": base_memory}}
    for name in names:
        base.seconds = []
        trainers = {library: Trainer(library).build(name) for library in ("ours", "peft")}
        for trainer in trainers.values():
            # The first step fills caches and is not counted.
            trainer.step()
        for _ in range(options.rounds):
            for trainer in (base, *trainers.values()):
                trainer.measure()
        memory = {library: memory_of(library, name) for library in trainers}
        trained = sum(parameter.numel() for parameter in trainers["ours"].parameters) / 1e6
        cells = ["{:.2f} ({:.2f})".format(*ratios(t.seconds, base.seconds)) for t in trainers.values()]
        for which in ("peak", "build"):
            cells += [f"{memory[library][which] - base_memory[which]:+.0f}" for library in trainers]
        print(f"| {name} | {trained:.2f} M | {' | '.join(cells)} |")
        sys.stdout.flush()
        seconds = {BASE: base.seconds, **{library: trainer.seconds for library, trainer in trainers.items()}}
        figures[name] = {"seconds": seconds, "memory": memory}
    if options.json:
        options.json.write_text(json.dumps({"versions": versions, "rounds": options.rounds, "figures": figures}))


if __name__ == "__main__":
    main()
