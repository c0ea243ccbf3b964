"""LoRAs of grouped convolutions whose first factor has no groups, as PEFT and OneTrainer write them."""

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import diffadapt
from diffadapt import AdapterError
from diffadapt.formats import writer
from diffadapt.formats.document import AdapterState
from tests.support.compare import assert_differs, assert_same


def grouped(groups: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(6, 6, 3, padding=1, groups=groups))


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd")
def test_the_layout_of_peft_runs_and_is_not_merged(tmp_path: Path) -> None:
    model, picture = grouped(2), torch.randn(2, 6, 5, 5)
    base, weight = model(picture), model[0].weight.clone()
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["0"], init_lora_weights=False)
    theirs = peft.get_peft_model(copy.deepcopy(model), config)
    theirs.save_pretrained(tmp_path)
    diffadapt.load_adapter(model, tmp_path, name="a")
    assert_differs(model(picture), base)
    assert_same(model(picture), theirs(picture))
    adapters = diffadapt.adapters(model)
    for change in (adapters.merge, lambda: adapters.to_lora("a", "lora")):
        with pytest.raises(AdapterError, match="its LoRA reads all inputs"):
            change()
    assert torch.equal(model[0].weight, weight)
    adapters.prepare_hotswap(slots=1)
    assert_same(model(picture), theirs(picture))


def test_the_layout_of_onetrainer_adds_one_output_to_all_channels() -> None:
    model, picture = grouped(6), torch.randn(2, 6, 5, 5)
    down, up = torch.randn(4, 6, 3, 3), torch.randn(1, 4, 1, 1)
    expected = model(picture) + 0.5 * F.conv2d(F.conv2d(picture, down, padding=1), up)
    tensors = {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(2.0)}
    diffadapt.load_adapter(model, {f"lora_unet_0.{name}": tensor for name, tensor in tensors.items()}, name="a")
    assert_same(model(picture), expected)


@pytest.mark.parametrize("groups", [2, 6])
def test_a_loha_of_onetrainer_has_products_with_the_elements_of_the_weight(groups: int, tmp_path: Path) -> None:
    model, picture = grouped(groups), torch.randn(2, 6, 5, 5)
    shapes = {"a": (6 // groups, 4, 1, 1), "b": (4, 6, 3, 3)}
    tensors = {f"hada_w{number}_{side}": torch.randn(shapes[side]) for number in "12" for side in "ab"}
    one, two = (tensors[f"hada_w{n}_a"].flatten(1) @ tensors[f"hada_w{n}_b"].flatten(1) for n in "12")
    layer: Any = model[0]
    weight = layer.weight + 0.5 * (one * two).view_as(layer.weight)
    expected = F.conv2d(picture, weight, layer.bias, padding=1, groups=groups)
    file = {f"lora_unet_0.{name}": tensor for name, tensor in {**tensors, "alpha": torch.tensor(2.0)}.items()}
    diffadapt.load_adapter(model, file, name="a", component="unet")
    assert_same(model(picture), expected)
    adapters = diffadapt.adapters(model)
    adapters.merge()
    assert_same(model[0].weight, weight)
    adapters.unmerge()
    saved = adapters.save("a", tmp_path / "a.safetensors", "kohya")
    again = grouped(groups)
    diffadapt.load_adapter(again, saved, component="unet")
    assert_same(again(picture), expected)
    with pytest.raises(AdapterError, match="PEFT has other shapes"):
        adapters.save("a", tmp_path, "peft")


def test_a_loha_of_lycoris_is_not_saved_for_onetrainer(tmp_path: Path) -> None:
    model = grouped(2)
    shapes = {"a": (6, 4), "b": (4, 3 * 9)}
    tensors = {f"lora_unet_0.hada_w{n}_{side}": torch.randn(shapes[side]) for n in "12" for side in "ab"}
    diffadapt.load_adapter(model, tensors, name="a", component="unet")
    adapters = diffadapt.adapters(model)
    (adapter,) = adapters["a"].components.values()
    dump = writer("onetrainer").dump
    assert dump is not None
    with pytest.raises(AdapterError, match=r"unet\.0: on a convolution of 2 groups.*save with format='kohya'"):
        dump(AdapterState({"unet": {"0": adapter.layers["0"].state}}, {}, "sd"))
    picture, again = torch.randn(2, 6, 5, 5), grouped(2)
    diffadapt.load_adapter(again, adapters.save("a", tmp_path / "a.safetensors", "kohya"), component="unet")
    assert_same(again(picture), model(picture))
    assert_differs(again(picture), grouped(2)(picture))


def test_a_dora_of_such_factors_is_refused_at_load() -> None:
    tensors = {"lora_A.weight": torch.ones(4, 6, 3, 3), "lora_B.weight": torch.ones(6, 2, 1, 1)}
    file = {f"0.{name}": tensor for name, tensor in {**tensors, "dora_scale": torch.ones(6, 1, 1, 1)}.items()}
    with pytest.raises(AdapterError, match="this is no change of its weight"):
        diffadapt.load_adapter(grouped(2), file)
