"""Every adapter type in regions, on every kind of layer, in float64.

A position with the mask m has to get what strength x m gives everywhere.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from diffadapt.runtime.attach import detach_, refresh_
from diffadapt.runtime.bank import bank_of
from diffadapt.runtime.regions.fields import Regions
from diffadapt.runtime.regions.token_layout import Picture, TokenLayout, Tokens
from tests.support.compare import assert_same
from tests.support.variants import Case, Variant, on_layers

SEQUENCES = ("linear", "linear-8-to-16", "conv1d", "embedding", "norm-layer")
PICTURES = ("conv2d", "conv2d-4-to-8", "conv2d-grouped", "conv3d", "norm-group")
VALUES = (0.0, 0.25, 1.0)
STRENGTH = 0.5


def enter(case: Case, masks: Mapping[str, Tensor], length: int) -> None:
    """Give the adapters masks over a picture that is a row of `length` tokens, or that layers get with two axes."""
    layout = TokenLayout(lambda model, call: Picture((), (Tokens("picture", length, (1, length)),)), {})
    bank = bank_of(case.root)
    assert bank is not None
    bank.call.regions = Regions({name: mask.double() for name, mask in masks.items()}, layout)
    refresh_(case.root)


def output(case: Case) -> Tensor:
    return case.root(case.input).clone()


@torch.no_grad()
@on_layers([*SEQUENCES, *PICTURES])
def test_a_position_has_the_change_of_its_own_strength(variant: Variant, layer: str) -> None:
    case = Case(variant, layer)
    base = output(case)
    channels = 1 if layer.startswith("conv") or layer == "norm-group" else -1
    positions = base.select(channels, 0)[0]
    shape = tuple(positions.shape[-2:]) if positions.ndim > 1 else (1, max(positions.numel(), 1))
    chosen = torch.randint(len(VALUES), (1, *shape), generator=case.generator)
    mask = torch.tensor(VALUES)[chosen]
    tensors = case.random()
    adapter = case.attach({name: tensor.clone() for name, tensor in tensors.items()}, strength=STRENGTH)
    full = output(case)
    assert (full - base).abs().max() > 1e-3
    alone: list[Tensor] = []
    for value in (*VALUES, float(mask.mean())):
        adapter.set_strengths([STRENGTH * value])
        alone.append(output(case))
    adapter.set_strengths([STRENGTH])
    enter(case, {"a": mask}, shape[1])
    masked = output(case)
    if base.ndim == 2:
        expected = alone[-1]
    else:
        index = chosen[0] if positions.ndim > 1 else chosen[0, 0]
        index = index.expand(positions.shape)
        index = index.unsqueeze(channels if channels < 0 else 0)
        expected = alone[0]
        for number, value in enumerate(alone[:-1]):
            expected = torch.where(index == number, value, expected)
    assert_same(masked, expected, 1e-10)
    for value, whole in ((1.0, full), (0.0, base)):
        enter(case, {"a": torch.full((1, 3, 2), value)}, shape[1])
        assert torch.equal(output(case), whole)
    case.attach(tensors, "b", STRENGTH)
    enter(case, {"a": mask, "b": 1 - mask}, shape[1])
    assert_same(output(case), full, 1e-10)
    enter(case, {"a": mask, "b": torch.zeros(1, 1, 1)}, shape[1])
    assert_same(output(case), masked, 1e-10)
    detach_(case.root, "b")
    bank = bank_of(case.root)
    assert bank is not None
    bank.call.regions = None
    refresh_(case.root)
    assert torch.equal(output(case), full)
