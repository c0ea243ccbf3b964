"""Which tensors of a file hold NaN or infinite values."""

from collections.abc import Iterable

import torch
from torch import Tensor

from diffadapt.types.tensor_ops import FLOAT8


def non_finite(values: Iterable[tuple[str, Tensor]]) -> set[str]:
    """Of tensors by key, the keys of those with NaN or infinite values, with one synchronisation for all."""
    alike: dict[tuple[torch.device, torch.dtype], list[tuple[str, Tensor]]] = {}
    for key, tensor in values:
        if tensor.is_floating_point() and tensor.numel() and not tensor.is_meta:
            wide = tensor.float() if tensor.dtype in FLOAT8 else tensor
            alike.setdefault((wide.device, wide.dtype), []).append((key, wide))
    broken: set[str] = set()
    for found in alike.values():
        # A sum is quick, and finite only if all of its terms are; a large one need not be.
        block = _block([tensor for _, tensor in found])
        if block is not None and torch.isfinite(block.sum()):
            continue
        finite = torch.isfinite(torch.stack([tensor.sum() for _, tensor in found])).tolist()
        suspects = (item for item, ok in zip(found, finite, strict=True) if not ok)
        broken |= {key for key, tensor in suspects if not torch.isfinite(tensor).all()}
    return broken


def _block(tensors: list[Tensor]) -> Tensor | None:
    """One tensor in which these are, if they are most of a stretch of the same memory, as those of a file are."""
    first, memory = tensors[0], tensors[0].untyped_storage().data_ptr()
    if any(not tensor.is_contiguous() or tensor.untyped_storage().data_ptr() != memory for tensor in tensors):
        return None
    start = min(tensor.storage_offset() for tensor in tensors)
    size = max(tensor.storage_offset() + tensor.numel() for tensor in tensors) - start
    return first.as_strided((size,), (1,), start) if size <= 2 * sum(map(Tensor.numel, tensors)) else None
