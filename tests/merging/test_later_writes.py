"""Weights that are written while an adapter is merged into them: undoing the merge must not silently undo that."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import diffadapt
from diffadapt import AdapterError, Adapters
from tests.support.cases import for_each


class Model(nn.Module):
    """One layer with a bias."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(8, 8)
        self.requires_grad_(False)

    def forward(self, input: Tensor) -> Tensor:
        return self.layer(input)


def lora(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "layer.lora_A.weight": torch.randn(2, 8, generator=generator),
        "layer.lora_B.weight": torch.randn(8, 2, generator=generator),
    }


ACTIONS: dict[str, Callable[[Adapters], object]] = {
    "unmerge": lambda adapters: adapters.unmerge(),
    "hotswap": lambda adapters: adapters.hotswap("a", lora(2)),
    "clear": lambda adapters: adapters.clear(),
}


def merged(dtype: torch.dtype) -> tuple[Model, Adapters]:
    model = Model().to(dtype)
    diffadapt.load_adapter(model, lora(1), "a")
    adapters = diffadapt.adapters(model)
    adapters.merge("a", compact=False)
    return model, adapters


@for_each(action=ACTIONS, dtype=[torch.float32, torch.bfloat16])
def test_weights_that_were_loaded_after_a_merge_are_not_lost(action: str, dtype: torch.dtype) -> None:
    model, adapters = merged(dtype)
    loaded = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    model.load_state_dict(loaded)
    with pytest.raises(AdapterError, match=r"layer\.weight was written after 'a' was merged into it"):
        ACTIONS[action](adapters)
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in model.state_dict().items())


@for_each(action=ACTIONS)
def test_casts_copies_and_merges_are_no_such_writes(action: str) -> None:
    model, adapters = merged(torch.float32)
    diffadapt.load_adapter(model, lora(3), "b")
    adapters.merge("b")
    adapters.hotswap("b", lora(4))
    copied = copy.deepcopy(model)
    for each in (model.to(torch.float64).to(torch.float32), copied):
        ACTIONS[action](diffadapt.adapters(each))
        diffadapt.adapters(each).clear()
        assert all(torch.equal(tensor, Model().state_dict()[name]) for name, tensor in each.state_dict().items())
