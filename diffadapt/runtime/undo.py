"""Ways back to the content of a base tensor before adapters were merged into it, bit for bit.

The way here is a copy. `merging/` has others that need less memory.
"""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


class Undo(Protocol):
    """A way back to the original content of one base tensor."""

    @property
    def tensor(self) -> Tensor:
        """The base tensor, which adapters are merged into."""
        ...

    @property
    def nbytes(self) -> int:
        """The memory that this way back occupies, in bytes."""
        ...

    def restored(self) -> Tensor:
        """Return the original content, to be read only. It never shares memory with the base tensor.

        Raises:
            AdapterError: the original can no longer be determined.
        """
        ...


@dataclass(frozen=True)
class UndoByCopy:
    """A way back by a copy of the original content."""

    tensor: Tensor
    content: Tensor

    @property
    def nbytes(self) -> int:
        """The size of the copy in bytes."""
        return self.content.nbytes

    def restored(self) -> Tensor:
        """Return the copy."""
        return self.content
