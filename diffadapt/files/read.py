"""Read an adapter from any source: a file, a folder, a hub repository or a state dict."""

import os
from collections.abc import Mapping
from pathlib import Path

from diffadapt.files.checkpoint import Checkpoint, Location, Source
from diffadapt.files.file_names import PEFT_CONFIG, USUAL_FILES
from diffadapt.files.folder import file_in_folder, path_inside, read_config
from diffadapt.files.hub import file_from_hub
from diffadapt.files.safetensors_file import read_safetensors
from diffadapt.files.state_dict import read_state_dict


def read(source: Source, location: Location | None = None, *, headers_only: bool = False) -> Checkpoint:
    """Read a file, a folder, a hub repository or a state dict.

    Args:
        source: a path, a hub id or a state dict.
        location: which file of a folder or repository to read; ignored for a state dict.
        headers_only: whether to read only names, shapes, metadata and scalars; other tensors are on the meta device.

    Raises:
        AdapterError: the source does not exist, or it is not an intact safetensors file.
    """
    location = location or Location()
    if isinstance(source, Mapping):
        return read_state_dict(source, headers_only)
    text = os.fspath(source)
    path = Path(text).expanduser()
    if path.is_dir():
        file = file_in_folder(path_inside(path, location.subfolder or ""), location.weight_name)
    elif path.is_file():
        file = path
    else:
        file = file_from_hub(text, location)
    config = read_config(path_inside(file.parent, PEFT_CONFIG))
    # A file with a usual name says nothing about its content, so the folder or repository names the adapter.
    is_usual = file.name in USUAL_FILES and path != file
    named_after = (path if path.is_dir() else Path(text)) if is_usual else file.with_suffix("")
    return read_safetensors(file, named_after.name.replace(".", "_"), config, headers_only)
