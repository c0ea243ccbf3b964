"""Stored weights of every backend: decoded to the values with which the layer computes, and encoded again."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffadapt import AdapterError, weights
from tests.support.bases import CAST, EVERY, SHAPES, Base, values
from tests.support.cases import for_each
from tests.support.compare import relative_error

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("base", EVERY, ids=lambda base: base.name)
def test_decoded_values_are_those_with_which_the_layer_computes(base: Base) -> None:
    layer = base.layer().eval()
    for _ in range(2):
        # Also after a forward pass, which may change the layout in which bitsandbytes stores the weight.
        found = weights.decoded(layer, "weight")
        assert found.dtype == torch.float32
        assert found.shape == SHAPES[base.kind]
        assert 0 < relative_error(found, values(0, base.kind)[0]) < base.error
        # Layers that also quantise their input do not compute exactly with their weight.
        assert relative_error(base.canonical(found).double(), base.computed(layer)[0]) < (5e-3 if base.exact else 0.03)
    assert weights.unreadable(layer, "weight") is None


@pytest.mark.parametrize(
    "base", [base for base in EVERY if base.merges and base not in CAST], ids=lambda base: base.name
)
def test_values_can_be_written_and_undone_bit_for_bit(base: Base) -> None:
    layer = base.layer().eval()
    before, _ = base.computed(layer)
    codec = weights.codec_of(layer, "weight")
    parts = codec.parts(layer, "weight")
    kept = {name: part.clone() for name, part in parts.items()}
    wanted = weights.decoded(layer, "weight") + 0.3 * values(1, base.kind)[0]
    assert codec.encode is not None
    contents = codec.encode(layer, "weight", wanted)
    assert contents.keys() == parts.keys()
    weights.write(parts, contents)
    assert relative_error(base.computed(layer)[0], base.canonical(wanted).double()) < base.error
    assert relative_error(weights.decoded(layer, "weight"), wanted) < base.error
    weights.write(parts, kept)
    assert torch.equal(base.computed(layer)[0], before)


class Tripled(nn.Linear):
    """A layer that does not compute with its weight."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 3


class Conditioned(nn.Linear):
    """A layer that cannot be run alone, and has a float8 weight with a scale."""

    def forward(self, input: Tensor, condition: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(input) * condition


def test_a_layer_that_does_not_compute_with_its_weight_is_refused() -> None:
    layer = Tripled(8, 8)
    with pytest.raises(AdapterError, match="its own forward does not compute with"):
        weights.decoded(layer, "weight")
    assert "does not compute with" in str(weights.unreadable(layer, "weight"))


@pytest.mark.parametrize("name", ["weight_scale", "scale_weight", "weight_scale_inv"])
@for_each(shape=[(), (1,), (6,), (6, 1), (2, 2)], dtype=[torch.float8_e4m3fn, torch.float8_e5m2, torch.float16])
def test_a_scale_next_to_the_weight_is_applied_in_any_class(name: str, shape: Any, dtype: torch.dtype) -> None:
    layer = Conditioned(4, 6)
    generator = torch.Generator().manual_seed(0)
    stored = torch.randn(6, 4, generator=generator).to(dtype)
    scale = torch.rand(shape, generator=generator) + 0.5
    layer.weight = nn.Parameter(stored, requires_grad=False)
    layer.register_buffer(name, scale)
    spread = scale.repeat_interleave(3, 0).repeat_interleave(2, 1) if shape == (2, 2) else scale.view(-1, 1)
    torch.testing.assert_close(weights.decoded(layer, "weight"), stored.float() * spread)
    # Values in another range get other scales.
    codec, wanted = weights.codec_of(layer, "weight"), stored.float() * spread * 100
    assert codec.encode is not None
    weights.write(codec.parts(layer, "weight"), codec.encode(layer, "weight", wanted))
    assert relative_error(weights.decoded(layer, "weight"), wanted) < 0.1


def test_as_many_blocks_as_rows_are_blocks() -> None:
    layer = Conditioned(4, 4)
    layer.weight = nn.Parameter(torch.ones(4, 4).to(torch.float8_e4m3fn), requires_grad=False)
    layer.register_buffer("weight_scale_inv", torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    expected = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).repeat_interleave(2, 0).repeat_interleave(2, 1)
    assert torch.equal(weights.decoded(layer, "weight"), expected)


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


def test_float_weights_are_read_unchanged() -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        layer = nn.Linear(4, 4, dtype=dtype)
        found = weights.decoded(layer, "weight")
        assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert torch.equal(found, layer.weight.detach().to(found.dtype))
