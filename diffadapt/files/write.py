"""Write adapter files, either all of an adapter's files or none."""

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffadapt.errors import AdapterError
from diffadapt.files.file_names import DIFFUSERS_FILE, PEFT_CONFIG, PEFT_FILE, PICKLE_SUFFIXES
from diffadapt.files.safetensors_file import DTYPES
from diffadapt.formats.document import Document
from diffadapt.progress import with_progress

SPELLED = {dtype: spelled for spelled, dtype in DTYPES.items()}
"""The name in safetensors by dtype."""


def write(path: str | os.PathLike[str], documents: Mapping[str, Document]) -> Path:
    """Write adapter files.

    All files are written under temporary names first and renamed when every one is complete.

    Args:
        path: for a document without a config, a file that ends in `.safetensors`, or a folder, which gets
            `pytorch_lora_weights.safetensors`; for one with a config, a folder, which gets `adapter_model.safetensors`
            and `adapter_config.json`.
        documents: what to write, by subfolder of `path`; "" stands for `path` itself.

    Returns:
        The path of the weight file or, if there are several documents, that of the folder with all of them.

    Raises:
        AdapterError: the name of the path does not suit the documents.
        OSError: a file cannot be written.
    """
    files = {_target(path, folder, document): document for folder, document in documents.items()}
    ready: list[tuple[Path, Path]] = []
    try:
        for target, document in files.items():
            target.parent.mkdir(parents=True, exist_ok=True)
            ready.append((temporary_beside(target), target))
            _save(ready[-1][0], document.tensors, document.metadata)
            if document.config is not None:
                ready.append((temporary_beside(target.parent / PEFT_CONFIG), target.parent / PEFT_CONFIG))
                ready[-1][0].write_text(json.dumps(document.config, indent=2, sort_keys=True))
        for temporary, target in ready:
            publish(temporary, target)
    except BaseException:
        for temporary, _ in ready:
            temporary.unlink(missing_ok=True)
        raise
    return next(iter(files)) if len(files) == 1 else Path(path).expanduser()


def publish(temporary: Path, target: Path) -> None:
    """Give a complete temporary file or folder the name `target`, and the permissions of an ordinary one."""
    # What tempfile creates is private; this is an ordinary file, or folder, under the user's umask.
    mask = os.umask(0)
    os.umask(mask)
    os.chmod(temporary, (0o777 if temporary.is_dir() else 0o666) & ~mask)
    os.replace(temporary, target)


def temporary_beside(target: Path) -> Path:
    """Create an empty file with a temporary name in the folder of `target` and return its path."""
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
    os.close(handle)
    return Path(name)


def _target(path: str | os.PathLike[str], folder: str, document: Document) -> Path:
    target = Path(path).expanduser()
    if document.config is not None:
        if target.suffix in (".safetensors", *PICKLE_SUFFIXES):
            raise AdapterError(f"{target}: a PEFT adapter is a folder with two files; pass the path of a folder")
        return target / folder / PEFT_FILE
    if target.suffix != ".safetensors":
        if target.suffix in PICKLE_SUFFIXES:
            raise AdapterError(f"{target}: adapters are written as .safetensors, not {target.suffix}")
        target = target / DIFFUSERS_FILE
    return target


def _save(file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file: the tensors of the largest dtypes first, which aligns all, and a sorted header.

    So the same adapter is the same file, byte for byte; `save_file` of safetensors writes metadata in random order.
    """
    ordered = sorted(tensors, key=lambda key: (-tensors[key].itemsize, str(tensors[key].dtype), key))
    entries: dict[str, Any] = {}
    end = 0
    for key in ordered:
        start, end = end, end + tensors[key].nbytes
        spelled = SPELLED.get(tensors[key].dtype)
        if spelled is None:
            raise AdapterError(f"{file}: {key} has dtype {tensors[key].dtype}, which no safetensors file can hold")
        entries[key] = {"dtype": spelled, "shape": list(tensors[key].shape), "data_offsets": [start, end]}
    with file.open("wb") as opened:
        opened.write(header_of(entries, metadata))
        for key in with_progress(ordered, "writing", "tensor"):
            opened.write(raw_bytes(tensors[key]))


def header_of(entries: Mapping[str, Any], metadata: Mapping[str, str]) -> bytes:
    """Return the beginning of a safetensors file, up to the data, with the metadata in sorted order."""
    notes = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    header = json.dumps({**notes, **entries}, ensure_ascii=False, separators=(",", ":")).encode()
    # Readers expect the data at a multiple of eight bytes.
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header


def raw_bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor in the order of its elements."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
