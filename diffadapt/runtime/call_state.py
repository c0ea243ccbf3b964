"""The state of a call of a model that its adapter layers need: the per-call scale, and the samples of the batch."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from diffadapt.errors import AdapterError

SCALE_KWARGS = ("cross_attention_kwargs", "joint_attention_kwargs", "attention_kwargs")
"""Keyword arguments in which pipelines pass the scale of a call to a model."""


class CallState:
    """The per-call state that all adapter layers of one model share.

    Attributes:
        value: the per-call scale, 0-d, or `None` if the caller passed none.
        outer: the value that `value` is reset to after a call of the model; set while a pipeline encodes its prompt.
        samples: the number of samples with a mix of adapters of their own; 0 if all samples have the same mix.
        images: the number of images per sample, which follow one another in the batch (`num_images_per_prompt`); 0 if
            the pipeline does not say how many it draws.
        asks_images: whether `images` is read from the pipeline when it encodes its prompts.
        counted: whether the samples are known to be as many as the prompts of the call. In a pipeline they are counted
            when it encodes its prompts; the rows of a model that is called on its own are the samples.
        by_rows: whether the rows of the model's input are the samples, each with its images. If not, a pipeline may
            repeat all of them for guidance. Compiled graphs depend on this, so it keeps its value after `per_sample`.
        batch: the number of rows of the model's input in this call. 0 if it is not known.
    """

    def __init__(self) -> None:
        self.value: Tensor | None = None
        self.outer: Tensor | None = None
        self.samples = 0
        self.images = 1
        self.asks_images = True
        self.counted = True
        self.by_rows = False
        self.batch = 0

    def refuse_unknown_rows(self) -> None:
        """Raise `AdapterError` if samples have their own mixes and the rows of the batch cannot be assigned to them."""
        problem = self._problem(self.samples, self.batch) if self.samples and self.batch else None
        if problem is not None:
            raise AdapterError(problem)

    def spread(self, gate: Tensor, rows: int) -> Tensor:
        """Return the gates of all rows of a layer's input, given those of all samples.

        A batch consists of copies of all samples (for guidance), and each sample of its images. A layer may split
        every row of the batch into several (frames, windows).

        Args:
            gate: (samples,) or (samples, rank).
            rows: the number of rows of the layer's input.

        Returns:
            (rows,) or (rows, rank). If no sample has a mix of its own and the rows cannot be assigned to samples, the
            gate of the first sample: 0-d or (rank,).

        Raises:
            AdapterError: samples have mixes of their own and the rows cannot be assigned to them.
        """
        count = len(gate)
        problem = self._problem(count, rows)
        if problem is not None:
            if not self.samples:
                # Slots are reserved with gates per sample, but all samples have the same gates now.
                return gate[0]
            raise AdapterError(problem)
        batch, images = self.batch or rows, self.images or 1
        copies = batch // (count * images)
        per_row = gate.unsqueeze(1).unsqueeze(0).expand(copies, -1, rows // batch * images, *gate.shape[1:])
        return per_row.flatten(0, 2)

    def _problem(self, count: int, rows: int) -> str | None:
        """Return why the `rows` of a layer's input cannot be assigned to `count` samples, or `None` if they can.

        Divisibility alone says little: with guidance, one prompt has two rows, and so have two prompts without it.
        """
        batch, images = self.batch or rows, self.images or 1
        if not self.counted:
            return (
                f"per_sample: {count} mixes, but the pipeline has not encoded its prompts inside the block, so it is "
                "not known how many there are; encode them there, or run the samples one by one. For a loop of your "
                "own, diffadapt.adapters(model).per_sample(...) takes the rows of a model's batch as samples"
            )
        if not self.images and batch != count:
            return (
                f"per_sample: a batch of {batch} rows for {count} mixes, but this pipeline does not say how many "
                "images it draws of each prompt; pass images= to per_sample"
            )
        if self.by_rows and batch != count * images:
            return (
                f"per_sample: {count} mixes for the rows of this model, but its batch has {batch} rows; pass one mix "
                "for every row (mixes * 2 where guidance repeats the batch), or use pipe.adapters.per_sample, which "
                "counts the prompts"
            )
        if batch % (count * images):
            return (
                f"per_sample: {count} mixes, but a batch of {batch} is no multiple of {count} x {images} images; pass "
                "as many prompts and negative prompts as samples"
            )
        if rows % batch:
            return (
                f"per_sample: {count} mixes, but a layer gets {rows} rows of a batch of {batch}, and it is not known "
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
