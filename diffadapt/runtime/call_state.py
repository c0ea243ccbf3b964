"""The state of a call of a model that its adapter layers need: the per-call scale, and the samples of the batch."""

import math
from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor

from diffadapt.errors import AdapterError
from diffadapt.runtime.call_arguments import Clock
from diffadapt.runtime.inference_mode import ordinary_tensors
from diffadapt.runtime.regions.fields import Regions

SCALE_KWARGS = ("cross_attention_kwargs", "joint_attention_kwargs", "attention_kwargs")
"""Keyword arguments in which pipelines pass the scale of a call to a model."""

_MOST_KNOWN_ROWS = 64


class CallState:
    """The per-call state that all adapter layers of one model share.

    Attributes:
        value: the per-call scale, 0-d, or `None` if the caller passed none.
        outer: the value that `value` is reset to after a call of the model; set while a pipeline encodes its prompt.
        neutral: the value of a call without a scale. On a model with slots it is a 1, since compiled graphs depend on
            whether there is a tensor; without slots, `None`.
        samples: the number of samples with a mix of adapters of their own; 0 if all samples have the same mix.
        images: the number of images per sample, which follow one another in the batch (`num_images_per_prompt`); 0 if
            the pipeline does not say how many it draws.
        asks_images: whether `images` is read from the pipeline when it encodes its prompts.
        counted: whether the samples are known to be as many as the prompts of the call. In a pipeline they are counted
            when it encodes its prompts; the rows of a model that is called on its own are the samples.
        by_rows: whether the rows of the model's input are the samples, each with its images. If not, a pipeline may
            repeat all of them for guidance. Compiled graphs depend on this, so it keeps its value after `per_sample`.
        batch: the number of rows of the model's input in this call. 0 if it is not known.
        is_ragged: whether the rows of an argument have different numbers of tokens, which layers may get joined.
        row_samples: (batch,) the number of the sample that each row of the model's input belongs to, in this call of a
            model whose slots have gates per sample; else `None`. Compiled graphs read this tensor, and not the numbers
            that it follows from.
        timestep: how noisy the rows of the batch are in this call of a model with adapters that depend on it, from 0 to
            1000: 0-d or (batch,); else `None`.
        clock: how the model is told the timestep, if there are such adapters; else `None`.
        regions: where in the picture adapters act; `None` if they act everywhere.
        row_factors: what the rows of a batch pick from the adapter layers on each layer of the model; see
            `row_factors.py`. Emptied when `per_sample` ends.
        everywhere: the value of `regions` without masks. It is an object without masks where slots are prepared for
            them, since compiled graphs depend on whether there is one; else `None`.
    """

    def __init__(self) -> None:
        self.value: Tensor | None = None
        self.outer: Tensor | None = None
        self.samples = 0
        self.images = 1
        self.asks_images = True
        self.counted = True
        self.neutral: Tensor | None = None
        self.by_rows = False
        self.batch = 0
        self.is_ragged = False
        self.row_samples: Tensor | None = None
        self.timestep: Tensor | None = None
        self.clock: Clock | None = None
        self.regions: Regions | None = None
        self.everywhere: Regions | None = None
        self.row_factors: dict[object, object] = {}
        self._known_rows: dict[tuple[object, ...], Tensor] = {}

    def set_neutral(self, value: Tensor | None) -> None:
        """Make `value` the call scale of calls without one, from now on."""
        self.neutral = self.outer = self.value = value

    def set_everywhere(self, regions: Regions | None) -> None:
        """Make `regions`, which have no masks, those of calls without masks, from now on."""
        if self.regions is self.everywhere:
            self.regions = regions
        self.everywhere = regions

    def scale(self, value: Any) -> Tensor | None:
        """Return the tensor of a call scale, or of a call without one (`None`).

        Raises:
            AdapterError: the scale is a number that is not finite.
        """
        if value is None:
            return self.neutral
        if isinstance(value, (int, float)) and not torch.compiler.is_compiling() and not math.isfinite(value):
            raise AdapterError(f"the scale of a call must be a finite number, not {value}")
        with ordinary_tensors():
            device = None if self.neutral is None else self.neutral.device
            return torch.as_tensor(value, dtype=torch.float32, device=device)

    def keep(self) -> Callable[[], AbstractContextManager[None]]:
        """Return a function whose context has the scale and the timestep of this moment, whatever call runs then."""
        value, timestep = self.value, self.timestep

        @contextmanager
        def kept() -> Generator[None, None, None]:
            before = self.value, self.timestep
            self.value, self.timestep = value, timestep
            try:
                yield
            finally:
                self.value, self.timestep = before

        return kept

    def acting(self, until: Tensor, rows: int) -> Tensor:
        """Return 1 for every component of a rank that acts at the timestep of this call, else 0.

        Args:
            until: the last whole timestep at which a component acts, (rank,).
            rows: the number of rows of the layer's input.

        Returns:
            (rank,), or (rows, rank) if the rows of the batch have timesteps of their own, in float32.

        Raises:
            AdapterError: there is no timestep, since the layer was not called by its model, or it is not known which
                row of the input belongs to which row of the batch.
        """
        if self.clock is None:
            return torch.ones_like(until, dtype=torch.float32)
        timestep = self.timestep
        if timestep is None:
            raise AdapterError(
                "the adapter depends on the timestep, which only a call of the whole model tells; call the model, and "
                "let it do gradient checkpointing (enable_gradient_checkpointing)"
            )
        if timestep.ndim:
            if rows % len(timestep) == 0:
                timestep = timestep.repeat_interleave(rows // len(timestep)).unsqueeze(-1)
            elif not torch.compiler.is_compiling() and bool((timestep == timestep[0]).all()):
                timestep = timestep[0]
            else:
                raise AdapterError(
                    f"the adapter depends on the timestep, and a layer gets {rows} rows for {len(timestep)} timesteps; "
                    "call the model with one timestep"
                )
        # Whole timesteps may come out slightly smaller where models count in shares.
        return (timestep.to(until.device) < until + 0.99).to(torch.float32)

    def assign_rows(self, device: torch.device) -> None:
        """Set `row_samples` for a call with `batch` rows. Without mixes, all rows belong to the first sample."""
        self.row_samples = self._row_samples_on(device)

    def _row_samples_on(self, device: torch.device) -> Tensor:
        if torch.compiler.is_compiling():
            return self._find_row_samples(device)
        key = self.batch, self.samples, self.images or 1, device
        found = self._known_rows.get(key)
        return self._remember(key, self._find_row_samples(device)) if found is None else found

    def _find_row_samples(self, device: torch.device) -> Tensor:
        with ordinary_tensors():
            rows = torch.arange(self.batch, device=device) // (self.images or 1)
            return rows % self.samples if self.samples else torch.zeros_like(rows)

    def refuse_unknown_rows(self) -> None:
        """Raise `AdapterError` if samples have their own mixes and the rows of the batch cannot be assigned to them."""
        for count, what in self.expected if self.batch else ():
            problem = self._problem(count, self.batch, what)
            if problem is not None:
                raise AdapterError(problem)

    @property
    def expected(self) -> list[tuple[int, str]]:
        """How many prompts a call has to be for, since they have mixes or masks of their own, and what they have."""
        masks = 0 if self.regions is None else self.regions.samples
        found = (self.samples, f"per_sample: {self.samples} mixes"), (masks, f"regions: masks for {masks} prompts")
        return [(count, what) for count, what in found if count]

    def spread_masks(self, fields: Tensor) -> Tensor:
        """Return the fields of all rows of the batch, given those of all prompts that have masks of their own.

        Raises:
            AdapterError: the rows cannot be assigned to prompts.
        """
        self.refuse_unknown_rows()
        return self._per_row(fields, len(fields), self.batch)

    def spread(self, gate: Tensor, rows: int) -> Tensor:
        """Return the gates of all rows of a layer's input, given those of all samples.

        A batch consists of copies of all samples (for guidance), and each sample of its images. A layer may split
        every row of the batch into several (frames, windows).

        Args:
            gate: (samples,) or (samples, rank). Slots may have more samples than there are mixes; the last are unused.
            rows: the number of rows of the layer's input.

        Returns:
            (rows,) or (rows, rank). If no sample has a mix of its own and the rows cannot be assigned to samples, the
            gate of the first sample: 0-d or (rank,).

        Raises:
            AdapterError: samples have mixes of their own and the rows cannot be assigned to them.
        """
        if not torch.compiler.is_compiling():
            index = self.samples_of_rows(self.samples or len(gate), rows, gate.device)
            # Slots may be reserved with gates per sample while all samples have the same gates.
            return gate[0] if index is None else gate.index_select(0, index)
        self._refuse_ragged(rows)
        if self.row_samples is not None and rows % len(self.row_samples) == 0:
            is_there = self.row_samples.device == gate.device
            row_samples = self.row_samples if is_there else self._row_samples_on(gate.device)
            per_row = gate.index_select(0, row_samples)
            repeats = rows // len(self.row_samples)
            return per_row if repeats == 1 else per_row.repeat_interleave(repeats, 0)
        count = self.samples or len(gate)
        return gate[0] if self._refuse_unassigned(count, rows) else self._per_row(gate, count, rows)

    def samples_of_rows(self, count: int, rows: int, device: torch.device) -> Tensor | None:
        """Return the number of the sample that every row of a layer's input belongs to, (rows,).

        Every call of the same batch gets the same tensor.

        Args:
            count: the number of samples.
            rows: the number of rows of the layer's input.
            device: the device of the result.

        Returns:
            `None` if no sample has a mix of its own and the rows cannot be assigned to samples.

        Raises:
            AdapterError: see `spread`.
        """
        state = self.batch, self.samples, self.images, self.counted, self.by_rows, self.is_ragged
        key = *state, self.row_samples is None, count, rows, device
        found = self._known_rows.get(key)
        if found is not None:
            return found
        self._refuse_ragged(rows)
        with ordinary_tensors():
            if self.row_samples is not None and rows % len(self.row_samples) == 0:
                repeats = rows // len(self.row_samples)
                return self._remember(key, self._row_samples_on(device).repeat_interleave(repeats))
            if self._refuse_unassigned(count, rows):
                return None
            return self._remember(key, self._per_row(torch.arange(count, device=device), count, rows))

    def _remember(self, key: tuple[object, ...], rows: Tensor) -> Tensor:
        if len(self._known_rows) >= _MOST_KNOWN_ROWS:
            self._known_rows.clear()
        self._known_rows[key] = rows
        return rows

    def _refuse_ragged(self, rows: int) -> None:
        if self.is_ragged and self.samples and rows != self.batch:
            raise AdapterError(
                f"per_sample: {self.samples} mixes, but a layer gets the {rows} tokens of all prompts as one matrix, "
                "and the prompts have different lengths; run the samples one by one"
            )

    def _refuse_unassigned(self, count: int, rows: int) -> bool:
        """Return whether rows cannot be assigned to samples; raise `AdapterError` if samples have their own mixes."""
        problem = self._problem(count, rows)
        if problem is not None and self.samples:
            raise AdapterError(problem)
        return problem is not None

    def _per_row(self, values: Tensor, count: int, rows: int) -> Tensor:
        """Return the values of all `rows` of a layer's input, given those of the first `count` samples."""
        batch, images = self.batch or rows, self.images or 1
        copies = batch // (count * images)
        values = values[:count].unsqueeze(1).unsqueeze(0)
        return values.expand(copies, -1, rows // batch * images, *values.shape[3:]).flatten(0, 2)

    def _problem(self, count: int, rows: int, what: str | None = None) -> str | None:
        """Return why the `rows` of a layer's input cannot be assigned to `count` samples, or `None` if they can.

        `what` says what these samples have, by default mixes.

        Divisibility alone says little: with guidance, one prompt has two rows, and so have two prompts without it.
        """
        what = what or f"per_sample: {count} mixes"
        batch, images = self.batch or rows, self.images or 1
        if not self.counted:
            return (
                f"{what}, but the pipeline has not encoded its prompts inside the block, so it is "
                "not known how many there are; encode them there, or run the samples one by one. For a loop of your "
                "own, diffadapt.adapters(model).per_sample(...) takes the rows of a model's batch as samples"
            )
        if not self.images and batch != count:
            subject = f"per_sample: a batch of {batch} rows for {count} mixes" if what.startswith("per_") else what
            remedy = "pass images= to per_sample" if what.startswith("per_") else "draw the pictures one by one"
            return f"{subject}, but this pipeline does not say how many images it draws of each prompt; {remedy}"
        if self.by_rows and batch != count * images:
            return (
                f"{what} for the rows of this model, but its batch has {batch} rows; pass one mix "
                "for every row (mixes * 2 where guidance repeats the batch), or use pipe.adapters.per_sample, which "
                "counts the prompts"
            )
        if batch % (count * images):
            return (
                f"{what}, but a batch of {batch} is no multiple of {count} x {images} images; pass "
                "as many prompts and negative prompts as samples"
            )
        if rows % batch:
            return (
                f"{what}, but a layer gets {rows} rows of a batch of {batch}, and it is not known "
                "which sample each row belongs to; run the samples one by one"
            )
        return None


def scale_of_call(kwargs: Mapping[str, Any]) -> Any:
    """Return the scale that a model is called with, or `None`."""
    scale = None
    for name in SCALE_KWARGS:
        options = kwargs.get(name)
        if isinstance(options, dict) and options.get("scale") is not None:
            scale = options["scale"]
    return scale
