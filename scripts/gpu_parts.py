"""What `gpu_check` checks: each part is a function of a device and returns rows of the table.

The parts also run on a CPU, where they are tested with tiny models. They then leave out what a CPU does not have.
"""

import gc
import math
import time
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import diffadapt
from diffadapt import weights
from diffadapt.runtime.bank import bank_of
from scripts import gpu_models
from scripts.gpu_models import Subject
from tests.support import formulas
from tests.support.bases import BASES, Base, silenced

CPU = torch.device("cpu")
BACKENDS = (
    "bitsandbytes nf4",
    "bitsandbytes fp4, nested",
    "bitsandbytes int8",
    "torchao int8",
    "torchao float8",
    "torchao intx",
)


class Row(NamedTuple):
    """A row of the table.

    Attributes:
        what: what was done.
        found: what came out of it.
        right: whether that is right; `None` for a figure that is neither right nor wrong.
    """

    what: str
    found: str
    right: bool | None = None


@dataclass(frozen=True)
class Setting:
    """Where and how the parts run.

    Attributes:
        device: the device.
        tiny: whether models are as small as possible.
        compile: the arguments of `torch.compile`.
    """

    device: torch.device
    tiny: bool = False
    compile: dict[str, Any] | None = None

    @property
    def on_cuda(self) -> bool:
        """Whether the device has what only CUDA has: graphs, streams, pinned memory."""
        return self.device.type == "cuda"

    def synchronize(self) -> None:
        """Wait until everything that was given to the device is done."""
        if self.on_cuda:
            torch.cuda.synchronize(self.device)

    def milliseconds(self, body: Callable[[], object]) -> float:
        """Return how long `body` takes, its work on the device included."""
        self.synchronize()
        start = time.perf_counter()
        body()
        self.synchronize()
        return 1e3 * (time.perf_counter() - start)


def relative(found: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference, as a share of the norm of `expected`."""
    found, expected = found.detach().to(CPU, torch.float64), expected.detach().to(CPU, torch.float64)
    return float((found - expected).norm() / expected.norm())


def swaps_of_compiled_models(setting: Setting) -> Iterable[Row]:
    """Swap, rescale and deactivate adapters on a compiled model, and compare every output with an eager model."""
    compared, plain = (gpu_models.flux(setting.device, torch.float32, tiny=True) for _ in range(2))
    for subject in (compared, plain):
        with silenced():
            diffadapt.adapters(subject.model).prepare_hotswap([subject.lora()], slots=2)
        diffadapt.load_adapter(subject.model, subject.lora(0), "a")
    compiled = torch.compile(compared.model, **(setting.compile or {"mode": "reduce-overhead", "fullgraph": True}))
    subject = Subject(compared.name, compared.component, compiled, compared.inputs)
    # The first calls of a mode with CUDA graphs compile, warm up and record.
    output = [subject().clone() for _ in range(3)][-1]
    errors = [relative(output, plain())]
    changes: dict[str, Callable[[Any], object]] = {
        "hotswap": lambda adapters: adapters.hotswap("a", compared.lora(1)),
        "lower rank": lambda adapters: adapters.hotswap("a", compared.lora(2, rank=4)),
        "rescale": lambda adapters: adapters.activate({"a": 0.5}),
        "second": lambda adapters: adapters.load(compared.lora(3), "b", scale=0.3),
        "none": lambda adapters: adapters.activate({}),
        "both": lambda adapters: adapters.activate({"a": 1.0, "b": -0.5}),
    }
    before, effects = addresses(compared.model), [0.0]
    with captures() as recorded, torch.compiler.set_stance("fail_on_recompile"):
        for change in changes.values():
            change(diffadapt.adapters(compared.model))
            change(diffadapt.adapters(plain.model))
            previous, output = output, subject().clone()
            effects.append(relative(output, previous))
            errors.append(relative(output, plain()))
    yield Row(f"{len(changes)} changes, compiled", f"no recompile, error {max(errors):.1e}", max(errors) < 1e-3)
    yield Row("their effect", f"outputs differ by {min(effects[1:]):.1e} or more", min(effects[1:]) > 1e-3)
    moved = sum(old != new for old, new in zip(before, addresses(compared.model), strict=True))
    yield Row("addresses of slots and gates", f"{moved} of {len(before)} changed", moved == 0)
    if setting.on_cuda:
        yield Row("CUDA graphs recorded again", str(len(recorded)), not recorded)
        yield from _captured_by_hand(compared, plain)


def _captured_by_hand(subject: Subject, plain: Subject) -> Iterable[Row]:
    """Record an uncompiled call in a CUDA graph, swap the adapter, and replay it."""
    warm_up = torch.cuda.Stream()
    warm_up.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm_up):
        subject()
    torch.cuda.current_stream().wait_stream(warm_up)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = subject()
    errors: list[float] = []
    for seed in (4, 5):
        for owner in (subject, plain):
            diffadapt.adapters(owner.model).hotswap("a", subject.lora(seed), scale=0.7)
        graph.replay()
        torch.cuda.synchronize()
        errors.append(relative(output, plain()))
    yield Row("swaps under a CUDA graph recorded by hand", f"error {max(errors):.1e}", max(errors) < 1e-3)


def addresses(model: nn.Module) -> list[int]:
    """Return the addresses of all slots of a model and of their gates."""
    bank = bank_of(model)
    assert bank is not None
    assert bank.reservation is not None
    slots = [slot for _, slot in bank.reservation.leaves()]
    return [tensor.data_ptr() for slot in slots for tensor in (*slot.tensors.values(), slot.gate)]


@contextmanager
def captures() -> Generator[list[int], None, None]:
    """Collect the CUDA graphs that are recorded in this block."""
    recorded: list[int] = []
    begin = torch.cuda.CUDAGraph.capture_begin

    def counted(graph: Any, *args: Any, **kwargs: Any) -> Any:
        recorded.append(id(graph))
        return begin(graph, *args, **kwargs)

    torch.cuda.CUDAGraph.capture_begin = counted  # type: ignore[method-assign]
    try:
        yield recorded
    finally:
        torch.cuda.CUDAGraph.capture_begin = begin  # type: ignore[method-assign]


def prefetching(setting: Setting) -> Iterable[Row]:
    """Load an adapter that was read into CPU memory before, and compare it with one that was not."""
    dtype = torch.float32 if setting.tiny else torch.bfloat16
    subject, plain = (gpu_models.unet(setting.device, dtype, tiny=setting.tiny) for _ in range(2))
    adapters = diffadapt.adapters(subject.model)
    base = subject()
    sources = [subject.lora(seed) for seed in range(4)]
    planned = [adapters.prefetch(source) for source in sources]
    tensors = [
        t for p in planned for layers in p.layers.values() for layer in layers.values() for t in layer.parameters()
    ]
    if setting.on_cuda:
        pinned = sum(tensor.is_pinned() for tensor in tensors)
        yield Row(
            "tensors of prefetched adapters in pinned memory", f"{pinned} of {len(tensors)}", pinned == len(tensors)
        )
    adapters.prepare_hotswap(sources[0], slots=1)
    adapters.load(planned[0], "a")
    direct = [setting.milliseconds(partial(adapters.hotswap, "a", source)) for source in sources[1:]]
    ready = [setting.milliseconds(partial(adapters.hotswap, "a", plan)) for plan in planned[1:]]
    yield Row("hotswap from tensors in memory", f"{min(direct):.1f} ms")
    yield Row("hotswap of a prefetched adapter", f"{min(ready):.1f} ms")
    diffadapt.load_adapter(plain.model, sources[-1], "a")
    error, effect = relative(subject(), plain()), relative(subject(), base)
    yield Row("output after prefetching", f"error {error:.1e}, effect {effect:.1e}", error < 1e-3 < effect)


def group_offloading(setting: Setting) -> Iterable[Row]:
    """Run adapters under diffusers' group offloading, with streams on CUDA, loaded before and after it."""
    plain = gpu_models.flux(setting.device, torch.float32, tiny=True)
    source = plain.lora()
    base = plain()
    diffadapt.load_adapter(plain.model, source, "a")
    expected, effect = plain(), relative(plain(), base)
    stream = {"use_stream": True} if setting.on_cuda else {}
    for kind, options in {"leaf_level": {}, "block_level": {"num_blocks_per_group": 1}}.items():
        for order in ("before", "after"):
            subject = gpu_models.flux(CPU, torch.float32, tiny=True)
            subject.model.load_state_dict({name: tensor.to(CPU) for name, tensor in plain.model.state_dict().items()})
            subject = Subject(subject.name, subject.component, subject.model, plain.inputs)
            if order == "before":
                diffadapt.load_adapter(subject.model, source, "a")
            subject.model.enable_group_offload(setting.device, CPU, offload_type=kind, **options, **stream)
            if order == "after":
                diffadapt.load_adapter(subject.model, source, "a")
            error = max(relative(subject(), expected) for _ in range(3))
            what = f"group offload, {kind}{', stream' if stream else ''}, adapter loaded {order}"
            yield Row(what, f"error {error:.1e}, effect {effect:.1e}", error < 1e-3 < effect)


def backends(setting: Setting, names: Iterable[str] = BACKENDS) -> Iterable[Row]:
    """Run and merge adapters on quantised layers."""
    named = {base.name: base for base in BASES}
    for name in names:
        yield from guarded(name, partial(_backend, named[name], setting))


def _backend(base: Base, setting: Setting) -> Iterable[Row]:
    with silenced():
        model = nn.Sequential(base.layer()).to(setting.device)
    weight = weights.decoded(model[0], "weight").to(CPU, torch.float64)
    bias = weights.decoded(model[0], "bias").to(CPU, torch.float64)
    input = base.input()
    # On CUDA, bitsandbytes also quantises the input of its 8-bit layers.
    limit = 0.1 if base.name == "bitsandbytes int8" else 2e-2
    adapters = diffadapt.adapters(model)

    @torch.no_grad()
    def output() -> Tensor:
        with silenced():
            return model(input.to(setting.device)).to(CPU, torch.float64)

    plain = output()
    for variant in ("lora", "dora", "oft-peft"):
        torch.manual_seed(0)
        content = formulas.VARIANTS[variant][1](weight, bias)
        assert content is not None
        assert content.bias is not None
        change = input.double() @ (content.weight - weight).T + content.bias - bias
        with silenced():
            adapters.load({f"0.{key}": tensor.float() for key, tensor in content.tensors.items()}, variant)
        error = relative(output() - plain, change)
        yield Row(f"{base.name}, {variant}", f"error of the change {error:.1e}", error < limit)
        adapters.remove(variant)
    exact = torch.equal(output(), plain)
    yield Row(f"{base.name}, removed", "bit for bit as before" if exact else "differs", exact)
    if base.merges:
        before = {
            name: tensor.clone()
            for name, tensor in weights.codec_of(model[0], "weight").parts(model[0], "weight").items()
        }
        adapters.load(
            {"0.lora_A.weight": torch.ones(2, weight.shape[1]) / 8, "0.lora_B.weight": torch.ones(len(weight), 2)}, "a"
        )
        with silenced():
            adapters.merge("a")
            adapters.unmerge()
        after = weights.codec_of(model[0], "weight").parts(model[0], "weight")
        exact = all(torch.equal(tensor, before[name]) for name, tensor in after.items())
        yield Row(f"{base.name}, merged and unmerged", "bit for bit as before" if exact else "differs", exact)


def merging(setting: Setting) -> Iterable[Row]:
    """Merge on the device, and unmerge there and on the CPU."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        name, device = _short(dtype), setting.device.type
        model = _layers(setting, dtype)
        originals = {key: tensor.to(CPU, copy=True) for key, tensor in model.state_dict().items()}
        adapters = diffadapt.adapters(model)
        adapters.load(_lora(model), "a", scale=0.7)
        for where in (setting.device, CPU):
            model.to(setting.device)
            took = setting.milliseconds(partial(adapters.merge, "a"))
            merged = {key: tensor.to(CPU, copy=True) for key, tensor in model.state_dict().items()}
            model.to(where)
            adapters.unmerge()
            changed, left = (
                sum(not torch.equal(tensor.to(CPU), originals[key]) for key, tensor in found.items())
                for found in (merged, model.state_dict())
            )
            what = f"{name}, merged on {device}, unmerged on {where.type}"
            yield Row(what, f"{changed} weights changed, {left} not restored, {took:.0f} ms", changed > 0 and left == 0)
        adapters.merge("a")
        apart = max(relative(tensor, merged[key]) for key, tensor in model.state_dict().items())
        yield Row(f"{name}, merged on cpu and on {device}", f"differ by {apart:.1e} at most", apart < 1e-2)


def _layers(setting: Setting, dtype: torch.dtype) -> nn.Module:
    """Return layers of the sizes of SDXL's."""
    width = 32 if setting.tiny else 640
    layers: dict[str, nn.Module] = {
        "attention": nn.Linear(2 * width, 2 * width),
        "context": nn.Linear(3 * width, 2 * width, bias=False),
        "feed": nn.Linear(2 * width, 16 * width),
        "convolution": nn.Conv2d(width, width, 3),
    }
    torch.manual_seed(0)
    for layer in layers.values():
        nn.init.normal_(layer.weight, std=layer.weight[0].numel() ** -0.5)  # type: ignore[arg-type,index,operator]
    return nn.ModuleDict(layers).to(setting.device, dtype).requires_grad_(False)


def _lora(model: nn.Module) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, layer in model.named_children():
        weight: Any = layer.weight
        tensors[f"{name}.lora_A.weight"] = torch.randn(8, *weight.shape[1:]) / weight[0].numel() ** 0.5
        tensors[f"{name}.lora_B.weight"] = torch.randn(len(weight), 8, *(1 for _ in weight.shape[2:])) / 30
    return tensors


@torch.no_grad()
def half_precision(setting: Setting) -> Iterable[Row]:
    """Return the error of every adapter type in half precision, next to that of the layer alone."""
    size = 64 if setting.tiny else 1280
    torch.manual_seed(0)
    weight = torch.randn(size, size, dtype=torch.float64) / size**0.5
    bias, input = torch.randn(size, dtype=torch.float64), torch.randn(16 if setting.tiny else 1024, size)
    models: list[nn.Sequential] = []
    for dtype in (torch.bfloat16, torch.float16):
        layer = nn.Linear(size, size, dtype=torch.float64).requires_grad_(False)
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
        models.append(nn.Sequential(layer).to(setting.device, dtype))
    found = ", ".join(f"{_short(model[0].weight.dtype)} {_error_of(model, input):.1f} dB" for model in models)  # type: ignore[arg-type]
    yield Row("layer without adapters", found)
    for name, (_, variant) in formulas.VARIANTS.items():
        if not name.endswith("bias-alone"):
            yield from guarded(name, partial(_errors_of, name, variant, models, input))


def _errors_of(name: str, variant: formulas.Variant, models: Iterable[nn.Sequential], input: Tensor) -> Iterable[Row]:
    found: list[str] = []
    right = True
    for model in models:
        dtype: Any = model[0].weight.dtype
        error = _error_of(model, input, variant)
        # Three factors after each other lose the most.
        right = right and error < _error_of(model, input) + 18
        found.append(f"{_short(dtype)} {error:.1f} dB")
    yield Row(name, ", ".join(found), right)


def _error_of(model: nn.Sequential, input: Tensor, variant: formulas.Variant | None = None) -> float:
    """Return the error of the output in decibels, relative to the output for the rounded weight and input."""
    layer: Any = model[0]
    # What is lost by rounding the weight and the input is no fault of an adapter.
    weight, bias = (tensor.to(CPU, torch.float64) for tensor in (layer.weight, layer.bias))
    given = input.to(layer.weight)
    adapters = diffadapt.adapters(model)
    if variant is not None:
        torch.manual_seed(1)
        content = variant(weight, bias)
        assert content is not None
        assert content.bias is not None
        adapters.load({f"0.{key}": tensor.float() for key, tensor in content.tensors.items()}, "a")
        weight, bias = content.weight, content.bias
    error = relative(model(given), given.to(CPU, torch.float64) @ weight.T + bias)
    adapters.clear()
    return 20 * math.log10(max(error, 1e-20))


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def guarded(what: str, rows: Callable[[], Iterable[Row]]) -> Iterable[Row]:
    """Yield the rows, and one more if an error ends them."""
    try:
        yield from rows()
    except Exception as error:  # one part that fails must not end the others
        line = str(error).strip().partition("\n")[0]
        yield Row(what, f"{type(error).__name__}: {line[:160]}", False)


def release(setting: Setting) -> None:
    """Free the memory of models that are no longer used."""
    gc.collect()
    if setting.on_cuda:
        torch.cuda.empty_cache()
