"""The denoiser of every family and all classes of text encoders, run with adapters on all layers.

The adapters are loaded, merged, swapped and mixed by row.
"""

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
    # Rotations cannot mix groups, positions are not rows of a batch, and a weight of two layers is not merged.
    "target_modules": r"(?!(.*\.)?(depthwise|conv_depth|position_embeddings?|relative_attention_bias|lm_head"
    r"|embed_tokens|shared)$).*",
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
    # The rows of the batch are followed by one for the time of pictures to be edited.
    "qwen21": "gets 4 rows of a batch of 3",
    # Its modulation reads the steps of a sequence, which all rows of the batch share.
    "minimax-h3": "gets 2 rows of a batch of 3",
}
"""Models with layers that do not get the rows of the batch -> the message for such layers."""


def build(name: str) -> nn.Module:
    if name in SMALL:
        return SMALL[name].build()[next(iter(SMALL[name].components))].double()
    torch.manual_seed(0)
    return TEXT_ENCODERS[name]().eval().double().requires_grad_(False)


def run(name: str, model: nn.Module) -> Tensor:
    return output(model, CALLS[name](ROWS)) if name in SMALL else hidden_states(model, ROWS)


def saved(name: str, folder: Path) -> dict[str, Path]:
    """Save adapters of several types, each on all layers, and return their folders by type."""
    made: dict[str, Path] = {}
    for adapter_type, config in CONFIGS.items():
        model = build(name)
        torch.manual_seed(0)
        adapter = diffadapt.add_adapter(model, config, adapter_type)
        for parameter in adapter.parameters():
            parameter.data.mul_(0.3)
        made[adapter_type] = diffadapt.adapters(model).save(adapter_type, folder / adapter_type, "peft").parent
    return made


@torch.no_grad()
@pytest.mark.parametrize("name", [*CALLS, *TEXT_ENCODERS])
def test_adapters_on_all_layers_are_loaded_merged_swapped_and_mixed_by_row(name: str, tmp_path: Path) -> None:
    base, alone = run(name, build(name)), dict[str, Tensor]()
    sources = saved(name, tmp_path)
    for adapter_type, source in sources.items():
        model = build(name)
        assert not diffadapt.load_adapter(model, source, adapter_type).unused
        alone[adapter_type] = run(name, model)
        assert_differs(alone[adapter_type], base, 1e-3)
        adapters = diffadapt.adapters(model)
        adapters.merge(adapter_type)
        # Several models round to float32 internally.
        assert_same(run(name, model), alone[adapter_type], 1e-6)
        adapters.unmerge()
        adapters.clear()
        assert_same(run(name, model), base, 1e-12)
    model = build(name)
    adapters = diffadapt.adapters(model)
    adapters.prepare_hotswap(list(sources.values()), slots=2, samples=ROWS)
    assert_same(run(name, model), base, 1e-12)
    diffadapt.load_adapter(model, sources["lora"], "a")
    for adapter_type, source in sources.items():
        adapters.hotswap("a", source)
        assert_same(run(name, model), alone[adapter_type], 1e-6)
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
