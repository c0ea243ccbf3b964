"""Classes that cannot simply be mixed: those with several bases, from `ABC` or `Generic`, or with a metaclass."""

import pickle
from abc import ABC, ABCMeta
from copy import deepcopy
from typing import Any, Generic, TypeVar

import pytest
import torch
from torch import Tensor, nn

import diffadapt

T = TypeVar("T")


class Abstract(ABC):  # noqa: B024
    """A base with a metaclass and a memory layout of its own, as that of quanto's layers."""

    def kind(self) -> str:
        return "abstract"


class AbstractLinear(Abstract, nn.Linear):
    pass


class GenericLinear(Generic[T], nn.Linear):
    pass


class Named:
    name = "named"


class SeveralBases(Named, AbstractLinear, Generic[T]):
    pass


class Meta(ABCMeta):
    pass


class OtherMetaclass(nn.Linear, metaclass=Meta):
    pass


CLASSES = [AbstractLinear, GenericLinear, SeveralBases, OtherMetaclass]
LORA = {
    "0.lora_A.weight": torch.randn(2, 4, generator=torch.Generator().manual_seed(0)),
    "0.lora_B.weight": torch.randn(4, 2, generator=torch.Generator().manual_seed(1)),
}
INPUT = torch.ones(2, 4)


def model(cls: Any) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(cls(4, 4)).requires_grad_(False)


@pytest.mark.parametrize("cls", CLASSES)
def test_any_class_of_layer_carries_adapters(cls: Any) -> None:
    target, plain = model(cls), model(nn.Linear)
    base = target(INPUT)
    for each in (target, plain):
        diffadapt.load_adapter(each, LORA, "a")
    assert torch.equal(target(INPUT), plain(INPUT))
    assert isinstance(target[0], cls)
    assert type(target[0]).__name__ == cls.__name__
    copies = deepcopy(target), pickle.loads(pickle.dumps(target))
    diffadapt.adapters(target).clear()
    assert type(target[0]) is cls
    assert torch.equal(target(INPUT), base)
    for copy in copies:
        assert torch.equal(copy(INPUT), plain(INPUT))
        diffadapt.adapters(copy).clear()
        assert type(copy[0]) is cls


@pytest.mark.parametrize("cls", CLASSES)
def test_they_are_compiled_into_one_graph(cls: Any) -> None:
    target = model(cls)
    diffadapt.load_adapter(target, LORA, "a")
    with torch.no_grad():
        expected: Tensor = target(INPUT)
        assert torch.equal(torch.compile(target, backend="eager", fullgraph=True)(INPUT), expected)
