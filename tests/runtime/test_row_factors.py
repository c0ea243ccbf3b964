"""Without slots, every row of a batch with many adapters is multiplied by the factors of its own adapters only."""

import torch
from torch import Tensor, nn

import diffadapt
from diffadapt.runtime import compose, row_factors
from tests.support.compare import assert_differs, assert_same


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
    picked: list[Tensor | None] = []

    def counted(*args: object) -> Tensor | None:
        picked.append(row_factors.add_by_row(*args))
        return picked[-1]

    monkeypatch.setattr(compose, "add_by_row", counted)
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
    assert all(output is not None for output in picked)
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
