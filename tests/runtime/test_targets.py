"""The layers that the settings of a new adapter mean."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import diffadapt
from diffadapt import AdapterError, LoraConfig
from diffadapt.runtime.targets import Targets
from tests.support import small_models
from tests.support.cases import for_each
from tests.support.compare import assert_differs, assert_same, assert_unchanged, snapshot
from tests.support.denoisers import SMALL
from tests.support.text_encoders import TEXT_ENCODERS
from tests.support.tied import llama


def chosen(model: nn.Module, **settings: Any) -> list[str]:
    settings = {"target_modules": "all-linear", **settings}
    return list(diffadapt.add_adapter(model, LoraConfig(rank=1, **settings)).layers)


@for_each(encoder=list(TEXT_ENCODERS))
def test_all_linear_leaves_output_layers_and_vision_towers_alone(encoder: str) -> None:
    model = TEXT_ENCODERS[encoder]()
    linear = {path for path, module in Targets(model).modules.items() if isinstance(module, nn.Linear)}
    is_multimodal = hasattr(model.config, "vision_config")
    towers = {"visual", "vision_tower", "multi_modal_projector"}
    apart = {path for path in linear if "lm_head" in path or (is_multimodal and towers & set(path.split(".")))}
    assert set(chosen(model)) == linear - apart
    assert (encoder in ("llama", "qwen2.5-vl", "qwen3-vl", "mistral3")) == bool(apart)
    if is_multimodal:
        # They are there for everyone who asks by name.
        assert chosen(TEXT_ENCODERS[encoder](), target_modules=r".*vis.*(qkv|q_proj)")


LAST: dict[str, set[str]] = {
    "anima": {"proj_out"},
    "hidream": {"final_layer.linear"},
    "ideogram4": {"final_layer.linear"},
    "krea2": {"final_layer.linear"},
    "ltx2": {"proj_out", "audio_proj_out"},
    "lumina2": {"norm_out.linear_2"},
    "zimage": {"all_final_layer.2-1.linear"},
    **{family: set[str]() for family in ("sd", "sdxl")},
    **{family: {"proj_out"} for family in ("chroma", "flux", "pixart", "qwen", "sana", "sd3", "wan")},
}


@for_each(family=list(LAST))
def test_all_linear_leaves_the_last_layer_of_a_denoiser_alone(family: str) -> None:
    targets = Targets(next(iter(SMALL[family].build().values())))
    linear = {path for path, module in targets.modules.items() if isinstance(module, nn.Linear)}
    assert linear - set(targets.select("all-linear")) == LAST[family]


def test_all_linear_is_saved_with_full_names_and_never_means_adapters(tmp_path: Path) -> None:
    model = llama()
    first = chosen(model)
    second = list(diffadapt.add_adapter(model, LoraConfig(rank=1, target_modules="all-linear"), "second").layers)
    assert first == second
    assert len(first) == 7
    path = diffadapt.adapters(model).save("second", tmp_path / "a", "peft")
    config = (path.parent / "adapter_config.json").read_text()
    assert all(f'"{name}"' in config for name in first)
    again = llama()
    diffadapt.load_adapter(again, path.parent, "a", component="text_encoder")
    assert list(diffadapt.adapters(again)["a"].components["text_encoder"].layers) == first


def test_layers_are_chosen_by_the_number_of_their_block() -> None:
    build = partial(small_models.flux, 2)
    every = chosen(build(), target_modules=["to_q"])
    assert len(every) > 2
    for blocks in (1, [1]):
        assert chosen(build(), target_modules=["to_q"], layers_to_transform=blocks) == [
            path for path in every if ".1." in path
        ]
    single = {"layers_to_transform": [0], "layers_pattern": "single_transformer_blocks"}
    assert chosen(build(), target_modules=["to_q"], **single) == [
        path for path in every if path.startswith("single_transformer_blocks.0.")
    ]


REFUSED: dict[str, dict[str, Any]] = {
    "exclude_modules: 'nonexistent' matches no layer": {"exclude_modules": ["nonexistent"]},
    r"exclude_modules: 'none\.\*' matches no layer": {"exclude_modules": "none.*"},
    "layers_to_transform: 9 is no block of the model": {"layers_to_transform": [9]},
    "layers_to_transform: 0 is no block in x": {"layers_to_transform": 0, "layers_pattern": ["x"]},
    "layers_pattern: 'x' is no list of blocks": {"layers_to_transform": 0, "layers_pattern": ["layers", "x"]},
    "layers_pattern has no effect": {"layers_pattern": "layers"},
    "expected at least 0": {"layers_to_transform": [-1]},
    "target_modules is missing": {"target_modules": ()},
    "'nope' is no parameter of": {"target_modules": (), "target_parameters": ["nope"]},
    "only a LoRA without dropout": {"target_parameters": ["weight"], "dropout": 0.1},
}


@for_each(message=list(REFUSED))
def test_settings_without_an_effect_are_refused(message: str) -> None:
    model = llama()
    before = snapshot(model)
    with pytest.raises(AdapterError, match=message):
        chosen(model, **REFUSED[message])
    assert_unchanged(model, before)


class Experts(nn.Module):
    """Fused experts and a table, as in the blocks of some diffusion transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.randn(3, 4, 5))
        self.table = nn.Parameter(torch.randn(2, 4))
        self.proj = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bi,eij->bj", self.proj(x) * self.table[0] + self.table[1], self.weights)


def test_bare_parameters_are_adapted_merged_and_saved(tmp_path: Path) -> None:
    def model() -> nn.Module:
        torch.manual_seed(0)
        return nn.ModuleDict({"block": Experts()}).double()

    adapted, x = model(), torch.randn(2, 4, dtype=torch.float64)
    block: Any = adapted["block"]
    base, before = block(x).detach(), snapshot(adapted)
    config = LoraConfig(rank=2, alpha=1, target_parameters=["block.weights", "table"], target_modules=["proj"])
    adapter = diffadapt.add_adapter(adapted, config, "a").double()
    assert_same(block(x), base, 0)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_()
    output = block(x)
    assert_differs(output, base)
    output.sum().backward()
    assert all(parameter.grad is not None for parameter in adapter.parameters())
    adapted.zero_grad()
    # By the formula.
    expected = model()
    with torch.no_grad():
        for path, layer in adapter.layers.items():
            parameter = expected.get_parameter(path if layer.parameter != "weight" else f"{path}.weight")
            up, down = list(layer.tensors.values())[::-1]
            parameter += 0.5 * (up @ down)
    assert_same(output, expected["block"](x), 1e-10)
    adapters = diffadapt.adapters(adapted)
    adapters.activate({"a": 0.25})
    assert_differs(block(x), output)
    adapters.activate("a")
    adapters.merge("a")
    assert_same(block(x), output, 1e-10)
    adapters.unmerge()
    path = adapters.save("a", tmp_path / "a", "peft")
    again = model()
    report = diffadapt.load_adapter(again, path.parent, "a", component="model", dtype=torch.float64)
    assert report.unused == []
    assert_same(again["block"](x), output, 1e-10)
    adapters.clear()
    assert_unchanged(adapted, before)
