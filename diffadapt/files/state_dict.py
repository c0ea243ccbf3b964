"""State dicts that callers have in memory, checked and read as a `Checkpoint`."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from diffadapt.errors import AdapterError
from diffadapt.files.checkpoint import Checkpoint, refuse_implausible_names, shapes_by_key
from diffadapt.files.safetensors_file import DTYPES
from diffadapt.formats.format import Header

_ORIGIN = "the state dict"
_STORABLE = frozenset(DTYPES.values())


def read_state_dict(source: Mapping[Any, Any], headers_only: bool) -> Checkpoint:
    """Return the tensors of a state dict as a checkpoint.

    Args:
        source: tensors by key. A dict of two dicts, as IP-Adapters are published, is flattened.
        headers_only: whether to replace all tensors but scalars by placeholders on the meta device.

    Raises:
        AdapterError: an entry is not a tensor that a safetensors file could hold, has no values, or is larger than its
            memory; or there are more or longer names than any adapter has.
    """
    if isinstance(source.get("ip_adapter"), Mapping):
        flat: dict[Any, Any] = {}
        for outer, found in source.items():
            inner = found.items() if isinstance(found, Mapping) else ()
            flat.update({f"{outer}.{key}": value for key, value in inner} if inner else {outer: found})
        source = flat
    for key, value in source.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise AdapterError(
                f"a state dict maps str to Tensor; found {type(key).__name__} -> {type(value).__name__} at {key!r}"
            )
        if value.layout != torch.strided or value.dtype not in _STORABLE:
            raise AdapterError(f"{_ORIGIN}: {key} is {value.layout} of {value.dtype}, expected an ordinary tensor")
        if value.is_meta and not headers_only:
            raise AdapterError(f"{_ORIGIN}: {key} is on the meta device, where it has no values")
        if not (value.is_contiguous() or value.is_meta) and value.nbytes > value.untyped_storage().nbytes():
            raise AdapterError(f"{_ORIGIN}: {key} is larger than its memory; pass {key}.contiguous()")
    refuse_implausible_names(_ORIGIN, source)
    tensors = {key: _placeholder(value) if headers_only else value for key, value in source.items()}
    return Checkpoint(_ORIGIN, None, tensors, Header(tuple(tensors), shapes=shapes_by_key(tensors)), headers_only)


def _placeholder(tensor: Tensor) -> Tensor:
    return tensor if tensor.ndim == 0 else torch.empty_like(tensor, device="meta")
