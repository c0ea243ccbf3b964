"""The parts of fused layers: layers of the model that a file has as one layer, or with its outputs in another order.

Checkpoints in a model's original layout have one projection for query, key and value where diffusers has three, and
they have the two halves of an adaptive norm in the opposite order.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class FusedPart:
    """A layer of the model that is a part of a layer of the file.

    Attributes:
        path: path of the model's layer.
        swapped: whether the file has the second half of its outputs first.
    """

    path: str
    swapped: bool = False

    def rows(self, start: int, size: int) -> tuple[range, ...]:
        """Return which rows of the file's weight this part consists of, in the order of the model's layer.

        Args:
            start: the first row of the part.
            size: number of its rows.
        """
        if not self.swapped:
            return (range(start, start + size),)
        middle = start + size // 2
        return range(middle, start + size), range(start, middle)
