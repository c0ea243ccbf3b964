"""Local folders of adapter files: the weight file, PEFT's config, and paths that must stay inside the folder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffadapt.errors import AdapterError
from diffadapt.files.file_names import PEFT_FILE, choose_name, refuse_outside_name
from diffadapt.formats.metadata import MAX_JSON, parse_json
from diffadapt.formats.prefixes import COMPONENT


def read_config(path: Path) -> Mapping[str, Any] | None:
    """Return the content of an `adapter_config.json`, or `None` if the file does not exist.

    Raises:
        AdapterError: the file is too large, is not UTF-8 text, or does not hold a JSON object.
    """
    if not path.is_file():
        return None
    if path.stat().st_size > MAX_JSON:
        raise AdapterError(f"{path}: {path.stat().st_size} bytes, expected a JSON file of at most {MAX_JSON}")
    try:
        text = path.read_text("utf-8")
    except (ValueError, OSError) as error:
        raise AdapterError(f"{path}: not readable as text ({error})") from error
    config = parse_json(text, str(path))
    if not isinstance(config, dict):
        raise AdapterError(f"{path}: holds a {type(config).__name__}, expected an object")
    return config  # type: ignore[return-value]


def parts_in_folder(folder: Path) -> dict[str, Path]:
    """Return the PEFT folders in a folder by the pipeline component that each is named after.

    The result is empty if the folder has a weight file itself, or no PEFT folders.

    Raises:
        AdapterError: the folder does not exist, or it has PEFT folders that are named after no component.
    """
    if not folder.is_dir():
        raise AdapterError(f"{folder}: no such folder")
    inside = sorted(folder.iterdir())
    if any(path.suffix == ".safetensors" for path in inside):
        return {}
    names = [path.name for path in inside if (path / PEFT_FILE).is_file()]
    if not all(map(COMPONENT.fullmatch, names)):
        raise AdapterError(
            f"{folder}: has adapters in the folders {', '.join(names)}; pass subfolder= with one of them"
        )
    return {name: path_inside(folder, name) for name in names}


def file_in_folder(folder: Path, weight_name: str | None) -> Path:
    """Return the path of the weight file that is meant in a folder; see `choose_name`.

    Raises:
        AdapterError: the folder does not exist, or it is not clear which of its files is meant.
    """
    if not folder.is_dir():
        raise AdapterError(f"{folder}: no such folder")
    found = sorted(path.name for path in folder.iterdir() if path.suffix == ".safetensors" and path.is_file())
    name = choose_name(found, weight_name, str(folder), lambda name: path_inside(folder, name).is_file())
    return path_inside(folder, name)


def path_inside(folder: Path, name: str) -> Path:
    """Return `folder / name`.

    Links may lead to the blobs of the hub's cache, which consists of such links.

    Raises:
        AdapterError: the path leads out of the folder, by its name or by a link.
    """
    refuse_outside_name(str(folder), name)
    file, root = folder / name, folder.resolve()
    blobs = [parent.parent / "blobs" for parent in root.parents if parent.name == "snapshots"]
    target = file.resolve()
    if not any(target.is_relative_to(allowed) for allowed in (root, *blobs)):
        raise AdapterError(f"{file}: a link out of the folder, to {target}; pass that path itself if you mean it")
    return file
