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
        head: rows of one attention head if the file has the heads of all parts in turn; 0 if it has one part after the
            other.
        count: the number of parts that take turns.
    """

    path: str
    swapped: bool = False
    head: int = 0
    count: int = 1

    def rows(self, start: int, size: int) -> tuple[range, ...]:
        """Return which rows of the file's weight this part consists of, in the order of the model's layer.

        Args:
            start: the first row of the part, or its number times its size if the parts take turns.
            size: number of its rows.
        """
        if self.head:
            first = start // size * self.head
            steps = range(first, size * self.count, self.head * self.count)
            return tuple(range(row, row + self.head) for row in steps)
        if not self.swapped:
            return (range(start, start + size),)
        middle = start + size // 2
        return range(middle, start + size), range(start, middle)
