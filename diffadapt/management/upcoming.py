"""Adapters that are read in the background while a run draws, and act from one of its steps on (`Adapters.begin`).

An upcoming adapter waits for the run that begins next. At the end of a step, between two calls of the denoiser, it is
loaded into all components at once, by the thread that draws; from then on it is a loaded adapter like any other. This
module knows when it is due. What else happens at a step is in `activation.py`.
"""

import threading
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, InvalidStateError
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import replace
from typing import Any, Literal
from weakref import WeakKeyDictionary

from diffadapt.errors import AdapterError, Fault
from diffadapt.loading.plan import Plan
from diffadapt.loading.report import Report
from diffadapt.management.owner import Owner
from diffadapt.runtime.components import is_text_encoder
from diffadapt.strengths.schedules import Moment


class UpcomingAdapter:
    """An adapter that `begin` reads in the background, and that acts from a step of the coming run on.

    Attributes:
        name: its name; `None` until it has been read, if none was given.
        step: the step from which on it acts, from 0.
        exact: whether it acts from exactly that step on, or before it, as soon as it has been read.
    """

    def __init__(
        self,
        name: str | None,
        at_step: int | None,
        by_step: int | None,
        read: Callable[[], Plan],
        install: Callable[[Owner, Plan], Report],
        uninstall: Callable[[Owner, str], None],
    ) -> None:
        """
        Args:
            name, at_step, by_step: see `Adapters.begin`.
            read: reads and plans the adapter, in another thread.
            install: loads the plan into the models of an owner.
            uninstall: removes the adapter of this name from them.

        Raises:
            AdapterError: there is not one step, or it is none.
        """
        steps = [step for step in (at_step, by_step) if step is not None]
        if len(steps) != 1 or not isinstance(steps[0], int) or isinstance(steps[0], bool) or steps[0] < 0:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise AdapterError(f"begin: at_step is {at_step!r} and by_step is {by_step!r}, expected one step, from 0")
        self.name = name
        self.step = steps[0]
        self.exact = at_step is not None
        self._install, self._uninstall = install, uninstall
        # Dropped once it has been called, since it keeps the pipeline alive.
        self._read_plan: Callable[[], Plan] | None = read
        self._plan: Future[Plan] = Future()
        self._state: Literal["waiting", "active", "failed", "cancelled"] = "waiting"
        self._error: BaseException | None = None
        # Whether the run that it waits for has begun.
        self._has_run = False

    def __repr__(self) -> str:
        return f"<UpcomingAdapter {self.name or ''!r} {'at' if self.exact else 'by'} step {self.step}: {self.state}>"

    @property
    def state(self) -> Literal["reading", "ready", "active", "failed", "cancelled"]:
        """What has become of it: it is being read, ready for its step, active, refused or cancelled."""
        if self._state != "waiting":
            return self._state
        if not self._plan.done():
            return "reading"
        return "ready" if self._plan.exception() is None else "failed"

    @property
    def report(self) -> Report:
        """Which tensors of the file are used, and why others are not; waits until the file has been read."""
        return self.wait()

    def wait(self, timeout: float | None = None) -> Report:
        """Wait until the file has been read and checked, and return its report. The adapter may not act yet.

        Args:
            timeout: the longest time to wait, in seconds; `None` for as long as it takes.

        Raises:
            AdapterError: the file cannot be read or applied, the adapter was refused at its step, or it was cancelled.
            TimeoutError: the file has not been read in time.
        """
        if self._error is not None:
            raise self._error
        try:
            planned = self._plan.result(timeout)
        except CancelledError:
            planned = None
        except FutureTimeoutError as error:
            raise TimeoutError(f"begin: {self.name or 'the file'} has not been read in {timeout} s") from error
        if planned is None or self._state == "cancelled":
            raise AdapterError(f"begin: {self.name or 'the adapter'} was cancelled")
        return self._with_late_parts(planned)

    def start(self) -> None:
        """Start reading."""
        threading.Thread(target=self._read, name="diffadapt-begin", daemon=True).start()

    def cancel(self) -> bool:
        """Take it back. Return whether that was possible: an adapter that acts already stays; `remove` removes it."""
        with _lock:
            if self._state in ("active", "failed"):
                return False
            self._state = "cancelled"
        self._plan.cancel()
        return True

    def _read(self) -> None:
        assert self._read_plan is not None
        try:
            planned = self._read_plan()
            self._refuse_late(planned)
            if self.name is None:
                self.name = planned.checkpoint.name
            self._plan.set_result(planned)
        except InvalidStateError:
            # It was cancelled in the meantime.
            return
        except BaseException as error:  # It is raised where the adapter is needed.
            if not self._plan.cancelled():
                self._plan.set_exception(error)
        finally:
            self._read_plan = None

    def _refuse_late(self, planned: Plan) -> None:
        if all(map(is_text_encoder, planned.adapters)):
            raise AdapterError(
                f"{planned.checkpoint.origin}: it changes text encoders only, which encode the prompt before a run "
                "has any steps; load it before the run"
            )

    def _with_late_parts(self, planned: Plan) -> Report:
        """Return the report with a note for every component that the adapter reaches too late for its first run."""
        report = planned.report(self.name or "")
        late = [
            Fault(component, "acts from the next prompt on; this one is encoded before the steps of the run")
            for component in planned.adapters
            if is_text_encoder(component)
        ]
        return replace(report, notes=[*report.notes, *late])

    def _is_due(self, moment: Moment) -> bool:
        return moment.step >= self.step or (not self.exact and self._plan.done())

    def _refuse_short_run(self, moment: Moment) -> None:
        if self.step >= moment.steps:
            raise AdapterError(
                f"begin: {self.name or 'the adapter'} is to act from step {self.step} on, but this run has "
                f"{moment.steps} steps, 0 to {moment.steps - 1}; pass an earlier step, or draw with more steps"
            )


_lock = threading.RLock()
# By the pipeline or model. Not in it, since threads can be neither copied nor pickled.
_waiting: WeakKeyDictionary[Any, list[UpcomingAdapter]] = WeakKeyDictionary()
_begun: WeakKeyDictionary[Any, list[UpcomingAdapter]] = WeakKeyDictionary()


def add_(owner: Owner, upcoming: UpcomingAdapter) -> None:
    """Let an upcoming adapter wait for the run of `owner` that begins next.

    Raises:
        AdapterError: another one has its name.
    """
    with _lock:
        if upcoming.name is not None and any(other.name == upcoming.name for other in _still_waiting(owner)):
            raise AdapterError(
                f"begin: an adapter {upcoming.name!r} is on its way already; cancel it, or pass another name"
            )
        _waiting.setdefault(owner.key, []).append(upcoming)


def is_awaited(owner: Owner) -> bool:
    """Return whether adapters wait for a run of `owner`."""
    return bool(_still_waiting(owner))


def cancel_all(owner: Owner) -> None:
    """Cancel all adapters that wait for a run of `owner`."""
    for upcoming in _still_waiting(owner):
        upcoming.cancel()


def begin_due_(owner: Owner, moment: Moment) -> None:
    """Load the adapters that are due at `moment`, all or none, waiting for those that are still being read.

    Raises:
        AdapterError: one of them cannot be read, applied or loaded, or is due at a step that this run does not have. It
            no longer waits then, and those that were loaded in this run before wait for the next one.
    """
    if moment.begins:
        for upcoming in _still_waiting(owner):
            upcoming._has_run = True
        _begun.pop(owner.key, None)
    waiting = [upcoming for upcoming in _still_waiting(owner) if upcoming._has_run]
    failing: UpcomingAdapter | None = None
    try:
        for failing in waiting:
            failing._refuse_short_run(moment)
            if failing._plan.done() and not failing._plan.cancelled():
                # An error that is known already needs not wait for its step.
                failing._plan.result()
        due = [upcoming for upcoming in waiting if upcoming._is_due(moment)]
        plans: list[tuple[UpcomingAdapter, Plan]] = []
        for failing in due:
            try:
                plans.append((failing, failing._plan.result()))
            except CancelledError:
                continue
        for failing, planned in plans:
            with _lock:
                if failing._state == "cancelled":
                    continue
                failing._state = "active"
            failing.name = failing._install(owner, planned).name
            _begun.setdefault(owner.key, []).append(failing)
    except BaseException as error:
        if failing is not None and isinstance(error, Exception):
            failing._state, failing._error = "failed", error
        elif failing is not None and failing._state == "active":
            # Interrupted while it was being loaded.
            _put_back(owner, failing)
        for upcoming in reversed(_begun.pop(owner.key, [])):
            assert upcoming.name is not None
            upcoming._uninstall(owner, upcoming.name)
            _put_back(owner, upcoming)
        raise


def _put_back(owner: Owner, upcoming: UpcomingAdapter) -> None:
    """Let an upcoming adapter that was due wait for the next run."""
    with _lock:
        upcoming._state, upcoming._has_run = "waiting", False
        waiting = _waiting.setdefault(owner.key, [])
        if upcoming not in waiting:
            waiting.append(upcoming)


def _still_waiting(owner: Owner) -> list[UpcomingAdapter]:
    with _lock:
        waiting = [upcoming for upcoming in _waiting.get(owner.key, []) if upcoming._state == "waiting"]
        if waiting:
            _waiting[owner.key] = waiting
        else:
            _waiting.pop(owner.key, None)
        return list(waiting)
