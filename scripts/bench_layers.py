"""Benchmark one adapted layer against peft and LyCORIS: how much slower than the bare layer is it?

All libraries take turns in one run. Figures are ratios of process CPU time, one thread, to the bare layer in the same
round: the median over the rounds, and in brackets the ratio of the minima. `fwd` is inference (`torch.no_grad`, frozen
parameters). `f+b` is forward and backward with the base frozen, the adapter's parameters trained and a gradient for the
input, as inside a network. Only the peer that is fastest by median is shown, with its name; "bypass" is LyCORIS without
rebuilding the weight. `MiB` is the peak of what f+b allocates, minus that of the bare layer. The process keeps the
memory it frees, as torch does on a GPU; otherwise page faults, which depend on the order of allocations, blur all
figures.

    python scripts/bench_layers.py [--rounds 7] [--layer linear] [--tokens 4096] [--dtype bfloat16] [--only loha]
        [--json FILE]
"""

import argparse
import ctypes
import gc
import json
import logging
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import lycoris.modules as lycoris
import peft
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

import diffadapt

PACKAGES = ("torch", "diffusers", "peft", "lycoris-lora")
LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], tuple[int, ...]]]] = {
    "linear": (lambda: nn.Linear(1280, 1280), lambda tokens: (1, tokens, 1280)),
    "conv": (lambda: nn.Conv2d(320, 320, 3, padding=1), lambda tokens: (2, 320, 32, 32)),
}

Build: TypeAlias = Callable[[nn.Module], nn.Module]
"""Wraps a bare layer; the parameters that the result has in addition are those of the adapter."""


class Goal(NamedTuple):
    """Ratios to the bare layer that should not be exceeded; 0 for no goal."""

    forward: float = 0.0
    both: float = 0.0


@dataclass(frozen=True)
class Row:
    """One row of a table: one adapter on one layer, in diffadapt and its peers."""

    name: str
    ours: Build
    peers: dict[str, Build]
    goal: Goal = field(default_factory=Goal)


def ours(make: Callable[..., Any], count: int = 1, **options: Any) -> Build:
    """Return a function that adds `count` adapters of diffadapt to a layer, all active."""

    def build(layer: nn.Module) -> nn.Module:
        model = nn.Sequential(layer)
        for number in range(count):
            diffadapt.add_adapter(model, make(target_modules=["0"], init=False, **options), f"a{number}")
        return model

    return build


def with_peft(make: Callable[..., Any], count: int = 1, **options: Any) -> Build:
    """Return a function that adds `count` adapters of peft to a layer, all active."""

    def build(layer: nn.Module) -> nn.Module:
        model: nn.Module = nn.Sequential(layer)
        names = [f"a{number}" for number in range(count)]
        for name in names:
            peft.inject_adapter_in_model(make(target_modules=["0"], **options), model, adapter_name=name)
        for module in model.modules():
            if isinstance(module, BaseTunerLayer):
                module.set_adapter(names)
        return model

    return build


def wrapped_by_peft(make: Callable[..., Any], **options: Any) -> Build:
    """Return a function that wraps a layer with an adapter of peft, which may keep tensors for the whole model."""
    return lambda layer: peft.get_peft_model(nn.Sequential(layer), make(target_modules=["0"], **options))


def with_lycoris(make: Callable[..., Any], rank: int, bypass: bool = False, **options: Any) -> Build:
    """Return a function that lets a module of LyCORIS take over the forward of a layer."""

    def build(layer: nn.Module) -> nn.Module:
        adapter = make("a", layer, lora_dim=rank, alpha=rank, bypass_mode=bypass or None, **options)
        for parameter in adapter.parameters():
            nn.init.normal_(parameter, std=0.02)
        adapter.apply_to()
        model = nn.Sequential(layer)
        model.add_module("adapter", adapter)
        # The root calls only the layer, which calls the adapter.
        model.forward = layer.forward
        return model

    return build


def lycoris_and_bypass(make: Callable[..., Any], rank: int, **options: Any) -> dict[str, Build]:
    """Return LyCORIS without and with bypass, by name."""
    return {
        "lycoris": with_lycoris(make, rank, **options),
        "bypass": with_lycoris(make, rank, bypass=True, **options),
    }


def lokr(rank: int, factor: int, goal: Goal) -> Row:
    """Return the row of LoKr with a second factor of low rank."""
    return Row(
        f"LoKr r{rank} factor {factor}, low-rank w2",
        ours(diffadapt.LoKrConfig, rank=rank, factor=factor),
        {
            "peft": with_peft(peft.LoKrConfig, r=rank, decompose_factor=factor, init_weights=False),
            **lycoris_and_bypass(lycoris.LokrModule, rank, factor=factor),
        },
        goal,
    )


def lokr_full(factor: int, goal: Goal) -> Row:
    """Return the row of LoKr with two full factors. In peft, only a rank too large to be of use selects them."""
    return Row(
        f"LoKr full factors, factor {factor}",
        ours(diffadapt.LoKrConfig, full_matrix=True, factor=factor),
        {
            "peft": with_peft(peft.LoKrConfig, r=10000, decompose_factor=factor, init_weights=False),
            **lycoris_and_bypass(lycoris.LokrModule, 8, factor=factor, full_matrix=True),
        },
        goal,
    )


def methods() -> list[Row]:
    """Return a row for each further method of peft, on a linear layer."""
    table: list[tuple[str, Callable[..., Any], dict[str, Any], Callable[..., Any], dict[str, Any], Goal]] = [
        ("MiSS r64", diffadapt.MiSSConfig, {"rank": 64}, peft.MissConfig, {"r": 64}, Goal(1.04, 1.10)),
        (
            "GraLoRA r16, 2 x 2",
            diffadapt.GraLoRAConfig,
            {"rank": 16},
            peft.GraloraConfig,
            {"r": 16, "gralora_k": 2},
            Goal(1.08, 1.15),
        ),
        ("DeLoRA r16", diffadapt.DeLoRAConfig, {"rank": 16}, peft.DeloraConfig, {"r": 16}, Goal(1.08, 1.15)),
        ("HiRA r16", diffadapt.HiRAConfig, {"rank": 16}, peft.HiraConfig, {"r": 16}, Goal()),
        ("DEFT r16", diffadapt.DEFTConfig, {"rank": 16}, peft.DeftConfig, {"r": 16}, Goal()),
        ("RoAd 1", diffadapt.RoAdConfig, {}, peft.RoadConfig, {}, Goal()),
        ("HRA r8", diffadapt.HRAConfig, {"rank": 8}, peft.HRAConfig, {"r": 8}, Goal(1.10, 1.20)),
        ("PSOFT r32", diffadapt.PSOFTConfig, {"rank": 32}, peft.PsoftConfig, {"r": 32}, Goal()),
        ("C3A b256", diffadapt.C3AConfig, {"block_size": 256}, peft.C3AConfig, {"block_size": 256}, Goal(1.30, 1.50)),
        (
            "FourierFT n1000",
            diffadapt.FourierFTConfig,
            {"frequencies": 1000},
            peft.FourierFTConfig,
            {"n_frequency": 1000},
            Goal(),
        ),
        (
            "WaveFT n2592",
            diffadapt.WaveFTConfig,
            {"frequencies": 2592},
            peft.WaveFTConfig,
            {"n_frequency": 2592},
            Goal(),
        ),
        ("SHiRA r1", diffadapt.SHiRAConfig, {"rank": 1}, peft.ShiraConfig, {"r": 1}, Goal()),
        ("SHiRA r32", diffadapt.SHiRAConfig, {"rank": 32}, peft.ShiraConfig, {"r": 32}, Goal()),
        ("VeRA r16", diffadapt.VeRAConfig, {"rank": 16}, peft.VeraConfig, {"r": 16}, Goal(1.06, 1.12)),
        ("VeRA r256", diffadapt.VeRAConfig, {"rank": 256}, peft.VeraConfig, {"r": 256}, Goal()),
        ("PVeRA r256", diffadapt.PVeRAConfig, {"rank": 256}, peft.PveraConfig, {"r": 256}, Goal()),
        ("RandLora r32", diffadapt.RandLoraConfig, {"rank": 32}, peft.RandLoraConfig, {"r": 32}, Goal()),
        (
            "VB-LoRA r4",
            diffadapt.VBLoRAConfig,
            {"rank": 4},
            peft.VBLoRAConfig,
            {"r": 4, "num_vectors": 256},
            Goal(),
        ),
        ("UniLora r4", diffadapt.UniLoraConfig, {"rank": 4}, peft.UniLoraConfig, {"r": 4}, Goal()),
        (
            "AdaLoRA r12",
            diffadapt.AdaLoraConfig,
            {"rank": 12},
            peft.AdaLoraConfig,
            {"init_r": 12, "total_step": 100},
            Goal(),
        ),
        ("TinyLoRA r2", diffadapt.TinyLoRAConfig, {}, peft.TinyLoraConfig, {"init_weights": "uniform"}, Goal()),
        ("OSF, half kept", diffadapt.OSFConfig, {}, peft.OSFConfig, {}, Goal()),
        ("OSF, 16 trained", diffadapt.OSFConfig, {"kept": 1264}, peft.OSFConfig, {"effective_rank": 1264}, Goal()),
        ("FRoD 1 %", diffadapt.FRoDConfig, {}, peft.FrodConfig, {"progressbar": False}, Goal()),
        ("AdaMSS r100", diffadapt.AdaMSSConfig, {}, peft.AdamssConfig, {}, Goal()),
        ("PEANuT r32", diffadapt.PEANuTConfig, {"rank": 32}, peft.PeanutConfig, {"r": 32}, Goal()),
        ("SuperTuning", diffadapt.SuperTuningConfig, {}, peft.SupertuningConfig, {}, Goal()),
        (
            "GLoRA of peft, r8",
            diffadapt.GLoRAPEFTConfig,
            {"rank": 8},
            peft.GloraConfig,
            {"r": 8, "config_C": "none", "config_D_E": "none"},
            Goal(),
        ),
    ]
    return [
        Row(name, ours(own, **options), {"peft": wrapped_by_peft(theirs, **their_options)}, goal)
        for name, own, options, theirs, their_options, goal in table
    ]


def rows(layer: str) -> list[Row]:
    """Return the rows of the table for "linear" or "conv"."""
    linear = layer == "linear"
    found = [
        Row(
            "LoRA r16",
            ours(diffadapt.LoraConfig, rank=16),
            {
                "peft": with_peft(peft.LoraConfig, r=16, lora_alpha=16, init_lora_weights=False),
                **lycoris_and_bypass(lycoris.LoConModule, 16),
            },
            Goal(1.05, 1.10) if linear else Goal(),
        ),
        Row(
            "DoRA r16",
            ours(diffadapt.LoraConfig, rank=16, use_dora=True),
            {
                "peft": with_peft(peft.LoraConfig, r=16, lora_alpha=16, init_lora_weights=False, use_dora=True),
                "lycoris": with_lycoris(lycoris.LoConModule, 16, weight_decompose=True),
            },
            Goal(1.07, 1.15) if linear else Goal(),
        ),
        Row(
            "LoHa r8",
            ours(diffadapt.LoHaConfig, rank=8),
            {
                "peft": with_peft(peft.LoHaConfig, r=8, alpha=8, init_weights=False),
                **lycoris_and_bypass(lycoris.LohaModule, 8),
            },
            Goal(1.12, 1.22) if linear else Goal(1.26, 1.40),
        ),
        *(lokr(8, factor, Goal(1.10, 1.15) if linear else Goal(1.24, 1.32)) for factor in (8, -1)),
        *(lokr_full(factor, Goal(1.18, 1.32) if linear else Goal(1.24, 1.32)) for factor in (8, -1)),
    ]
    for terms in (0, 5):
        found.append(
            Row(
                f"OFT b32 input, {'exact' if not terms else f'Neumann {terms}'}",
                ours(diffadapt.OFTConfig, block_size=32, neumann_terms=terms),
                {
                    "peft": with_peft(
                        peft.OFTConfig, r=0, oft_block_size=32, use_cayley_neumann=terms > 0, init_weights=False
                    ),
                },
                Goal(1.08, 1.15) if linear else Goal(),
            )
        )
    # LyCORIS chooses the block size itself; diffadapt gets the same.
    size = 32 if linear else 10
    found.append(
        Row(
            f"OFT b{size} output",
            ours(diffadapt.OFTConfig, block_size=size, side="output"),
            lycoris_and_bypass(lycoris.DiagOFTModule, 32),
            Goal(1.08, 1.15) if linear else Goal(1.13, 1.16),
        )
    )
    found.append(
        Row(
            "BOFT b32 input, m1",
            ours(diffadapt.BOFTConfig, block_size=32),
            {"peft": with_peft(peft.BOFTConfig, boft_block_size=32, init_weights=False)},
            Goal(1.20, 1.25) if linear else Goal(),
        )
    )
    found.append(
        Row(
            f"BOFT b20 output, m{7 if linear else 5}",
            ours(diffadapt.BOFTConfig, block_size=20, side="output"),
            lycoris_and_bypass(lycoris.ButterflyOFTModule, 32),
            Goal() if linear else Goal(1.5, 1.5),
        )
    )
    if linear:
        found.append(
            Row(
                "eight LoRAs r16",
                ours(diffadapt.LoraConfig, 8, rank=16),
                {"peft": with_peft(peft.LoraConfig, 8, r=16, lora_alpha=16, init_lora_weights=False)},
                Goal(1.22, 1.35),
            )
        )
        found += [
            Row(
                "T-LoRA r16",
                ours(diffadapt.TLoRAConfig, rank=16),
                lycoris_and_bypass(lycoris.TLoraModule, 16),
            ),
            Row(
                "DyLoRA r16, blocks of 4",
                ours(diffadapt.DyLoRAConfig, rank=16, block_size=4),
                # Its bypass raises an error.
                {"lycoris": with_lycoris(lycoris.DyLoraModule, 16, block_size=4)},
            ),
        ]
        found += methods()
    return found


@dataclass
class Subject:
    """A model to measure and its input; the CPU seconds of every round, and the bytes f+b allocates at its peak."""

    model: nn.Module
    input: Tensor
    parameters: list[nn.Parameter]
    forward: list[float]
    both: list[float]
    peak: int = 0

    @classmethod
    def of(cls, build: Build, layer: nn.Module, input: Tensor) -> "Subject":
        """Return what `build` makes of a frozen copy of `layer`."""
        bare = type(layer).__new__(type(layer))
        bare.__dict__.update(layer.__dict__)
        bare._parameters = dict(layer._parameters)
        model = build(bare)
        weights = {id(parameter) for parameter in layer.parameters()}
        own = [parameter for parameter in model.parameters() if id(parameter) not in weights]
        for parameter in own:
            # The dtype that loading a file of this dtype results in.
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(input.dtype)
        # Random projections and the like stay as they are in training.
        parameters = [parameter for parameter in own if parameter.requires_grad]
        for parameter in layer.parameters():
            parameter.requires_grad_(False)
        return cls(model, input, parameters, [], [])

    def measure(self, gradient: Tensor, count: bool) -> None:
        """Measure both times once, and keep them if they `count`."""
        self.model.eval()
        for parameter in self.parameters:
            parameter.requires_grad_(False)
        with torch.no_grad():
            forward = timed(lambda: self.model(self.input))
        both = timed(partial(self.step, *self.trainable(), gradient))
        if count:
            self.forward.append(forward)
            self.both.append(both)

    def trainable(self) -> tuple[Tensor]:
        """Make everything ready for a training step and return its input."""
        self.model.train()
        for parameter in self.parameters:
            parameter.requires_grad_(True)
            parameter.grad = None
        leaf = self.input.detach().requires_grad_()
        return (leaf.view_as(leaf),)

    def step(self, input: Tensor, gradient: Tensor) -> None:
        """Run forward and backward."""
        self.model(input).backward(gradient)

    def measure_memory(self, gradient: Tensor) -> None:
        """Measure the peak of what a step allocates, as the largest running sum of torch's allocation events."""
        (input,) = self.trainable()
        activities = [torch.profiler.ProfilerActivity.CPU]
        with silent(), torch.profiler.profile(activities=activities, profile_memory=True) as profile:
            self.step(input, gradient)
        total = 0
        events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
        for event in sorted(events, key=lambda event: event.start_ns()):
            total += event.nbytes()
            self.peak = max(self.peak, total)


@contextmanager
def silent() -> Generator[None, None, None]:
    """Silence the standard error stream, native code included: torch's profiler reports its start and stop there."""
    stream = os.dup(2)
    with open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(stream, 2)
            os.close(stream)


def keep_memory() -> None:
    """Tell glibc not to return freed memory to the system."""
    if sys.platform == "linux":
        mallopt = ctypes.CDLL(None).mallopt
        trim_threshold, mmap_threshold, most = -1, -3, 2**31 - 1
        mallopt(trim_threshold, most)
        mallopt(mmap_threshold, most)


def timed(body: Callable[[], object]) -> float:
    """Return the CPU seconds that `body` takes."""
    gc.collect()
    start = time.process_time()
    body()
    return time.process_time() - start


def measured(row: Row, layer: nn.Module, input: Tensor, rounds: int) -> dict[str, Subject]:
    """Measure the bare layer, diffadapt and the peers in turn, round by round, and return them by name."""
    subjects = {"base": Subject.of(nn.Sequential, layer, input), "ours": Subject.of(row.ours, layer, input)}
    subjects |= {name: Subject.of(build, layer, input) for name, build in row.peers.items()}
    gradient = torch.randn_like(layer(input))
    for number in range(rounds + 1):
        for subject in subjects.values():
            # The first round fills caches and is not counted.
            subject.measure(gradient, count=number > 0)
    for subject in subjects.values():
        subject.measure_memory(gradient)
    return subjects


def ratios(values: list[float], base: list[float]) -> tuple[float, float]:
    """Return the median of the ratios within a round, and the ratio of the minima."""
    return statistics.median(v / b for v, b in zip(values, base, strict=True)), min(values) / min(base)


def cells(subjects: dict[str, Subject], goal: Goal) -> list[str]:
    """Return the cells of one row."""
    base, own = subjects["base"], subjects["ours"]
    peers = {name: subject for name, subject in subjects.items() if name not in ("base", "ours")}
    found: list[str] = []
    for which, aim in (("forward", goal.forward), ("both", goal.both)):
        figures = {name: ratios(getattr(s, which), getattr(base, which)) for name, s in subjects.items()}
        best = min(peers, key=lambda name: figures[name][0])
        found.append("{:.2f} ({:.2f})".format(*figures["ours"]))
        found.append("{:.2f} ({:.2f}) {}".format(*figures[best], best))
        found.append(f"{aim:.2f}" if aim else "")
    leanest = min(peers, key=lambda name: peers[name].peak)
    found.append(f"{(own.peak - base.peak) / 2**20:.1f}")
    found.append(f"{(peers[leanest].peak - base.peak) / 2**20:.1f} {leanest}")
    return found


def main() -> None:
    """Measure, print one table per layer, and write the figures if asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="rounds to measure (default: %(default)s)")
    parser.add_argument("--layer", choices=LAYERS, help="measure this layer only")
    parser.add_argument(
        "--tokens", type=int, default=4096, help="input tokens of the linear layer (default: %(default)s)"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="dtype of all tensors")
    parser.add_argument("--only", default="", help="measure only rows with this in their name")
    parser.add_argument("--methods", action="store_true", help="measure only the further methods of peft")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="also write all figures to this file")
    options = parser.parse_args()
    keep_memory()
    warnings.simplefilter("ignore")
    logging.getLogger("LyCORIS").setLevel(logging.WARNING)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    print(f"{options.dtype}; {torch.get_num_threads()} thread; {options.rounds} rounds; {versions}")
    figures: dict[str, Any] = {}
    for name in [options.layer] if options.layer else LAYERS:
        make, shape = LAYERS[name]
        layer, input = make().to(getattr(torch, options.dtype)), torch.randn(shape(options.tokens))
        input = input.to(layer.weight.dtype)
        print(f"\n{layer} on {'x'.join(map(str, input.shape))}\n")
        print("| | fwd | best peer | goal | f+b | best peer | goal | MiB | leanest peer |\n|---|" + "---|" * 8)
        for row in methods() if options.methods else rows(name):
            if options.only.lower() not in row.name.lower():
                continue
            subjects = measured(row, layer, input, options.rounds)
            print(f"| {row.name} | {' | '.join(cells(subjects, row.goal))} |")
            sys.stdout.flush()
            figures.setdefault(name, {})[row.name] = {
                key: {"forward": subject.forward, "both": subject.both, "peak": subject.peak}
                for key, subject in subjects.items()
            }
    if options.json:
        options.json.write_text(json.dumps({"versions": versions, **vars(options), "figures": figures}, default=str))


if __name__ == "__main__":
    main()
