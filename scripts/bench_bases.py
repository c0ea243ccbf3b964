"""Benchmark adapters on quantised and cast weights against diffusers with peft: what do they add to the bare layer?

All take turns in one run. "LoRA" and "DoRA" are a forward pass in inference with an adapter of rank 16, as a ratio of
process CPU time, one thread, to the bare layer of the same backend in the same round: the median over the rounds, and
in brackets the ratio of the minima. `KiB` is what all tensors together grow by when an adapter is loaded and has run
once, caches included. `load` is the time to load a LoRA onto 560 small layers of the backend, as a ratio to 560 float
layers. An asterisk marks a goal that both ratios miss: 1.10 for LoRA, 1.15 for DoRA, 1.3 for loading.

    python -m scripts.bench_bases [--rounds 7] [--tokens 4096] [--bases nf4 gguf] [--json FILE]
"""

import argparse
import contextlib
import gc
import json
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.loaders.peft import PeftAdapterMixin
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

import diffadapt
from scripts.bench_layers import keep_memory, ratios, timed
from tests.support.base_bench import silent
from tests.support.base_peer import marked
from tests.support.bases import BASES, CAST, PLAIN, Base

PACKAGES = ("torch", "diffusers", "transformers", "peft", "bitsandbytes", "torchao", "gguf", "optimum-quanto", "hqq")
FURTHER = ("nvidia-modelopt", "sdnq")
CHOSEN = (
    "float32",
    "bitsandbytes nf4",
    "bitsandbytes int8",
    "torchao int8",
    "torchao int8 dynamic",
    "torchao float8",
    "quanto int8",
    "hqq 4 bit",
    "gguf Q8_0",
    "gguf Q4_K",
    "BFL float8",
    "ComfyUI scaled float8",
    "float8 cast",
    "sdnq int8",
    "modelopt float8",
)
SIZE, RANK = 1280, 16
LAYERS, SMALL = 560, 256
GOALS = {"lora": 1.10, "dora": 1.15, "load": 1.3}


class Model(ModelMixin, ConfigMixin, PeftAdapterMixin):  # type: ignore[misc]
    """Layers one after the other, as a model of diffusers."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, input: Tensor) -> Tensor:
        for layer in self.layers:
            input = layer(input)
        return input


def made(base: Base, size: int, count: int = 1) -> Any:
    """Return a model of quantised layers, size x size."""
    generator = torch.Generator().manual_seed(0)
    layers: list[nn.Module] = []
    with silent(), contextlib.redirect_stdout(sys.stderr):
        for _ in range(count):
            weight = torch.randn(size, size, generator=generator) / size**0.5
            layers.append(base.make(weight, torch.zeros(size)).eval())
        return marked(Model(layers).eval().requires_grad_(False), base)


def adapter(size: int, count: int = 1, *, dora: bool = False) -> dict[str, Tensor]:
    """Return the tensors of a LoRA or a DoRA for all layers of a model."""
    generator = torch.Generator().manual_seed(1)
    tensors: dict[str, Tensor] = {}
    for number in range(count):
        tensors[f"layers.{number}.lora_A.weight"] = torch.randn(RANK, size, generator=generator) / size**0.5
        tensors[f"layers.{number}.lora_B.weight"] = torch.randn(size, RANK, generator=generator) / 8
        if dora:
            tensors[f"layers.{number}.lora_magnitude_vector"] = torch.rand(size, generator=generator) + 0.5
    return tensors


def load_ours(model: Any, tensors: dict[str, Tensor]) -> None:
    """Load an adapter with this library."""
    diffadapt.load_adapter(model, tensors, "a")


def load_theirs(model: Any, tensors: dict[str, Tensor]) -> None:
    """Load an adapter with diffusers and peft."""
    with silent():
        model.load_lora_adapter(dict(tensors), prefix=None, adapter_name="a")


@dataclass
class Subject:
    """One model whose forward pass is measured.

    Attributes:
        grown: bytes that the adapter added.
        failure: the class of the error with which it could not be run.
    """

    model: Any
    grown: int = 0
    failure: str = ""
    forward: list[float] = field(default_factory=list[float])

    @classmethod
    def of(cls, base: Base, load: Callable[..., None] | None, input: Tensor, *, dora: bool) -> "Subject":
        """Return a model with an adapter, which has run once."""
        subject = cls(made(base, SIZE))
        try:
            subject.run(input)
            before = held()
            if load is not None:
                load(subject.model, adapter(SIZE, dora=dora))
            subject.run(input)
            subject.grown = held() - before
        except Exception as error:  # a peer cannot load or run everything
            subject.failure = type(error).__name__
        return subject

    def run(self, input: Tensor) -> None:
        with torch.no_grad(), silent():
            self.model(input)


def held() -> int:
    """Return the bytes of the storages of all tensors."""
    gc.collect()
    with warnings.catch_warnings(action="ignore"):
        tensors = [thing for thing in gc.get_objects() if type(thing) in (Tensor, nn.Parameter)]
        plain = [tensor for tensor in tensors if tensor.device.type == "cpu" and tensor.layout == torch.strided]
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in plain}.values())


def forward_ratios(base: Base, tokens: int, rounds: int) -> dict[str, Any]:
    """Measure forward passes of the bare layer and of all adapters in turn."""
    input = torch.randn(1, tokens, SIZE, generator=torch.Generator().manual_seed(2))
    subjects = {"base": Subject.of(base, None, input, dora=False)}
    for who, load in (("ours", load_ours), ("peft", load_theirs)):
        for kind in ("lora", "dora"):
            subjects[f"{kind} {who}"] = Subject.of(base, load, input, dora=kind == "dora")
    for number in range(rounds + 1):
        for subject in subjects.values():
            if not subject.failure:
                seconds = timed(lambda subject=subject: subject.run(input))
                # The first round fills caches and is not counted.
                subject.forward += [seconds] if number else []
    bare = subjects.pop("base").forward
    found: dict[str, Any] = {"ms": 1e3 * min(bare)}
    for name, subject in subjects.items():
        found[name] = subject.failure or ratios(subject.forward, bare)
        found[f"{name} KiB"] = None if subject.failure else subject.grown / 1024
    return found


def load_times(bases: list[Base], rounds: int) -> dict[tuple[str, str], list[float] | str]:
    """Measure loading onto many layers of every base in turn, by (base, who)."""
    models = {base.name: made(base, SMALL, LAYERS) for base in bases}
    tensors = adapter(SMALL, LAYERS)
    found: dict[tuple[str, str], list[float] | str] = {}
    for number in range(rounds + 1):
        for name, model in models.items():
            for who, load in (("ours", load_ours), ("peft", load_theirs)):
                known = found.setdefault((name, who), [])
                if isinstance(known, str):
                    continue
                try:
                    seconds = timed(lambda model=model, load=load: load(model, tensors))
                    known += [seconds] if number else []
                    diffadapt.adapters(model).clear() if who == "ours" else model.unload_lora()
                except Exception as error:  # a peer cannot load everything
                    found[name, who] = type(error).__name__
        print(f"loading, round {number} of {rounds}", file=sys.stderr)
    return found


def ratio_cell(found: Any, goal: float = 0.0) -> str:
    """Return median and ratio of minima; an asterisk marks a goal that both miss."""
    if isinstance(found, str):
        return found
    median, least = found
    return f"{median:.2f} ({least:.2f}){' *' if goal and min(median, least) > goal else ''}"


def main() -> None:
    """Measure, print a table, and write the figures if asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="rounds to measure (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=4096, help="rows of the input (default: %(default)s)")
    parser.add_argument("--bases", nargs="+", help="only bases whose name contains one of these, and float32")
    parser.add_argument("--json", type=Path, help="also write all figures to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_memory()
    by_name = {base.name: base for base in (*PLAIN, *BASES, *CAST)}
    names = [name for name in CHOSEN if options.bases is None or any(part in name for part in options.bases)]
    bases = [by_name[name] for name in dict.fromkeys(["float32", *names])]
    rows: dict[str, dict[str, Any]] = {}
    for base in bases:
        rows[base.name] = forward_ratios(base, options.tokens, options.rounds)
        print(f"{base.name}: {rows[base.name]}", file=sys.stderr)
    times = load_times(bases, options.rounds)
    versions = ", ".join(f"{name} {version(name)}" for name in (*PACKAGES, *FURTHER))
    print(f"Linear {SIZE}, {options.tokens} tokens, rank {RANK}, float32, loading onto {LAYERS} layers; {versions}\n")
    print("| base | ms | LoRA | peft | DoRA | peft | KiB, LoRA / DoRA | peft | load | peft |\n" + "|---" * 10 + "|")
    for name, row in rows.items():
        cells = [name, f"{row['ms']:.0f}"]
        for kind in ("lora", "dora"):
            cells += [ratio_cell(row[f"{kind} ours"], GOALS[kind]), ratio_cell(row[f"{kind} peft"])]
        for who in ("ours", "peft"):
            grown = [row[f"{kind} {who} KiB"] for kind in ("lora", "dora")]
            cells.append(" / ".join("-" if each is None else f"{each:.0f}" for each in grown))
        for who in ("ours", "peft"):
            own, plain = times[name, who], times["float32", who]
            known = isinstance(own, str) or isinstance(plain, str)
            cells.append(str(own) if known else ratio_cell(ratios(own, plain), GOALS["load"] if who == "ours" else 0.0))
        print(f"| {' | '.join(cells)} |")
    for who in ("ours", "peft"):
        plain = times["float32", who]
        took = plain if isinstance(plain, str) else f"{1e3 * min(plain):.0f} ms"
        print(f"\n{who}, loading onto the float layers: {took}")
    if options.json:
        text = {"rows": rows, "load": {f"{name}, {who}": found for (name, who), found in times.items()}}
        options.json.write_text(json.dumps({"versions": versions, **text}, indent=1))


if __name__ == "__main__":
    main()
