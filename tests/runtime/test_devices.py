"""Models that are spread over several devices: adapters are where their layers are, and no call copies them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from torch import Tensor, nn

import diffadapt
from diffadapt.runtime.adapter import LayerTree
from diffadapt.runtime.bank import bank_of
from tests.support.cases import for_each
from tests.support.compare import assert_differs, assert_same
from tests.support.devices import FIRST, SECOND, Devices, OnDevice

ROWS, WIDTH = 4, 8
INPUT = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(1))
PATHS = ("first.0", "first.1", "second.0", "last")
DEVICES = {"first": FIRST, "second": SECOND, "last": FIRST}


def model() -> nn.Sequential:
    """Return a model whose last part is a layer by itself."""
    torch.manual_seed(0)
    made = nn.Sequential()
    made.first = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH))
    made.second = nn.Sequential(nn.Linear(WIDTH, WIDTH))
    made.last = nn.Linear(WIDTH, WIDTH)
    return made.requires_grad_(False)


def spread_(target: nn.Module) -> None:
    for name, device in DEVICES.items():
        target.get_submodule(name).to(device)
    dispatch_model(target, device_map=dict(DEVICES))


def tensors(kind: str, seed: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made: dict[str, Tensor] = {}
    for path in PATHS:
        if kind == "oft":
            made[f"{path}.oft_blocks"] = torch.randn(2, 4, 4, generator=generator) / 4
            continue
        made[f"{path}.lora_A.weight"] = torch.randn(2, WIDTH, generator=generator) / 2
        made[f"{path}.lora_B.weight"] = torch.randn(WIDTH, 2, generator=generator) / 2
        if kind == "dora":
            made[f"{path}.lora_magnitude_vector"] = torch.rand(WIDTH, generator=generator) + 0.5
    return made


def located(target: nn.Module) -> set[tuple[str, torch.device]]:
    """Return the devices of all parameters and gates of adapters and slots, by the name of the part they belong to."""
    found: set[tuple[str, torch.device]] = set()
    for tree in bank_of(target).children():  # type: ignore[union-attr]
        assert isinstance(tree, LayerTree)
        for path, layer in tree.leaves():
            found.update((path.partition(".")[0], tensor.device) for tensor in (*layer.tensors.values(), layer.gate))
    return found


def called(target: nn.Module, devices: Devices) -> Tensor:
    """Return the output of a call, which moves the activations between the devices and nothing else."""
    target(INPUT)
    devices.copies.clear()
    output: Any = target(INPUT)
    assert devices.copies == [ROWS * WIDTH] * 4
    return output.raw if isinstance(output, OnDevice) else output


@torch.no_grad()
@for_each(kind=("lora", "dora", "oft"), order=("spread first", "adapter first"))
def test_adapters_are_where_their_layers_are(kind: str, order: str) -> None:
    plain = model()
    base = plain(INPUT)
    expected = diffadapt.adapters(plain)
    expected.load(tensors(kind), "a")
    expected.load(tensors("lora", 3), "b", scale=0.5)
    assert_differs(plain(INPUT), base)
    with Devices() as devices:
        target = model()
        adapters = diffadapt.adapters(target)
        steps: list[Callable[[], Any]] = [
            lambda: spread_(target),
            lambda: (adapters.load(tensors(kind), "a"), adapters.load(tensors("lora", 3), "b", scale=0.5)),
        ]
        for step in steps if order == "spread first" else reversed(steps):
            step()
        assert_same(called(target, devices), plain(INPUT))
        assert located(target) == set(DEVICES.items())
        for strengths in ({"a": 0.5, "b": 1.0}, {"b": 2.0}, {"a": {"first": 0.3, "second": 0.7}, "b": 0.1}):
            adapters.activate(strengths)
            expected.activate(strengths)
            assert_same(called(target, devices), plain(INPUT))
        adapters.clear()
        assert_same(called(target, devices), base, 1e-7)


@torch.no_grad()
def test_slots_are_where_their_layers_are() -> None:
    plain = model()
    with Devices() as devices:
        target = model()
        spread_(target)
        for owner in (plain, target):
            diffadapt.adapters(owner).prepare_hotswap([tensors("lora"), tensors("dora")], slots=2, samples=2)
            diffadapt.load_adapter(owner, tensors("lora"), "a")
        assert_same(called(target, devices), plain(INPUT))
        for kind in ("dora", "lora"):
            for owner in (plain, target):
                diffadapt.adapters(owner).hotswap("a", tensors(kind, 4), scale=0.5)
            assert_same(called(target, devices), plain(INPUT))
            assert located(target) >= set(DEVICES.items())
        for owner in (plain, target):
            diffadapt.adapters(owner).load(tensors("lora", 5), "b")
            diffadapt.adapters(owner).remove("a")
        assert_same(called(target, devices), plain(INPUT))


@torch.no_grad()
def test_mixes_of_samples_reach_every_device() -> None:
    plain = model()
    with Devices() as devices:
        target = model()
        spread_(target)
        for owner in (plain, target):
            diffadapt.load_adapter(owner, tensors("lora"), "a")
        mixes = [{"a": strength} for strength in (0.0, 0.5, 1.0, -1.0)]
        with diffadapt.adapters(plain).per_sample(mixes), diffadapt.adapters(target).per_sample(mixes):
            assert_same(called(target, devices), plain(INPUT))
        assert_same(called(target, devices), plain(INPUT))


def test_a_new_adapter_is_trained_on_every_device() -> None:
    with Devices():
        target = model()
        spread_(target)
        adapter = diffadapt.add_adapter(target, diffadapt.LoraConfig(rank=2, init=False, target_modules="all-linear"))
        assert located(target) == set(DEVICES.items())
        target(INPUT).square().sum().backward()
        gradients = [parameter.grad for parameter in adapter.parameters()]
        assert all(gradient is not None and gradient.abs().max() > 0 for gradient in gradients)
        assert all(p.device == g.device for p, g in zip(adapter.parameters(), gradients, strict=True) if g is not None)


def test_a_model_on_one_device_has_one_gate_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LayerTree, "place_", lambda *_: pytest.fail("placed"))
    target = model()
    diffadapt.load_adapter(target, tensors("lora"), "a")
    target(INPUT)
