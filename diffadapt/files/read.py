"""Read an adapter from any source: a file, a folder, a hub repository or a state dict."""

import os
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

from diffadapt.errors import AdapterError
from diffadapt.files.checkpoint import Checkpoint, Location, Source
from diffadapt.files.file_names import PEFT_CONFIG, USUAL_FILES
from diffadapt.files.folder import file_in_folder, parts_in_folder, path_inside, read_config
from diffadapt.files.hub import file_from_hub
from diffadapt.files.links import taken_apart
from diffadapt.files.safetensors_file import read_safetensors
from diffadapt.files.state_dict import read_state_dict
from diffadapt.formats.format import Header


def read(source: Source, location: Location | None = None, *, headers_only: bool = False) -> Checkpoint:
    """Read a file, a folder, a hub repository or a state dict.

    Args:
        source: a path, a hub id, with or without the path of a file in the repository, a link to the hub, or a state
            dict.
        location: which file of a folder or repository to read; ignored for a state dict.
        headers_only: whether to read only names, shapes, metadata and scalars; other tensors are on the meta device.

    Raises:
        AdapterError: the source does not exist, or it is not an intact safetensors file.
    """
    location = location or Location()
    if isinstance(source, Mapping):
        return read_state_dict(source, headers_only)
    if not isinstance(source, (str, os.PathLike)):  # pyright: ignore[reportUnnecessaryIsInstance]
        several = "; load several files one by one" if isinstance(source, (list, tuple, set)) else ""
        raise AdapterError(f"an adapter is a path, a hub id or a state dict, not a {type(source).__name__}{several}")
    text = _local(os.fspath(source))
    path = Path(text).expanduser()
    if path.is_dir():
        folder = path_inside(path, location.subfolder or "")
        parts = parts_in_folder(folder) if location.weight_name is None else {}
        if parts:
            return _joined(folder, {name: read(part, headers_only=headers_only) for name, part in parts.items()})
        file = file_in_folder(folder, location.weight_name)
    elif path.is_file():
        file = path
    else:
        repo, location = taken_apart(text, location)
        path, file = Path(repo), file_from_hub(repo, location)
    config = read_config(path_inside(file.parent, PEFT_CONFIG))
    # A file with a usual name says nothing about its content, so the folder or repository names the adapter.
    is_usual = file.name in USUAL_FILES and path != file
    named_after = path.name if is_usual else file.stem
    return read_safetensors(file, _as_name(named_after), config, headers_only)


def _local(text: str) -> str:
    """Return the path in a `file:` URL, and any other text as it is."""
    link = urlsplit(text)
    return url2pathname(link.path) if link.scheme == "file" and link.netloc in ("", "localhost") else text


def _joined(folder: Path, parts: Mapping[str, Checkpoint]) -> Checkpoint:
    """Return what a folder has for several components as one checkpoint."""
    tensors = {f"{name}/{key}": tensor for name, part in parts.items() for key, tensor in part.tensors.items()}
    shapes = {f"{name}/{key}": shape for name, part in parts.items() for key, shape in part.header.shapes.items()}
    metadata = {key: text for part in parts.values() for key, text in part.header.metadata.items()}
    header, first = Header(tuple(tensors), metadata, shapes=shapes), next(iter(parts.values()))
    return Checkpoint(str(folder), _as_name(folder.name), tensors, header, first.headers_only, first.mapped, parts)


def _as_name(name: str) -> str:
    """Return the name of a file as the name of an adapter, which is printable and not blank."""
    return "".join(letter if letter.isprintable() and letter != "\\" else "_" for letter in name).strip() or "_"
