"""A clock that counts a pipeline's steps by observing its scheduler. All knowledge of diffusers' schedulers is here.

A run begins with `set_timesteps`. Image-to-image pipelines then skip steps: they call `set_begin_index` if the
scheduler has it; if not, the first timestep that they use shows how many they skip. Some pipelines call
`scale_model_input` before a call of the denoiser. After `step`, the next step begins. So a listener is notified of a
step before the first call of the denoiser in that step, with any pipeline, without a callback, and outside compiled
code.
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
    """Return whether a component of a pipeline is a scheduler that a denoising loop can use."""
    return hasattr(component, "set_timesteps") and hasattr(component, "step")


def follow(scheduler: Any, owner: object, listener: Listener | None, *, running: bool = False) -> None:
    """Call `listener` at the start of every run of `scheduler` and whenever a run moves on to another step.

    Args:
        scheduler: the scheduler to observe.
        owner: the owner of the listener. An owner has one listener; this one replaces a previous one.
        listener: the function to call, or `None` to remove the owner's listener. Once all listeners are removed, the
            scheduler is in its original state.
        running: whether a run has already begun. A new listener is then called at once.
    """
    clock = next((value.clock for value in vars(scheduler).values() if isinstance(value, _ObservedMethod)), None)
    if listener is not None:
        if clock is None:
            clock = _Clock(scheduler)
            clock.install()
        new = owner not in clock.listeners
        clock.listeners[owner] = listener
        if new and running:
            clock.notify(begins=True)
    elif clock is not None:
        clock.listeners.pop(owner, None)
        if not clock.listeners:
            clock.uninstall()


class _Clock:
    """The step counter of one scheduler.

    Attributes:
        scheduler: the observed scheduler.
        listeners: owner -> its listener.
        shadowed: the scheduler's own instance attributes that observed methods replace, by name.
        index: the index into the scheduler's `timesteps` of the next evaluation of the denoiser.
        begin: the index of the first evaluation in this run; `None` while it is unknown.
    """

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler
        self.listeners: dict[object, Listener] = {}
        self.shadowed = {name: vars(scheduler)[name] for name in _METHODS if name in vars(scheduler)}
        self.index = 0
        self.begin: int | None = getattr(scheduler, "begin_index", None)

    def install(self) -> None:
        """Replace the scheduler's methods by observed ones, as attributes of the instance."""
        for name in _METHODS:
            if hasattr(self.scheduler, name):
                vars(self.scheduler)[name] = _ObservedMethod(self, name)

    def uninstall(self) -> None:
        """Restore the scheduler's methods."""
        for name in _METHODS:
            vars(self.scheduler).pop(name, None)
        vars(self.scheduler).update(self.shadowed)

    def call(self, name: str, method: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Call a method of the scheduler, update the position and notify the listeners."""
        if name in ("scale_model_input", "step"):
            # Usually the previous step has led here already. But a pipeline may also skip or repeat timesteps.
            if self._move_to(inspect.signature(method).bind(*args, **kwargs).arguments.get("timestep")):
                self.notify()
        result = method(*args, **kwargs)
        if name == "step":
            self.index += 1
        elif name == "set_timesteps":
            self.index, self.begin = 0, None
        elif name == "set_begin_index":
            self.begin = self.index = self.scheduler.begin_index or 0
        if name != "scale_model_input":
            self.notify(begins=name == "set_timesteps")
        return result

    def notify(self, begins: bool = False) -> None:
        """Call all listeners with the current moment. `begins` is whether a run begins."""
        order = getattr(self.scheduler, "order", 1)
        timesteps = self.scheduler.timesteps
        begin = self.begin or 0
        steps = max(1, math.ceil((len(timesteps) - begin) / order))
        step = min(max(0, self.index - begin) // order, steps - 1)
        # A listener may end its listening.
        for listener in list(self.listeners.values()):
            listener(Moment(step, steps, lambda: self._sigma(begin + step * order), begins))

    def _move_to(self, timestep: Any) -> bool:
        """Set the position to that of a timestep, and return whether it changed."""
        index = self._index_of(timestep)
        before = self.index, self.begin
        if index is not None:
            self.index = index
            if self.begin is None:
                self.begin = index
        return before != (self.index, self.begin)

    def _index_of(self, timestep: Any) -> int | None:
        """Return the index of a timestep among those of the run, or `None` if it is not one of them."""
        timesteps = self.scheduler.timesteps
        if timestep is None:
            return None
        if isinstance(timestep, Tensor) and isinstance(timesteps, Tensor) and timestep.dtype == timesteps.dtype:
            # Denoising loops iterate over views of this tensor. The offset of a view distinguishes equal timesteps, and
            # reading it does not wait for the GPU.
            if timestep.untyped_storage().data_ptr() == timesteps.untyped_storage().data_ptr():
                return (timestep.storage_offset() - timesteps.storage_offset()) // timesteps.stride(0)
        value = float(timestep.flatten()[0] if isinstance(timestep, Tensor) else timestep)
        matches = [index for index, other in enumerate(timesteps.tolist()) if other == value]
        return min(matches, key=lambda index: abs(index - self.index), default=None)

    def _sigma(self, index: int) -> float:
        """Return the noise level of a timestep. Raise `AdapterError` if the scheduler does not provide it."""
        scheduler = self.scheduler
        sigmas, alphas = getattr(scheduler, "sigmas", None), getattr(scheduler, "alphas_cumprod", None)
        if sigmas is not None:
            return float(sigmas[index])
        if alphas is not None:
            # Variance-preserving process: x = sqrt(alpha) x0 + sqrt(1 - alpha) noise, rescaled to x0 + sigma noise.
            alpha = float(alphas[int(scheduler.timesteps[index])])
            return math.sqrt((1 - alpha) / alpha) if alpha else math.inf
        raise AdapterError(f"{type(scheduler).__name__} does not say its noise levels; use a schedule over fraction")

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Clock":
        scheduler = memo.get(id(self.scheduler))
        if scheduler is None:
            # The scheduler itself is not being copied: some pipelines copy its attributes and later restore them.
            return self
        clock = _Clock(scheduler)
        clock.shadowed, clock.index, clock.begin = {}, self.index, self.begin
        # A copy of the scheduler alone draws with the same models; one that is copied with its pipeline does not.
        copied = any(id(owner) in memo for owner in self.listeners)
        others = ((owner, listener) for owner, listener in self.listeners.items() if id(owner) not in memo)
        clock.listeners = dict(others) if copied else self.listeners
        return clock


class _ObservedMethod:
    """A stand-in for a method of a scheduler that reports its calls to the clock."""

    def __init__(self, clock: _Clock, name: str) -> None:
        self.clock = clock
        self.name = name

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        """The original method. Pipelines inspect its parameters, for which `inspect` follows this attribute."""
        scheduler = self.clock.scheduler
        shadowed = self.clock.shadowed.get(self.name)
        return getattr(type(scheduler), self.name).__get__(scheduler) if shadowed is None else shadowed

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.clock.call(self.name, self.__wrapped__, args, kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> "_ObservedMethod":
        return _ObservedMethod(copy.deepcopy(self.clock, memo), self.name)
