"""Locks on models, so that one thread at a time can set which adapters act.

Which adapters act is state of the model, and it must not change between the first and the last step of a request. So
`pipe.adapters.activated` and similar context managers lock the models of a request. Meanwhile another thread that
wants to change their adapters waits, and a call of such a model from another thread is refused, since it would run with
adapters that were not meant for it. Calls inside a compiled graph are not checked, since a graph does not know its
thread. Reading what is loaded, and planning files for the models, needs no lock.
"""

import threading
from collections.abc import Generator, Iterable
from contextlib import ExitStack, contextmanager
from weakref import WeakKeyDictionary

import torch
from torch import nn

from diffadapt.errors import AdapterError


class _Lock:
    """A re-entrant lock that knows the thread that holds it.

    Attributes:
        owner: the id of the thread that holds the lock; `None` if none does.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self.owner: int | None = None
        self._depth = 0

    def __enter__(self) -> None:
        self._lock.acquire()
        self.owner = threading.get_ident()
        self._depth += 1

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if not self._depth:
            self.owner = None
        self._lock.release()


# Not in the models, since a lock can be neither copied nor pickled.
_locks: WeakKeyDictionary[nn.Module, _Lock] = WeakKeyDictionary()
_registry_lock = threading.Lock()


@contextmanager
def exclusive(models: Iterable[nn.Module]) -> Generator[None, None, None]:
    """Lock `models` for this thread, waiting until no other thread holds one of them."""
    with _registry_lock:
        locks = {id(model): _locks.setdefault(model, _Lock()) for model in models}
    with ExitStack() as stack:
        # Always in the same order, or two threads could wait for each other.
        for key in sorted(locks):
            stack.enter_context(locks[key])
        yield


def is_held_elsewhere(model: nn.Module) -> bool:
    """Return whether another thread holds `model`."""
    lock = _locks.get(model)
    return lock is not None and lock.owner not in (None, threading.get_ident())


def refuse_other_threads(model: nn.Module) -> None:
    """Raise `AdapterError` if another thread holds `model`."""
    if not torch.compiler.is_compiling() and is_held_elsewhere(model):
        raise AdapterError(
            f"another thread has activated adapters on this {type(model).__name__} for a request of its own; run this "
            "request inside pipe.adapters.activated(...) or pipe.adapters.exclusive(), too: it waits for its turn"
        )
