"""Models whose weights are offloaded to disk: adapters run right in either order, and merging is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import disk_offload
from diffusers.hooks import apply_group_offloading
from torch import Tensor, nn

import diffadapt
from tests.support.cases import for_each
from tests.support.compare import assert_same
from tests.support.versions import needs


class Model(nn.Module):
    """A layer at the root and two blocks, so that every kind of group occurs."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 16)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.GELU()) for _ in range(2))

    def forward(self, input: Tensor) -> Tensor:
        hidden = self.first(input)
        for block in self.blocks:
            hidden = block(hidden)
        return hidden


INPUT = torch.randn(3, 16, generator=torch.Generator().manual_seed(1))
PATHS = ("first", "blocks.0.0", "blocks.1.0")


def model() -> Model:
    torch.manual_seed(0)
    return Model().requires_grad_(False)


def tensors(kind: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    made: dict[str, Tensor] = {}
    for path in PATHS:
        made[f"{path}.lora_A.weight"] = torch.randn(2, 16, generator=generator)
        made[f"{path}.lora_B.weight"] = torch.randn(16, 2, generator=generator)
        if kind == "dora":
            made[f"{path}.lora_magnitude_vector"] = torch.ones(16)
    return made


def offload_(target: nn.Module, kind: str, folder: Path) -> None:
    if kind == "accelerate":
        disk_offload(target, str(folder), execution_device=torch.device("cpu"))
        return
    needs("diffusers", "0.34", "offload_to_disk_path")
    options: dict[str, Any] = {"num_blocks_per_group": 1} if kind == "block_level" else {}
    cpu = torch.device("cpu")
    apply_group_offloading(target, cpu, offload_type=kind, offload_to_disk_path=str(folder), **options)


def overwrite_freed_memory() -> None:
    for size in (16, 32, 256):
        torch.full((64, size), float("nan"))


@for_each(kind=("lora", "dora"), offload=("leaf_level", "block_level", "accelerate"), order=("before", "after"))
def test_adapters_run_in_either_order(kind: str, offload: str, order: str, tmp_path: Path) -> None:
    expected = model()
    base = expected(INPUT)
    diffadapt.load_adapter(expected, tensors(kind), "a")
    target = model()
    adapters = diffadapt.adapters(target)
    if order == "before":
        adapters.load(tensors(kind), "a")
    offload_(target, offload, tmp_path)
    if order == "after":
        adapters.load(tensors(kind), "a")
    with torch.no_grad():
        for _ in range(3):
            overwrite_freed_memory()
            assert_same(target(INPUT), expected(INPUT))
        for strength in (0.5, 1.0):
            adapters.activate({"a": strength})
            diffadapt.adapters(expected).activate({"a": strength})
            assert_same(target(INPUT), expected(INPUT))
        adapters.hotswap("a", tensors("lora"))
        diffadapt.adapters(expected).hotswap("a", tensors("lora"))
        assert_same(target(INPUT), expected(INPUT))
        adapters.clear()
        assert_same(target(INPUT), base)


@for_each(offload=("leaf_level", "block_level", "accelerate"))
def test_weights_are_read_between_calls(offload: str, tmp_path: Path) -> None:
    target, expected = model(), model()
    adapters = diffadapt.adapters(target)
    adapters.prepare_hotswap([tensors("dora"), tensors("lora")], slots=1)
    adapters.load(tensors("lora"), "a")
    offload_(target, offload, tmp_path)
    overwrite_freed_memory()
    adapters.hotswap("a", tensors("dora"))
    diffadapt.load_adapter(expected, tensors("dora"), "a")
    with torch.no_grad():
        assert_same(target(INPUT), expected(INPUT))


@for_each(offload=("leaf_level", "block_level", "accelerate"))
def test_an_adapter_is_saved_from_memory(offload: str, tmp_path: Path) -> None:
    target = model()
    adapters = diffadapt.adapters(target)
    adapters.load(tensors("lora"), "a")
    offload_(target, offload, tmp_path / "weights")
    overwrite_freed_memory()
    adapters.save("a", tmp_path / "a.safetensors")
    again = model()
    diffadapt.load_adapter(again, tmp_path / "a.safetensors", "a")
    expected = model()
    diffadapt.load_adapter(expected, tensors("lora"), "a")
    assert torch.equal(again(INPUT), expected(INPUT))


@for_each(offload=("leaf_level", "block_level", "accelerate"))
def test_merging_is_refused_with_the_reason(offload: str, tmp_path: Path) -> None:
    target = model()
    adapters = diffadapt.adapters(target)
    adapters.load(tensors("lora"), "a")
    adapters.load(tensors("lora"), "b", activate=False)
    adapters.merge("a")
    with torch.no_grad():
        merged = target(INPUT)
        offload_(target, offload, tmp_path)
        for act in (
            adapters.unmerge,
            adapters.clear,
            lambda: adapters.merge("b"),
            lambda: adapters.hotswap("a", tensors("lora")),
        ):
            with pytest.raises(diffadapt.AdapterError, match=r"on disk, which are read again .* remove the offloading"):
                act()
        assert_same(target(INPUT), merged)
    assert adapters.merged == ["a"]
