"""Folders of adapter files: which file is meant, and what is outside."""

from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from diffadapt.errors import AdapterError
from diffadapt.formats.metadata import MAX_JSON, parsed

CONFIG_NAME = "adapter_config.json"
USUAL_NAMES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")


def read_config(path: Path) -> Mapping[str, Any] | None:
    if not path.is_file():
        return None
    if path.stat().st_size > MAX_JSON:
        raise AdapterError(f"{path}: {path.stat().st_size} bytes, expected a JSON file of {MAX_JSON} at most")
    try:
        text = path.read_text("utf-8")
    except (ValueError, OSError) as error:
        raise AdapterError(f"{path}: not readable as text ({error})") from error
    config = parsed(text, str(path))
    if not isinstance(config, dict):
        raise AdapterError(f"{path}: holds a {type(config).__name__}, expected an object")
    return config  # type: ignore[return-value]


def file_in_folder(folder: Path, weight_name: str | None) -> Path:
    if not folder.is_dir():
        raise AdapterError(f"{folder}: no such folder")
    found = sorted(path.name for path in folder.iterdir() if path.suffix == ".safetensors" and path.is_file())
    return within(folder, choose(found, weight_name, str(folder), lambda name: within(folder, name).is_file()))


def within(folder: Path, name: str) -> Path:
    """`folder / name`, if that is in the folder, or in the hub's cache, where all files are links to its blobs.

    Raises:
        AdapterError: it leads out of the folder, by its name or by a link.
    """
    refuse_leading_out(str(folder), name)
    file, root = folder / name, folder.resolve()
    blobs = [parent.parent / "blobs" for parent in root.parents if parent.name == "snapshots"]
    target = file.resolve()
    if not any(target.is_relative_to(allowed) for allowed in (root, *blobs)):
        raise AdapterError(f"{file}: a link out of the folder, to {target}; pass that path itself if you mean it")
    return file


def refuse_leading_out(origin: str, name: str) -> None:
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or Path(name).is_absolute():
        raise AdapterError(f"{origin}: {name!r} leads out of it; expected the name of a file or folder inside")


def choose(found: list[str], weight_name: str | None, origin: str, exists: Callable[[str], bool]) -> str:
    """The one file meant: the one asked for, one of the usual names, or the only one there."""
    if weight_name is not None:
        if exists(weight_name):
            return weight_name
        raise AdapterError(f"{origin}: no file {weight_name!r}; it has {', '.join(found) or 'no .safetensors file'}")
    for usual in USUAL_NAMES:
        if usual in found:
            return usual
    if len(found) == 1:
        return found[0]
    if not found:
        raise AdapterError(f"{origin}: no .safetensors file there; pass weight_name= if it has another name")
    raise AdapterError(f"{origin}: several files, pass weight_name= one of: {', '.join(found)}")
