"""The probe of gradients finds exactly the layers that pass none or a wrong one to their input."""

import re
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffadapt import weights
from diffadapt.weights.gradients import gradient_problem, gradient_storage, needs_probe
from tests.support.bases import BASES, CONVOLUTIONS, INPUTS, OUT, Base, silenced
from tests.support.compare import relative_error

pytestmark = pytest.mark.filterwarnings("ignore")


def gradient_error(base: Base, layer: nn.Module) -> float | None:
    """Return the relative error of the gradient to the input of a layer, or `None` if there is no gradient."""
    input, weight = base.input().requires_grad_(True), weights.decoded(layer, "weight")
    with silenced():
        output: Tensor = layer(input)
    if not output.requires_grad:
        return None
    sent = torch.randn(output.shape)
    output.backward(sent.to(output.dtype))
    assert input.grad is not None
    other = input.detach().requires_grad_(True)
    own = nn.functional.linear if base.kind == "linear" else partial(nn.functional.conv2d, stride=2, padding=1)
    return relative_error(input.grad, torch.autograd.grad(own(other, weight), other, sent)[0])


@pytest.mark.parametrize("base", [*BASES, *CONVOLUTIONS], ids=lambda base: base.name)
def test_it_agrees_with_what_the_layers_of_every_backend_do(base: Base) -> None:
    layer = base.layer()
    assert needs_probe(layer)
    with torch.inference_mode(), silenced():
        problem = gradient_problem(layer)
    error = gradient_error(base, layer)
    if error is None:
        assert problem is not None
        assert problem.silent
        assert problem.text == "pass no gradient to their input"
    else:
        assert error < 0.1
        assert problem is None


class Scaled(nn.Linear):
    """A quantised layer whose backward is what a test makes it."""

    def __init__(self, backward: Any) -> None:
        super().__init__(INPUTS, OUT)
        self.backward, self.calls = backward, 0
        self.weight.data = self.weight.data.to(torch.float8_e4m3fn)
        self.register_buffer("weight_scale", torch.ones(()))

    def forward(self, input: Tensor) -> Tensor:
        self.calls += 1
        return self.backward(nn.functional.linear(input, self.weight.float(), self.bias))


def wrong_by(factor: float) -> Any:
    class Backward(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, input: Tensor) -> Tensor:
            return input.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return gradient * factor

    return Backward.apply


@pytest.mark.parametrize(
    ("backward", "found"),
    [(wrong_by(0.0), r"relative error 1\b"), (wrong_by(-1.0), r"relative error 2\b"), (wrong_by(1.0), None)],
)
def test_a_wrong_gradient_is_found_once_for_layers_that_are_alike(backward: Any, found: str | None) -> None:
    class Own(Scaled):
        pass

    layers = [Own(backward), Own(backward)]
    problems = [gradient_problem(layer) for layer in layers]
    assert problems[0] is problems[1]
    assert layers[0].calls > 0
    assert layers[1].calls == 0
    if found is None:
        assert problems[0] is None
    else:
        assert problems[0] is not None
        assert problems[0].silent
        assert re.search(found, problems[0].text)


def test_two_ways_to_compute_with_one_class_of_tensor_are_told_apart() -> None:
    named = {base.name: base for base in BASES}
    plain, dynamic = named["torchao int8"].layer(), named["torchao int8 dynamic"].layer()
    assert type(plain.weight) is type(dynamic.weight)
    assert gradient_storage(plain) != gradient_storage(dynamic)


def test_ordinary_layers_are_not_asked() -> None:
    layers = [
        nn.Linear(4, 4),
        nn.Linear(4, 4).half(),
        nn.Conv2d(4, 4, 3).bfloat16(),
        nn.Embedding(4, 4),
        nn.LayerNorm(4),
    ]
    assert not any(map(needs_probe, layers))
    assert needs_probe(nn.Linear(4, 4).to(torch.float8_e4m3fn))
