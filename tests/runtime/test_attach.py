"""What attaching an adapter does to a model, and what is refused."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import diffadapt
from diffadapt.runtime.targets import Targets
from tests.support import loras, models, spellings


class PackedLinear(nn.Module):
    """A layer like a quantised linear one: integer weights, sizes as attributes, and not an `nn.Linear`."""

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = inner.in_features, inner.out_features
        self.scale = inner.weight.detach().abs().max() / 127
        self.register_buffer("packed", (inner.weight.detach() / self.scale).round().to(torch.int8))

    def forward(self, input: Tensor) -> Tensor:
        assert isinstance(self.packed, Tensor)
        return nn.functional.linear(input, self.packed.to(input.dtype) * self.scale)


class TwoPaths(nn.Module):
    """One convolution under two names, as in the downsamplers of older diffusers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.Conv2d_0 = self.conv

    def forward(self, input: Tensor) -> Tensor:
        return self.conv(input)


def lora_of_one_layer(unet: nn.Module) -> dict[str, Tensor]:
    layers = loras.layers_of(unet, r"attn1\.to_q")
    path = next(iter(layers))
    return spellings.peft_names({"unet": loras.factors_for({path: layers[path]}, rank=2)})


def add(model: nn.Module, targets: Any, name: str = "a") -> nn.Module:
    adapter = diffadapt.add_adapter(model, diffadapt.LoraConfig(rank=2, target_modules=targets), name=name)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.linspace(-1, 1, parameter.numel()).view_as(parameter))
    return adapter


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Return the classes and all attributes of the modules, as text."""
    return {
        path: (type(module), {key: str(value) for key, value in vars(module).items() if key != "_modules"})
        for path, module in model.named_modules()
    }


@pytest.mark.parametrize("order", list(itertools.permutations("abc")), ids="".join)
def test_removal_in_any_order_restores_the_original(order: tuple[str, ...]) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 3))
    input = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    before, base, keys = snapshot(model), model(input), list(model.state_dict())
    for name, targets in (("a", ["0", "2"]), ("b", ["2"]), ("c", ["0"])):
        add(model, targets, name)
    assert not torch.equal(model(input), base)
    for name in order:
        diffadapt.adapters(model).remove(name)
    assert snapshot(model) == before
    assert list(model.state_dict()) == keys
    assert torch.equal(model(input), base)


def test_a_layer_keeps_its_identity() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    layer, weight = model[0], model[0].weight
    add(model, ["0"])
    assert model[0] is layer
    assert layer.weight is weight
    assert isinstance(layer, nn.Linear)
    assert type(layer).__name__ == "Linear"
    assert list(dict(model[0].named_parameters())) == ["weight", "bias"]


def test_training_reaches_only_the_adapter() -> None:
    model = nn.Sequential(nn.Linear(4, 4)).requires_grad_(False)
    adapter = add(model, "all-linear")
    model(torch.ones(1, 4)).sum().backward()
    assert all(parameter.grad is not None for parameter in adapter.parameters())
    assert model[0].weight.grad is None
    assert not model[0].weight.requires_grad


def test_loading_changes_no_requires_grad() -> None:
    model = models.unet_sd15()
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    diffadapt.load_adapter(model, lora_of_one_layer(model), "a")
    after = dict(model.named_parameters())
    assert all(after[name].requires_grad is value for name, value in before.items())
    assert not any(parameter.requires_grad for name, parameter in after.items() if name not in before)


def test_an_output_that_a_hook_has_kept_is_not_overwritten() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    kept: list[Tensor] = []
    model[0].register_forward_hook(lambda module, args, output: kept.append(output))
    with torch.no_grad():
        base = model(torch.ones(1, 4)).clone()
        add(model, ["0"])
        assert not torch.equal(model(torch.ones(1, 4)), base)
    assert torch.equal(kept[-1], base)


def test_a_layer_with_packed_weights_gets_adapters_but_cannot_be_merged() -> None:
    model = nn.Sequential(PackedLinear(nn.Linear(6, 4, bias=False)))
    base = model(torch.ones(1, 6))
    add(model, ["0"])
    assert not torch.equal(model(torch.ones(1, 6)), base)
    with pytest.raises(diffadapt.AdapterError, match=r"0: .*keep it unmerged"):
        diffadapt.adapters(model).merge("a")


def test_a_module_at_two_paths_is_one_layer() -> None:
    model = TwoPaths()
    adapter = add(model, "all-conv")
    assert len(list(adapter.parameters())) == 2
    assert Targets(model).resolve("conv") == Targets(model).resolve("Conv2d_0")


def test_multihead_attention_is_refused() -> None:
    model = nn.TransformerEncoderLayer(8, 2, batch_first=True)
    with pytest.raises(diffadapt.AdapterError, match=r"self_attn\.out_proj.*without calling"):
        add(model, ["out_proj"])
    assert "self_attn.out_proj" not in Targets(model).select("all-linear")


def test_a_layer_that_cannot_carry_an_adapter_is_refused() -> None:
    model = nn.Sequential(nn.ConvTranspose2d(3, 3, 2))
    with pytest.raises(diffadapt.AdapterError, match="matches no layer"):
        add(model, ["0"])


def test_a_pattern_that_matches_nothing_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(diffadapt.AdapterError, match="'to_q' matches no layer"):
        add(model, ["0", "to_q"])
    assert diffadapt.adapters(model).names == []


@pytest.mark.slow
def test_fused_projections_are_refused_before_and_after_loading() -> None:
    pipe = models.sd15()
    tensors = lora_of_one_layer(pipe.unet)
    pipe.unet.fuse_qkv_projections()
    with pytest.raises(diffadapt.AdapterError, match="unfuse_qkv_projections"):
        pipe.load_adapter(tensors, "a")
    pipe.unet.unfuse_qkv_projections()
    pipe.load_adapter(tensors, "a")
    pipe.unet.fuse_qkv_projections()
    with pytest.raises(diffadapt.AdapterError, match=r"to_q carries an adapter.*unfuse_qkv_projections"):
        models.draw(pipe)
    with pipe.adapters.disabled():
        models.draw(pipe)


@torch.no_grad()
def test_an_adapter_may_have_the_name_of_anything_in_the_bank() -> None:
    model = nn.Sequential(nn.Linear(4, 4)).requires_grad_(False)
    adapters, input = diffadapt.adapters(model), torch.ones(1, 4)
    source = {"0.lora_A.weight": torch.ones(2, 4), "0.lora_B.weight": torch.ones(4, 2)}
    base = model(input)
    adapters.load(source, "first")
    attributes = [name.lstrip("_") for name in vars(model.diffadapt)] + list(vars(model.diffadapt))
    for name in dict.fromkeys([*attributes, "children", "before_call", "adapters", "reservation"]):
        adapters.load(source, name, activate=False)
        adapters.hotswap(name, source)
        adapters.activate({name: 0.5})
        assert torch.equal(model.eval()(input), base + 4)
        adapters.merge(name)
        torch.testing.assert_close(model(input), base + 4)
        adapters.unmerge()
        adapters.remove(name)
    adapters.clear()
    assert torch.equal(model(input), base)
