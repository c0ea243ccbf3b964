"""Memory for tensors, found quickly.

The first write to a page of fresh memory makes the system find one, which takes longer than the write. So copies that
are kept are taken from large chunks, in large pages where the system has them, and what is not kept is used again.
"""

import mmap
from contextlib import suppress

import torch
from torch import Tensor

_ALIGNMENT = 64
_CHUNK = 64 * 2**20


class Arena:
    """Memory on the CPU that tensors are given parts of. A chunk of it is free again when all of its parts are gone."""

    def __init__(self) -> None:
        self._chunk = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def copy(self, tensor: Tensor) -> Tensor:
        """A contiguous copy of a tensor on the CPU."""
        start = -(-self._used // _ALIGNMENT) * _ALIGNMENT
        if start + tensor.nbytes > len(self._chunk):
            self._chunk, start = _pages(max(_CHUNK, tensor.nbytes)), 0
        self._used = start + tensor.nbytes
        return self._chunk[start : self._used].view(tensor.dtype).view(tensor.shape).copy_(tensor)


class Scratch:
    """Memory that is used again and again."""

    def __init__(self) -> None:
        self._parts: dict[tuple[int, torch.device], Tensor] = {}

    def like(self, tensor: Tensor, number: int = 0) -> Tensor:
        """A contiguous tensor of this shape, dtype and device, whatever is in it.

        Args:
            number: of several that are in use at the same time. What had it before is overwritten.
        """
        part = self._parts.get((number, tensor.device))
        if part is None or part.nbytes < tensor.nbytes:
            part = torch.empty(tensor.nbytes, dtype=torch.uint8, device=tensor.device)
            self._parts[number, tensor.device] = part
        return part[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)


def _pages(size: int) -> Tensor:
    """Bytes, in large pages where the system has such."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(size, dtype=torch.uint8)
    pages = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):
        # A system may be built without them.
        pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=torch.uint8)
