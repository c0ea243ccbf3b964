"""The sizes of an adapter's changes, and the map that notebooks show."""

import copy
import gc
import pickle

import pytest
import torch
from torch import nn

import diffadapt
from diffadapt.loading.heat_map import HeatMap, block_and_projection
from diffadapt.to_lora.sizes import change_sizes
from tests.support.cases import for_each

CONFIGS = {
    "lora": diffadapt.LoraConfig(rank=2, target_modules="all-linear", init=False),
    "dora": diffadapt.LoraConfig(rank=2, target_modules="all-linear", use_dora=True, init=False),
    "loha": diffadapt.LoHaConfig(rank=2, target_modules="all-linear", init=False),
    "oft": diffadapt.OFTConfig(block_size=4, target_modules="all-linear", init=False),
}


def model() -> nn.Module:
    blocks = nn.ModuleList([nn.ModuleDict({"to_q": nn.Linear(16, 8), "to_k": nn.Linear(16, 8)}) for _ in range(2)])
    return nn.ModuleDict({"blocks": blocks}).double()


@for_each(kind=CONFIGS)
def test_sizes_are_those_of_the_merged_weights(kind: str) -> None:
    host = model()
    adapter = diffadapt.add_adapter(host, CONFIGS[kind], "style")
    sizes = change_sizes({"unet": adapter})
    assert sizes.relative
    before = {path: module.weight.clone() for path, module in host.named_modules() if isinstance(module, nn.Linear)}
    diffadapt.adapters(host).merge()
    for path, weight in before.items():
        change = host.get_submodule(path).get_parameter("weight") - weight
        assert sizes.by_layer[f"unet.{path}"] == pytest.approx(
            float((change.norm() / weight.norm()).detach()), rel=1e-4
        )
        assert sizes.by_layer[f"unet.{path}"] > 0.01


def test_blocks_and_projections() -> None:
    for layer, expected in {
        "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0": (
            "unet.down_blocks.1.attentions.0",
            "attn1.to_out",
        ),
        "transformer.single_transformer_blocks.12.attn.to_q": ("transformer.single_transformer_blocks.12", "attn.to_q"),
        "unet.conv_in": ("unet", "conv_in"),
        "text_encoder.encoder.layers.3.mlp.fc1": ("text_encoder.encoder.layers.3", "mlp.fc1"),
    }.items():
        assert block_and_projection(layer) == expected
    found = HeatMap.of({"unet.a.10.q": 1.0, "unet.a.2.q": 3.0, "unet.a.2.k<b>": 0.5}, "size")
    assert found.rows == ("unet.a.2", "unet.a.10")
    assert "k&lt;b&gt;" in found.html()


def test_notebooks_show_a_loaded_adapter_as_long_as_it_is_loaded() -> None:
    host = model().float()
    torch.manual_seed(0)
    state = {
        f"{path}.lora_{name}.weight": torch.randn(shape)
        for path in ("blocks.0.to_q", "blocks.1.to_k")
        for name, shape in (("A", (2, 16)), ("B", (8, 2)))
    }
    report = diffadapt.load_adapter(host, state, "<b>style", component="unet")
    shown = report._repr_html_()
    assert "&lt;b&gt;style" in shown
    assert "<b>" not in shown
    assert "change / weight" in shown
    assert "to_q" in shown
    adapters = diffadapt.adapters(host)._repr_html_()
    assert "<details><summary>&lt;b&gt;style</summary>" in adapters
    assert pickle.loads(pickle.dumps(report)) == copy.deepcopy(report) == report
    diffadapt.adapters(host).clear()
    gc.collect()
    assert "change / weight" not in report._repr_html_()
