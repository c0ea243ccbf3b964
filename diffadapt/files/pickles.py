"""Pickle files. They are read only by `read_pickle`, which callers have to ask for explicitly."""

import os
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffadapt.errors import AdapterError
from diffadapt.files.state_dict import read_state_dict


def read_pickle(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Return the state dict in a pickle file, to be passed on as a source: `pipe.load_adapter(read_pickle(path))`.

    The file is unpickled with `weights_only=True`, which allows tensors and containers only.

    Args:
        path: the file, with the state dict itself, with a dict that has it under "state_dict", or with a textual
            inversion as A1111 and the original code write it. The token of such a file is its name without the suffix.

    Returns:
        Tensors on the CPU by key.

    Raises:
        AdapterError: the file does not hold a pickled state dict, holds more than tensors, or unpacks to more bytes
            than it has.
    """
    try:
        _refuse_bomb(Path(path))
        # The original code of textual inversion keeps its vectors in a `ParameterDict`.
        with torch.serialization.safe_globals([nn.ParameterDict]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except AdapterError:
        raise
    except Exception as error:
        # Not `from error`: torch's message advises to unpickle without that protection.
        reason = _why_not_unpickled(error)
        raise AdapterError(f"{os.fspath(path)}: cannot be unpickled with weights_only=True ({reason})") from None
    content = content.get("state_dict", content) if isinstance(content, dict) else content
    if not isinstance(content, Mapping):
        raise AdapterError(f"{os.fspath(path)}: holds a {type(content).__name__}, expected a state dict")
    vectors = content.get("string_to_param")
    if isinstance(vectors, (Mapping, nn.ParameterDict)):
        content = _named_vectors(vectors, Path(path).stem)
    return dict(read_state_dict(content, headers_only=False).tensors)


def _named_vectors(vectors: Any, name: str) -> dict[Any, Any]:
    """Return learned vectors under keys that contain their tokens, as LyCORIS spells them.

    Args:
        vectors: the vectors by placeholder; `*` stands for the name of the file.
        name: the name of the file without its suffix.
    """
    tokens = {key: name if key == "*" else key for key in vectors}
    found = {f"bundle_emb.{token}.string_to_param.*": vectors[key] for key, token in tokens.items()}
    return {key: own.detach() if isinstance(own, Tensor) else own for key, own in found.items()}


def _why_not_unpickled(error: Exception) -> str:
    """Return why `torch.load` refused a file, without its advice to unpickle what may run code."""
    found = re.search(r"GLOBAL ([\w.]+)", str(error))
    if found:
        return f"it holds {found[1]}, expected tensors only; save its state dict as safetensors where it was made"
    if isinstance(error, OSError):
        return str(error)
    return "it is no intact pickle file of torch; download it again, or pass a safetensors file"


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
