"""Corrections: the few elements of a tensor that a prediction of it may get wrong.

If a change is added to a half-precision weight, the sum rounded, and the change subtracted again, most elements come
out right. Storing the others takes a few percent of a copy (2-4 % for a change of one percent in bfloat16).
"""

import ctypes
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_SKIP = 255
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_COLUMNS = 64

# The comparison of the C library allocates nothing, and takes two thirds of NumPy's time.
_memcmp: Any = ctypes.CDLL("msvcrt" if os.name == "nt" else None).memcmp
_memcmp.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_memcmp.restype = ctypes.c_int


@dataclass(frozen=True)
class Corrections:
    """The elements in which a tensor differs from its prediction.

    Attributes:
        gaps: uint8; the distance of each of these elements from the one before it, or from index -1. 255 means: advance
            by 255 to an element that does not differ.
        values: the right values of these elements.
        checksum: checksum of the whole tensor.
    """

    gaps: Tensor
    values: Tensor
    checksum: int

    @classmethod
    def between(cls, actual: Tensor, predicted: Sequence[Tensor]) -> "Corrections":
        """Compare `actual` with its predictions, bit by bit: -0.0 differs from 0.0, and a NaN equals itself.

        Args:
            predicted: predictions of the same shape and dtype; several if `apply_` may later get any of them, or
                anything between them.
        """
        indices = _mismatches(actual, predicted)
        distances = torch.diff(indices, prepend=indices.new_full((1,), -1))
        # A distance d is stored as d // 255 skips and the remainder, which is never 255.
        skips = distances // _SKIP
        ends = (skips + 1).cumsum(0)
        gaps = torch.full((int(ends[-1]) if len(ends) else 0,), _SKIP, dtype=torch.uint8, device=actual.device)
        gaps.index_copy_(0, ends - 1, distances.sub_(skips, alpha=_SKIP).to(torch.uint8))
        return cls(gaps, _bits(actual).index_select(0, indices).view(actual.dtype), _checksum(_bits(actual)))

    def apply_(self, predicted: Tensor) -> None:
        """Turn a prediction, which must be contiguous, into the tensor.

        Raises:
            ArithmeticError: the result is not the tensor, so the prediction is not one of those compared.
        """
        bits = _bits(predicted)
        gaps = self.gaps.to(predicted.device)
        indices = gaps.cumsum(0, dtype=torch.int64)[gaps != _SKIP] - 1
        if len(indices) and int(indices[-1]) >= len(bits):
            raise ArithmeticError("the prediction has too few elements")
        bits.index_copy_(0, indices, self.values.to(predicted.device).view(bits.dtype))
        if _checksum(bits) != self.checksum:
            raise ArithmeticError("the checksum differs")

    @property
    def nbytes(self) -> int:
        """Memory used, in bytes."""
        return self.gaps.nbytes + self.values.nbytes


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Return whether tensors of the same shape, dtype and device are equal bit by bit, also in NaNs and zero signs."""
    first, second = one.detach().contiguous(), other.detach().contiguous()
    if one.device.type != "cpu":
        return torch.equal(_bits(first), _bits(second))
    return _memcmp(first.data_ptr(), second.data_ptr(), first.nbytes) == 0


def _mismatches(actual: Tensor, predicted: Sequence[Tensor]) -> Tensor:
    """Return the flat indices, ascending, of the elements that at least one prediction gets wrong."""
    bits = [_bits(tensor) for tensor in (actual, *predicted)]
    if actual.device.type != "cpu":
        return torch.nonzero(_differs(*bits)).squeeze(1)
    # Whole words first, since few of them differ.
    words, tails = _words(bits)
    lanes = 8 // actual.element_size()
    suspects = _differs(*words).nonzero()[0]
    differs = _differs(*(each.take(suspects).view(tail.dtype) for each, tail in zip(words, tails, strict=True)))
    in_words, in_tail = differs.nonzero()[0], _differs(*tails).nonzero()[0]
    indices = suspects[in_words // lanes] * lanes + in_words % lanes
    return torch.cat([torch.from_numpy(indices), torch.from_numpy(in_tail + len(words[0]) * lanes)])


def _words(bits: Iterable[Tensor]) -> tuple[list[Any], list[Any]]:
    """Return the whole 8-byte words of CPU tensors, and the elements after the last one.

    They are NumPy arrays: NumPy compares three times, and finds differences six times, as fast as torch.
    """
    arrays: list[Any] = [tensor.numpy() for tensor in bits]
    counts = [array.nbytes // 8 * (8 // array.itemsize) for array in arrays]
    words = [array[:count].view("int64") for array, count in zip(arrays, counts, strict=True)]
    return words, [array[count:] for array, count in zip(arrays, counts, strict=True)]


def _differs(wanted: Any, *found: Any) -> Any:
    """Return a mask of the elements in which any of the tensors, or NumPy arrays, differs from `wanted`."""
    differs = wanted != found[0]
    for other in found[1:]:
        differs |= wanted != other
    return differs


def _bits(tensor: Tensor) -> Tensor:
    """Return a flat view (a copy if `tensor` is not contiguous) as integers of the same size."""
    return tensor.detach().contiguous().view(-1).view(_BITS[tensor.element_size()])


def _checksum(bits: Tensor) -> int:
    """Return a checksum that depends on every element and on its position.

    Positions count through weights for the rows and columns of a grid.
    """
    lanes = 8 // bits.element_size()
    if len(bits) % lanes or bits.storage_offset() % lanes:
        bits = torch.nn.functional.pad(bits, (0, -len(bits) % lanes))
    words = bits.view(torch.int64)
    count = len(words) // _COLUMNS * _COLUMNS
    grid, tail = words[:count].view(-1, _COLUMNS), words[count:]
    columns, rows = torch.cat([grid.sum(0), tail]), grid.sum(1)
    total = (columns * torch.arange(1, len(columns) + 1, device=bits.device)).sum()
    # The odd 64-bit factor spreads the sum over the rows to other bits than that over the columns.
    return int(total + 0x1E3779B97F4A7C15 * (rows * torch.arange(1, len(rows) + 1, device=bits.device)).sum())
