"""The content of a source of adapters, and the limits that no adapter comes near."""

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from diffadapt.errors import AdapterError
from diffadapt.formats.format import Header

Source: TypeAlias = str | os.PathLike[str] | Mapping[str, Tensor]
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
MAX_TENSORS = 100_000
_MAX_NAME = 1000
DTYPES: dict[str, torch.dtype] = {
    spelled: getattr(torch, name)
    for spelled, name in {
        "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "C64": "complex64", "BOOL": "bool",
        "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
        "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz",
        "I8": "int8", "I16": "int16", "I32": "int32", "I64": "int64",
        "U8": "uint8", "U16": "uint16", "U32": "uint32", "U64": "uint64",
    }.items()
    if hasattr(torch, name)
}  # fmt: skip
"""safetensors' names of the dtypes that have an element for every number, so far as this torch has them."""
_KNOWN = frozenset(DTYPES.values())


@dataclass(frozen=True)
class Checkpoint:
    """The content of one source.

    Attributes:
        origin: what to call the source in messages.
        name: a name for the adapter, from the file's; `None` for a state dict.
        tensors: all tensors, or placeholders on the meta device when only headers were read.
        headers_only: which of the two.
        mapped: the tensors are pages of a file, which may change on disk.
    """

    origin: str
    name: str | None
    tensors: Mapping[str, Tensor]
    header: Header
    headers_only: bool = False
    mapped: bool = False


@dataclass(frozen=True)
class Location:
    """The arguments of `load_adapter` that say where a file is; those of `huggingface_hub`, with the same meaning."""

    weight_name: str | None = None
    subfolder: str | None = None
    revision: str | None = None
    token: str | bool | None = None
    cache_dir: str | os.PathLike[str] | None = None
    local_files_only: bool = False


def refuse_names(origin: str, names: Collection[str]) -> None:
    """Raise if there are more names, or longer ones, than an adapter has."""
    if len(names) > MAX_TENSORS:
        raise AdapterError(f"{origin}: {len(names)} tensors, expected at most {MAX_TENSORS} in an adapter")
    longest = max(names, key=len, default="")
    if len(longest) > _MAX_NAME:
        raise AdapterError(f"{origin}: the name {longest[:50]}... has {len(longest)} characters, expected {_MAX_NAME}")


def from_state_dict(source: Mapping[Any, Any], headers_only: bool) -> Checkpoint:
    if isinstance(source.get("ip_adapter"), Mapping):
        # IP-Adapters are published as a dict of two.
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
        if value.layout != torch.strided or value.dtype not in _KNOWN:
            raise AdapterError(f"the state dict: {key} is {value.layout} of {value.dtype}, expected an ordinary tensor")
        if value.is_meta and not headers_only:
            raise AdapterError(f"the state dict: {key} is on the meta device, where it has no values")
        if not (value.is_contiguous() or value.is_meta) and value.nbytes > value.untyped_storage().nbytes():
            raise AdapterError(f"the state dict: {key} is larger than its memory; pass {key}.contiguous()")
    refuse_names("the state dict", source)
    tensors = {key: _placeholder(value) if headers_only else value for key, value in source.items()}
    return Checkpoint("the state dict", None, tensors, Header(tuple(tensors), shapes=shapes_of(tensors)), headers_only)


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in tensors.items()}


def _placeholder(tensor: Tensor) -> Tensor:
    return tensor if tensor.ndim == 0 else torch.empty_like(tensor, device="meta")
