"""Every family's denoiser and every kind of text encoder as they run: with adapters of all types on all layers, loaded,
merged, swapped and by row."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import diffadapt
from diffadapt import AdapterConfig, AdapterError
from tests.support.calls import CALLS, output
from tests.support.compare import assert_differs, assert_same
from tests.support.denoisers import SMALL
from tests.support.text_encoders import TEXT_ENCODERS, hidden_states

pytestmark = pytest.mark.slow

ROWS = 3
EVERYWHERE: dict[str, Any] = {
    "target_modules": ".*",
    # Rotations cannot mix groups, positions are no rows of a batch, and a weight of two layers is not merged.
    "exclude_modules": r"(.*\.)?(depthwise|conv_depth|position_embeddings?|relative_attention_bias|lm_head|embed_tokens"
    r"|shared)",
    "init": False,
}
CONFIGS: dict[str, AdapterConfig] = {
    "lora": diffadapt.LoraConfig(rank=2, alpha=1, **EVERYWHERE),
    "dora": diffadapt.LoraConfig(rank=3, use_dora=True, **EVERYWHERE),
    "loha": diffadapt.LoHaConfig(rank=2, **EVERYWHERE),
    "lokr": diffadapt.LoKrConfig(rank=1, **EVERYWHERE),
    "oft": diffadapt.OFTConfig(block_size=2, **EVERYWHERE),
}
ROUTED = {
    "hidream": "is an expert",
    # A row for the time of pictures to be edited comes after those of the batch.
    "qwen21": "gets 4 rows of a batch of 3",
}
"""Models with layers that do not get the rows of the batch, and what is said of those."""


def build(name: str) -> nn.Module:
    if name in SMALL:
        return SMALL[name].build()[next(iter(SMALL[name].components))].double()
    torch.manual_seed(0)
    return TEXT_ENCODERS[name]().eval().double().requires_grad_(False)


def run(name: str, model: nn.Module) -> Tensor:
    return output(model, CALLS[name](ROWS)) if name in SMALL else hidden_states(model, ROWS)


def saved(name: str, folder: Path) -> dict[str, Path]:
    """An adapter of every type, each on all layers."""
    made: dict[str, Path] = {}
    for kind, config in CONFIGS.items():
        model = build(name)
        torch.manual_seed(0)
        adapter = diffadapt.add_adapter(model, config, kind)
        for parameter in adapter.parameters():
            parameter.data.mul_(0.3)
        made[kind] = diffadapt.adapters(model).save(kind, folder / kind, "peft").parent
    return made


@torch.no_grad()
@pytest.mark.parametrize("name", [*CALLS, *TEXT_ENCODERS])
def test_adapters_on_all_layers(name: str, tmp_path: Path) -> None:
    base, alone = run(name, build(name)), dict[str, Tensor]()
    sources = saved(name, tmp_path)
    for kind, source in sources.items():
        model = build(name)
        assert not diffadapt.load_adapter(model, source, kind).unused
        alone[kind] = run(name, model)
        assert_differs(alone[kind], base, 1e-3)
        adapters = diffadapt.adapters(model)
        adapters.merge(kind)
        # Several models round to float32 on the way.
        assert_same(run(name, model), alone[kind], 1e-6)
        adapters.unmerge()
        adapters.clear()
        assert_same(run(name, model), base, 1e-12)
    model = build(name)
    adapters = diffadapt.adapters(model)
    adapters.prepare_hotswap(list(sources.values()), slots=2, samples=ROWS)
    assert_same(run(name, model), base, 1e-12)
    diffadapt.load_adapter(model, sources["lora"], "a")
    for kind, source in sources.items():
        adapters.hotswap("a", source)
        assert_same(run(name, model), alone[kind], 1e-6)
    diffadapt.load_adapter(model, sources["lora"], "b")
    mixes: list[dict[str, Any]] = [{"a": 1.0}, {}, {"b": 0.5}]
    adapters.activate({"b": 0.5})
    expected = torch.stack([alone["oft"][0], base[1], run(name, model)[2]])
    if name in ROUTED:
        with pytest.raises(AdapterError, match=ROUTED[name]), adapters.per_sample(mixes):
            run(name, model)
        return
    for _ in range(2):
        with adapters.per_sample(mixes):
            assert_same(run(name, model), expected, 1e-6)
        adapters.release_slots()
