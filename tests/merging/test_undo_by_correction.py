"""Merging without copies of the weights: every bit is restored from what rounding lost."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import diffadapt
from diffadapt.merging.corrections import Corrections
from diffadapt.merging.memory import Scratch
from diffadapt.merging.undo_by_correction import UndoByCorrection
from diffadapt.merging.weight_update import LowRankUpdate
from diffadapt.runtime.bank import bank_of
from diffadapt.runtime.undo import UndoByCopy
from tests.support.cases import for_each
from tests.support.compare import assert_unchanged, snapshot
from tests.support.small_models import unet
from tests.support.swaps import CONFIGS, ON_CONVOLUTIONS, make

# Projections have no bias to change.
ALL = {name: config for name, config in (CONFIGS | ON_CONVOLUTIONS).items() if name not in ("lora with a bias", "full")}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
@for_each(count=[0, 1, 7])
def test_corrections_are_exact(count: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    actual = torch.randn(70, 100, generator=generator).to(dtype)
    predicted = actual.clone()
    # The first and the last element, and distances from 1 to thousands.
    places = torch.tensor([0, 1, 255, 256, 511, 4000, 6999])[:count]
    predicted.view(-1)[places] = torch.tensor(float("nan"), dtype=torch.float32).to(dtype)
    corrections = Corrections.between(actual, [predicted])
    restored = predicted.clone()
    corrections.apply_(restored)
    assert torch.equal(restored.view(torch.uint8), actual.view(torch.uint8))
    assert len(corrections.values) == count
    assert corrections.nbytes <= 7 * actual.element_size() + 40
    other = predicted.clone()
    other.view(-1)[5000] = 3.0
    with pytest.raises(ArithmeticError):
        corrections.apply_(other)


@pytest.mark.parametrize("name", ALL)
@for_each(dtype=[torch.bfloat16, torch.float16, torch.float32])
@torch.no_grad()
def test_every_type_is_undone_bit_for_bit_with_less_memory_than_a_copy(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
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
def test_the_corrections_of_a_layer_of_usual_size_take_a_fraction_of_a_copy(name: str) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(320, 640, bias=False).bfloat16()
    net, before = nn.Sequential(layer), layer.weight.clone()
    adapter = diffadapt.add_adapter(net, replace(CONFIGS[name], target_modules=["0"]), "a")
    # As strong as usual: the weight changes by at most a few percent.
    diffadapt.adapters(net).activate({"a": 1e-3 if "dora" in name else 1e-2})
    adapter.requires_grad_(False)
    diffadapt.adapters(net).merge("a", compact=True)
    change = (layer.weight.float() - before.float()).norm() / before.float().norm()
    assert 1e-4 < change < 0.2
    assert 0 < diffadapt.adapters(net).undo_bytes < 0.3 * before.nbytes
    diffadapt.adapters(net).unmerge()
    assert torch.equal(layer.weight, before)


@torch.no_grad()
def test_adapters_merged_in_turn_are_undone_also_after_the_originals_were_needed(tmp_path: Path) -> None:
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
def test_a_weight_that_was_changed_after_merging_is_reported(tmp_path: Path) -> None:
    model = unet().to(torch.bfloat16)
    diffadapt.load_adapter(model, make(unet, ALL["lora"], tmp_path / "a"), "a", scale=0.1)
    diffadapt.adapters(model).merge("a", compact=True)
    bank = bank_of(model)
    next(iter(bank.hosts.values())).weight[0, 0] += 1
    with pytest.raises(diffadapt.AdapterError, match="cannot be restored"):
        diffadapt.adapters(model).unmerge()


# The corrections must be right for every way in which the original may be predicted later.


@pytest.mark.parametrize("name", ["lora", "lora in float32", "loha", "dora", "lokr whole"])
@for_each(product=["float32", "float64"], dtype=[torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float32])
@torch.no_grad()
def test_other_threads_and_another_order_of_ranks_restore_every_bit(
    name: str, product: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(192, 320, bias=False))
    adapter = diffadapt.add_adapter(net, replace(CONFIGS[name.split(" in ")[0]], target_modules=["0"]), "a")
    adapter.requires_grad_(False)
    adapter.to(torch.float32 if "float32" in name else torch.bfloat16)
    net[0].weight[:, ::7] = 0.0
    net[0].weight[:2, ::7] = -0.0
    net[0].weight.data = net[0].weight.data.to(dtype)
    before = net[0].weight.clone()
    adapters = diffadapt.adapters(net)
    adapters.activate({"a": 0.02})
    adapters.merge("a", compact=True)
    assert not torch.equal(net[0].weight.float(), before.float())
    assert [type(way) for way in bank_of(net).undo] == [UndoByCorrection]
    order = torch.randperm(2)
    for factor, axis in (("lora_down", 0), ("lora_up", 1), ("hada_w1_a", 1), ("hada_w1_b", 0)):
        tensor = adapter.layers["0"].tensors.get(factor)
        if tensor is not None and tensor.shape[axis] == 2:
            tensor.copy_(tensor.index_select(axis, order))
    # Also compute the product in other ways, such as in float64, which other devices use.
    monkeypatch.setattr("diffadapt.merging.weight_update._rounds_once", lambda like: False)
    monkeypatch.setattr("diffadapt.merging.weight_update._multiplies_in_float32", lambda: product == "float32")
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        adapters.unmerge()
    finally:
        torch.set_num_threads(threads)
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[dtype.itemsize]
    assert torch.equal(net[0].weight.data.view(bits), before.data.view(bits))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("rank", [1, 16, 200])
@torch.no_grad()
def test_every_prediction_is_within_the_bounds(rank: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(256, 384, bias=False).to(dtype))
    adapter = diffadapt.add_adapter(net, replace(CONFIGS["lora"], rank=rank, target_modules=["0"]), "a")
    adapter.requires_grad_(False).to(torch.bfloat16)
    # Far stronger than usual, so that many elements are near a tie.
    diffadapt.adapters(net).activate({"a": 3.0})
    layers, weight, rows = (adapter.layers["0"],), net[0].weight.detach(), slice(None)
    way = LowRankUpdate.of(layers, weight, back=True)
    assert way is not None
    low, high = way.bounds(weight, rows, Scratch())
    same = low == high
    assert 0.9 < same.float().mean() < 1 or dtype == torch.float32
    double = LowRankUpdate(way.up.double() * way.scale, way.down.double(), 1.0, way.total)
    for other in (way, double, *(permuted(of, seed) for of in (double, way) for seed in range(4))):
        found = weight.clone()
        other.predict_(found, rows)
        assert torch.equal(found[same], low[same])
        assert ((low <= found) & (found <= high)).all()


def permuted(way: LowRankUpdate, seed: int) -> LowRankUpdate:
    order = torch.randperm(way.up.shape[1], generator=torch.Generator().manual_seed(seed))
    return replace(way, up=way.up[:, order], down=way.down[order])


@torch.no_grad()
def test_a_bfloat16_product_is_rounded_once_on_this_processor() -> None:
    """It is compared with the same product in float32. `weight_update._rounds_once` relies on it."""
    torch.manual_seed(0)
    for rank in (1, 16, 17, 128, 512):
        weight, up, down = (torch.randn(shape).bfloat16() for shape in ((384, 256), (384, rank), (rank, 256)))
        short, long = weight.clone(), weight.clone()
        LowRankUpdate(up, down, 0.037, torch.float32).merge(short, slice(None), short)
        LowRankUpdate(up.float() * 0.037, down.float(), 1.0, torch.float32).merge(long, slice(None), long)
        assert (short != long).float().mean() < 2e-3
        exact = weight.double() + 0.037 * up.double() @ down.double()
        assert ((short.double() - exact).abs() <= exact.abs() * 2.0**-8 * 1.0001 + 1e-6).all()


@torch.no_grad()
def test_by_default_only_low_rank_changes_in_half_precision_are_compact(tmp_path: Path) -> None:
    for name, dtype, is_compact in (
        ("lora", torch.bfloat16, True),
        ("loha", torch.float16, True),
        ("lora", torch.float32, False),
        ("dora", torch.bfloat16, False),
    ):
        model = unet().to(dtype)
        diffadapt.load_adapter(model, make(unet, ALL[name], tmp_path / "a"), "a", scale=0.05)
        diffadapt.adapters(model).merge()
        bank = bank_of(model)
        assert {type(way) for way in bank.undo} == {UndoByCorrection if is_compact else UndoByCopy}
        with diffadapt.adapters(model).disabled():
            assert not bank.undo
        assert {type(way) for way in bank.undo} == {UndoByCorrection if is_compact else UndoByCopy}
        diffadapt.adapters(model).unmerge()
        diffadapt.adapters(model).merge(compact=not is_compact)
        assert any(isinstance(way, UndoByCorrection) for way in bank.undo) != is_compact


@torch.no_grad()
def test_a_model_converted_to_float32_after_merging_gets_its_weights_back(tmp_path: Path) -> None:
    model = unet().to(torch.bfloat16)
    before = {path: parameter.clone() for path, parameter in model.named_parameters()}
    diffadapt.load_adapter(model, make(unet, ALL["lora"], tmp_path / "a"), "a", scale=0.1)
    diffadapt.adapters(model).merge()
    model.float()
    diffadapt.adapters(model).clear()
    assert all(torch.equal(parameter, before[path].float()) for path, parameter in model.named_parameters())


@torch.no_grad()
@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("stack", [False, True])
def test_a_merge_that_fails_halfway_changes_nothing(compact: bool, stack: bool, tmp_path: Path) -> None:
    model = unet().to(torch.float16)
    diffadapt.load_adapter(model, make(unet, ALL["lora"], tmp_path / "a"), "a", scale=0.1)
    diffadapt.load_adapter(model, make(unet, ALL["loha"], tmp_path / "b"), "b", scale=0.1)
    adapters, first = diffadapt.adapters(model), snapshot(model)
    if stack:
        adapters.merge("a", compact=compact)
    before, kept = snapshot(model), adapters.undo_bytes
    adapter = next(iter(adapters["b"].components.values()))
    last = list(adapter.layers.values())[-1]
    right = {name: tensor.clone() for name, tensor in last.tensors.items()}
    for tensor in last.tensors.values():
        tensor.mul_(1e3)
    with pytest.raises(diffadapt.AdapterError, match="cannot hold"):
        adapters.merge("b", compact=compact)
    for name, tensor in last.tensors.items():
        tensor.copy_(right[name])
    assert_unchanged(model, before)
    assert adapters.merged == (["a"] if stack else [])
    assert adapters.undo_bytes == kept
    adapters.merge("b", compact=compact)
    adapters.unmerge()
    assert_unchanged(model, first)
