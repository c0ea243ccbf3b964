"""safetensors files: read as a `Checkpoint` of memory-mapped tensors, or kept open as an `OpenFile`."""

import json
import os
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from diffadapt.errors import AdapterError
from diffadapt.files.checkpoint import MAX_TENSORS, Checkpoint, refuse_implausible_names
from diffadapt.files.file_names import PICKLE_SUFFIXES
from diffadapt.formats.format import Header

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
"""dtype by its name in safetensors. Excluded are dtypes that pack several numbers into an element, and those that the
installed torch does not have."""

_MAX_HEADER_BYTES = 32 * 2**20
"""A limit that no adapter comes near; the largest have metadata of a few megabytes."""

_ONCE_PER_TENSOR = b'"data_offsets"'
"""What a header contains once per tensor, unless it is spelled with escapes."""

_BEGINNINGS = {
    b"PK\x03\x04": "a zip file, as torch.save writes; convert it to safetensors",
    b"\x80": "a pickle; convert it to safetensors",
    b"version ": "the pointer that Git LFS leaves instead of a file; fetch the file with git lfs pull",
    b"<": "a web page; download the file itself",
    b"{": "JSON, perhaps the index of several files; pass one of those",
}
"""What files that end in `.safetensors` sometimes are instead, by their first bytes."""


class OpenFile:
    """A safetensors file that is kept open. The values of a tensor are read from the disk when they are first used.

    Attributes:
        origin: the path, for messages.
        tensors: tensor by key, as memory-mapped pages of the file.
        metadata: the metadata of the file.
    """

    def __init__(self, file: Path) -> None:
        """
        Raises:
            AdapterError: the file cannot be opened, or is not an intact safetensors file.
        """
        self.origin = str(file)
        try:
            # An open handle refers to the same file even if another file takes over the name.
            self._handle = os.open(file, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        except OSError as error:
            raise AdapterError(f"{file}: cannot be opened ({error.strerror})") from error
        weakref.finalize(self, os.close, self._handle)
        self._initial_state = self._state()
        checkpoint = read_safetensors(file, file.stem, None, headers_only=False)
        self.tensors, self.metadata = checkpoint.tensors, checkpoint.header.metadata

    @property
    def is_unchanged(self) -> bool:
        """Whether the file has not been written since it was opened.

        Tensors of a changed file must not be read: if the file was truncated, that ends the process.
        """
        return self._initial_state == self._state()

    def named(self, name: str) -> Iterator[str]:
        """Yield the keys of the tensors that may be what a model calls `name`, the likeliest first.

        That is `name` itself or, without such a key, every key that ends in the same words as `name`, at least three of
        them; the more words agree, the earlier it comes. transformers changes the beginnings of names between versions,
        and original layouts have others.
        """
        if name in self.tensors:
            yield name
        else:
            yield from dict.fromkeys(key for ending in _endings(name) for key in self._by_ending.get(ending, ()))

    @cached_property
    def _by_ending(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for key in self.tensors:
            for ending in _endings(key):
                found.setdefault(ending, []).append(key)
        return found

    def _state(self) -> tuple[int, int]:
        """Return the file's size in bytes and the time of its last change in nanoseconds."""
        state = os.fstat(self._handle)
        return state.st_size, state.st_mtime_ns


def _endings(name: str) -> list[str]:
    """Return the endings of a dotted name that have at least three words, the longest first."""
    words = name.split(".")
    return [".".join(words[start:]) for start in range(len(words) - 2)]


def read_safetensors(file: Path, name: str, config: Mapping[str, Any] | None, headers_only: bool) -> Checkpoint:
    """Return the content of a safetensors file.

    Args:
        file: the file.
        name: the name of the adapter in it.
        config: the content of the `adapter_config.json` next to the file, if there is one.
        headers_only: whether to put all tensors but scalars on the meta device instead of mapping them.

    Raises:
        AdapterError: the file is a pickle, is not an intact safetensors file, or exceeds the limits of an adapter.
    """
    if file.suffix in PICKLE_SUFFIXES:
        raise AdapterError(
            f"{file}: pickle files can run code and are not loaded; convert it to safetensors, or, if you trust it, "
            f"pass diffadapt.read_pickle({file.name!r}) as the source"
        )
    try:
        header = _read_header(file)
        count = header.count(_ONCE_PER_TENSOR)
        if count > MAX_TENSORS:
            raise AdapterError(f"{file}: {count} tensors, expected at most {MAX_TENSORS} in an adapter")
        with safe_open(file, framework="pt") as opened:
            names: list[str] = list(opened.keys())
            refuse_implausible_names(str(file), names)
            if count != len(names) or b"\\u" in header:
                _refuse_duplicates(file, header)
            tensors, shapes = _map_tensors(file, header, names, headers_only)
            metadata = opened.metadata() or {}
    except AdapterError:
        raise
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise AdapterError(f"{file}: not a readable safetensors file ({error}); download or export it again") from error
    return Checkpoint(
        str(file),
        name,
        tensors,
        Header(tuple(tensors), metadata, config, shapes),
        headers_only,
        mapped=True,
    )


def _read_header(file: Path) -> bytes:
    """Return the JSON header of a safetensors file, which follows its length.

    Raises:
        AdapterError: the header would be longer than the file, or is longer than the header of any adapter.
    """
    with file.open("rb") as opened:
        start = opened.read(8)
        size, rest = int.from_bytes(start, "little"), os.fstat(opened.fileno()).st_size - 8
        if len(start) < 8 or size > rest:
            cut = f"cut off: its header should have {size} bytes, and {max(rest, 0)} follow; download it again"
            cut = cut if start else "empty; download it again"
            # The length of a header has zeros in its upper bytes, which text has not.
            other = "text, or something else; pass the .safetensors file" if start and 0 not in start else cut
            what = next((what for begin, what in _BEGINNINGS.items() if start.startswith(begin)), other)
            raise AdapterError(f"{file}: not a safetensors file but {what}")
        if size > _MAX_HEADER_BYTES:
            raise AdapterError(f"{file}: a header of {size} bytes, expected at most {_MAX_HEADER_BYTES} in an adapter")
        header = opened.read(size)
    return header


def _refuse_duplicates(file: Path, header: bytes) -> None:
    """Raise `AdapterError` if two tensors have the same name; JSON parsers silently keep the last of them."""

    def refuse(pairs: list[tuple[str, Any]]) -> None:
        names = Counter(name for name, _ in pairs)
        if len(names) < len(pairs):
            raise AdapterError(f"{file}: {names.most_common(1)[0][0]!r} is there twice; export the file again")

    json.loads(header, object_pairs_hook=refuse)


def _map_tensors(
    file: Path, header: bytes, names: Iterable[str], headers_only: bool
) -> tuple[dict[str, Tensor], dict[str, tuple[int, ...]]]:
    """Return the tensors as memory-mapped pages of the file, and their shapes.

    safetensors has validated the header before. Its own way of returning tensors takes three times as long.

    Args:
        file: the file.
        header: its JSON header.
        names: keys of the tensors to return.
        headers_only: whether to put all tensors but scalars on the meta device instead.
    """
    entries: dict[str, Any] = json.loads(header)
    pages = torch.from_file(str(file), shared=False, size=file.stat().st_size, dtype=torch.uint8)
    begin = 8 + len(header)
    pages_by_dtype: dict[torch.dtype, Tensor] = {}
    # Most tensors have the dtype and shape of an earlier one.
    alike: dict[tuple[str, tuple[int, ...]], tuple[Tensor, tuple[int, ...]]] = {}
    tensors: dict[str, Tensor] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for key in names:
        entry = entries[key]
        shape = shapes[key] = tuple(entry["shape"])
        known = alike.get((entry["dtype"], shape))
        if known is None:
            dtype = DTYPES.get(entry["dtype"])
            if dtype is None:
                raise AdapterError(f"{file}: {key} has dtype {entry['dtype']}, expected one of {', '.join(DTYPES)}")
            placeholder = torch.empty(shape, dtype=dtype, device="meta")
            known = alike[entry["dtype"], shape] = placeholder, placeholder.stride()
        placeholder, stride = known
        if headers_only and shape:
            # Another tensor, but made in a quarter of the time.
            tensors[key] = placeholder.detach()
            continue
        start, stop = entry["data_offsets"]
        dtype, size = placeholder.dtype, placeholder.itemsize
        if (begin + start) % size:
            # After a header of unusual length a tensor may not be aligned to its elements.
            tensors[key] = pages[begin + start : begin + stop].clone().view(dtype).view(shape)
            continue
        if dtype not in pages_by_dtype:
            pages_by_dtype[dtype] = pages[: len(pages) // size * size].view(dtype)
        tensors[key] = pages_by_dtype[dtype].as_strided(shape, stride, (begin + start) // size)
    return tensors, shapes
