"""Random sequences of all operations on loaded adapters, with and without slots, merged and unmerged.

After every step the output must equal that of a new model with the same adapters. A refused operation changes nothing.
"""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import diffadapt
from diffadapt import AdapterError
from diffadapt.runtime.adapter_layer import BANK
from tests.support.compare import assert_same
from tests.support.swaps import CONFIGS, ON_CONVOLUTIONS, make

SAMPLES = 3
STEPS = 20
PREFIXES = ("down_blocks", "mid_block", "up_blocks", "down_blocks.0", "up_blocks.1")
IMAGES = torch.randn(SAMPLES, 8, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class Block(nn.Module):
    """A block whose layers have the names that `CONFIGS` targets."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(8, 8, 3, padding=1)
        self.to_q, self.to_k, self.to_v = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 16)
        self.linear_1, self.fc1 = nn.Linear(16, 8, bias=False), nn.Linear(8, 8)

    def forward(self, images: Tensor) -> Tensor:
        tokens = torch.tanh(self.conv1(images)).flatten(2).transpose(1, 2)
        values = self.linear_1(torch.tanh(self.to_v(tokens))) * torch.tanh(self.to_q(tokens) + self.to_k(tokens))
        return images + self.fc1(values).transpose(1, 2).reshape(images.shape)


class Net(nn.Module):
    """A model of three stages with two blocks each."""

    def __init__(self) -> None:
        super().__init__()
        for stage in ("down_blocks", "mid_block", "up_blocks"):
            self.add_module(stage, nn.Sequential(Block(), Block()))

    def forward(self, images: Tensor) -> Tensor:
        for stage in self.children():
            images = stage(images)
        return images


def build() -> nn.Module:
    torch.manual_seed(0)
    return Net().double().requires_grad_(False)


def scale(choose: random.Random) -> Any:
    """Return a random strength, or random strengths by block."""
    number = lambda: round(choose.uniform(-1.5, 1.5), 2)  # noqa: E731
    return number() if choose.random() < 0.4 else {prefix: number() for prefix in choose.sample(PREFIXES, 2)}


class Play:
    """A model, and the expected state of its adapters: name -> [source, strength, whether it is active]."""

    def __init__(self, choose: random.Random, sources: dict[str, Path]) -> None:
        self.choose, self.sources = choose, sources
        self.model = build()
        self.adapters = diffadapt.adapters(self.model)
        self.expected: dict[str, list[Any]] = {}
        self.slots = choose.randint(0, 3)
        if self.slots:
            samples = choose.choice((0, SAMPLES))
            self.adapters.prepare_hotswap(list(sources.values()), slots=self.slots, samples=samples)

    def fresh(self, mix: dict[str, Any] | None = None) -> Tensor:
        """Return the output of a new model with these adapters active; defaults to those expected to be active."""
        model = build()
        for name, (source, *_) in self.expected.items():
            diffadapt.load_adapter(model, self.sources[source], name, activate=False)
        active = {name: strength for name, (_, strength, is_active) in self.expected.items() if is_active}
        diffadapt.adapters(model).activate(active if mix is None else mix)
        return model(IMAGES)

    def check(self) -> None:
        assert self.adapters.active == {
            name: strength for name, (_, strength, active) in self.expected.items() if active
        }
        assert_same(self.model(IMAGES), self.fresh(), 1e-9)

    def mix(self) -> dict[str, Any]:
        names = self.choose.sample(list(self.expected), min(len(self.expected), self.choose.randint(0, 2)))
        return {name: scale(self.choose) for name in names}

    def load(self) -> None:
        name, source = (
            f"n{len(self.expected)}{self.choose.random()}".replace(".", ""),
            self.choose.choice(list(self.sources)),
        )
        strength, active = scale(self.choose), self.choose.random() < 0.7
        diffadapt.load_adapter(self.model, self.sources[source], name, scale=strength, activate=active)
        self.expected[name] = [source, strength, active]

    def hotswap(self) -> None:
        name, source = self.choose.choice(list(self.expected)), self.choose.choice(list(self.sources))
        strength = None if self.choose.random() < 0.5 else scale(self.choose)
        content: Any = self.sources[source]
        if self.choose.random() < 0.5:
            content = self.adapters.prefetch(content)
        self.adapters.hotswap(name, content, scale=strength)
        self.expected[name][0] = source
        if strength is not None:
            self.expected[name][1] = strength

    def activate(self) -> None:
        mix = self.mix()
        self.adapters.activate(mix)
        for name, entry in self.expected.items():
            entry[1:] = [mix.get(name, entry[1]), name in mix]

    def activated(self) -> None:
        mix = self.mix()
        with self.adapters.activated(mix):
            assert_same(self.model(IMAGES), self.fresh(mix), 1e-9)

    def remove(self) -> None:
        name = self.choose.choice(list(self.expected))
        self.adapters.remove(name)
        del self.expected[name]

    def disabled(self) -> None:
        with self.adapters.disabled():
            assert_same(self.model(IMAGES), build()(IMAGES), 1e-12)

    def merge(self) -> None:
        names = [name for name in self.expected if self.choose.random() < 0.5] or list(self.expected)
        self.adapters.merge(*names, compact=self.choose.random() < 0.5)
        for name in names:
            self.expected[name][2] = True

    def unmerge(self) -> None:
        self.adapters.unmerge()

    def per_sample(self) -> None:
        mixes = [self.mix() for _ in range(SAMPLES)]
        with self.adapters.per_sample(mixes):
            output = self.model(IMAGES)
        for row, mix in enumerate(mixes):
            assert_same(output[row], self.fresh(mix)[row], 1e-9)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("sources")
    configs = {**CONFIGS, **ON_CONVOLUTIONS}
    return {name: make(build, config, folder / str(number)) for number, (name, config) in enumerate(configs.items())}


@torch.no_grad()
@pytest.mark.parametrize("seed", [*range(8), 151])
def test_any_sequence_of_operations_has_the_expected_output(seed: int, sources: dict[str, Path]) -> None:
    choose = random.Random(seed)
    play = Play(choose, {name: sources[name] for name in choose.sample(list(sources), 4)})
    base = build()(IMAGES)
    play.load()
    refused, differed = 0, False
    for _ in range(STEPS):
        operations = [play.load, play.load, play.disabled, play.unmerge]
        if play.expected:
            operations += [play.hotswap, play.hotswap, play.activate, play.activate, play.activated, play.remove]
            operations += [play.merge, play.per_sample]
        try:
            choose.choice(operations)()
        except AdapterError:
            refused += 1
        play.check()
        differed |= not torch.equal(play.model(IMAGES), base)
    assert differed
    assert refused < STEPS
    play.adapters.clear()
    play.adapters.release_slots()
    assert torch.equal(play.model(IMAGES), base)
    assert BANK not in play.model._modules
