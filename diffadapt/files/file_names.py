"""Names of adapter files: those that libraries write, the one that is meant, and names that lead out of a folder."""

from collections.abc import Callable
from pathlib import Path, PurePosixPath

from diffadapt.errors import AdapterError

DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
PEFT_FILE = "adapter_model.safetensors"
PEFT_CONFIG = "adapter_config.json"
USUAL_FILES = (DIFFUSERS_FILE, PEFT_FILE)
"""Names that say nothing about the adapter in the file; the first one found is the one meant."""

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def choose_name(found: list[str], weight_name: str | None, origin: str, exists: Callable[[str], bool]) -> str:
    """Return the name of the file that is meant: the one asked for, a usual one, or the only one.

    Args:
        found: names of the safetensors files in the folder or repository.
        weight_name: the name asked for, if any.
        origin: what messages call the folder or repository.
        exists: whether it has a file of a given name.

    Raises:
        AdapterError: the file asked for does not exist, there is no file, or there are several.
    """
    if weight_name is not None:
        if exists(weight_name):
            return weight_name
        raise AdapterError(f"{origin}: no file {weight_name!r}; it has {', '.join(found) or 'no .safetensors file'}")
    for usual in USUAL_FILES:
        if usual in found:
            return usual
    if len(found) == 1:
        return found[0]
    if not found:
        raise AdapterError(f"{origin}: no .safetensors file there; pass weight_name= if it has another name")
    raise AdapterError(f"{origin}: several files; pass weight_name= with one of {', '.join(found)}")


def refuse_outside_name(origin: str, name: str) -> None:
    """Raise `AdapterError` if `name` is absolute or has a `..`, on any operating system."""
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or Path(name).is_absolute():
        raise AdapterError(f"{origin}: {name!r} leads out of it; expected the name of a file or folder inside")
