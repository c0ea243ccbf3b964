"""What the adapter layers of one model have to know of a call of that model."""

from torch import Tensor

from diffadapt.errors import AdapterError


class CallState:
    """What the adapter layers of one model have to know of a call.

    Attributes:
        value: the per-call scale, a 0-d tensor, or `None` when no caller asked for one.
        outer: what `value` falls back to between two calls of the model (set while a pipeline encodes its prompt).
        samples: how many samples have a mix of adapters of their own; 0 if all have the same.
        images: of every sample, next to one another in the batch (`num_images_per_prompt`).
        asks_images: that number is what the pipeline says when it encodes its prompts.
        batch: rows of the model's input in this call; guidance makes it a multiple of `samples * images`.
    """

    def __init__(self) -> None:
        self.value: Tensor | None = None
        self.outer: Tensor | None = None
        self.samples = 0
        self.images = 1
        self.asks_images = True
        self.batch = 0

    def spread(self, gate: Tensor, rows: int) -> Tensor:
        """One gate, or one row of gates, for every row of a layer's input, from one for every sample.

        A batch is made of copies of all samples (for guidance), each sample of its images, and a layer may split every
        row of the batch into several (frames, windows).

        Raises:
            AdapterError: so many rows cannot be told apart by samples.
        """
        count, batch = len(gate), self.batch or rows
        if rows % batch or batch % (count * self.images):
            if not self.samples:
                # Room for samples is reserved, and they are all alike.
                return gate[0]
            problem = (
                f"a layer gets {rows} rows of a batch of {batch}, and whose they are is not known; run them one by one"
                if rows % batch
                else f"a batch of {batch} is no multiple of {count} x {self.images} images; pass as many prompts and "
                "negative prompts as samples"
            )
            raise AdapterError(f"{count} samples have adapters of their own, but {problem}")
        copies = batch // (count * self.images)
        each = gate.unsqueeze(1).unsqueeze(0).expand(copies, -1, rows // batch * self.images, *gate.shape[1:])
        return each.flatten(0, 2)
