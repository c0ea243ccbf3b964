"""Changes that are computed as part of the weight, against the same changes as products of their own."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import diffadapt
from diffadapt.runtime import changed_weight
from tests.support.cases import for_each

CONFIGS: dict[str, Callable[..., Any]] = {
    "full": lambda **own: diffadapt.FullConfig(bias=True, **own),
    "hira": lambda **own: diffadapt.HiRAConfig(rank=4, **own),
    "shira": lambda **own: diffadapt.SHiRAConfig(rank=2, **own),
    "supertuning": lambda **own: diffadapt.SuperTuningConfig(sparsity=0.8, rank=2, **own),
    "peanut": lambda **own: diffadapt.PEANuTConfig(rank=4, **own),
    "randlora": lambda **own: diffadapt.RandLoraConfig(rank=4, **own),
    "waveft": lambda **own: diffadapt.WaveFTConfig(frequencies=20, **own),
    "fourierft": lambda **own: diffadapt.FourierFTConfig(frequencies=20, **own),
    "glora": lambda **own: diffadapt.GLoRAPEFTConfig(rank=4, **own),
    "miss": lambda **own: diffadapt.MiSSConfig(rank=4, variant="bat", **own),
    "osf": lambda **own: diffadapt.OSFConfig(**own),
    "c3a": lambda **own: diffadapt.C3AConfig(block_size=4, **own),
}
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(12, 16), (2, 40, 12)),
    "no bias": (lambda: nn.Linear(12, 16, bias=False), (2, 40, 12)),
    "conv": (lambda: nn.Conv2d(12, 16, 3, padding=1, padding_mode="reflect"), (2, 12, 6, 6)),
}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Return whether each call of a layer computed with a changed weight."""
    found: list[bool] = []
    own = changed_weight.in_weight

    def counted(*args: Any) -> Any:
        result = own(*args)
        found.append(bool(result))
        return result

    monkeypatch.setattr("diffadapt.runtime.compose.in_weight", counted)
    return found


def adapted(layer: str, *configs: str) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(LAYERS[layer][0]()).double()
    for number, name in enumerate(configs):
        make = CONFIGS.get(name, lambda **own: diffadapt.LoraConfig(rank=4, **own))
        adapter = diffadapt.add_adapter(model, make(target_modules=["0"], init=False), f"a{number}")
        for tensor in adapter.layers["0"].tensors.values():
            if tensor.is_floating_point():
                tensor.data = tensor.data.double()
    diffadapt.adapters(model).activate({f"a{number}": 0.7 + number / 4 for number in range(len(configs))})
    return model


def result(model: nn.Sequential, input: Tensor) -> list[Tensor]:
    """Return the output, and the gradients of the input and of all adapters."""
    leaf = input.clone().requires_grad_()
    trained = {id(tensor): tensor for tensor in model.parameters() if tensor.requires_grad}
    own = {id(tensor) for tensor in model[0].parameters()}
    tensors = [tensor for key, tensor in trained.items() if key not in own]
    output = model(leaf)
    return [output.detach(), *torch.autograd.grad(output.pow(3).sum(), [leaf, *tensors])]


def with_a_hook(model: nn.Sequential) -> nn.Sequential:
    """Return the model with a hook on its layer, which keeps it from computing with another weight."""
    model[0].register_forward_hook(lambda *_: None)
    return model


@for_each(layer=list(LAYERS), config=[*CONFIGS, "mixed"])
def test_outputs_and_gradients_are_those_of_separate_products(layer: str, config: str, calls: list[bool]) -> None:
    names = ("shira", "lora", "hira") if config == "mixed" else (config,)
    if layer != "linear" and config in ("peanut", "glora", "c3a", "miss", "full"):
        return
    input = torch.randn(LAYERS[layer][1], dtype=torch.float64)
    del calls[:]
    found = result(adapted(layer, *names), input)
    with torch.no_grad():
        drawn = adapted(layer, *names)(input)
    assert calls == [config != "c3a", True]
    expected = result(with_a_hook(adapted(layer, *names)), input)
    assert calls[2:] == [False]
    base = adapted(layer)(input).detach()
    assert (found[0] - base).abs().max() > 1e-3
    torch.testing.assert_close(drawn, found[0])
    for own, other in zip(found, expected, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-9, atol=1e-9)


def test_layers_that_do_more_than_multiply_and_few_tokens_have_products_of_their_own(calls: list[bool]) -> None:
    input = torch.randn(2, 40, 12, dtype=torch.float64)
    cases: list[Callable[[], Any]] = [
        lambda: adapted("linear", "hira")(input[:, :8]),
        lambda: adapted("linear", "hira").float()(input.float()),
        lambda: adapted("linear", "hira").bfloat16()(input.bfloat16()),
    ]
    for case in cases:
        case()
    assert calls == [False, True, False]
    model = adapted("linear", "hira")
    with diffadapt.adapters(model).per_sample([{"a0": 1.0}, {}]):
        assert torch.equal(model(input)[1], adapted("linear")(input)[1])
    assert calls[3] is False
