"""Ways back to what was in a base tensor before adapters were merged into it, bit for bit.

A copy is one; `compact` and `base_files` have others.
"""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


class Undo(Protocol):
    """How to get the original of one base tensor."""

    @property
    def tensor(self) -> Tensor:
        """The base tensor, with adapters in it now."""
        ...

    @property
    def nbytes(self) -> int:
        """Memory that is kept for this."""
        ...

    def restored(self) -> Tensor:
        """The original, in other memory than the base tensor's, to be read only.

        Raises:
            AdapterError: it cannot be known any more.
        """
        ...


@dataclass(frozen=True)
class UndoByCopy:
    """A copy of the original."""

    tensor: Tensor
    content: Tensor

    @property
    def nbytes(self) -> int:
        return self.content.nbytes

    def restored(self) -> Tensor:
        return self.content
