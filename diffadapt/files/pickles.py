"""Pickle files, which are read only when a caller asks for it by name."""

import os
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from diffadapt.errors import AdapterError
from diffadapt.files.checkpoint import from_state_dict


def read_pickle(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The state dict in a pickle file, to be passed on as a source: `pipe.load_adapter(read_pickle(path))`.

    Unpickles with `weights_only=True`, so tensors and containers only.

    Raises:
        AdapterError: the file is no pickled state dict, holds more than tensors, or unpacks to more than its size.
    """
    try:
        _refuse_bomb(Path(path))
        content = torch.load(path, map_location="cpu", weights_only=True)
    except AdapterError:
        raise
    except Exception as error:
        raise AdapterError(f"{os.fspath(path)}: cannot be unpickled with weights_only=True ({error})") from error
    content = content.get("state_dict", content) if isinstance(content, dict) else content
    if not isinstance(content, Mapping):
        raise AdapterError(f"{os.fspath(path)}: holds a {type(content).__name__}, expected a state dict")
    return dict(from_state_dict(content, headers_only=False).tensors)


def _refuse_bomb(file: Path) -> None:
    """Raise for a zip that says to unpack to more bytes than it has: `torch.save` stores tensors as they are."""
    if not zipfile.is_zipfile(file):
        return
    with zipfile.ZipFile(file) as archive:
        unpacked = sum(entry.file_size for entry in archive.infolist())
    size = file.stat().st_size
    if unpacked > size:
        raise AdapterError(
            f"{file}: {size} bytes that unpack to {unpacked}, expected no more than there are, since torch.save does "
            "not compress; load it with torch and pass the state dict if you trust it"
        )
