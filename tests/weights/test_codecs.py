"""What stored weights mean, backend by backend: decoded as the layer's own forward does it, and encoded again."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffadapt import AdapterError, weights
from tests.support.bases import BASES, INPUTS, OUT, Base, silenced, values

pytestmark = pytest.mark.filterwarnings("ignore")


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def computed(layer: nn.Module) -> Tensor:
    """The weight that a layer computes with, from unit vectors."""
    with torch.no_grad(), silenced():
        return (layer(torch.eye(INPUTS)) - layer(torch.zeros(1, INPUTS))).float().T


@pytest.mark.parametrize("base", BASES, ids=lambda base: base.name)
def test_values_are_those_that_the_layer_computes_with(base: Base) -> None:
    layer = base.layer()
    for _ in range(2):
        # Also after a forward: bitsandbytes may store the weight in another layout then.
        found = weights.decoded(layer, "weight")
        assert found.dtype == torch.float32
        assert found.shape == (OUT, INPUTS)
        assert relative(found, values()[0]) < base.error
        # Layers that quantise their input, too, are a little off their own weight.
        assert relative(found, computed(layer)) < 0.03
    assert weights.unreadable(layer, "weight") is None


@pytest.mark.parametrize("base", [base for base in BASES if base.merges], ids=lambda base: base.name)
def test_values_can_be_written_and_undone_bit_for_bit(base: Base) -> None:
    layer = base.layer()
    before = computed(layer)
    codec = weights.codec_of(layer, "weight")
    parts = codec.parts(layer, "weight")
    kept = {name: part.clone() for name, part in parts.items()}
    wanted = weights.decoded(layer, "weight") + 0.3 * values(1)[0]
    assert codec.encode is not None
    contents = codec.encode(layer, "weight", wanted)
    assert contents.keys() == parts.keys()
    weights.write(parts, contents)
    assert relative(computed(layer), wanted) < base.error
    assert relative(weights.decoded(layer, "weight"), wanted) < base.error
    weights.write(parts, kept)
    assert torch.equal(computed(layer), before)


class Tripled(nn.Linear):
    """A layer that computes with something else than its weight."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 3


class Conditioned(nn.Linear):
    """A layer that cannot be run by itself, and holds a float8 weight with a scale."""

    def forward(self, input: Tensor, condition: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(input) * condition


def test_a_layer_that_computes_with_something_else_than_its_weight_is_refused() -> None:
    layer = Tripled(8, 8)
    with pytest.raises(AdapterError, match="its own forward does not compute with"):
        weights.decoded(layer, "weight")
    assert "does not compute with" in str(weights.unreadable(layer, "weight"))


@pytest.mark.parametrize("name", ["weight_scale", "scale_weight", "weight_scale_inv"])
@pytest.mark.parametrize("shape", [(), (1,), (6,), (6, 1), (2, 2)])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float16])
def test_a_scale_beside_the_weight_counts_in_any_class(name: str, shape: Any, dtype: torch.dtype) -> None:
    layer = Conditioned(4, 6)
    generator = torch.Generator().manual_seed(0)
    stored = torch.randn(6, 4, generator=generator).to(dtype)
    scale = torch.rand(shape, generator=generator) + 0.5
    layer.weight = nn.Parameter(stored, requires_grad=False)
    layer.register_buffer(name, scale)
    spread = scale.repeat_interleave(3, 0).repeat_interleave(2, 1) if shape == (2, 2) else scale.view(-1, 1)
    torch.testing.assert_close(weights.decoded(layer, "weight"), stored.float() * spread)


def test_a_scale_of_another_shape_is_refused() -> None:
    layer = Conditioned(4, 6)
    layer.register_buffer("weight_scale", torch.ones(5))
    with pytest.raises(AdapterError, match=r"a scale of shape \(5,\) beside a weight of shape \(6, 4\)"):
        weights.decoded(layer, "weight")


def test_the_meta_device_has_no_values() -> None:
    layer = nn.Linear(4, 4, device="meta")
    with pytest.raises(AdapterError, match="on the meta device"):
        weights.decoded(layer, "weight")
    assert "meta device" in str(weights.unreadable(layer, "weight"))


def test_plain_layers_are_read_as_they_are() -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        layer = nn.Linear(4, 4, dtype=dtype)
        found = weights.decoded(layer, "weight")
        assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert torch.equal(found, layer.weight.detach().to(found.dtype))
