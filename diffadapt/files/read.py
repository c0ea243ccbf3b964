"""Read an adapter from wherever it is."""

import os
from collections.abc import Mapping
from pathlib import Path

from diffadapt.files.checkpoint import Checkpoint, Location, Source, from_state_dict
from diffadapt.files.folder import CONFIG_NAME, USUAL_NAMES, file_in_folder, read_config, within
from diffadapt.files.hub import from_hub
from diffadapt.files.safetensors_file import read_file


def read(source: Source, where: Location | None = None, *, headers_only: bool = False) -> Checkpoint:
    """Read a file, a folder, a hub repository or a state dict.

    Args:
        headers_only: read names, shapes, metadata and scalars only; other tensors are on the meta device.

    Raises:
        AdapterError: nothing is there, it is no safetensors file, or it is damaged.
    """
    where = where or Location()
    if isinstance(source, Mapping):
        return from_state_dict(source, headers_only)
    text = os.fspath(source)
    path = Path(text).expanduser()
    if path.is_dir():
        file = file_in_folder(within(path, where.subfolder or ""), where.weight_name)
    elif path.is_file():
        file = path
    else:
        file = from_hub(text, where)
    config = read_config(within(file.parent, CONFIG_NAME))
    generic = file.name in USUAL_NAMES
    named_after = (path if path.is_dir() else Path(text)) if generic and path != file else file.with_suffix("")
    return read_file(file, named_after.name.replace(".", "_"), config, headers_only)
