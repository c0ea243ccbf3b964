"""Hundreds of adapters for one pipeline: ready in CPU memory, and in the models only while requests use them.

An adapter is read once (`Adapters.prefetch`: parsed, checked against the models, converted) and kept in CPU memory,
page-locked if there is a CUDA device. When the budget is used up, the least recently used adapters are dropped and read
again when they are next wanted. A request loads the adapters it names into the models and removes the least recently
used ones. On a pipeline with slots, loading is a copy and compiles nothing.
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

_Registered = tuple[Source, dict[str, Any]]
"""A source and the options to read it with. Its identity tells whether a name still means the same source."""


class AdapterPool:
    """A pool of adapters by name, for one pipeline or model. It is thread-safe.

    Attributes:
        budget: bytes of adapters to keep in CPU memory. Adapters in the models are kept even beyond it.
        loaded: number of adapters to keep in the models between requests.
    """

    def __init__(self, adapters: Adapters, budget: int, loaded: int = 1) -> None:
        """
        Args:
            adapters: `pipe.adapters`, or `diffadapt.adapters(model)`.
            budget: bytes of adapters to keep in CPU memory, above 0.
            loaded: number of adapters to keep in the models between requests.

        Raises:
            AdapterError: `budget` or `loaded` is out of range.
        """
        if budget <= 0 or loaded < 0:
            raise AdapterError(f"budget is {budget} and loaded is {loaded}, expected bytes and a number of adapters")
        self.budget = budget
        self.loaded = loaded
        self._adapters = adapters
        self._sources: dict[str, _Registered] = {}
        self._plans: OrderedDict[str, Plan] = OrderedDict()
        self._reading: dict[str, Future[Plan]] = {}
        self._resident: OrderedDict[str, None] = OrderedDict()
        self._lock = RLock()
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="diffadapt-pool")

    def add(self, name: str, source: Source, **options: Any) -> None:
        """Register an adapter. It is read when it is first used, or by `prefetch`.

        Args:
            name: name of the adapter in this pool and in the models.
            source: a file, folder, hub id or state dict.
            options: `where`, `components`, `strict` and `dtype` of `Adapters.prefetch`.

        Raises:
            AdapterError: the name is no adapter's, or is in this pool already.
        """
        with self._lock:
            check_name(name)
            if name in self._sources:
                raise AdapterError(f"the name {name!r} is taken in this pool; discard that adapter first")
            self._sources[name] = source, options

    def discard(self, name: str) -> None:
        """Drop an adapter from the pool, and remove it from the models.

        Raises:
            AdapterError: no such adapter.
        """
        with exclusive(self._adapters.models()), self._lock:
            self._source(name)
            if name in self._resident:
                self._remove(name)
            self._plans.pop(name, None)
            self._reading.pop(name, None)
            del self._sources[name]

    def __contains__(self, name: object) -> bool:
        return name in self._sources

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._sources))

    def __len__(self) -> int:
        return len(self._sources)

    def __str__(self) -> str:
        """Return a table of the adapters, those last used at the end."""
        with self._lock:
            waiting = [name for name in self._sources if name not in self._plans]
            rows = [("name", "state", "size")]
            for name in (*waiting, *self._plans):
                state = "in the models" if name in self._resident else "in memory" if name in self._plans else "-"
                rows.append((name, state, f"{self._plans[name].bytes / 2**20:.1f} MiB" if name in self._plans else ""))
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        return "\n".join([*lines, f"{self.bytes / 2**20:.1f} of {self.budget / 2**20:.1f} MiB"])

    def __repr__(self) -> str:
        with self._lock:
            return (
                f"<AdapterPool: {len(self._sources)} adapters, {len(self._plans)} in memory ({self.bytes / 2**20:.1f} "
                f"of {self.budget / 2**20:.1f} MiB), {len(self._resident)} in the models>"
            )

    @property
    def bytes(self) -> int:
        """Size of the adapters that are in memory now."""
        with self._lock:
            return sum(plan.bytes for plan in self._plans.values())

    @property
    def ready(self) -> list[str]:
        """Names of the adapters that are in memory now, the least recently used first."""
        with self._lock:
            return list(self._plans)

    def prefetch(self, *names: str) -> None:
        """Read adapters in the background. If one cannot be read, the error is raised when it is used.

        Raises:
            AdapterError: no such adapter.
        """
        with self._lock:
            for name in names:
                registered = self._source(name)
                if name not in self._plans and name not in self._reading:
                    self._reading[name] = self._worker.submit(self._read, name, registered)

    @contextmanager
    def activated(self, adapters: Chosen) -> Generator[None, None, None]:
        """Load adapters of this pool, and make exactly `adapters` active inside the `with` block.

        On leaving, the adapters that were active before are active again. Other threads wait until then.

        Args:
            adapters: names and strengths as for `Adapters.activate`, of adapters in this pool or loaded otherwise.

        Raises:
            AdapterError: an adapter cannot be read, loaded or activated.
        """
        with self._in_models(adapters), self._adapters.activated(adapters):
            yield

    @contextmanager
    def per_sample(
        self, mixes: Sequence[Chosen], *, images: int | None = None, scheduler: Any = None
    ) -> Generator[None, None, None]:
        """Load adapters of this pool, and give every prompt of a batch its own mix inside the `with` block.

        On leaving, the adapters that were active before are active again. Other threads wait until then.

        Args:
            mixes: one mix per prompt; names and strengths as for `Adapters.activate`, of adapters in this pool or
                loaded otherwise.
            images: number of images per prompt; defaults to the `num_images_per_prompt` of the pipeline call.
            scheduler: the scheduler that steps a loop of your own; defaults to the pipeline's.

        Raises:
            AdapterError: an adapter cannot be read or loaded, or `Adapters.per_sample` refuses a mix.
        """
        with self._in_models(name for mix in mixes for name in _names(mix)):
            with self._adapters.per_sample(mixes, images=images, scheduler=scheduler):
                yield

    def close(self) -> None:
        """Stop reading, remove the pool's adapters from the models, and drop them all."""
        self._worker.shutdown(cancel_futures=True)
        with exclusive(self._adapters.models()), self._lock:
            for name in list(self._resident):
                self._remove(name)
            self._plans.clear()
            self._sources.clear()

    @contextmanager
    def _in_models(self, adapters: Chosen) -> Generator[None, None, None]:
        """Hold the models for this thread, with those of `adapters` that are in this pool loaded."""
        wanted = [name for name in _names(adapters) if name in self._sources]
        plans = {name: self._plan(name) for name in wanted}
        with exclusive(self._adapters.models()):
            with self._lock:
                for name, (registered, _) in plans.items():
                    if self._sources.get(name) is not registered:
                        raise AdapterError(f"adapter {name!r} was discarded while a request waited for it")
                self._make_room(wanted)
                for name, (_, plan) in plans.items():
                    kept = self._keep(name, plan)
                    if name not in self._resident:
                        self._adapters.load(kept, name, activate=False)
                    self._resident[name] = None
                    self._resident.move_to_end(name)
            try:
                yield
            finally:
                with self._lock:
                    for name in list(self._resident)[: max(len(self._resident) - self.loaded, 0)]:
                        self._remove(name)

    def _read(self, name: str, registered: _Registered) -> Plan:
        """Read an adapter, and keep it unless the name was given to another source in between."""
        source, options = registered
        plan = self._adapters.prefetch(source, **options)
        with self._lock:
            if self._sources.get(name) is registered:
                self._reading.pop(name, None)
                self._keep(name, plan)
        return plan

    def _keep(self, name: str, plan: Plan) -> Plan:
        """Keep an adapter in memory as the most recently used, drop others beyond the budget, and return it.

        If another read of it is kept already, that one is returned: an adapter must not be in the models twice.
        """
        plan = self._plans.setdefault(name, plan)
        self._plans.move_to_end(name)
        excess = self.bytes - self.budget
        for other in list(self._plans):
            if excess > 0 and other not in (name, *self._resident):
                excess -= self._plans.pop(other).bytes
        return plan

    def _plan(self, name: str) -> tuple[_Registered, Plan]:
        """Return an adapter in memory, and what it was read from; read it, or wait for it if it is being read."""
        with self._lock:
            self.prefetch(name)
            registered = self._source(name)
            plan, reading = self._plans.get(name), self._reading.get(name)
        if plan is None:
            assert reading is not None
            try:
                plan = reading.result()
            except Exception:
                with self._lock:
                    if self._reading.get(name) is reading:
                        del self._reading[name]
                    if self._sources.get(name) is registered:
                        raise
        with self._lock:
            if plan is not None and self._sources.get(name) is registered:
                return registered, self._keep(name, plan)
        # The name was given to another source in between, which is read anew.
        return self._plan(name)

    def _make_room(self, wanted: Sequence[str]) -> None:
        """Remove adapters from the models, the least recently used first, until those in `wanted` fit."""
        for name in list(self._resident):
            if len(self._resident | dict.fromkeys(wanted)) > max(self.loaded, len(wanted)) and name not in wanted:
                self._remove(name)

    def _remove(self, name: str) -> None:
        """Remove an adapter from the models; it stays in memory."""
        if name in self._adapters:
            self._adapters.remove(name)
        del self._resident[name]
        for adapter in self._plans[name].adapters.values() if name in self._plans else ():
            # Without slots, it was moved to the device of the model.
            adapter.to(torch.device("cpu"))

    def _source(self, name: str) -> _Registered:
        """Return the source of an adapter and its options, or raise `AdapterError` if it is not in this pool."""
        if name not in self._sources:
            raise AdapterError(f"no adapter {name!r} in this pool; it has {', '.join(self._sources) or 'none'}")
        return self._sources[name]


def _names(adapters: Chosen) -> Iterable[str]:
    """Return the names of the chosen adapters."""
    return [adapters] if isinstance(adapters, str) else list(adapters)
