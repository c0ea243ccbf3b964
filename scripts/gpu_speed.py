"""Steps per second for `gpu_check`: models with and without adapters, compiled, next to diffusers' own hotswap."""

import statistics
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import diffadapt
from scripts import gpu_models
from scripts.gpu_models import RANK, Subject
from scripts.gpu_parts import Row, Setting, guarded, relative, release

ANCHOR = 2.23
"""diffusers' documentation gives this for its own hotswap, compiled, over its uncompiled run (Flux, H100)."""

_ROUNDS, _STEPS, _WARM_UP = 3, 4, 3


def unet_speed(setting: Setting) -> Iterable[Row]:
    """Measure a model of SDXL's shape."""
    return _speed(setting, gpu_models.unet)


def flux_speed(setting: Setting) -> Iterable[Row]:
    """Measure a model of Flux' shape."""
    return _speed(setting, gpu_models.flux)


def _speed(setting: Setting, build: Callable[..., Subject]) -> Iterable[Row]:
    dtype = torch.float32 if setting.tiny else torch.bfloat16
    make = partial(build, setting.device, dtype, tiny=setting.tiny)
    rates: dict[str, float] = {}
    outputs: dict[str, Tensor] = {}
    cases: dict[str, Callable[[Subject], object]] = {
        "uncompiled, no adapter": lambda subject: None,
        "uncompiled, 1 adapter": partial(_load, count=1),
        "compiled, no adapter": partial(_compile, setting),
        "compiled, 1 adapter in slots": partial(_in_slots, setting, count=1),
        "compiled, 4 adapters in slots": partial(_in_slots, setting, count=4),
        "diffusers' hotswap, uncompiled": _of_diffusers,
        "diffusers' hotswap, compiled": partial(_of_diffusers, setting=setting),
    }
    name = make().name
    for what, prepare in cases.items():
        yield from guarded(f"{name}: {what}", partial(_case, setting, make, prepare, what, rates, outputs))
        release(setting)
    ratios = {
        "compiled over uncompiled, 1 adapter": ("compiled, 1 adapter in slots", "uncompiled, 1 adapter"),
        "the same, diffusers' hotswap": ("diffusers' hotswap, compiled", "diffusers' hotswap, uncompiled"),
        "1 adapter over none, compiled": ("compiled, 1 adapter in slots", "compiled, no adapter"),
        "4 adapters over none, compiled": ("compiled, 4 adapters in slots", "compiled, no adapter"),
    }
    for what, (above, below) in ratios.items():
        if above in rates and below in rates:
            anchor = f" (anchor: {ANCHOR} for diffusers on an H100)" if "diffusers" in what else ""
            yield Row(f"{name}: {what}", f"{rates[above] / rates[below]:.2f} x{anchor}")


def _case(
    setting: Setting,
    make: Callable[[], Subject],
    prepare: Callable[[Subject], object],
    what: str,
    rates: dict[str, float],
    outputs: dict[str, Tensor],
) -> Iterable[Row]:
    subject = make()
    base = subject()
    prepare(subject)
    output = _warmed_up(subject)
    effect = relative(output, base)
    seconds = [setting.milliseconds(lambda: [subject() for _ in range(_STEPS)]) / 1e3 for _ in range(_ROUNDS)]
    rates[what] = _STEPS / statistics.median(seconds)
    # Those with the same adapters have the same output, and those without have that of the model alone.
    kind = next(kind for kind in ("no adapter", "4 adapters", "") if kind in what)
    error = relative(output, outputs.setdefault(kind, output))
    right = error < 0.05 and (kind == "no adapter") == (effect < 1e-3)
    yield Row(f"{subject.name}: {what}", f"{rates[what]:.2f} steps/s, effect {effect:.1e}, error {error:.1e}", right)


def _warmed_up(subject: Subject) -> Tensor:
    """Return the output after some calls, which compile the model."""
    return [subject() for _ in range(_WARM_UP)][-1]


def _load(subject: Subject, count: int) -> None:
    for number in range(count):
        diffadapt.load_adapter(subject.model, subject.lora(number), f"a{number}")


def _in_slots(setting: Setting, subject: Subject, count: int) -> None:
    """Compile a model with slots, run it with other adapters, and swap in those that are measured."""
    adapters = diffadapt.adapters(subject.model)
    adapters.prepare_hotswap(subject.lora(), slots=count)
    for number in range(count):
        adapters.load(subject.lora(10 + number), f"a{number}")
    _compile(setting, subject)
    _warmed_up(subject)
    for number in range(count):
        adapters.hotswap(f"a{number}", subject.lora(number))


def _of_diffusers(subject: Subject, setting: Setting | None = None) -> None:
    """Do the same with diffusers and peft, and without compiling if there is no `setting`."""
    model, prefix = subject.model, subject.component
    options: dict[str, Any] = {"prefix": prefix, "adapter_name": "a0"}
    # Before peft renames the layers.
    other, own = subject.lora(10), subject.lora(0)
    if setting is None:
        model.load_lora_adapter(own, **options)
        return
    model.enable_lora_hotswap(target_rank=RANK)
    model.load_lora_adapter(other, **options)
    _compile(setting, subject)
    _warmed_up(subject)
    model.load_lora_adapter(own, hotswap=True, **options)


def _compile(setting: Setting, subject: Subject) -> None:
    """Compile the repeated blocks, as diffusers recommends: this takes seconds where the whole model takes minutes."""
    subject.model.compile_repeated_blocks(**(setting.compile or {"fullgraph": True}))
