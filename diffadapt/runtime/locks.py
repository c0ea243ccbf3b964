"""One request at a time: which thread has a model's adapters to itself.

Which adapters act is a state of the model, and a request needs it to stay the same from its first step to its last. A
request that says so (`pipe.adapters.activated` and its relatives) therefore holds its models; what other threads do
with their adapters waits, and a call of such a model from another thread is refused, since it would get adapters that
were not meant for it. (Not inside a compiled graph, where there are no threads to see.)
"""

import threading
from collections.abc import Generator, Iterable
from contextlib import ExitStack, contextmanager
from weakref import WeakKeyDictionary

import torch
from torch import nn

from diffadapt.errors import AdapterError


class _Lock:
    """A re-entrant lock that can tell who holds it."""

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


# Beside the models, since a lock can neither be copied nor pickled with one.
_locks: WeakKeyDictionary[nn.Module, _Lock] = WeakKeyDictionary()
_making = threading.Lock()


@contextmanager
def exclusive(models: Iterable[nn.Module]) -> Generator[None, None, None]:
    """Have these models to oneself; waits until no other thread holds one of them."""
    with _making:
        locks = {id(model): _locks.setdefault(model, _Lock()) for model in models}
    with ExitStack() as stack:
        # In one order for all, or two threads could wait for each other.
        for key in sorted(locks):
            stack.enter_context(locks[key])
        yield


def refuse_other_threads(model: nn.Module) -> None:
    """Raise `AdapterError` if another thread holds `model`."""
    if torch.compiler.is_compiling():
        return
    lock = _locks.get(model)
    if lock is not None and lock.owner not in (None, threading.get_ident()):
        raise AdapterError(
            f"another thread has activated adapters on this {type(model).__name__} for a request of its own; run this "
            "request inside pipe.adapters.activated(...), too: it waits for its turn"
        )
