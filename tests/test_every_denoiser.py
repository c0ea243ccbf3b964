"""Every family's denoiser as it runs: with adapters of all types on all of its layers, swapped, merged and by row."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import diffadapt
from diffadapt import AdapterConfig, AdapterError
from tests.calls import CALLS, output
from tests.compare import assert_differs, assert_same
from tests.denoisers import SMALL

pytestmark = pytest.mark.slow

ROWS = 3
EVERYWHERE: dict[str, Any] = {"target_modules": ".*", "init": False}
CONFIGS: dict[str, AdapterConfig] = {
    "lora": diffadapt.LoraConfig(rank=2, alpha=1, **EVERYWHERE),
    "dora": diffadapt.LoraConfig(rank=3, use_dora=True, **EVERYWHERE),
    "loha": diffadapt.LoHaConfig(rank=2, **EVERYWHERE),
    "lokr": diffadapt.LoKrConfig(rank=1, **EVERYWHERE),
    "oft": diffadapt.OFTConfig(block_size=2, exclude_modules=r".*depth(_conv|wise)?.*", **EVERYWHERE),
}
ROUTED = {
    "hidream": "is an expert",
    # A row for the time of pictures to be edited comes after those of the batch.
    "qwen21": "gets 4 rows of a batch of 3",
}
"""Families with layers that do not get the rows of the batch, and what is said of those."""


def denoiser(family: str) -> nn.Module:
    small = SMALL[family]
    return small.build()[next(iter(small.components))].double()


def run(family: str, model: nn.Module) -> Tensor:
    return output(model, CALLS[family](ROWS))


def files(family: str, folder: Path) -> dict[str, Path]:
    """An adapter of every type, each on all layers."""
    made: dict[str, Path] = {}
    for name, config in CONFIGS.items():
        model = denoiser(family)
        torch.manual_seed(0)
        adapter = diffadapt.add_adapter(model, config, name)
        for parameter in adapter.parameters():
            parameter.data.mul_(0.3)
        made[name] = diffadapt.adapters(model).save(name, folder / name, "peft").parent
    return made


@torch.no_grad()
@pytest.mark.parametrize("family", CALLS)
def test_adapters_on_all_layers(family: str, tmp_path: Path) -> None:
    base, alone = run(family, denoiser(family)), dict[str, Tensor]()
    sources = files(family, tmp_path)
    for name, source in sources.items():
        model = denoiser(family)
        report = diffadapt.load_adapter(model, source, name)
        assert not report.unused
        alone[name] = run(family, model)
        assert_differs(alone[name], base, 1e-3)
        adapters = diffadapt.adapters(model)
        adapters.merge(name)
        assert_same(run(family, model), alone[name], 1e-6)
        adapters.unmerge()
        adapters.clear()
        assert_same(run(family, model), base, 1e-12)
    model = denoiser(family)
    adapters = diffadapt.adapters(model)
    adapters.prepare_hotswap(list(sources.values()), slots=2, samples=ROWS)
    assert_same(run(family, model), base, 1e-12)
    diffadapt.load_adapter(model, sources["lora"], "a")
    for name, source in sources.items():
        adapters.hotswap("a", source)
        assert_same(run(family, model), alone[name], 1e-6)
    diffadapt.load_adapter(model, sources["lora"], "b")
    mixes: list[dict[str, Any]] = [{"a": 1.0}, {}, {"b": 0.5}]
    expected = [alone["oft"][0], base[1]]
    adapters.activate({"b": 0.5})
    expected.append(run(family, model)[2])
    if family in ROUTED:
        with pytest.raises(AdapterError, match=ROUTED[family]), adapters.per_sample(mixes):
            run(family, model)
        return
    for _ in range(2):
        with adapters.per_sample(mixes):
            assert_same(run(family, model), torch.stack(expected), 1e-6)
        adapters.release_slots()
