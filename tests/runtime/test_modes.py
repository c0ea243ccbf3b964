"""Global modes of torch during loading: inference mode and another default dtype; and the dtype adapters get."""

from collections.abc import Generator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

import diffadapt
from diffadapt.runtime.bank import bank_of
from diffadapt.runtime.foreign_hooks import compute_dtype
from tests.support.cases import for_each
from tests.support.compare import assert_same

INPUT = torch.ones(2, 8)


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8)).requires_grad_(False)


def tensors(kind: str) -> dict[str, Tensor]:
    torch.manual_seed(1)
    made = {"0.lora_A.weight": torch.randn(2, 8), "0.lora_B.weight": torch.randn(8, 2)}
    return {**made, "0.lora_magnitude_vector": torch.ones(8)} if kind == "dora" else made


@contextmanager
def default_dtype(dtype: torch.dtype) -> Generator[None, None, None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@for_each(kind=("lora", "dora"), slots=(False, True))
def test_what_was_loaded_in_inference_mode_works_outside(kind: str, slots: bool) -> None:
    target, expected = model(), model()
    with torch.inference_mode():
        adapters = diffadapt.adapters(target)
        if slots:
            adapters.prepare_hotswap(tensors(kind), slots=1, samples=2)
        adapters.load(tensors(kind), "a")
        target(INPUT)
    diffadapt.load_adapter(expected, tensors(kind), "a")
    for strength in (0.5, 0.25):
        for each in (adapters, diffadapt.adapters(expected)):
            each.activate({"a": strength})
        assert_same(target(INPUT), expected(INPUT))
    with torch.inference_mode(), adapters.per_sample([{"a": 1.0}, {}], images=1):
        target(INPUT)
    adapters.activate({"a": 1.0})
    diffadapt.adapters(expected).activate({"a": 1.0})
    assert_same(target(INPUT), expected(INPUT))
    assert not any(parameter.is_inference() for parameter in target.parameters())
    with torch.inference_mode():
        adapters.merge("a")
    adapters.clear()
    assert torch.equal(target(INPUT), model()(INPUT))


def test_what_was_loaded_in_inference_mode_can_be_trained() -> None:
    target = model()
    with torch.inference_mode():
        adapter = diffadapt.add_adapter(target, diffadapt.LoraConfig(rank=2, target_modules="all-linear"), name="a")
    target(INPUT).sum().backward()
    assert any(parameter.grad is not None for parameter in adapter.parameters())


@for_each(kind=("lora", "dora"), slots=(False, True))
def test_strengths_are_exact_under_another_default_dtype(kind: str, slots: bool) -> None:
    expected, target, given = model(), model(), tensors(kind)
    diffadapt.load_adapter(expected, given, "a", scale=0.7)
    with default_dtype(torch.bfloat16):
        adapters = diffadapt.adapters(target)
        if slots:
            adapters.prepare_hotswap(given, slots=1)
        adapters.load(given, "a", scale=0.7)
        gates = bank_of(target).adapters["a"].gates  # type: ignore[union-attr]
        assert gates.dtype == torch.float32
        assert gates.tolist() == pytest.approx([0.7], rel=1e-7)
        assert_same(target(INPUT), expected(INPUT), 1e-6)
        with adapters.per_sample([{"a": 0.7}, {"a": 0.7}], images=1) if not slots else torch.no_grad():
            assert_same(target(INPUT), expected(INPUT), 1e-6)


class Tables(nn.Module):
    """A model in half precision that keeps its first table and its norms in float32, as Wan does."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.scale_shift_table = nn.Parameter(torch.zeros(6, 8))
        self.time = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.layers = nn.ModuleList(nn.Linear(8, 8, dtype=dtype) for _ in range(4))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_adapters_get_the_dtype_in_which_most_layers_compute(dtype: torch.dtype) -> None:
    target = Tables(dtype)
    assert compute_dtype(list(target.modules())) == dtype
    diffadapt.load_adapter(target, {k.replace("0.", "layers.0."): t for k, t in tensors("lora").items()}, "a")
    assert {p.dtype for p in bank_of(target).parameters()} == {dtype}  # type: ignore[union-attr]


def test_packed_weights_do_not_decide() -> None:
    class Packed(nn.Linear):
        compute_dtype: torch.dtype

    layer = Packed(8, 8, dtype=torch.bfloat16)
    layer.compute_dtype = torch.float32
    norm = nn.LayerNorm(8, dtype=torch.bfloat16)
    assert compute_dtype([layer, norm]) == torch.float32
