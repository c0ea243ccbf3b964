"""Write adapter files, either all of an adapter's files or none."""

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file

from diffadapt.errors import AdapterError
from diffadapt.files.file_names import DIFFUSERS_FILE, PEFT_CONFIG, PEFT_FILE, PICKLE_SUFFIXES
from diffadapt.formats.document import Document


def write(path: str | os.PathLike[str], documents: Mapping[str, Document]) -> Path:
    """Write adapter files.

    All files are written under temporary names first and renamed when every one is complete.

    Args:
        path: for a document without a config, a file that ends in `.safetensors`, or a folder, which gets
            `pytorch_lora_weights.safetensors`; for one with a config, a folder, which gets `adapter_model.safetensors`
            and `adapter_config.json`.
        documents: what to write, by subfolder of `path`; "" stands for `path` itself.

    Returns:
        The path of the weight file or, if there are several documents, that of the folder with all of them.

    Raises:
        AdapterError: the name of the path does not suit the documents.
        OSError: a file cannot be written.
    """
    files = {_target(path, folder, document): document for folder, document in documents.items()}
    ready: list[tuple[Path, Path]] = []
    try:
        for target, document in files.items():
            target.parent.mkdir(parents=True, exist_ok=True)
            content = {key: tensor.detach().to("cpu").contiguous() for key, tensor in document.tensors.items()}
            ready.append((temporary_beside(target), target))
            save_file(content, ready[-1][0], metadata=dict(document.metadata))
            _sort_metadata(ready[-1][0])
            if document.config is not None:
                ready.append((temporary_beside(target.parent / PEFT_CONFIG), target.parent / PEFT_CONFIG))
                ready[-1][0].write_text(json.dumps(document.config, indent=2, sort_keys=True))
        for temporary, target in ready:
            publish(temporary, target)
    except BaseException:
        for temporary, _ in ready:
            temporary.unlink(missing_ok=True)
        raise
    return next(iter(files)) if len(files) == 1 else Path(path).expanduser()


def publish(temporary: Path, target: Path) -> None:
    """Give a complete temporary file or folder the name `target`, and the permissions of an ordinary one."""
    # What tempfile creates is private; this is an ordinary file, or folder, under the user's umask.
    mask = os.umask(0)
    os.umask(mask)
    os.chmod(temporary, (0o777 if temporary.is_dir() else 0o666) & ~mask)
    os.replace(temporary, target)


def temporary_beside(target: Path) -> Path:
    """Create an empty file with a temporary name in the folder of `target` and return its path."""
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
    os.close(handle)
    return Path(name)


def _target(path: str | os.PathLike[str], folder: str, document: Document) -> Path:
    target = Path(path).expanduser()
    if document.config is not None:
        if target.suffix in (".safetensors", *PICKLE_SUFFIXES):
            raise AdapterError(f"{target}: a PEFT adapter is a folder with two files; pass the path of a folder")
        return target / folder / PEFT_FILE
    if target.suffix != ".safetensors":
        if target.suffix in PICKLE_SUFFIXES:
            raise AdapterError(f"{target}: adapters are written as .safetensors, not {target.suffix}")
        target = target / DIFFUSERS_FILE
    return target


def _sort_metadata(file: Path) -> None:
    """Sort the metadata in the header of a safetensors file, which safetensors writes in random order.

    So the same adapter is the same file, byte for byte.
    """
    with file.open("r+b") as opened:
        size = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(size))
        if "__metadata__" not in header:
            return
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        # The offsets of the tensors start after the header, so its length has to stay; it is padded with spaces.
        assert len(text) <= size, f"{file}: a sorted header of {len(text)} bytes for {size}"
        opened.seek(8)
        opened.write(text.ljust(size))
