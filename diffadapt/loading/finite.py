"""The check of a file's values for NaN and infinity."""

from collections.abc import Iterable

import torch
from torch import Tensor

from diffadapt.progress import with_progress
from diffadapt.types.tensor_ops import FLOAT8

_LARGE = 2**30


def non_finite(values: Iterable[tuple[str, Tensor]]) -> set[str]:
    """Return the keys of the tensors that hold NaN or infinite values. Integers and meta tensors are skipped.

    If all values are finite, the check usually synchronises the device once for all tensors of one dtype.
    """
    alike: dict[tuple[torch.device, torch.dtype], list[tuple[str, Tensor]]] = {}
    for key, tensor in values:
        if tensor.is_floating_point() and tensor.numel() and not tensor.is_meta:
            summable = tensor.float() if tensor.dtype in FLOAT8 else tensor
            alike.setdefault((summable.device, summable.dtype), []).append((key, summable))
    broken: set[str] = set()
    for found in alike.values():
        # A sum is fast. A finite sum proves that all of its terms are finite; an infinite one may be an overflow.
        block = _block([tensor for _, tensor in found])
        # A large file is read from the disk here, tensor by tensor, which shows progress.
        if block is not None and block.nbytes < _LARGE and torch.isfinite(block.sum()):
            continue
        sums = [tensor.sum() for _, tensor in with_progress(found, "reading", "tensor")]
        finite = torch.isfinite(torch.stack(sums)).tolist()
        suspects = (item for item, ok in zip(found, finite, strict=True) if not ok)
        broken |= {key for key, tensor in suspects if not torch.isfinite(tensor).all()}
    return broken


def _block(tensors: list[Tensor]) -> Tensor | None:
    """Return one tensor over the memory from the first to the last of `tensors`, as a file has them in one storage.

    The result is `None` if they are in different storages, are not contiguous, or fill less than half of that memory.
    """
    first, memory = tensors[0], tensors[0].untyped_storage().data_ptr()
    if any(not tensor.is_contiguous() or tensor.untyped_storage().data_ptr() != memory for tensor in tensors):
        return None
    start = min(tensor.storage_offset() for tensor in tensors)
    size = max(tensor.storage_offset() + tensor.numel() for tensor in tensors) - start
    return first.as_strided((size,), (1,), start) if size <= 2 * sum(map(Tensor.numel, tensors)) else None
