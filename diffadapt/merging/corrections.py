"""What rounding lost: the few elements of a tensor that a prediction of it may get wrong.

If a change is added to a weight, rounded, and subtracted again, most elements of a half-precision weight come out
right. Keeping the others takes a few percent of a copy (2-4 % for a change of one percent in bfloat16).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_STEP = 255
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_COLUMNS = 64


@dataclass(frozen=True)
class Corrections:
    """The difference between a prediction and a tensor.

    Attributes:
        steps: uint8; distances between the places that differ, where 255 stands for a distance without a place.
        values: what is right in those places.
        checksum: of the tensor.
    """

    steps: Tensor
    values: Tensor
    checksum: int

    @classmethod
    def between(cls, actual: Tensor, predicted: Sequence[Tensor]) -> "Corrections":
        """Of tensors of the same shape and dtype, bit by bit: -0.0 differs from 0.0, a NaN not from itself.

        Args:
            predicted: several if it is not known which of them `apply_` will get, or what between them.
        """
        places = _places(actual, predicted)
        distances = torch.diff(places, prepend=places.new_full((1,), -1))
        # A distance d is d // 255 times 255, and then the rest, which is never 255.
        whole = distances // _STEP
        ends = (whole + 1).cumsum(0)
        steps = torch.full((int(ends[-1]) if len(ends) else 0,), _STEP, dtype=torch.uint8, device=actual.device)
        steps.index_copy_(0, ends - 1, distances.sub_(whole, alpha=_STEP).to(torch.uint8))
        return cls(steps, _bits(actual).index_select(0, places).view(actual.dtype), _checksum(_bits(actual)))

    def apply_(self, predicted: Tensor) -> None:
        """Make the tensor of its prediction, which has to be contiguous.

        Raises:
            ArithmeticError: the prediction is another one, so this is not the tensor.
        """
        bits = _bits(predicted)
        steps = self.steps.to(predicted.device)
        places = steps.cumsum(0, dtype=torch.int64)[steps != _STEP] - 1
        if len(places) and int(places[-1]) >= len(bits):
            raise ArithmeticError("it is larger")
        bits.index_copy_(0, places, self.values.to(predicted.device).view(bits.dtype))
        if _checksum(bits) != self.checksum:
            raise ArithmeticError("the checksum differs")

    @property
    def nbytes(self) -> int:
        """Bytes that are kept."""
        return self.steps.nbytes + self.values.nbytes


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether tensors of the same shape, dtype and device are the same, NaNs and signs of zeros too."""
    pair = _bits(one), _bits(other)
    if one.device.type != "cpu":
        return torch.equal(*pair)
    words, rest = _words(pair)
    return not (_differs(*words).any() or _differs(*rest).any())


def _places(actual: Tensor, predicted: Sequence[Tensor]) -> Tensor:
    """Ascending indices of the elements that one of the predictions has not got right."""
    bits = [_bits(tensor) for tensor in (actual, *predicted)]
    if actual.device.type != "cpu":
        return torch.nonzero(_differs(*bits)).squeeze(1)
    # Word by word at first: few of those differ.
    words, rest = _words(bits)
    lanes = 8 // actual.element_size()
    suspects = _differs(*words).nonzero()[0]
    wrong = _differs(*(each.take(suspects).view(other.dtype) for each, other in zip(words, rest, strict=True)))
    wrong, behind = wrong.nonzero()[0], _differs(*rest).nonzero()[0]
    places = suspects[wrong // lanes] * lanes + wrong % lanes
    return torch.cat([torch.from_numpy(places), torch.from_numpy(behind + len(words[0]) * lanes)])


def _words(bits: Iterable[Tensor]) -> tuple[list[Any], list[Any]]:
    """Of tensors on the CPU the words of 8 bytes, and what is behind the last whole one.

    As arrays of numpy, which compares them three times, and finds what differs six times as quickly as torch.
    """
    arrays: list[Any] = [tensor.numpy() for tensor in bits]
    whole = [array.nbytes // 8 * (8 // array.itemsize) for array in arrays]
    words = [array[:count].view("int64") for array, count in zip(arrays, whole, strict=True)]
    return words, [array[count:] for array, count in zip(arrays, whole, strict=True)]


def _differs(wanted: Any, *found: Any) -> Any:
    """Where tensors, or arrays of numpy, are not all the same."""
    differs = wanted != found[0]
    for other in found[1:]:
        differs |= wanted != other
    return differs


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(-1).view(_BITS[tensor.element_size()])


def _checksum(bits: Tensor) -> int:
    """Depends on every element and, by weights for rows and columns of a grid, on where it is."""
    words = 8 // bits.element_size()
    if len(bits) % words or bits.storage_offset() % words:
        bits = torch.nn.functional.pad(bits, (0, -len(bits) % words))
    numbers = bits.view(torch.int64)
    whole = len(numbers) // _COLUMNS * _COLUMNS
    grid, rest = numbers[:whole].view(-1, _COLUMNS), numbers[whole:]
    columns, rows = torch.cat([grid.sum(0), rest]), grid.sum(1)
    total = (columns * torch.arange(1, len(columns) + 1, device=bits.device)).sum()
    # An odd number as large as a word, so that what rows and columns say is not added up in the same bits.
    return int(total + 0x1E3779B97F4A7C15 * (rows * torch.arange(1, len(rows) + 1, device=bits.device)).sum())
