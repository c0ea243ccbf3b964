"""LoRA+ and LoRA-FA."""

import pytest
import torch
from torch import nn

import diffadapt
from diffadapt import AdapterError, LoraConfig


def trained(**options: object) -> tuple[nn.Module, diffadapt.Adapter]:
    torch.manual_seed(0)
    model = nn.ModuleDict({"q": nn.Linear(16, 8), "k": nn.Linear(16, 8)}).requires_grad_(False)
    return model, diffadapt.add_adapter(model, LoraConfig(rank=2, target_modules=["q", "k"], **options), "style")


def test_only_the_up_factors_learn_faster() -> None:
    _, adapter = trained(use_dora=True, init=False)
    names = {id(parameter): name.rpartition(".")[2] for name, parameter in adapter.named_parameters()}
    for groups, lr in (
        (diffadapt.lora_plus_groups(adapter, ratio=16), 1e-4),
        (diffadapt.lora_plus_groups(adapter, 16, lr=1e-4), 5.0),
    ):
        optimizer = torch.optim.AdamW(groups, lr=lr)
        rates = {names[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]}
        assert rates == {"lora_down": 1e-4, "dora_scale": 1e-4, "lora_up": pytest.approx(16e-4)}
        assert sum(len(group["params"]) for group in optimizer.param_groups) == len(names)
        restored = torch.optim.AdamW(diffadapt.lora_plus_groups(adapter, ratio=2), lr=1.0)
        restored.load_state_dict(optimizer.state_dict())
        assert [group["lr"] for group in restored.param_groups] == [group["lr"] for group in optimizer.param_groups]


def test_what_has_no_up_factor_is_refused() -> None:
    model = nn.ModuleDict({"q": nn.Linear(16, 8)})
    adapter = diffadapt.add_adapter(model, diffadapt.IA3Config(target_modules=["q"]))
    with pytest.raises(
        AdapterError, match="none of the trained parameters is a lora_up; the adapter is of type ia3-lycoris"
    ):
        diffadapt.lora_plus_groups(adapter)
    with pytest.raises(AdapterError, match="q has a ia3-lycoris, expected a LoRA"):
        diffadapt.lora_fa_(adapter)
    with pytest.raises(AdapterError, match="ratio is 0, expected a positive number"):
        diffadapt.lora_plus_groups(trained()[1], 0)


def test_a_step_of_lora_fa_is_the_best_approximation_of_a_step_of_the_weight() -> None:
    model, adapter = trained(alpha=6.0)
    x, rate = torch.randn(5, 16), 0.1
    layer = adapter.layers["q"]
    down, up = layer.get_parameter("lora_down"), layer.get_parameter("lora_up")
    weight = model["q"].weight.clone().requires_grad_(True)
    nn.functional.linear(x, weight, model["q"].bias).square().sum().backward()
    assert diffadapt.lora_fa_(adapter) is adapter
    model["q"](x).square().sum().backward()
    assert down.grad is None
    assert not down.requires_grad
    assert weight.grad is not None
    assert up.grad is not None
    change = 3.0 * (-rate * up.grad) @ down.detach()
    projection = torch.linalg.pinv(down.detach()) @ down.detach()
    torch.testing.assert_close(change, -rate * weight.grad @ projection, rtol=1e-4, atol=1e-5)
    assert change.norm() > 0.01
