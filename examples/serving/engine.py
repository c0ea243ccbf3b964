"""One pipeline that draws requests with different adapters together. It knows nothing of HTTP or Ray.

    engine = Engine("examples/tiny_pipeline", "adapters", slots=8, samples=8, pool_bytes=2**30)
    first, second = engine.draw([
        Request("a red circle", {"ink": 1.0}, seed=1),
        Request("a green star", {"pixel": 0.7, "critter": {"unet.up_blocks": 0.5}}, seed=2),
    ])

Requests of the same size, number of steps and guidance scale share a batch, each row with its own prompt, generator and
mix of adapters. So a picture does not depend on the requests that were drawn with it, except for rounding: it is what
the same request gives alone.

A compiled pipeline has a graph for every number of rows. So it draws only powers of two of them, some of them empty.
"""

import inspect
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from threading import RLock
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from numpy.typing import NDArray
from PIL import Image

import diffadapt
from diffadapt import AdapterError
from examples.serving.adapters import AdapterFolder, Stamp, UnknownAdapter


@dataclass(frozen=True)
class Request:
    """One picture.

    Attributes:
        prompt: the prompt, without adapter tags.
        adapters: adapter name -> strength: a number, a schedule, or prefix -> number or schedule.
        seed: seed of the picture's own generator.
        steps: number of denoising steps.
        size: width and height in pixels; `None` for the size the model was trained with.
        guidance_scale: guidance scale of the pipeline.
    """

    prompt: str
    adapters: Mapping[str, Any] = field(default_factory=dict[str, Any])
    seed: int = 0
    steps: int = 20
    size: tuple[int, int] | None = None
    guidance_scale: float = 3.0


EMPTY = Request("")
"""The row that fills a batch of a compiled pipeline. Its picture is thrown away."""

_TRIAL = "tried on"  # No file of the folder can have this name.
_MEASURED = 8
"""How many adapters are read to tell how large they are."""


class Abandoned(Exception):
    """Nobody waits for the pictures any more."""


class Engine:
    """A pipeline, the adapters of a folder, and a pool of those in use. It is thread-safe.

    Attributes:
        pipe: the pipeline.
        folder: the folder of adapters.
        pool: the adapters in memory.
        slots: how many different adapters a batch may have.
        samples: the largest number of rows of a batch.
        compiled: whether the denoiser is compiled.
        native_size: width and height that the model was trained with, in pixels.
        multiple: what width and height have to be multiples of.
    """

    def __init__(
        self,
        pipeline: str | PathLike[str],
        adapters: AdapterFolder | str | PathLike[str],
        *,
        slots: int = 8,
        samples: int = 8,
        pool_bytes: int = 2**30,
        compiled: bool | str | Callable[..., Any] = False,
    ) -> None:
        """
        Args:
            pipeline: path or hub id of a diffusers pipeline. On a GPU it is loaded in bfloat16.
            adapters: the folder of adapters.
            slots: how many different adapters a batch may have.
            samples: the largest number of rows of a batch.
            pool_bytes: bytes of adapters to keep in CPU memory.
            compiled: whether to compile the denoiser; or the backend of `torch.compile` to do it with.
        """
        self.pipe: Any = DiffusionPipeline.from_pretrained(pipeline)
        if torch.cuda.is_available():
            self.pipe.to("cuda", torch.bfloat16)
        self.pipe.set_progress_bar_config(disable=True)
        self.folder = adapters if isinstance(adapters, AdapterFolder) else AdapterFolder(adapters)
        self.slots = slots
        self.samples = samples
        self.compiled = bool(compiled)
        self.native_size = _native_size(self.pipe)
        self.multiple = _multiple(self.pipe)
        self.pool = diffadapt.AdapterPool(self.pipe.adapters, pool_bytes, loaded=slots)
        # Old pipelines cannot be stopped between two steps.
        self._has_callback = "callback_on_step_end" in inspect.signature(self.pipe.__call__).parameters
        self._stamps: dict[str, Stamp] = {}
        self._fitting: set[str] = set()
        self._registering = RLock()
        self._drawing = RLock()
        if compiled:
            self._reserve()
            backend = "inductor" if compiled is True else compiled
            # One graph for every shape of a batch; the default limit of 8 would silently leave the ninth uncompiled.
            torch._dynamo.config.recompile_limit = 64
            _denoiser(self.pipe).compile(backend=backend, dynamic=False)

    def check(self, request: Request) -> None:
        """Raise an error if a request cannot be drawn, as far as this shows without reading an adapter.

        Raises:
            UnknownAdapter: the folder has no such adapter.
            AdapterError: the request has more adapters than there are slots, or than the pool has room for.
        """
        size = sum(self.folder.path(name).stat().st_size for name in request.adapters)
        if len(request.adapters) > self.slots:
            raise AdapterError(
                f"{len(request.adapters)} adapters in one request, but at most {self.slots} can be mixed"
            )
        if size > self.pool.budget:
            raise AdapterError(
                f"the adapters of the request have {size} bytes, but the pool has {self.pool.budget}; mix fewer or "
                "smaller ones"
            )

    def capacity(self) -> int:
        """Return about how many adapters the pool has room for, by the size of a few; 256 if there are none yet."""
        names = self.folder.names()
        sizes: list[int] = []
        for name in names[:: -(-len(names) // _MEASURED) or 1]:
            with suppress(AdapterError):
                sizes.append(self.pipe.adapters.prefetch(self.folder.path(name)).bytes)
        return max(1, int(self.pool.budget / statistics.mean(sizes))) if sizes else 256

    def prefetch(self, names: Iterable[str]) -> None:
        """Start reading adapters in the background. If one cannot be read, `draw` says so."""
        for name in names:
            with suppress(UnknownAdapter), self._registering:
                stamp = self.folder.stamp(name)
                if name not in self.pool:
                    self.pool.add(name, self.folder.path(name))
                    self._stamps[name] = stamp
                if self._stamps[name] == stamp:
                    self.pool.prefetch(name)

    def try_on(self, file: Path) -> None:
        """Check that an adapter can be drawn with: read it completely, load it into the models, and remove it again.

        Raises:
            AdapterError: the file is damaged, for another model, larger than the pool, or not finite. The message has
                the reasons.
        """
        plan = self.pipe.adapters.prefetch(file)
        if plan.bytes > self.pool.budget:
            raise AdapterError(f"the adapter takes {plan.bytes} bytes of memory, but the pool has {self.pool.budget}")
        with self._drawing:
            # Without a seat: if there are slots, they are enlarged when the adapter is first drawn with.
            self.pipe.adapters.load(plan, _TRIAL, activate=False, allow_recompile=True)
            self.pipe.adapters.remove(_TRIAL)

    def draw(
        self, requests: Sequence[Request], is_wanted: Callable[[], bool] = lambda: True
    ) -> list[Image.Image | Exception]:
        """Draw pictures, as many at once as a batch may have.

        Args:
            requests: any number of requests, with any adapters, sizes and numbers of steps.
            is_wanted: is asked before every batch and every step; if it returns `False`, drawing ends.

        Returns:
            For every request its picture, or the error that kept it from being drawn. It does not affect the others.
            The error is `Abandoned` for those that were not drawn because they were not wanted any more.
        """
        results: dict[int, Image.Image | Exception] = {}
        with self._drawing:
            for index, request in enumerate(requests):
                try:
                    self.check(request)
                except AdapterError as error:
                    results[index] = error
            sound = {index: request for index, request in enumerate(requests) if index not in results}
            self._renew({name for request in sound.values() for name in request.adapters})
            for batch in self._batches(sound):
                results |= self._draw_or_divide(batch, is_wanted)
        return [results[index] for index in range(len(requests))]

    def warm_up(self) -> None:
        """Compile the graphs of all batches of the native size, with guidance."""
        self._renew(self._fitting)
        for count in sorted({self._rows(count + 1) for count in range(self.samples)}):
            # A graph for rows with mixes of their own is another one than for rows without adapters.
            mix = dict.fromkeys(sorted(self._fitting)[:1], 1.0)
            self._draw_batch([Request("", mix, steps=1)] * count, lambda: True)

    def close(self) -> None:
        """Drop all adapters and stop the thread that reads them."""
        self.pool.close()

    def _batches(self, requests: Mapping[int, Request]) -> list[dict[int, Request]]:
        """Divide requests into batches of one shape each, with no more adapters than slots."""
        batches: list[dict[int, Request]] = []
        unfilled: dict[Any, tuple[dict[int, Request], set[str]]] = {}
        for index, request in requests.items():
            shape = request.size or self.native_size, request.steps, request.guidance_scale
            batch, names = unfilled.get(shape, ({}, set[str]()))
            names = names | set(request.adapters)
            if not batch or len(batch) == self.samples or len(names) > self.slots:
                batch, names = {}, set(request.adapters)
                batches.append(batch)
            batch[index] = request
            unfilled[shape] = batch, names
        return batches

    def _draw_or_divide(
        self, requests: Mapping[int, Request], is_wanted: Callable[[], bool]
    ) -> dict[int, Image.Image | Exception]:
        """Draw one batch; if that fails, draw its requests one by one, so that only the faulty ones fail."""
        try:
            return dict(zip(requests, self._draw_batch(list(requests.values()), is_wanted), strict=True))
        except Abandoned as error:
            return dict.fromkeys(requests, error)
        except Exception as error:
            if len(requests) == 1:
                return dict.fromkeys(requests, error)
        results: dict[int, Image.Image | Exception] = {}
        for index, request in requests.items():
            results |= self._draw_or_divide({index: request}, is_wanted)
        return results

    def _draw_batch(self, requests: Sequence[Request], is_wanted: Callable[[], bool]) -> list[Image.Image | Exception]:
        """Draw requests of one shape in one call of the pipeline.

        Returns:
            The pictures; an error in place of one whose numbers are not finite.

        Raises:
            AdapterError: a request cannot be drawn, and so none was.
            Abandoned: the pictures are not wanted any more.
        """

        def go_on(pipe: Any, step: int, time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            if not is_wanted():
                raise Abandoned
            return tensors

        if not is_wanted():
            raise Abandoned
        if self.compiled:
            self._make_room({name for request in requests for name in request.adapters})
        mixes = [dict(request.adapters) for request in requests]
        rows = [*requests]
        if len(rows) == 1 or (not self.compiled and all(mix == mixes[0] for mix in mixes)):
            mixed = self.pool.activated(mixes[0])
        else:
            missing = self._rows(len(rows)) - len(rows) if self.compiled else 0
            rows += [EMPTY] * missing
            mixed = self.pool.per_sample([*mixes, *({} for _ in range(missing))])
        width, height = requests[0].size or self.native_size
        call = dict[str, Any](
            prompt=[request.prompt for request in rows],
            generator=[torch.Generator().manual_seed(request.seed) for request in rows],
            num_inference_steps=requests[0].steps,
            guidance_scale=requests[0].guidance_scale,
            width=width,
            height=height,
            output_type="np",
        )
        if self._has_callback:
            call["callback_on_step_end"] = go_on
        with mixed:
            try:
                pictures = self.pipe(**call).images
            except ValueError as error:
                if isinstance(error, AdapterError) or (width, height) == self.native_size:
                    raise
                raise AdapterError(f"the model cannot draw {width}x{height}: {error}") from error
        return [_picture(values, request) for values, request in zip(pictures, requests, strict=False)]

    def _renew(self, names: Iterable[str]) -> None:
        """Register adapters in the pool, and drop those whose file is another one now, or none."""
        with self._registering:
            for name in [*self.pool.ready, *names]:
                try:
                    stamp = self.folder.stamp(name)
                except UnknownAdapter:
                    stamp = None
                if name in self.pool and self._stamps[name] != stamp:
                    self.pool.discard(name)
                    self._fitting.discard(name)
                if name not in self.pool and stamp is not None:
                    self.pool.add(name, self.folder.path(name))
                    self._stamps[name] = stamp

    def _rows(self, requests: int) -> int:
        """Return the number of rows that a compiled pipeline draws for a number of requests."""
        return min(1 << (requests - 1).bit_length(), self.samples)

    def _make_room(self, names: Iterable[str]) -> None:
        """Enlarge the slots if adapters that came after the last reservation do not fit. The next call recompiles."""
        for name in sorted(set(names) - self._fitting):
            try:
                with self.pool.activated({name: 1.0}):
                    self._fitting.add(name)
            except AdapterError:
                self._reserve()

    def _reserve(self) -> None:
        """Reserve slots for all adapters of the folder that can be used."""
        usable = {
            name: path for name in self.folder.names() if not _is_faulty(path := self.folder.path(name), self.pipe)
        }
        spare = diffadapt.LoraConfig(rank=16, target_modules="all-linear")
        self.pipe.adapters.prepare_hotswap(list(usable.values()) or [spare], slots=self.slots, samples=self.samples)
        self._fitting = set(usable)


def _is_faulty(file: Path, pipe: Any) -> bool:
    """Return whether an adapter file cannot be used completely."""
    try:
        return bool(diffadapt.inspect(file, pipe).unused)
    except AdapterError:
        return True


def _picture(values: NDArray[np.float32], request: Request) -> Image.Image | Exception:
    """Return the picture of values `(height, width, 3)` in 0..1, or an error if they are not all finite."""
    if not np.isfinite(values).all():
        mixed = ", ".join(request.adapters) or "no adapters"
        return AdapterError(f"the picture is not finite numbers, with {mixed}; try smaller strengths")
    return Image.fromarray((values * 255).round().astype(np.uint8))


def _denoiser(pipe: Any) -> torch.nn.Module:
    """Return the UNet or transformer of a pipeline."""
    return pipe.unet if getattr(pipe, "unet", None) is not None else pipe.transformer


def _native_size(pipe: Any) -> tuple[int, int]:
    """Return the width and height in pixels that a pipeline draws by default."""
    sample = getattr(pipe, "default_sample_size", None) or _denoiser(pipe).config.sample_size
    height, width = sample if isinstance(sample, (tuple, list)) else (sample, sample)
    return int(width * pipe.vae_scale_factor), int(height * pipe.vae_scale_factor)


def _multiple(pipe: Any) -> int:
    """Return what width and height have to be multiples of: pipelines ask for 8, and transformers for whole patches."""
    is_transformer = getattr(pipe, "unet", None) is None
    return math.lcm(8, int(pipe.vae_scale_factor) * (2 if is_transformer else 1))
