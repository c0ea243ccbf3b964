"""Components inside wrappers: adapters belong to the model inside."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.parallel import DataParallel

import diffadapt
from diffadapt.runtime.components import unwrapped


class Engine(nn.Module):
    """A wrapper such as DeepSpeed's engine or those of xDiT."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, *args: Any) -> Any:
        return self.module(*args)


class Sharded(nn.Module):
    """A wrapper such as FSDP1, whose child has another name than the attribute."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._fsdp_wrapped_module = module

    @property
    def module(self) -> nn.Module:
        return self._fsdp_wrapped_module

    def forward(self, *args: Any) -> Any:
        return self.module(*args)


LORA = {"0.lora_A.weight": torch.ones(2, 4), "0.lora_B.weight": torch.ones(4, 2)}


@pytest.mark.parametrize("wrap", [Engine, Sharded, DataParallel, lambda model: Engine(Sharded(model))])
def test_wrappers_are_looked_through(wrap: Any) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    wrapper = wrap(model)
    base = wrapper(torch.ones(1, 4))
    assert unwrapped(wrapper) is model
    diffadapt.load_adapter(wrapper, LORA, "a")
    torch.testing.assert_close(wrapper(torch.ones(1, 4)), base + 8)
    diffadapt.add_adapter(wrapper, diffadapt.LoraConfig(rank=2, target_modules="all-linear"), name="b")
    assert diffadapt.adapters(model).names == diffadapt.adapters(wrapper).names == ["a", "b"]


def test_a_model_with_a_layer_called_module_is_no_wrapper() -> None:
    layer = nn.Sequential()
    layer.module = nn.Linear(4, 4)
    assert unwrapped(layer) is layer

    class WithParameter(Engine):
        def __init__(self) -> None:
            super().__init__(nn.Sequential(nn.Linear(4, 4)))
            self.table = nn.Parameter(torch.ones(4))

    model = WithParameter()
    assert unwrapped(model) is model
