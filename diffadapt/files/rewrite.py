"""A copy of a safetensors file in which some tensors have other values: large files, one tensor in memory at a time."""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from diffadapt.errors import AdapterError
from diffadapt.files.safetensors_file import DTYPES
from diffadapt.files.write import header_of, publish, raw_bytes, temporary_beside
from diffadapt.progress import with_progress

_BLOCK = 16 * 2**20


def rewrite(source: Path, target: Path, changed: Iterable[tuple[str, Tensor]], metadata: Mapping[str, str]) -> None:
    """Write a copy of `source`, with the tensors of `changed` in the place of those with the same names.

    The file appears under its name once it is complete.

    Args:
        source: an intact safetensors file.
        target: the file to write.
        changed: pairs of a key and the new tensor, of the same shape and dtype as in the file; used one at a time.
        metadata: the metadata of the copy.

    Raises:
        AdapterError: a tensor has another shape or dtype than in the file.
        OSError: the file cannot be written.
    """
    with source.open("rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        entries: dict[str, Any] = json.loads(opened.read(size))
        entries.pop("__metadata__", None)
        header = header_of(entries, metadata)
        blocks = range(math.ceil((source.stat().st_size - opened.tell()) / _BLOCK))
        temporary = temporary_beside(target)
        try:
            with temporary.open("wb") as written:
                written.write(header)
                for _ in with_progress(blocks, "copying", "block"):
                    written.write(opened.read(_BLOCK))
                for key, tensor in changed:
                    entry = entries[key]
                    shape, dtype = tuple(entry["shape"]), DTYPES[entry["dtype"]]
                    if tuple(tensor.shape) != shape or tensor.dtype != dtype:
                        raise AdapterError(
                            f"{source}: {key} is {dtype} of shape {shape}, not {tensor.dtype} of {tuple(tensor.shape)}"
                        )
                    written.seek(len(header) + entry["data_offsets"][0])
                    written.write(raw_bytes(tensor))
            publish(temporary, target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
