"""At which step a pipeline is, told by its scheduler. What we know of diffusers' schedulers is here.

A run begins with `set_timesteps`. Image-to-image pipelines then skip steps, and say so by `set_begin_index` where the
scheduler has that; where it has not, the first timestep they use shows it. `scale_model_input` comes before a call of
the denoiser, in the pipelines that use it; after `step` the next step begins. So a listener knows of a step before the
first call of the denoiser in it, whatever else a pipeline calls: with no callback, and outside of compiled code.
"""

import copy
import inspect
import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from diffadapt.errors import AdapterError
from diffadapt.strengths.schedules import Moment

Listener = Callable[[Moment], None]
_METHODS = ("set_timesteps", "set_begin_index", "scale_model_input", "step")


def is_scheduler(component: object) -> bool:
    """Whether this is what a denoising loop steps with."""
    return hasattr(component, "set_timesteps") and hasattr(component, "step")


def follow(scheduler: Any, owner: object, listener: Listener | None, *, running: bool = False) -> None:
    """Call `listener` at the beginning of a run of `scheduler` and whenever it goes on to another step.

    Args:
        owner: of the listener, which takes the place of the one it had; others stay.
        listener: `None` for nobody. Without a listener a scheduler is as it was.
        running: a run has begun already.
    """
    clock = next((own.clock for own in vars(scheduler).values() if isinstance(own, _Told)), None)
    if listener is not None:
        if clock is None:
            clock = _Clock(scheduler)
            clock.install()
        new = owner not in clock.listeners
        clock.listeners[owner] = listener
        if new and running:
            clock.tell()
    elif clock is not None:
        clock.listeners.pop(owner, None)
        if not clock.listeners:
            clock.leave()


class _Clock:
    """Counts the steps of one scheduler.

    Attributes:
        listeners: by their owners.
        index: of the coming evaluation of the denoiser, in the scheduler's `timesteps`.
        begin: of the first one of this run, if that is known.
    """

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler
        self.listeners: dict[object, Listener] = {}
        self.own = {name: vars(scheduler)[name] for name in _METHODS if name in vars(scheduler)}
        self.index = 0
        self.begin: int | None = getattr(scheduler, "begin_index", None)

    def install(self) -> None:
        for name in _METHODS:
            if hasattr(self.scheduler, name):
                vars(self.scheduler)[name] = _Told(self, name)

    def leave(self) -> None:
        for name in _METHODS:
            vars(self.scheduler).pop(name, None)
        vars(self.scheduler).update(self.own)

    def call(self, name: str, method: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if name in ("scale_model_input", "step"):
            # What tells of the step before has said this already, unless a pipeline goes its own ways.
            if self._locate(inspect.signature(method).bind(*args, **kwargs).arguments.get("timestep")):
                self.tell()
        result = method(*args, **kwargs)
        if name == "step":
            self.index += 1
        elif name == "set_timesteps":
            self.index, self.begin = 0, None
        elif name == "set_begin_index":
            self.begin = self.index = self.scheduler.begin_index or 0
        if name != "scale_model_input":
            self.tell()
        return result

    def tell(self) -> None:
        order = getattr(self.scheduler, "order", 1)
        timesteps = self.scheduler.timesteps
        begin = self.begin or 0
        steps = max(1, math.ceil((len(timesteps) - begin) / order))
        step = min(max(0, self.index - begin) // order, steps - 1)
        for listener in self.listeners.values():
            listener(Moment(step, steps, lambda: self._sigma(begin + step * order)))

    def _locate(self, timestep: Any) -> bool:
        """Go to where a timestep is, and say whether that is news."""
        index = self._position(timestep)
        before = self.index, self.begin
        if index is not None:
            self.index = index
            if self.begin is None:
                self.begin = index
        return before != (self.index, self.begin)

    def _position(self, timestep: Any) -> int | None:
        """Where a timestep is among those of the run, if it is one."""
        timesteps = self.scheduler.timesteps
        if timestep is None:
            return None
        if isinstance(timestep, Tensor) and isinstance(timesteps, Tensor) and timestep.dtype == timesteps.dtype:
            # Loops go over views of that very tensor. Their place in it tells equal timesteps apart, and reading it
            # does not wait for a GPU.
            if timestep.untyped_storage().data_ptr() == timesteps.untyped_storage().data_ptr():
                return (timestep.storage_offset() - timesteps.storage_offset()) // timesteps.stride(0)
        value = float(timestep.flatten()[0] if isinstance(timestep, Tensor) else timestep)
        places = [index for index, other in enumerate(timesteps.tolist()) if other == value]
        return min(places, key=lambda index: abs(index - self.index), default=None)

    def _sigma(self, index: int) -> float:
        scheduler = self.scheduler
        sigmas, alphas = getattr(scheduler, "sigmas", None), getattr(scheduler, "alphas_cumprod", None)
        if sigmas is not None:
            return float(sigmas[index])
        if alphas is not None:
            # Of a variance-preserving process: x = sqrt(alpha) x0 + sqrt(1 - alpha) noise, scaled to x0 + sigma noise.
            alpha = float(alphas[int(scheduler.timesteps[index])])
            return math.sqrt((1 - alpha) / alpha) if alpha else math.inf
        raise AdapterError(f"{type(scheduler).__name__} does not say its noise levels; use a schedule over fraction")

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Clock":
        scheduler = memo.get(id(self.scheduler))
        if scheduler is None:
            # Pipelines keep copies of a scheduler's attributes, and put them back.
            return self
        clock = _Clock(scheduler)
        clock.own, clock.listeners, clock.index, clock.begin = {}, self.listeners, self.index, self.begin
        return clock


class _Told:
    """Stands in for a method of a scheduler and tells the clock of its calls."""

    def __init__(self, clock: _Clock, name: str) -> None:
        self.clock = clock
        self.name = name

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        """The method itself. Pipelines look at its parameters, and `inspect` looks here."""
        scheduler = self.clock.scheduler
        own = self.clock.own.get(self.name)
        return getattr(type(scheduler), self.name).__get__(scheduler) if own is None else own

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.clock.call(self.name, self.__wrapped__, args, kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Told":
        return _Told(copy.deepcopy(self.clock, memo), self.name)
