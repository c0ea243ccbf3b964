"""Strengths that change between a forward pass and its backward pass: gradients are those of the forward pass."""

from collections.abc import Generator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import diffadapt
from diffadapt import AdapterError
from tests.support.cases import for_each

INPUT = torch.randn(4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
CONFIGS: dict[str, diffadapt.AdapterConfig] = {
    "lora": diffadapt.LoraConfig(rank=2, target_modules=["block"], init=False),
    "dora": diffadapt.LoraConfig(rank=2, target_modules=["block"], init=False, use_dora=True),
    "oft": diffadapt.OFTConfig(block_size=4, target_modules=["block"], init=False),
}


class Model(nn.Module):
    """Two layers; the first is checkpointed as models of diffusers checkpoint a block."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.block, self.head = nn.Linear(8, 8), nn.Linear(8, 4)
        self.double().requires_grad_(False)

    def forward(self, input: Tensor) -> Tensor:
        run = self.__dict__.get("_gradient_checkpointing_func")
        return self.head(self.block(input) if run is None else run(self.block, input)).square()


class Setup:
    """A model with two adapters, "a" of which is active and trained."""

    def __init__(self, config: str, checkpointing: bool) -> None:
        self.model = Model()
        if checkpointing:
            self.model.__dict__["_gradient_checkpointing_func"] = lambda f, *x: checkpoint(f, *x, use_reentrant=False)
        self.adapters = diffadapt.adapters(self.model)
        diffadapt.add_adapter(self.model, CONFIGS[config], name="b").requires_grad_(False)
        self.trained = diffadapt.add_adapter(self.model, CONFIGS[config], name="a")
        self.adapters.activate({"a": 0.5})

    def gradients(self, loss: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(loss, list(self.trained.parameters())))


@contextmanager
def reference(adapters: diffadapt.Adapters) -> Generator[None, None, None]:
    """Run the base model, as a loss that compares with it does."""
    with adapters.disabled(), torch.no_grad():
        yield


@for_each(config=CONFIGS, checkpointing=[False, True])
def test_a_loss_may_compare_with_the_base_model(config: str, checkpointing: bool) -> None:
    setup = Setup(config, checkpointing)
    with reference(setup.adapters):
        base = setup.model(INPUT)
    expected = setup.gradients((setup.model(INPUT) - base).sum())
    output = setup.model(INPUT)
    with reference(setup.adapters):
        base = setup.model(INPUT)
    found = setup.gradients((output - base).sum())
    assert expected[0].abs().max() > 1e-3
    torch.testing.assert_close(found, expected)


@for_each(config=CONFIGS)
def test_a_backward_pass_may_follow_the_block_that_set_the_strength(config: str) -> None:
    setup = Setup(config, checkpointing=False)
    expected = [a + b for a, b in zip(*(_inside(setup, strength) for strength in (1.0, -1.0)), strict=True)]
    losses: list[Tensor] = []
    for strength in (1.0, -1.0):
        with setup.adapters.activated({"a": strength}):
            losses.append(setup.model(INPUT).sum())
    torch.testing.assert_close(setup.gradients(losses[0] + losses[1]), expected)


def _inside(setup: Setup, strength: float) -> list[Tensor]:
    with setup.adapters.activated({"a": strength}):
        return setup.gradients(setup.model(INPUT).sum())


@for_each(config=CONFIGS, change=["strength", "adapter", "none", "per_sample"])
def test_blocks_are_not_computed_anew_with_other_adapters(config: str, change: str) -> None:
    setup = Setup(config, checkpointing=True)
    adapters = setup.adapters
    if change == "per_sample":
        with adapters.per_sample([{"a": 0.5}, {}, {"b": 1.0}, {}]):
            loss = setup.model(INPUT).sum()
    else:
        loss = setup.model(INPUT).sum()
        adapters.activate({"strength": {"a": -0.5}, "adapter": {"b": 0.5}, "none": {}}[change])
    with pytest.raises(AdapterError, match="between a call with gradient checkpointing and its backward pass"):
        setup.gradients(loss)
