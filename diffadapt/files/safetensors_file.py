"""safetensors files: read tensor by tensor from mapped memory, and checked before."""

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
from diffadapt.files.checkpoint import DTYPES, MAX_TENSORS, PICKLES, Checkpoint, refuse_names, shapes_of
from diffadapt.formats.format import Header

# Limits that no adapter comes near: the largest have some ten thousand tensors, and metadata of a few megabytes.
_MAX_HEADER_BYTES = 32 * 2**20
_EVERY_ENTRY = b'"data_offsets"'
"""What the header has once for every tensor, unless it spells it with escapes."""
_BEGINNINGS = {
    b"PK\x03\x04": "a zip file, as torch.save writes; convert it to safetensors",
    b"\x80": "a pickle; convert it to safetensors",
    b"version ": "the pointer that Git LFS leaves instead of a file; fetch the file with git lfs pull",
    b"<": "a web page; download the file itself",
    b"{": "JSON, perhaps the index of several files; pass one of those",
}
"""What files that end in `.safetensors` sometimes are, by their first bytes."""


class OpenFile:
    """A safetensors file that is held open. Of its tensors nothing is read before it is used.

    Attributes:
        origin: what to call it in messages.
        tensors: pages of the file.
    """

    def __init__(self, file: Path) -> None:
        """
        Raises:
            AdapterError: it cannot be opened, is no safetensors file, or is damaged.
        """
        self.origin = str(file)
        try:
            # Open, it is the same file even when another gets its name.
            self._handle = os.open(file, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        except OSError as error:
            raise AdapterError(f"{file}: cannot be opened ({error.strerror})") from error
        weakref.finalize(self, os.close, self._handle)
        self._state = self._present_state()
        self.tensors = read_file(file, file.stem, None, headers_only=False).tensors

    @property
    def is_unchanged(self) -> bool:
        """Whether nobody has written it meanwhile. What has been cut off must not be read: that ends the process."""
        return self._state == self._present_state()

    def named(self, name: str) -> Iterator[str]:
        """Keys of the tensors that may be what a model calls `name`: that, or the more of their last words are the
        same the earlier, from three on.

        transformers changes the beginnings of names from version to version, and the original layouts have others.
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

    def _present_state(self) -> tuple[int, int]:
        state = os.fstat(self._handle)
        return state.st_size, state.st_mtime_ns


def _endings(name: str) -> list[str]:
    words = name.split(".")
    return [".".join(words[start:]) for start in range(len(words) - 2)]


def read_file(file: Path, name: str, config: Mapping[str, Any] | None, headers_only: bool) -> Checkpoint:
    if file.suffix in PICKLES:
        raise AdapterError(
            f"{file}: pickle files can run code and are not loaded; convert it to safetensors, or, if you trust it, "
            f"pass diffadapt.read_pickle({file.name!r}) as the source"
        )
    try:
        header = _read_header(file)
        count = header.count(_EVERY_ENTRY)
        if count > MAX_TENSORS:
            raise AdapterError(f"{file}: {count} tensors, expected at most {MAX_TENSORS} in an adapter")
        with safe_open(file, framework="pt") as opened:
            names: list[str] = list(opened.keys())
            refuse_names(str(file), names)
            if count != len(names) or b"\\u" in header:
                _refuse_twins(file, header)
            tensors = _tensors(file, header, names, headers_only)
            metadata = opened.metadata() or {}
    except AdapterError:
        raise
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise AdapterError(f"{file}: not a readable safetensors file ({error}); download or export it again") from error
    return Checkpoint(
        str(file),
        name,
        tensors,
        Header(tuple(tensors), metadata, config, shapes_of(tensors)),
        headers_only,
        mapped=True,
    )


def _read_header(file: Path) -> bytes:
    """The JSON that a safetensors file begins with, if its length, which comes first, can be that of an adapter's."""
    with file.open("rb") as opened:
        start = opened.read(8)
        size, rest = int.from_bytes(start, "little"), os.fstat(opened.fileno()).st_size - 8
        if len(start) < 8 or size > rest:
            cut = f"cut off: its header should have {size} bytes, and {max(rest, 0)} follow; download it again"
            what = next((what for begin, what in _BEGINNINGS.items() if start.startswith(begin)), cut)
            raise AdapterError(f"{file}: no safetensors file but {what}")
        if size > _MAX_HEADER_BYTES:
            raise AdapterError(f"{file}: a header of {size} bytes, expected at most {_MAX_HEADER_BYTES} in an adapter")
        header = opened.read(size)
    return header


def _refuse_twins(file: Path, header: bytes) -> None:
    """Raise if two tensors have one name: of those, readers of JSON keep the last one and say nothing."""

    def unique(pairs: list[tuple[str, Any]]) -> None:
        names = Counter(name for name, _ in pairs)
        if len(names) < len(pairs):
            raise AdapterError(f"{file}: {names.most_common(1)[0][0]!r} is there twice; export the file again")

    json.loads(header, object_pairs_hook=unique)


def _tensors(file: Path, header: bytes, names: Iterable[str], headers_only: bool) -> dict[str, Tensor]:
    """Tensors that are pages of the file. safetensors has checked the header; its own way to them takes thrice as long.

    Args:
        headers_only: on the meta device, but for scalars.
    """
    entries: dict[str, Any] = json.loads(header)
    mapped = torch.from_file(str(file), shared=False, size=file.stat().st_size, dtype=torch.uint8)
    begin = 8 + len(header)
    blocks: dict[torch.dtype, Tensor] = {}
    strides: dict[tuple[int, ...], tuple[int, ...]] = {}
    tensors: dict[str, Tensor] = {}
    for key in names:
        entry = entries[key]
        shape, (start, stop) = tuple(entry["shape"]), entry["data_offsets"]
        dtype = DTYPES.get(entry["dtype"])
        if dtype is None:
            raise AdapterError(f"{file}: {key} has dtype {entry['dtype']}, expected one of {', '.join(DTYPES)}")
        if headers_only and shape:
            tensors[key] = torch.empty(shape, dtype=dtype, device="meta")
            continue
        size = dtype.itemsize
        if (begin + start) % size:
            # A header of an odd length.
            tensors[key] = mapped[begin + start : begin + stop].clone().view(dtype).view(shape)
            continue
        if dtype not in blocks:
            blocks[dtype] = mapped[: len(mapped) // size * size].view(dtype)
        if shape not in strides:
            strides[shape] = torch.empty(shape, device="meta").stride()
        tensors[key] = blocks[dtype].as_strided(shape, strides[shape], (begin + start) // size)
    return tensors
