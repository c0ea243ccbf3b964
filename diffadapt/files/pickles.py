"""Pickle files. They are read only by `read_pickle`, which callers have to ask for explicitly."""

import os
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from diffadapt.errors import AdapterError
from diffadapt.files.state_dict import read_state_dict


def read_pickle(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Return the state dict in a pickle file, to be passed on as a source: `pipe.load_adapter(read_pickle(path))`.

    The file is unpickled with `weights_only=True`, which allows tensors and containers only.

    Args:
        path: the file, with the state dict itself or with a dict that has it under "state_dict".

    Returns:
        Tensors on the CPU by key.

    Raises:
        AdapterError: the file does not hold a pickled state dict, holds more than tensors, or unpacks to more bytes
            than it has.
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
    return dict(read_state_dict(content, headers_only=False).tensors)


def _refuse_bomb(file: Path) -> None:
    """Raise `AdapterError` if a zip file claims to unpack to more bytes than it has.

    `torch.save` stores tensors uncompressed, so its files never do.
    """
    if not zipfile.is_zipfile(file):
        return
    with zipfile.ZipFile(file) as archive:
        unpacked = sum(entry.file_size for entry in archive.infolist())
    size = file.stat().st_size
    if unpacked > size:
        raise AdapterError(
            f"{file}: {size} bytes that unpack to {unpacked}, expected no more than the file has, since torch.save "
            "does not compress; if you trust the file, load it with torch and pass the state dict"
        )
