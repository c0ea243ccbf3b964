"""Values computed from the tensors of adapter layers and the weights of their hosts, until one of these changes."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from diffadapt.weights.resting import resting_tensor, rests_on_disk

T = TypeVar("T")


class HasSources(Protocol):
    """What this module needs of an adapter layer; see `AdapterLayer`."""

    host: nn.Module

    @property
    def tensors(self) -> Mapping[str, Tensor]: ...

    @property
    def reads_weight(self) -> bool: ...


@dataclass(frozen=True)
class Cached(Generic[T]):
    """A value, and what it was computed from.

    Attributes:
        value: the value.
        layers: the adapter layers whose tensors, and whose hosts' weights if they read them, the value depends on.
        sources: each source tensor, with its version, storage and dtype at that time.
    """

    value: T
    layers: Sequence[HasSources]
    sources: tuple[tuple[Tensor, Any], ...]

    @classmethod
    def of(cls, layers: Sequence[HasSources], compute: Callable[[], T]) -> "Cached[T]":
        """Compute a value, and return it with its sources."""
        with torch.inference_mode(False), torch.no_grad():
            value = compute()
        return cls(value, layers, _sources(layers))

    def is_current(self) -> bool:
        """Return whether the sources are unchanged."""
        now = _sources(self.layers)
        return len(now) == len(self.sources) and all(
            tensor is source and state == was for (tensor, state), (source, was) in zip(now, self.sources, strict=True)
        )


def sum_of_terms(terms: Iterable[Tensor]) -> Tensor:
    """Return the sum of one or more tensors, on the device of the first."""
    first, *others = terms
    return sum((term.to(first) for term in others), first)


def _sources(layers: Iterable[HasSources]) -> tuple[tuple[Tensor, Any], ...]:
    sources: list[tuple[Tensor, Any]] = []
    for layer in layers:
        sources += ((tensor, (tensor._version, tensor.data_ptr(), tensor.dtype)) for tensor in layer.tensors.values())
        if layer.reads_weight:
            on_disk = rests_on_disk(layer.host, "weight")
            weight = layer.host._parameters.get("weight") if on_disk else resting_tensor(layer.host, "weight")
            # Without its storage, since casting and offloading hooks give the weight a new one in every forward.
            if weight is not None:
                sources.append((weight, None if weight.is_inference() else (weight._version, weight.dtype)))
    return tuple(sources)
