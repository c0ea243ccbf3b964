"""Write adapter files: all of them, or none."""

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file

from diffadapt.errors import AdapterError
from diffadapt.files.checkpoint import PICKLES
from diffadapt.files.folder import CONFIG_NAME, USUAL_NAMES
from diffadapt.formats.document import Document


def write(path: str | os.PathLike[str], documents: Mapping[str, Document]) -> Path:
    """Write adapter files: all of them to temporary names first, renamed when every one is complete.

    Args:
        path: a file that ends in `.safetensors`, or a folder, which gets `pytorch_lora_weights.safetensors`; with a
            config a folder, which gets `adapter_model.safetensors` and `adapter_config.json`.
        documents: what to write, by subfolder; "" for the path itself.

    Returns:
        The file written, the first of several.
    """
    files = {_target(path, folder, document): document for folder, document in documents.items()}
    ready: list[tuple[Path, Path]] = []
    try:
        for target, document in files.items():
            target.parent.mkdir(parents=True, exist_ok=True)
            content = {key: tensor.detach().to("cpu").contiguous() for key, tensor in document.tensors.items()}
            ready.append((_temporary(target), target))
            save_file(content, ready[-1][0], metadata=dict(document.metadata))
            if document.config is not None:
                ready.append((_temporary(target.parent / CONFIG_NAME), target.parent / CONFIG_NAME))
                ready[-1][0].write_text(json.dumps(document.config, indent=2, sort_keys=True))
        # mkstemp's files are private; an adapter is an ordinary file under the user's umask.
        mask = os.umask(0)
        os.umask(mask)
        for temporary, target in ready:
            os.chmod(temporary, 0o666 & ~mask)
            os.replace(temporary, target)
    except BaseException:
        for temporary, _ in ready:
            temporary.unlink(missing_ok=True)
        raise
    return next(iter(files))


def _target(path: str | os.PathLike[str], folder: str, document: Document) -> Path:
    target = Path(path).expanduser()
    if document.config is not None:
        if target.suffix in (".safetensors", *PICKLES):
            raise AdapterError(f"{target}: a PEFT adapter is a folder with two files; pass the path of a folder")
        return target / folder / USUAL_NAMES[1]
    if target.suffix != ".safetensors":
        if target.suffix in PICKLES:
            raise AdapterError(f"{target}: adapters are written as .safetensors, not {target.suffix}")
        target = target / USUAL_NAMES[0]
    return target


def _temporary(target: Path) -> Path:
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
    os.close(handle)
    return Path(name)
