"""The state of a call of a model that its adapter layers need: the per-call scale, and the samples of the batch."""

from torch import Tensor

from diffadapt.errors import AdapterError


class CallState:
    """The per-call state that all adapter layers of one model share.

    Attributes:
        value: the per-call scale, 0-d, or `None` if the caller passed none.
        outer: the value that `value` is reset to after a call of the model; set while a pipeline encodes its prompt.
        samples: the number of samples with a mix of adapters of their own; 0 if all samples have the same mix.
        images: the number of images per sample, which follow one another in the batch (`num_images_per_prompt`).
        knows_images: whether the pipeline, or the user, says how many images there are.
        asks_images: whether `images` is read from the pipeline when it encodes its prompts.
        counted: whether the samples are known to be as many as the prompts of the call. In a pipeline they are counted
            when it encodes its prompts; the rows of a model that is called on its own are the samples.
        batch: the number of rows of the model's input in this call; guidance makes it a multiple of
            `samples * images`. 0 if it is not known.
    """

    def __init__(self) -> None:
        self.value: Tensor | None = None
        self.outer: Tensor | None = None
        self.samples = 0
        self.images = 1
        self.knows_images = True
        self.asks_images = True
        self.counted = True
        self.batch = 0

    def refuse_unknown_rows(self) -> None:
        """Raise `AdapterError` if samples have mixes of their own and the rows of the batch cannot be assigned to them.

        Divisibility is not enough: with guidance, one prompt has two rows, and so have two prompts without it.
        """
        if not self.samples:
            return
        if not self.counted:
            raise AdapterError(
                f"per_sample: {self.samples} mixes, but the pipeline has not encoded its prompts inside the block, so "
                "it is not known how many there are; encode them there, or run the samples one by one. For a loop of "
                "your own, diffadapt.adapters(model).per_sample(...) takes the rows of a model's batch as samples"
            )
        if self.asks_images and not self.knows_images and self.batch != self.samples:
            raise AdapterError(
                f"per_sample: a batch of {self.batch} rows for {self.samples} mixes, but this pipeline does not say "
                "how many images it draws of each prompt; pass images= to per_sample"
            )

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
        count, batch = len(gate), self.batch or rows
        if rows % batch or batch % (count * self.images):
            if not self.samples:
                # Slots are reserved with gates per sample, but all samples have the same gates now.
                return gate[0]
            problem = (
                f"a layer gets {rows} rows of a batch of {batch}, and it is not known which sample each row belongs "
                "to; run the samples one by one"
                if rows % batch
                else f"a batch of {batch} is no multiple of {count} x {self.images} images; pass as many prompts and "
                "negative prompts as samples"
            )
            raise AdapterError(f"{count} samples have adapters of their own, but {problem}")
        copies = batch // (count * self.images)
        per_row = gate.unsqueeze(1).unsqueeze(0).expand(copies, -1, rows // batch * self.images, *gate.shape[1:])
        return per_row.flatten(0, 2)
