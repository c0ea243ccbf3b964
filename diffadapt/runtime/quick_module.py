"""A module that is made in a fifth of the time, for adapters, which have hundreds of them."""

from collections import OrderedDict
from typing import Any

from torch import nn

_BARE: dict[str, Any] = nn.Module().__dict__
_CONTENT = ("_parameters", "_buffers", "_non_persistent_buffers_set", "_modules")
"""Containers that `nn.Module` reads from the `__dict__` of a module."""


class _MadeWhenUsed:
    """An empty container that a module gets when it is first asked for; hardly any adapter layer has hooks."""

    def __init__(self, name: str, kind: type[Any]) -> None:
        self._name = name
        self._kind = kind

    def __get__(self, module: nn.Module | None, owner: type[nn.Module]) -> Any:
        return self if module is None else module.__dict__.setdefault(self._name, self._kind())


class QuickModule(nn.Module):
    """A module without children, parameters, buffers and hooks yet."""

    def __init__(self) -> None:
        # What `nn.Module.__init__` sets. Its own way of setting it takes much longer.
        attributes = self.__dict__
        attributes.update(_PLAIN)
        for name in _CONTENT:
            attributes[name] = _BARE[name].copy()


_HOOKS = {name: value for name, value in _BARE.items() if isinstance(value, (dict, set)) and name not in _CONTENT}
_PLAIN = {name: value for name, value in _BARE.items() if name not in _HOOKS and name not in _CONTENT}
for _name, _value in _HOOKS.items():
    setattr(QuickModule, _name, _MadeWhenUsed(_name, OrderedDict if isinstance(_value, OrderedDict) else type(_value)))
