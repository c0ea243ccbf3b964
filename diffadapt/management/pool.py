"""Hundreds of adapters for one pipeline: checked and ready in CPU memory, in the models only while they are wanted.

An adapter is read once (`Adapters.prefetch`: parsed, checked against the models, converted) and kept in CPU memory,
page-locked if there is CUDA, until the budget is used up; the longest unused ones go first. A request brings those it
names into the models, and those that are there longest without being asked for make room. On a pipeline prepared with
slots that is a copy and compiles nothing.
"""

from collections import OrderedDict
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from threading import RLock
from typing import Any

import torch

from diffadapt.errors import AdapterError
from diffadapt.files.checkpoint import Source
from diffadapt.loading.plan import Plan
from diffadapt.management.manager import Adapters
from diffadapt.management.snapshot import Chosen, check_name
from diffadapt.runtime.locks import exclusive


class AdapterPool:
    """Adapters by name, for one pipeline. Thread-safe.

    Attributes:
        budget: bytes of adapters that are kept in CPU memory.
        loaded: how many are kept in the models between requests.
    """

    def __init__(self, adapters: Adapters, budget: int, loaded: int = 1) -> None:
        """
        Args:
            adapters: `pipe.adapters`, or `diffadapt.adapters(model)`.
        """
        if budget <= 0 or loaded < 0:
            raise AdapterError(f"budget is {budget} and loaded is {loaded}, expected bytes and a number of adapters")
        self.budget = budget
        self.loaded = loaded
        self._adapters = adapters
        self._sources: dict[str, tuple[Source, dict[str, Any]]] = {}
        self._plans: OrderedDict[str, Plan] = OrderedDict()
        self._reading: dict[str, Future[Plan]] = {}
        self._inside: OrderedDict[str, None] = OrderedDict()
        self._lock = RLock()
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="diffadapt-pool")

    def add(self, name: str, source: Source, **options: Any) -> None:
        """Make an adapter known under `name`; it is read when it is first wanted, or by `prefetch`.

        Args:
            options: as for `Adapters.prefetch`.
        """
        with self._lock:
            check_name(name)
            if name in self._sources:
                raise AdapterError(f"adapter {name!r} is in this pool already; discard it first")
            self._sources[name] = source, options

    def discard(self, name: str) -> None:
        """Forget an adapter, also in the models."""
        with exclusive(self._adapters.models()), self._lock:
            self._source(name)
            if name in self._inside:
                self._take_out(name)
            self._plans.pop(name, None)
            self._reading.pop(name, None)
            del self._sources[name]

    def __contains__(self, name: object) -> bool:
        return name in self._sources

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._sources))

    def __len__(self) -> int:
        return len(self._sources)

    @property
    def bytes(self) -> int:
        """Size of the adapters that are in memory."""
        with self._lock:
            return sum(_size(plan) for plan in self._plans.values())

    @property
    def ready(self) -> list[str]:
        """Names of the adapters that are in memory, the longest unused first."""
        with self._lock:
            return list(self._plans)

    def prefetch(self, *names: str) -> None:
        """Read adapters in the background. What is wrong with one is raised when it is wanted."""
        with self._lock:
            for name in names:
                source, options = self._source(name)
                if name not in self._plans and name not in self._reading:
                    self._reading[name] = self._worker.submit(self._adapters.prefetch, source, **options)

    @contextmanager
    def activated(self, adapters: Chosen) -> Generator[None, None, None]:
        """`Adapters.activated`, of adapters of this pool and others that are loaded."""
        with self._brought(adapters), self._adapters.activated(adapters):
            yield

    @contextmanager
    def per_sample(self, mixes: Sequence[Chosen], *, images: int | None = None) -> Generator[None, None, None]:
        """`Adapters.per_sample`, of adapters of this pool and others that are loaded."""
        with self._brought(name for mix in mixes for name in _names(mix)):
            with self._adapters.per_sample(mixes, images=images):
                yield

    def close(self) -> None:
        """Take the pool's adapters out of the models, and stop reading."""
        self._worker.shutdown(cancel_futures=True)
        with exclusive(self._adapters.models()), self._lock:
            for name in list(self._inside):
                self._take_out(name)
            self._plans.clear()
            self._sources.clear()

    @contextmanager
    def _brought(self, adapters: Chosen) -> Generator[None, None, None]:
        """Have these adapters in the models, and the models to oneself."""
        wanted = [name for name in _names(adapters) if name in self._sources]
        plans = {name: self._plan(name) for name in wanted}
        with exclusive(self._adapters.models()):
            with self._lock:
                self._make_room(wanted)
                for name, plan in plans.items():
                    if name not in self._inside:
                        self._adapters.load(plan, name, activate=False)
                    self._inside[name] = None
                    self._inside.move_to_end(name)
            try:
                yield
            finally:
                with self._lock:
                    for name in list(self._inside)[: max(len(self._inside) - self.loaded, 0)]:
                        self._take_out(name)

    def _plan(self, name: str) -> Plan:
        """The adapter, in memory; waits for it if it is being read."""
        with self._lock:
            self.prefetch(name)
            plan, reading = self._plans.get(name), self._reading.get(name)
        if plan is None:
            assert reading is not None
            try:
                plan = reading.result()
            finally:
                with self._lock:
                    self._reading.pop(name, None)
        with self._lock:
            # Of two requests that waited for it the first one's counts, or it would be in the models twice.
            plan = self._plans.setdefault(name, plan)
            self._plans.move_to_end(name)
            for other in list(self._plans):
                if self.bytes > self.budget and other not in (name, *self._inside):
                    del self._plans[other]
            return plan

    def _make_room(self, wanted: Sequence[str]) -> None:
        for name in list(self._inside):
            if len(self._inside | dict.fromkeys(wanted)) > max(self.loaded, len(wanted)) and name not in wanted:
                self._take_out(name)

    def _take_out(self, name: str) -> None:
        if name in self._adapters:
            self._adapters.remove(name)
        del self._inside[name]
        for adapter in self._plans[name].adapters.values() if name in self._plans else ():
            # Without slots it has been where the model is.
            adapter.to(torch.device("cpu"))

    def _source(self, name: str) -> tuple[Source, dict[str, Any]]:
        if name not in self._sources:
            raise AdapterError(f"no adapter {name!r} in this pool; it has {', '.join(self._sources) or 'none'}")
        return self._sources[name]


def _names(adapters: Chosen) -> Iterable[str]:
    return [adapters] if isinstance(adapters, str) else list(adapters)


def _size(plan: Plan) -> int:
    return sum(adapter.bytes for adapter in plan.adapters.values())
