"""In which order pictures are seen: draws with a running number, in batches of one size."""

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from diffadapt.training.data.shapes import Size
from diffadapt.training.randomness import chance

INSTANCE, CLASS = "instance", "class"
"""The two streams of draws: pictures to learn, and pictures of the class to keep."""


class Draw(NamedTuple):
    """One picture of a batch. All that is random about it follows from the stream and the number.

    Attributes:
        stream: `INSTANCE` or `CLASS`.
        number: running number of the draw in its stream, which no other draw has.
        picture: index of the picture.
    """

    stream: str
    number: int
    picture: int


class Draws:
    """The endless draws of a stream.

    Every epoch shows each picture `repeats` times, in a new order. Batches contain pictures of one size: a draw waits
    until there are enough of its size, if need be until the next epoch, so that no batch is short and every picture is
    seen equally often. With a single size, batches are the draws in their order, whatever the batch size.
    """

    def __init__(
        self, sizes: Sequence[Size], batch_size: int, *, seed: int, stream: str, repeats: Sequence[int] | None = None
    ) -> None:
        """Make the draws of a stream.

        Args:
            sizes: the size of each picture.
            batch_size: pictures per batch.
            seed: seed of the run.
            stream: `INSTANCE` or `CLASS`.
            repeats: how often each picture is seen in an epoch; defaults to once.
        """
        self.sizes = sizes
        self.batch_size = batch_size
        self.seed = seed
        self.stream = stream
        counts = repeats or [1] * len(sizes)
        self.entries = [index for index, count in enumerate(counts) for _ in range(count)]

    def draws(self) -> Iterator[Draw]:
        """Return all draws, epoch after epoch."""
        numbers = itertools.count()
        for epoch in itertools.count():
            order = chance(self.seed, self.stream, "order", epoch).permutation(len(self.entries))
            for place in order:
                yield Draw(self.stream, next(numbers), self.entries[int(place)])

    def batches(self) -> Iterator[list[Draw]]:
        """Return all batches."""
        waiting: dict[Size, list[Draw]] = {}
        for draw in self.draws():
            group = waiting.setdefault(self.sizes[draw.picture], [])
            group.append(draw)
            if len(group) == self.batch_size:
                yield group.copy()
                group.clear()

    def share(self, first: int, stride: int) -> Iterator[list[Draw]]:
        """Return every `stride`-th batch, starting with number `first`."""
        return itertools.islice(self.batches(), first, None, stride)
