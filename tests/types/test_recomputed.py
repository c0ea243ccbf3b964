"""Types whose backward pass computes again what follows from their parameters, instead of keeping it."""

from typing import Any

import torch
from torch import Tensor, nn

import diffadapt
from diffadapt.types import oft
from tests.support.cases import for_each

CONFIGS: dict[str, Any] = {
    "oft": lambda: diffadapt.OFTConfig(block_size=8, target_modules=["0"], init=False),
    "oft-7": lambda: diffadapt.OFTConfig(block_size=8, neumann_terms=7, target_modules=["0"], init=False),
    "oft-exact": lambda: diffadapt.OFTConfig(block_size=8, neumann_terms=0, target_modules=["0"], init=False),
}
TOKENS, WIDTH = 96, 64


def trained(name: str) -> tuple[nn.Module, list[nn.Parameter], Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH)).requires_grad_(False).double()
    adapter = diffadapt.add_adapter(model, CONFIGS[name]()).double()
    return model, list(adapter.parameters()), torch.randn(TOKENS, WIDTH, dtype=torch.float64)


def derivatives(name: str) -> list[Tensor]:
    """Return the gradients of a loss, and those of the size of its gradients."""
    model, parameters, input = trained(name)
    leaves = [input.requires_grad_(), *parameters]
    first = torch.autograd.grad(model(input).tanh().square().sum(), leaves, create_graph=True)
    second = torch.autograd.grad(torch.stack([grad.square().sum() for grad in first]).sum(), leaves)
    once = torch.autograd.grad(model(input).tanh().square().sum(), leaves)
    assert all(bool(grad.any()) for grad in (*once, *second))
    return [*once, *first, *second]


@for_each(name=tuple(CONFIGS))
def test_gradients_and_their_gradients_are_those_of_the_formula(name: str, monkeypatch: Any) -> None:
    found = derivatives(name)
    monkeypatch.setattr(oft, "recomputed", lambda function, *inputs: function(*inputs))
    for ours, expected in zip(found, derivatives(name), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)


def test_the_backward_pass_keeps_little_besides_the_input() -> None:
    model, parameters, input = trained("oft")
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(input)
    known = [input, *parameters, *model.parameters()]
    for tensor in known:
        kept.pop(tensor.untyped_storage().data_ptr(), None)
    assert output.requires_grad
    # A rotation and its gated copy: far less than another copy of the input.
    assert sum(kept.values()) <= (2 * WIDTH * 8 + 64) * 8 < input.nbytes // 2


def test_functional_gradients_work() -> None:
    model, _, input = trained("oft")

    def loss(value: Tensor) -> Tensor:
        return model(value).square().sum()

    functional = torch.func.grad(loss)(input)
    (usual,) = torch.autograd.grad(loss(input.requires_grad_()), input)
    torch.testing.assert_close(functional, usual)
