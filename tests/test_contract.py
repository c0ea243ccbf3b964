"""What every adapter type promises, over the registry and every kind of layer, in float64.

A new type is covered as soon as it is in the registry.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from diffadapt.adapter import Adapter, AdapterLayer
from diffadapt.attach import attach_, detach_, refresh_
from diffadapt.kind import AdapterType
from diffadapt.layer import LayerSpec
from diffadapt.merge import merge_, unmerge_
from diffadapt.types import TYPES, identify

RANK = 4


class ScaledEmbedding(nn.Embedding):
    """As in the text encoders of the Gemma family: the layer scales its own output."""

    embed_scale = 3.0

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * self.embed_scale


class NamedInput(nn.Linear):
    """As `LoRACompatibleLinear` of older diffusers: another argument name, and a second argument."""

    def forward(self, hidden_states: Tensor, scale: float = 1.0) -> Tensor:
        return super().forward(hidden_states)


def _vectors(*shape: int) -> Callable[[torch.Generator], Tensor]:
    return lambda generator: torch.randn(*shape, generator=generator, dtype=torch.float64)


def _ids(*shape: int) -> Callable[[torch.Generator], Tensor]:
    return lambda generator: torch.randint(0, 7, shape, generator=generator)


LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[torch.Generator], Tensor]]] = {
    "linear": (lambda: nn.Linear(6, 10), _vectors(3, 5, 6)),
    "linear-no-bias": (lambda: nn.Linear(6, 10, bias=False), _vectors(6)),
    "linear-subclass": (lambda: NamedInput(6, 10), _vectors(2, 6)),
    "transformers-conv1d": (lambda: Conv1D(10, 6), _vectors(2, 3, 6)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1), _vectors(2, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, padding=1), _vectors(2, 4, 7, 7)),
    "conv2d-1x1": (lambda: nn.Conv2d(4, 6, 1), _vectors(2, 4, 7, 7)),
    "conv2d-strided-dilated": (lambda: nn.Conv2d(4, 6, (3, 2), (2, 1), (1, 0), (1, 2)), _vectors(2, 4, 9, 8)),
    "conv2d-grouped": (lambda: nn.Conv2d(4, 6, 3, padding=1, groups=2), _vectors(2, 4, 7, 7)),
    "conv2d-depthwise": (lambda: nn.Conv2d(4, 4, 3, padding=1, groups=4), _vectors(2, 4, 7, 7)),
    "conv2d-same": (lambda: nn.Conv2d(4, 6, 3, padding="same"), _vectors(2, 4, 7, 7)),
    "conv2d-reflect": (lambda: nn.Conv2d(4, 6, 3, padding=(1, 2), padding_mode="reflect"), _vectors(2, 4, 7, 7)),
    "conv2d-circular-same": (
        lambda: nn.Conv2d(4, 6, (3, 2), padding="same", padding_mode="circular"),
        _vectors(2, 4, 7, 7),
    ),
    "conv3d": (lambda: nn.Conv3d(4, 6, (1, 3, 3), padding=(0, 1, 1)), _vectors(2, 4, 3, 5, 5)),
    "embedding": (lambda: nn.Embedding(7, 10, padding_idx=0), _ids(2, 5)),
    "embedding-scaled": (lambda: ScaledEmbedding(7, 10), _ids(2, 5)),
}

pytestmark = [
    pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.name),
    pytest.mark.parametrize("layer", LAYERS),
]


class Case:
    """A root with one layer, seeded input, and tensors of a type for it."""

    def __init__(self, kind: AdapterType, layer: str, *, bias: bool = True) -> None:
        self.generator = torch.Generator().manual_seed(7)
        make, draw = LAYERS[layer]
        self.root = nn.Sequential(make()).double()
        for parameter in self.root.parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=self.generator, dtype=torch.float64))
        self.kind = kind
        self.spec = LayerSpec.of(self.root[0]) or pytest.fail("no adapter can sit here")
        self.input = draw(self.generator)
        self.bias = (
            bias
            and kind.name == "lora"
            and self.spec.kind != "embedding"
            and getattr(self.root[0], "bias", None) is not None
        )

    def initial(self) -> dict[str, Tensor]:
        tensors = self.kind.init(self.spec, RANK, self.generator, self.bias)
        return {name: tensor.double() for name, tensor in tensors.items()}

    def random(self) -> dict[str, Tensor]:
        return {
            name: torch.randn(tensor.shape, generator=self.generator, dtype=torch.float64)
            for name, tensor in self.initial().items()
        }

    def attach(self, tensors: dict[str, Tensor], name: str = "a", strength: float = 0.5) -> Adapter:
        adapter = Adapter({"0": AdapterLayer(self.kind, self.spec, tensors, alpha=3.0, trainable=True)})
        attach_(self.root, name, adapter, {"0": self.root[0]})
        adapter.set_strengths([strength])
        adapter.active = True
        refresh_(self.root)
        return adapter


def test_initial_adapter_changes_nothing(kind: AdapterType, layer: str) -> None:
    case = Case(kind, layer)
    base = case.root(case.input)
    case.attach(case.initial())
    torch.testing.assert_close(case.root(case.input), base, rtol=0, atol=0)


@pytest.mark.parametrize("grad", [True, False], ids=["autograd", "no-grad"])
def test_forward_equals_merged_weight_and_has_an_effect(kind: AdapterType, layer: str, grad: bool) -> None:
    case = Case(kind, layer)
    weights = {name: tensor.clone() for name, tensor in case.root.state_dict().items()}
    with torch.set_grad_enabled(grad):
        base = case.root(case.input).clone()
        case.attach(case.random())
        forward = case.root(case.input).clone()
        merge_({"model": case.root}, ["a"])
        merged = case.root(case.input).clone()
    torch.testing.assert_close(forward, merged, rtol=1e-10, atol=1e-10)
    assert (forward - base).abs().max() > 0.1
    unmerge_(case.root)
    detach_(case.root, "a")
    assert all(torch.equal(tensor, weights[name]) for name, tensor in case.root.state_dict().items())


def test_two_adapters_add_up_in_any_order(kind: AdapterType, layer: str) -> None:
    case = Case(kind, layer)
    base = case.root(case.input)
    first, second = case.random(), case.random()
    changes: list[Tensor] = []
    for tensors in (first, second):
        case.attach(tensors)
        changes.append(case.root(case.input) - base)
        detach_(case.root, "a")
    for order in ((first, second), (second, first)):
        case.attach(order[0], "a")
        case.attach(order[1], "b")
        torch.testing.assert_close(case.root(case.input), base + changes[0] + changes[1], rtol=1e-10, atol=1e-10)
        detach_(case.root, "a")
        detach_(case.root, "b")


def test_gradients(kind: AdapterType, layer: str) -> None:
    case = Case(kind, layer)
    gate = torch.tensor(0.75, dtype=torch.float32)
    names, tensors = zip(*case.random().items(), strict=True)
    onto = case.root(case.input).detach()

    def output(*values: Tensor) -> Tensor:
        return kind.delta_output(dict(zip(names, values, strict=True)), case.spec, case.input, gate, onto)

    assert torch.autograd.gradcheck(output, [tensor.requires_grad_() for tensor in tensors])


def test_gradient_reaches_the_input(kind: AdapterType, layer: str) -> None:
    case = Case(kind, layer)
    if not case.input.is_floating_point():
        pytest.skip("embeddings take ids")
    case.attach(case.random())
    merged = Case(kind, layer)
    merged.attach(merged.random())
    merge_({"model": merged.root}, ["a"])
    gradients: list[Tensor] = []
    for model in (case, merged):
        input = model.input.clone().requires_grad_()
        model.root(input).pow(2).sum().backward()
        assert input.grad is not None
        gradients.append(input.grad)
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-9)


def test_declared_names_and_rank(kind: AdapterType, layer: str) -> None:
    case = Case(kind, layer)
    tensors = case.random()
    assert set(tensors) <= set(kind.tensors)
    assert identify(tensors) is kind
    assert kind.rank(tensors) in (RANK, None)


def test_state_round_trip(kind: AdapterType, layer: str) -> None:
    case = Case(kind, layer)
    adapter = case.attach(case.random())
    output = case.root(case.input)
    state = {name: tensor.clone() for name, tensor in adapter.state_dict().items()}
    assert sorted(state) == sorted(f"0.{name}" for name in adapter.layers["0"].tensors)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.zero_()
    assert not torch.equal(case.root(case.input), output)
    adapter.load_state_dict(state)
    assert torch.equal(case.root(case.input), output)


def test_fitted_tensors_fit_again(kind: AdapterType, layer: str) -> None:
    case = Case(kind, layer)
    tensors = kind.fit(case.random(), case.spec)
    again = kind.fit(tensors, case.spec)
    assert {name: tensor.shape for name, tensor in again.items()} == {n: t.shape for n, t in tensors.items()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_error(kind: AdapterType, layer: str, dtype: torch.dtype) -> None:
    case = Case(kind, layer)
    adapter = case.attach(case.random(), strength=0.7)
    with torch.no_grad():
        exact = case.root(case.input.clone())
        case.root.to(dtype)
        half = case.root(case.input.to(dtype) if case.input.is_floating_point() else case.input).double()
    assert all(parameter.dtype == dtype for parameter in adapter.parameters())
    error = 10 * torch.log10(exact.pow(2).sum() / (half - exact).pow(2).sum())
    assert error > (35 if dtype == torch.bfloat16 else 53)
