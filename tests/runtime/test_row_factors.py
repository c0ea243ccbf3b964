"""Without slots, every row of a batch with many adapters is multiplied by the factors of its own adapters only."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import diffadapt
from diffadapt.runtime import compose, row_factors
from diffadapt.runtime.bank import bank_of
from tests.support.compare import assert_differs, assert_same
from tests.support.versions import needs


def model() -> nn.Module:
    """A convolution with a stride and reflected edges, one of a kernel of 1, and linear layers."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1, padding_mode="reflect"),
        nn.Conv2d(8, 6, 1),
        nn.Flatten(2),
        nn.Linear(16, 12),
        nn.Linear(12, 5, bias=False),
    ).double()


def with_adapters(host: nn.Module) -> list[str]:
    """Load six adapters of three types and different ranks; return their names."""
    layers = ["0", "1", "3", "4"]
    configs = {
        "a": diffadapt.LoraConfig(rank=2, target_modules=layers, init=False),
        "b": diffadapt.LoraConfig(rank=5, target_modules=layers, init=False),
        "c": diffadapt.LoHaConfig(rank=2, target_modules=layers, init=False),
        "d": diffadapt.LoKrConfig(rank=1, factor=2, target_modules=layers, init=False),
        "e": diffadapt.LoraConfig(rank=3, use_dora=True, target_modules=layers, init=False),
        "f": diffadapt.LoraConfig(rank=1, target_modules=layers[2:], init=False),
    }
    for name, config in configs.items():
        diffadapt.add_adapter(host, config, name).double().eval().requires_grad_(False)
    return list(configs)


def test_every_row_is_what_it_is_alone(monkeypatch) -> None:
    host = model()
    base, input = model(), torch.randn(7, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    a, b, c, d, e, f = with_adapters(host)
    mixes = [{a: 1.0}, {b: 0.5, c: 0.7}, {}, {d: 1.0}, {e: 0.6, f: -1.0}, {f: 2.0}, {c: 0.0, a: 0.3}]
    adapters = diffadapt.adapters(host)
    picked: list[row_factors.RowFactors | None] = []

    def counted(*args: Any) -> row_factors.RowFactors | None:
        picked.append(row_factors.row_factors(*args))
        return picked[-1]

    monkeypatch.setattr(compose, "row_factors", counted)
    alone: list[Tensor] = []
    for row, mix in enumerate(mixes):
        with torch.no_grad(), adapters.activated(mix):
            alone.append(host(input[row : row + 1]))
    picked.clear()
    for enabled in (False, True):
        with torch.set_grad_enabled(enabled), adapters.per_sample(mixes):
            together = host(input)
            # A block inside has gates of its own, and afterwards the outer ones are back.
            with adapters.per_sample(mixes[::-1]):
                assert_same(host(input.flip(0)), together.flip(0), 1e-12)
            assert_same(host(input), torch.cat(alone), 1e-12)
        assert_same(together, torch.cat(alone), 1e-12)
    assert len(picked) == 24
    assert all(own is not None and own.adding for own in picked)
    differences = (together - base(input)).abs().flatten(1).amax(1)
    assert differences[2] < 1e-12
    assert all(difference > 1e-2 for row, difference in enumerate(differences) if row != 2)


def test_few_adapters_per_row_share_one_product() -> None:
    host = model()
    names = with_adapters(host)
    input = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    everything = dict.fromkeys(names, 0.5)
    with torch.no_grad(), diffadapt.adapters(host).per_sample([everything, {}]):
        mixed = host(input)
    assert_same(mixed[1:], model()(input[1:]), 1e-12)
    with torch.no_grad(), diffadapt.adapters(host).activated(everything):
        assert_same(mixed[:1], host(input[:1]), 1e-12)
    assert_differs(mixed[:1], model()(input[:1]))


def test_what_rows_pick_follows_every_change_of_an_adapter() -> None:
    """Factors are put together once for a block, so each of these changes inside a block has to be noticed."""
    host = model()
    input = torch.randn(7, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    names = with_adapters(host)
    bank = bank_of(host)
    assert bank is not None
    other = {"0.lora_A.weight": torch.randn(3, 3, 3, 3).double(), "0.lora_B.weight": torch.randn(8, 3, 1, 1).double()}

    def write(name: str) -> None:
        for parameter in bank.adapters[name].parameters():
            parameter.mul_(1.1)

    def replace(name: str) -> None:
        for parameter in bank.adapters[name].parameters():
            parameter.data = parameter.data * 0.9

    def swap() -> None:
        diffadapt.adapters(host).hotswap("a", other, dtype=torch.float64)

    changes: dict[str, Callable[[], object]] = {
        **{f"write {name}": partial(write, name) for name in names},
        **{f"replace {name}": partial(replace, name) for name in names},
        "the base weight": lambda: host[0].weight.add_(0.05),  # type: ignore[operator,union-attr]
        "hotswap": swap,
        "strengths": lambda: bank.adapters["b"].set_strengths([[0.1]] * len(input)),
        "other samples": lambda: bank.adapters["b"].set_strengths([[0.5], [0.2], *[[0.0]] * 5]),
    }
    with diffadapt.adapters(host).per_sample([*({name: 0.8} for name in names), {}]):
        with torch.no_grad():
            before = host(input)
            for change in changes.values():
                change()
                after = host(input)
                bank.call.row_factors.clear()
                assert_same(after, host(input), 1e-12)
                assert_differs(after, before, 1e-3)
                before = after
        bank.adapters["b"].requires_grad_(True)
        host(input).sum().backward()
        assert all(float(parameter.grad.abs().sum()) > 0 for parameter in bank.adapters["b"].parameters())
    assert not bank.call.row_factors


@pytest.mark.slow
def test_rows_meet_the_ranks_of_their_own_adapters_in_slots(counter: CompileCounterWithBackend) -> None:
    # Seen with 2.6, without adapters, too: the layers are compiled one by one.
    needs("torch", "2.13", "a bare nn.Sequential with a disabled hook in one graph")
    host = model()
    names = with_adapters(host)
    input = torch.randn(4, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    a, b, c, d, e, f = names
    few: list[list[dict[str, float]]] = [
        [{a: 1.0}, {b: 0.5}, {}, {c: 1.0, d: 0.7}],
        [{e: 0.6}, {f: -1.0, a: 0.1}, {d: 1.0}, {}],
    ]
    many = [{a: 1.0, b: 0.5, c: 0.2}, {d: 1.0}, {}, {f: 1.0}]
    adapters = diffadapt.adapters(host)
    expected: list[Tensor] = []
    with torch.no_grad():
        for mixes in (*few, many):
            with adapters.per_sample(mixes):
                expected.append(host(input[: len(mixes)]))
    adapters.prepare_hotswap(slots=6, samples=4, adapters_per_sample=2)
    bank = bank_of(host)
    assert bank is not None
    assert bank.reservation is not None
    slot = bank.reservation.slots["3"][0]
    compiled = torch.compile(host, backend=counter, dynamic=False)

    def check(mixes: list[dict[str, float]], wanted: Tensor, ranks: tuple[int, ...] | None) -> None:
        with torch.no_grad(), adapters.per_sample(mixes):
            assert ranks == (None if slot.picks is None else slot.picks.shape)
            found = compiled(input[: len(mixes)])
            assert_same(found, wanted, 1e-12)
            assert_same(host(input[: len(mixes)]), wanted, 1e-12)

    for mixes, wanted in zip(few, expected, strict=False):
        check(mixes, wanted, (4, 10))
    assert counter.frame_count == 1
    # More than were reserved for: another graph, and the same result.
    with torch._dynamo.config.patch(error_on_recompile=False):
        check(many, expected[-1], None)
    check(few[0], expected[0], (4, 10))
    assert counter.frame_count == 2
