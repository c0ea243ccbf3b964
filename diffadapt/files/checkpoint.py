"""What reading a source returns, how callers locate a source, and limits on the tensors that a source may have."""

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from torch import Tensor

from diffadapt.errors import AdapterError
from diffadapt.formats.format import Header

Source: TypeAlias = str | os.PathLike[str] | Mapping[str, Tensor]
"""The path of a file or folder, the id of a hub repository, or a state dict."""

# Limits that no adapter comes near: the largest have some ten thousand tensors.
MAX_TENSORS = 100_000
_MAX_NAME = 1000


@dataclass(frozen=True)
class Checkpoint:
    """The content of one source.

    Attributes:
        origin: what messages call the source: a path, or "the state dict".
        name: a name for the adapter, taken from the file name; `None` for a state dict.
        tensors: every tensor by key. If `headers_only`, all but scalars are on the meta device.
        header: the keys, shapes and metadata.
        headers_only: whether the values of the tensors were left unread.
        mapped: whether the tensors are pages of a memory-mapped file, whose content may change on disk.
        parts: component -> what a folder has for it in a subfolder of its own, as PEFT's adapters of several components
            do; empty for a single file. `tensors` and `header` are then those of all parts.
    """

    origin: str
    name: str | None
    tensors: Mapping[str, Tensor]
    header: Header
    headers_only: bool = False
    mapped: bool = False
    parts: Mapping[str, "Checkpoint"] = field(default_factory=dict[str, "Checkpoint"])


@dataclass(frozen=True)
class Location:
    """The arguments of `load_adapter` that say where a file is, with the meaning they have in `huggingface_hub`.

    Attributes:
        weight_name: name of the file in its folder or repository; `None` if only one file comes into question.
        subfolder: folder of the file in the folder or repository.
        revision: branch, tag or commit of the repository.
        token: access token for private and gated repositories; `True` for the one that is stored on this machine.
        cache_dir: folder of the hub's cache.
        local_files_only: whether to use only the cache, without network access.
    """

    weight_name: str | None = None
    subfolder: str | None = None
    revision: str | None = None
    token: str | bool | None = None
    cache_dir: str | os.PathLike[str] | None = None
    local_files_only: bool = False


def refuse_implausible_names(origin: str, names: Collection[str]) -> None:
    """Raise `AdapterError` if there are more or longer tensor names than any adapter has."""
    if len(names) > MAX_TENSORS:
        raise AdapterError(f"{origin}: {len(names)} tensors, expected at most {MAX_TENSORS} in an adapter")
    longest = max(names, key=len, default="")
    if len(longest) > _MAX_NAME:
        raise AdapterError(
            f"{origin}: the name {longest[:50]}... has {len(longest)} characters, expected at most {_MAX_NAME}"
        )


def shapes_by_key(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor by its key."""
    return {key: tuple(tensor.shape) for key, tensor in tensors.items()}
