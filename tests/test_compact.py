"""Merging without copies of the weights: every bit comes back from what rounding lost."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import diffadapt
from diffadapt.attach import bank_of
from diffadapt.corrections import Corrections
from tests.compare import assert_unchanged, snapshot
from tests.test_compile import unet
from tests.test_hotswap import CONFIGS, ON_CONVOLUTIONS, make

# Projections have no bias to change.
ALL = {name: config for name, config in (CONFIGS | ON_CONVOLUTIONS).items() if name not in ("lora with a bias", "full")}


@pytest.mark.parametrize("count", [0, 1, 7])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_corrections_are_exact(count: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    actual = torch.randn(70, 100, generator=generator).to(dtype)
    predicted = actual.clone()
    # The first and the last element, and distances from 1 to thousands.
    places = torch.tensor([0, 1, 255, 256, 511, 4000, 6999])[:count]
    predicted.view(-1)[places] = torch.tensor(float("nan"), dtype=torch.float32).to(dtype)
    corrections = Corrections.between(predicted, actual)
    restored = corrections.applied(predicted)
    assert torch.equal(restored.view(torch.uint8), actual.view(torch.uint8))
    assert len(corrections.values) == count
    assert corrections.nbytes <= 7 * actual.element_size() + 40
    other = predicted.clone()
    other.view(-1)[5000] = 3.0
    with pytest.raises(ArithmeticError):
        corrections.applied(other)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", ALL)
def test_every_type_is_undone_bit_for_bit_for_less_than_a_copy(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    source = make(unet, ALL[name], tmp_path / "a")
    model, copied = unet().to(dtype), unet().to(dtype)
    before = snapshot(model)
    for owner in (model, copied):
        diffadapt.load_adapter(owner, source, "a", scale=0.05)
    adapters, others = diffadapt.adapters(model), diffadapt.adapters(copied)
    for _ in range(3):
        adapters.merge("a", compact=True)
        adapters.unmerge()
    adapters.merge("a", compact=True)
    others.merge("a")
    assert all(torch.equal(mine, other) for mine, other in zip(model.parameters(), copied.parameters(), strict=True))
    assert adapters.undo_bytes <= others.undo_bytes
    assert any(not torch.equal(value, before[f"model.state.{key}"]) for key, value in model.state_dict().items())
    adapters.clear()
    assert adapters.undo_bytes == 0
    assert_unchanged(model, before)


@torch.no_grad()
@pytest.mark.parametrize("name", ["lora", "dora", "dora by input", "loha", "lokr whole", "oft", "boft on outputs"])
def test_a_fraction_of_a_copy_is_kept_of_layers_of_usual_size(name: str) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(320, 640, bias=False).bfloat16()
    net, before = nn.Sequential(layer), layer.weight.clone()
    adapter = diffadapt.add_adapter(net, replace(CONFIGS[name], target_modules=["0"]), "a")
    # As strong as usual: the weight changes by a few percent.
    diffadapt.adapters(net).activate({"a": 1e-3 if "dora" in name else 1e-2})
    adapter.requires_grad_(False)
    diffadapt.adapters(net).merge("a", compact=True)
    change = (layer.weight.float() - before.float()).norm() / before.float().norm()
    assert 1e-4 < change < 0.2
    assert 0 < diffadapt.adapters(net).undo_bytes < 0.3 * before.nbytes
    diffadapt.adapters(net).unmerge()
    assert torch.equal(layer.weight, before)


@torch.no_grad()
def test_several_adapters_one_after_the_other_and_what_needs_the_originals(tmp_path: Path) -> None:
    names = ("lora", "dora", "oft", "conv oft")
    model = unet().to(torch.bfloat16)
    before = snapshot(model)
    adapters = diffadapt.adapters(model)
    for name in names:
        diffadapt.load_adapter(model, make(unet, ALL[name], tmp_path / name), name.replace(" ", "-"), scale=0.1)
    adapters.activate(["lora", "dora"])
    adapters.merge("lora", "dora", compact=True)
    small = adapters.undo_bytes
    lora = adapters.to_lora({"lora": 1.0}, "again")
    assert lora.error < 1e-2
    assert adapters.undo_bytes > small
    adapters.merge("oft", "conv-oft", compact=True)
    adapters.clear()
    assert_unchanged(model, before)


@torch.no_grad()
def test_a_weight_changed_meanwhile_is_told(tmp_path: Path) -> None:
    model = unet().to(torch.bfloat16)
    diffadapt.load_adapter(model, make(unet, ALL["lora"], tmp_path / "a"), "a", scale=0.1)
    diffadapt.adapters(model).merge("a", compact=True)
    bank = bank_of(model)
    next(iter(bank.hosts.values())).weight[0, 0] += 1
    with pytest.raises(diffadapt.AdapterError, match="cannot be restored"):
        diffadapt.adapters(model).unmerge()
