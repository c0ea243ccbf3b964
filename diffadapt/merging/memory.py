"""Fast memory for tensors: copies that are kept, and buffers that are reused.

On the first write to a page of fresh memory the system has to find one, which takes longer than the write itself. So
copies that are kept are cut from large chunks, in huge pages where the system has them, and temporary buffers are
reused.
"""

import mmap
from contextlib import suppress

import torch
from torch import Tensor

_ALIGNMENT = 64
_CHUNK = 64 * 2**20


class Arena:
    """Copies of tensors in large chunks of CPU memory. A chunk is freed when the last copy in it is gone."""

    def __init__(self) -> None:
        self._chunk = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def copy(self, tensor: Tensor) -> Tensor:
        """Return a contiguous copy of a CPU tensor."""
        start = -(-self._used // _ALIGNMENT) * _ALIGNMENT
        if start + tensor.nbytes > len(self._chunk):
            self._chunk, start = _fresh_chunk(max(_CHUNK, tensor.nbytes)), 0
        self._used = start + tensor.nbytes
        return self._chunk[start : self._used].view(tensor.dtype).view(tensor.shape).copy_(tensor)


class Scratch:
    """Temporary buffers that are reused."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[int, torch.device], Tensor] = {}

    def like(self, tensor: Tensor, number: int = 0) -> Tensor:
        """Return an uninitialised contiguous tensor with the shape, dtype and device of `tensor`.

        Args:
            number: which of several buffers. The tensor returned last for this number on the device is overwritten.
        """
        buffer = self._buffers.get((number, tensor.device))
        if buffer is None or buffer.nbytes < tensor.nbytes:
            buffer = torch.empty(tensor.nbytes, dtype=torch.uint8, device=tensor.device)
            self._buffers[number, tensor.device] = buffer
        return buffer[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)


def _fresh_chunk(size: int) -> Tensor:
    """Return `size` bytes, in huge pages where the system has them."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(size, dtype=torch.uint8)
    pages = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):
        # The kernel may be built without huge pages.
        pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=torch.uint8)
