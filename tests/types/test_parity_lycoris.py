"""LoRA, LoHa and LoKr against LyCORIS, with random tensors of every variant."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from diffadapt.types.adapter_type import AdapterType
from diffadapt.types.layer_spec import LayerSpec
from diffadapt.types.loha import LOHA
from diffadapt.types.lokr import LOKR
from diffadapt.types.lora import LORA
from tests.support.versions import needs

functional = pytest.importorskip("lycoris.functional")

Draw = Callable[..., Tensor]


@dataclass(frozen=True)
class Case:
    """A variant of an adapter type for a layer, and the weight change that LyCORIS computes."""

    adapter_type: AdapterType
    layer: Callable[[], nn.Module]
    shapes: dict[str, tuple[int, ...]]
    reference: Callable[[dict[str, Tensor]], Tensor]


def _linear() -> nn.Module:
    return nn.Linear(24, 40)


def _conv() -> nn.Module:
    return nn.Conv2d(12, 20, 3, stride=2, padding=1)


def _locon(t: dict[str, Tensor]) -> Tensor:
    needs("lycoris-lora", "4.0", "lycoris.functional.locon")
    return functional.locon.diff_weight(t["lora_down"], t["lora_up"], t.get("lora_mid"))


def _loha(t: dict[str, Tensor]) -> Tensor:
    cores = (t.get("hada_t1"), t.get("hada_t2"))
    return functional.loha.diff_weight(*(t[f"hada_w{n}_{side}"] for n in "12" for side in "ba"), *cores)


def _lokr(t: dict[str, Tensor]) -> Tensor:
    names = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
    # The function divides by the number of columns of the first `a` factor.
    rank = next((t[name].shape[1] for name in ("lokr_w1_a", "lokr_w2_a") if name in t), 1)
    return functional.lokr.diff_weight(*(t.get(name) for name in names), gamma=rank)


def _hada(out: int, columns: int, rank: int) -> dict[str, tuple[int, ...]]:
    return {f"hada_w{n}_{side}": (out, rank) if side == "a" else (rank, columns) for n in "12" for side in "ab"}


def _hada_tucker(out: int, columns: int, rank: int) -> dict[str, tuple[int, ...]]:
    factors = {f"hada_w{n}_{side}": (rank, out if side == "a" else columns) for n in "12" for side in "ab"}
    return {**factors, "hada_t1": (rank, rank, 3, 3), "hada_t2": (rank, rank, 3, 3)}


CASES = {
    "lora-linear": Case(LORA, _linear, {"lora_down": (4, 24), "lora_up": (40, 4)}, _locon),
    "lora-conv": Case(LORA, _conv, {"lora_down": (4, 12, 3, 3), "lora_up": (20, 4, 1, 1)}, _locon),
    "lora-tucker": Case(
        LORA, _conv, {"lora_down": (4, 12, 1, 1), "lora_mid": (4, 4, 3, 3), "lora_up": (20, 4, 1, 1)}, _locon
    ),
    "loha-linear-low-rank": Case(LOHA, _linear, _hada(40, 24, 3), _loha),
    "loha-linear-dense": Case(LOHA, _linear, _hada(40, 24, 6), _loha),
    "loha-conv-low-rank": Case(LOHA, _conv, _hada(20, 108, 3), _loha),
    "loha-conv-dense": Case(LOHA, _conv, _hada(20, 108, 6), _loha),
    "loha-tucker": Case(LOHA, _conv, _hada_tucker(20, 12, 3), _loha),
    "lokr-whole": Case(LOKR, _linear, {"lokr_w1": (4, 4), "lokr_w2": (10, 6)}, _lokr),
    "lokr-low-rank-w2": Case(LOKR, _linear, {"lokr_w1": (5, 4), "lokr_w2_a": (8, 2), "lokr_w2_b": (2, 6)}, _lokr),
    "lokr-low-rank-both": Case(
        LOKR,
        _linear,
        {"lokr_w1_a": (4, 2), "lokr_w1_b": (2, 4), "lokr_w2_a": (10, 2), "lokr_w2_b": (2, 6)},
        _lokr,
    ),
    "lokr-conv-whole": Case(LOKR, _conv, {"lokr_w1": (4, 3), "lokr_w2": (5, 4, 3, 3)}, _lokr),
    "lokr-conv-low-rank": Case(LOKR, _conv, {"lokr_w1": (4, 3), "lokr_w2_a": (5, 2), "lokr_w2_b": (2, 4, 3, 3)}, _lokr),
    "lokr-tucker": Case(
        LOKR,
        _conv,
        {"lokr_w1": (4, 3), "lokr_w2_a": (2, 5), "lokr_w2_b": (2, 4), "lokr_t2": (2, 2, 3, 3)},
        _lokr,
    ),
}


def drawn(case: Case) -> tuple[dict[str, Tensor], Tensor]:
    generator = torch.Generator().manual_seed(3)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in case.shapes.items()}
    input = torch.randn((2, 24) if case.layer is _linear else (2, 12, 9, 9), generator=generator)
    return tensors, input


@pytest.mark.parametrize("name", CASES)
def test_weight_change_and_output_are_those_of_lycoris(name: str) -> None:
    case = CASES[name]
    spec = LayerSpec.of(case.layer())
    assert spec is not None
    tensors, input = drawn(case)
    expected = case.reference(tensors).view(spec.weight_shape)
    fitted = case.adapter_type.fit(tensors, spec)
    delta = case.adapter_type.delta_weight(fitted, spec)
    torch.testing.assert_close(delta, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    output = case.adapter_type.delta_output(fitted, spec, input=input, gate=torch.tensor(0.5))
    reference = 0.5 * spec.op(input, expected)
    torch.testing.assert_close(output, reference, rtol=1e-5, atol=1e-5 * float(reference.abs().max()))
    assert (delta.flip(0) - expected).norm() > 0.5 * expected.norm()


@pytest.mark.parametrize("name", CASES)
def test_gradients_of_the_factored_path_are_those_of_the_weight(name: str) -> None:
    case = CASES[name]
    spec = LayerSpec.of(case.layer())
    assert spec is not None
    tensors, input = drawn(case)
    gradients: list[list[Tensor]] = []
    for factored in (True, False):
        leaves = {key: tensor.double().requires_grad_() for key, tensor in tensors.items()}
        fitted, x = case.adapter_type.fit(leaves, spec), input.double()
        gate = torch.tensor(0.5, dtype=torch.float64)
        if factored:
            output = case.adapter_type.delta_output(fitted, spec, input=x, gate=gate)
        else:
            output = spec.op(x, case.adapter_type.delta_weight(fitted, spec)) * gate
        output.pow(2).sum().backward()
        gradients.append([leaf.grad for leaf in leaves.values() if leaf.grad is not None])
    for ours, reference in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-9, atol=1e-9)
