"""What carries adapters: a pipeline or a single model, as the manager sees it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import nn

from diffadapt.management.snapshot import AdapterSnapshot
from diffadapt.strengths.scheduler_clock import Listener

Follow: TypeAlias = Callable[[Listener | None], None]
"""Makes schedulers report their steps to a listener; `None` ends that."""


@dataclass(frozen=True)
class Owner:
    """A pipeline or a model that carries adapters. It holds no state, so that owners of one model share its adapters.

    Attributes:
        models: returns the present models, by component.
        tokenizers: returns the tokenizers of the text encoders, by component.
        qualified: whether prefixes of paths start with the name of a component.
        changed: is called after adapters were loaded or removed.
        follow: connects the owner's schedulers to a listener; `None` for an owner without schedulers.
    """

    models: Callable[[], Mapping[str, nn.Module]]
    tokenizers: Callable[[], Mapping[str, Any]] = dict[str, Any]
    qualified: bool = True
    changed: Callable[[], None] = lambda: None
    follow: Follow | None = None

    def snapshot(self) -> AdapterSnapshot:
        """Return what is loaded now."""
        return AdapterSnapshot(self.models(), qualified=self.qualified)
