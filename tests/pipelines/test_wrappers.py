"""Components inside wrappers: adapters belong to the model inside."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.parallel import DataParallel

import diffadapt
from diffadapt.runtime.components import unwrapped
from tests.support import loras, models, spellings
from tests.support.compare import assert_differs
from tests.support.models import draw


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


@pytest.mark.slow
def test_components_of_a_pipeline_may_be_wrapped() -> None:
    class Forwarding(Engine):
        """A wrapper that shows the attributes of the model inside."""

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return self.module(*args, **kwargs)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._modules["module"], name) if name not in self._modules else super().__getattr__(name)

    plain, pipe = models.sd15(), models.sd15()
    base = draw(plain)
    source = spellings.peft_names(loras.parts_for(plain, ("unet", "text_encoder")))
    inside = {name: getattr(pipe, name) for name in ("unet", "text_encoder")}
    for name, model in inside.items():
        setattr(pipe, name, Forwarding(model))
    for owner in (plain, pipe):
        owner.load_adapter(source, "a")
        owner.adapters.activate({"a": 0.5})
    assert_differs(draw(plain), base)
    assert torch.equal(draw(pipe), draw(plain))
    assert all(diffadapt.adapters(model).names == ["a"] for model in inside.values())
    for act in ("merge", "unmerge", "clear"):
        for owner in (plain, pipe):
            getattr(owner.adapters, act)()
        assert torch.equal(draw(pipe), draw(plain))
    assert torch.equal(draw(pipe), base)
