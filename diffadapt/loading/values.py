"""The values of a file: checked for NaN and infinity, and copied out of the file, in blocks of neighbouring tensors."""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from diffadapt.progress import with_progress
from diffadapt.types.tensor_ops import FLOAT8

_LARGEST = 2**22
"""Bytes of a block, which stays in the cache of the processor between copying and checking."""

_GAP = 64
"""Bytes between two tensors of a block: those of an alpha, or of alignment."""


class Values(NamedTuple):
    """What `read_values` found.

    Attributes:
        broken: the keys of the tensors that hold NaN or infinite values.
        copies: `id` of a tensor -> its copy.
    """

    broken: set[str]
    copies: dict[int, Tensor]


def read_values(values: Iterable[tuple[str, Tensor]], copied: Callable[[Tensor], Tensor] | None = None) -> Values:
    """Check tensors for NaN and infinite values, and copy them. Integers and meta tensors are left out.

    A file has its tensors one after the other, so that most of them are copied and checked many at a time. Copies of
    one block share a storage, but no version counter. If all values are finite, the check usually synchronises the
    device once for all tensors of one dtype.

    Args:
        values: key and tensor.
        copied: returns the copy of a block, 1-d or a whole tensor; `None` to copy nothing.
    """
    copies: dict[int, Tensor] = {}
    sums: dict[tuple[torch.device, torch.dtype], list[tuple[_Block, Tensor]]] = {}
    for block in with_progress(list(_blocks(values)), "reading", "block"):
        memory = block.memory
        if copied is not None:
            block.cut(copied(memory), copies)
        # A sum is fast. A finite sum proves that all of its terms are finite; an infinite one may be an overflow.
        total = (memory.float() if memory.dtype in FLOAT8 else memory).sum()
        sums.setdefault((total.device, total.dtype), []).append((block, total))
    broken: set[str] = set()
    for found in sums.values():
        finite = torch.isfinite(torch.stack([total for _, total in found])).tolist()
        for (block, _), is_finite in zip(found, finite, strict=True):
            if not is_finite:
                broken.update(key for _, key, tensor in block.items if not _is_finite(tensor))
    return Values(broken, copies)


class _Block:
    """Neighbouring tensors of one dtype in one storage, or a single tensor.

    Attributes:
        items: the address, the key and the tensor, in the order of the addresses.
        memory: the memory from the first to the last tensor, 1-d, or the single tensor.
    """

    def __init__(self, items: list[tuple[int, str, Tensor]], stop: int) -> None:
        """
        Args:
            items: see the attribute.
            stop: the address after the last byte.
        """
        (start, _, first), *others = items
        self.items = items
        self.memory = first.as_strided(((stop - start) // first.element_size(),), (1,)) if others else first

    def cut(self, memory: Tensor, into: dict[int, Tensor]) -> None:
        """Add the part of `memory`, a copy of the block, that each tensor has to `into`, by the `id` of the tensor."""
        if len(self.items) == 1:
            into[id(self.items[0][2])] = memory
            return
        size = self.items[0][2].element_size()
        sizes: list[int] = []
        numbers: list[int] = []
        stop = self.items[0][0]
        for address, _, tensor in self.items:
            if address != stop:
                sizes.append((address - stop) // size)
            numbers.append(len(sizes))
            sizes.append(tensor.numel())
            stop = address + sizes[-1] * size
        # Each part has a version counter of its own: writing one parameter must not look like writing all.
        parts = memory.unsafe_split_with_sizes(sizes)
        for number, (_, _, tensor) in zip(numbers, self.items, strict=True):
            into[id(tensor)] = parts[number].view_as(tensor)


def _blocks(values: Iterable[tuple[str, Tensor]]) -> Iterator[_Block]:
    """Yield the floating-point tensors in blocks."""
    by_dtype: dict[torch.dtype, list[tuple[int, str, Tensor]]] = {}
    for key, tensor in values:
        if tensor.is_floating_point() and tensor.numel() and not tensor.is_meta:
            by_dtype.setdefault(tensor.dtype, []).append((tensor.data_ptr(), key, tensor))
    for dtype, found in by_dtype.items():
        found.sort(key=lambda item: item[0])
        items: list[tuple[int, str, Tensor]] = []
        stop = limit = 0
        for item in found:
            address, _, tensor = item
            is_dense = tensor.is_contiguous()
            end = address + tensor.numel() * dtype.itemsize
            if items and not (is_dense and stop <= address <= stop + _GAP and end <= limit):
                yield _Block(items, stop)
                items = []
            if not items:
                # Adjacent memory may belong to another storage.
                storage = tensor.untyped_storage()
                limit = min(address + _LARGEST, storage.data_ptr() + storage.nbytes()) if is_dense else 0
            items.append(item)
            stop = end
        yield _Block(items, stop)


def _is_finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor.float() if tensor.dtype in FLOAT8 else tensor).all())
