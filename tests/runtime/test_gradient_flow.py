"""Training on layers that pass no right gradient to their input is refused, and only where it would go wrong."""

from typing import Any

import pytest
import torch
from diffusers.hooks import apply_layerwise_casting
from torch import Tensor, nn

import diffadapt
from diffadapt.runtime.adapter import Adapter
from tests.support.bases import BASES, INPUTS, silenced
from tests.support.cases import for_each
from tests.support.versions import imported

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

NAMED = {base.name: base for base in BASES}


class Quantised(nn.Linear):
    """A layer with a scaled float8 weight whose output has lost its path back to the input if `cut`."""

    def __init__(self, features: int = 8, cut: bool = True) -> None:
        super().__init__(features, features)
        self.cut = cut
        self.weight.data = self.weight.data.to(torch.float8_e4m3fn)
        self.register_buffer("weight_scale", torch.ones(()))
        self.requires_grad_(False)

    def forward(self, input: Tensor) -> Tensor:
        input = input.detach() if self.cut else input
        return nn.functional.linear(input, self.weight.float(), self.bias)


class Right(Quantised):
    """The same with a right gradient."""

    def __init__(self) -> None:
        super().__init__(cut=False)


def floats() -> nn.Linear:
    return nn.Linear(8, 8).requires_grad_(False)


def train(model: nn.Module, **options: Any) -> Adapter:
    return diffadapt.add_adapter(model, diffadapt.LoraConfig(rank=2, init=False, **options), name="mine")


def gradients(adapter: Adapter, model: nn.Module, features: int = 8) -> list[float]:
    """Return the size of the gradient in every layer of an adapter after a backward pass."""
    with silenced():
        model(torch.randn(3, features)).square().sum().backward()
    return [max(float(p.grad.abs().max()) for p in layer.parameters()) for layer in adapter.layers.values()]


def test_a_layer_that_drops_the_gradient_is_refused_wherever_it_may_be_above_an_adapter() -> None:
    for layers, targets in (
        ([Quantised(), Quantised()], "all-linear"),
        ([floats(), Quantised()], "all-linear"),
        ([floats(), Quantised(), floats()], ["0"]),
    ):
        model = nn.Sequential(*layers)
        before = dict(model.named_modules())
        with pytest.raises(
            diffadapt.AdapterError, match=r"^[01]\b.*Quantised, .* pass no gradient to their input, .* unquantised"
        ):
            train(model, target_modules=targets)
        assert dict(model.named_modules()) == before
        assert diffadapt.adapters(model).names == []


def test_the_message_counts_the_layers() -> None:
    model = nn.Sequential(*(Quantised() for _ in range(4)))
    with pytest.raises(diffadapt.AdapterError, match=r"^0 and 3 more layers \(Quantised"):
        train(model, target_modules="all-linear")


def test_what_needs_no_gradient_from_such_a_layer_is_trained() -> None:
    model = nn.Sequential(Quantised())
    assert min(gradients(train(model, target_modules="all-linear"), model)) > 0
    # A rotation of the input learns through the layer's own gradient.
    with pytest.raises(diffadapt.AdapterError, match=r"^0 .*pass no gradient"):
        diffadapt.add_adapter(nn.Sequential(Quantised()), diffadapt.OFTConfig(block_size=4, target_modules=["0"]))
    model = nn.Sequential(floats(), Right(), floats())
    assert min(gradients(train(model, target_modules="all-linear"), model)) > 0


def test_layers_that_are_quantised_after_the_adapter_was_added_are_noticed_in_training() -> None:
    model = nn.Sequential(floats(), floats())
    adapter = train(model, target_modules="all-linear")
    assert min(gradients(adapter, model)) > 0
    model[1] = Quantised()
    with pytest.raises(diffadapt.AdapterError, match=r"^1 .*pass no gradient"):
        model(torch.randn(3, 8))
    with torch.no_grad():
        model(torch.randn(3, 8))
    adapter.requires_grad_(False)
    model(torch.randn(3, 8))


def test_a_float_model_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffadapt.runtime.gradient_flow.gradient_problem", lambda *_: pytest.fail("asked a layer"))
    model = nn.Sequential(floats(), floats())
    assert min(gradients(train(model, target_modules="all-linear"), model)) > 0


@for_each(name=("torchao int8", "torchao int8 dynamic"))
def test_a_model_of_torchao(name: str) -> None:
    imported("torchao")
    layer = NAMED[name].layer()
    model = nn.Sequential(nn.Linear(INPUTS, INPUTS).requires_grad_(False), layer)
    if name == "torchao int8":
        adapter = train(model, target_modules="all-linear")
        assert min(gradients(adapter, model, INPUTS)) > 0
        return
    with pytest.raises(diffadapt.AdapterError, match=r"^1 \(Linear, .*pass no gradient .*quantise the weights alone"):
        train(model, target_modules="all-linear")


def test_bitsandbytes_weights_that_were_rewritten_for_inference() -> None:
    def model() -> nn.Module:
        lower = nn.Linear(INPUTS, INPUTS).requires_grad_(False)
        return nn.Sequential(lower, NAMED["bitsandbytes nf4"].layer())

    used, fresh = model().eval(), model()
    with torch.no_grad(), silenced():
        used(torch.randn(2, INPUTS))
    if not getattr(used[1].weight.quant_state, "packing_format_for_cpu", False):
        pytest.skip("bitsandbytes rewrites no weights on this CPU")
    with pytest.raises(diffadapt.AdapterError, match=r"^1 .*bitsandbytes 4-bit.* load the model again, and call train"):
        train(used, target_modules="all-linear")
    adapter = train(fresh, target_modules="all-linear")
    assert min(gradients(adapter, fresh, INPUTS)) > 0
    fresh.eval()
    with torch.no_grad(), silenced():
        fresh(torch.randn(2, INPUTS))
    with pytest.raises(diffadapt.AdapterError, match=r"^1 .*bitsandbytes has rewritten their weights for inference"):
        fresh.train()(torch.randn(2, INPUTS))


def test_a_convolution_under_layerwise_casting_warns_that_its_backward_fails() -> None:
    model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)).requires_grad_(False)
    apply_layerwise_casting(model, storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    with pytest.warns(UserWarning, match=r"^0 and 1 more .*cannot compute the gradient.*skip_modules_pattern"):
        train(model, target_modules="all-conv")
