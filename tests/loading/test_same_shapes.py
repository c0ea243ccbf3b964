"""Layers of the same shapes are checked once; what is not a matter of shapes is checked on each of them."""

import pytest
import torch
from torch import Tensor, nn

import diffadapt
from diffadapt import LoadError
from diffadapt.runtime.targets import Targets
from diffadapt.runtime.ties import tied_groups


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict({"net": nn.Sequential(*(nn.Linear(6, 6) for _ in range(3)))}).double()


def test_positions_are_checked_on_every_layer() -> None:
    places = torch.tensor([[0, 1], [2, 3]])
    file: dict[str, Tensor] = {}
    for number in range(3):
        file[f"net.{number}.shira_weight"] = torch.ones(2)
        file[f"net.{number}.shira_indices"] = places.clone()
    file["net.1.shira_indices"][0, 0] = 6
    with pytest.raises(LoadError, match=r"net\.1") as caught:
        diffadapt.load_adapter(net(), file, "a", component="unet")
    assert {fault.key for fault in caught.value.faults} == {"net.1.shira_weight", "net.1.shira_indices"}


def test_factors_that_fit_only_some_layers_are_refused_there_alone() -> None:
    model = net()
    model["net"][1] = nn.Linear(5, 6).double()  # type: ignore[index]
    file = {
        f"net.{n}.lora_{f}.weight": torch.ones(2, 6) if f == "A" else torch.ones(6, 2) for n in range(3) for f in "AB"
    }
    with pytest.raises(LoadError, match=r"lora_down has shape \(2, 6\), expected \(2, 5\)") as caught:
        diffadapt.load_adapter(model, file, "a", component="unet")
    assert {fault.key.rpartition(".lora_")[0] for fault in caught.value.faults} == {"net.1"}


def test_the_parameters_of_every_layer_have_the_same_order() -> None:
    model = net()
    file = {
        f"net.{n}.lora_{f}.weight": torch.ones(2, 6) if f == "A" else torch.ones(6, 2) for n in range(3) for f in "BA"
    }
    diffadapt.load_adapter(model, file, "a", component="unet")
    (adapter,) = diffadapt.adapters(model)["a"].components.values()
    layers = adapter.layers.values()
    assert [list(layer.tensors) for layer in layers] == [["lora_down", "lora_up"]] * 3


def test_one_parameter_in_two_layers_is_found_among_layers_with_their_own() -> None:
    model = net()
    model["net"][2].weight = model["net"][0].weight  # type: ignore[index]
    assert tied_groups(Targets(model)) == [("net.0", "net.2")]
