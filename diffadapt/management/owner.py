"""Objects whose models carry adapters: a pipeline or a single model, seen from `Adapters`."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import wraps
from typing import Any, Concatenate, ParamSpec, Protocol, TypeAlias, TypeVar

from torch import nn

from diffadapt.management.snapshot import AdapterSnapshot
from diffadapt.runtime.inference_mode import ordinary_tensors
from diffadapt.runtime.locks import exclusive
from diffadapt.strengths.scheduler_clock import Listener

Follow: TypeAlias = Callable[[Listener | None], None]
"""Makes schedulers report their steps to a listener; `None` disconnects the present one."""


@dataclass(frozen=True)
class Owner:
    """A pipeline or a model that carries adapters. It holds no state, so that owners of one model share its adapters.

    Attributes:
        models: returns the present models by component.
        tokenizers: returns the tokenizers by the component of their text encoder.
        empty: returns the names of components that the owner has room for, but that are not loaded.
        qualified: whether prefixes of module paths start with the name of a component.
        changed: is called after adapters were loaded or removed, or slots reserved or released.
        counts_prompts: whether the models are those of a pipeline, which says how many prompts it is called with when
            it encodes them.
        feeds_control: whether the owner is able to feed a control image, for adapters that read one.
        follow: connects the owner's schedulers to a listener; `None` for an owner without schedulers.
        pipeline: the pipeline; `None` for a single model.
    """

    models: Callable[[], Mapping[str, nn.Module]]
    tokenizers: Callable[[], Mapping[str, Any]] = dict[str, Any]
    empty: Callable[[], Collection[str]] = tuple[str, ...]
    qualified: bool = True
    changed: Callable[[], None] = lambda: None
    counts_prompts: bool = False
    feeds_control: bool = True
    follow: Follow | None = None
    pipeline: Any = None

    @property
    def key(self) -> Any:
        """The pipeline or the model, to look up what is known of it elsewhere."""
        return next(iter(self.models().values())) if self.pipeline is None else self.pipeline

    def snapshot(self) -> AdapterSnapshot:
        """Return the adapters that are loaded now."""
        return AdapterSnapshot(self.models(), qualified=self.qualified)


class _Owned(Protocol):
    _owner: Owner


P = ParamSpec("P")
R = TypeVar("R")
S = TypeVar("S", bound=_Owned)


def exclusive_method(method: Callable[Concatenate[S, P], R]) -> Callable[Concatenate[S, P], R]:
    """Make a method hold the models of `self._owner` for its thread; it waits until no other thread holds them."""

    @wraps(method)
    def alone(self: S, /, *args: P.args, **kwargs: P.kwargs) -> R:
        with exclusive(self._owner.models().values()), ordinary_tensors():
            return method(self, *args, **kwargs)

    return alone
