"""Layers of a file that are several layers of the model, or the same one with its outputs in another order.

Checkpoints in a model's original layout have query, key and value in one projection where diffusers has three, and
the two halves of an adaptive norm the other way round. Every such name is an alias for pieces.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class FusedPart:
    """One layer of the model, as a part of a layer of a file.

    Attributes:
        path: of the model's layer.
        swapped: the file has the second half of its outputs first.
    """

    path: str
    swapped: bool = False

    def rows(self, start: int, size: int) -> tuple[range, ...]:
        """Rows of the file's layer, in the order of the model's, for a piece of `size` rows that starts at `start`."""
        if not self.swapped:
            return (range(start, start + size),)
        middle = start + size // 2
        return range(middle, start + size), range(start, middle)
