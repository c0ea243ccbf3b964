"""Where adapter files come from and go to. The only file that opens files.

safetensors by default. Pickles are never unpickled here unless `read_pickle` is called for one by name.
"""

import json
import os
import tempfile
import weakref
import zipfile
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, TypeAlias

import torch
from huggingface_hub import constants, hf_hub_download, list_repo_files, snapshot_download, try_to_load_from_cache
from huggingface_hub import errors as hub_errors
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from diffadapt.errors import AdapterError
from diffadapt.formats.format import Header
from diffadapt.formats.metadata import MAX_JSON, parsed
from diffadapt.state import Document

Source: TypeAlias = str | os.PathLike[str] | Mapping[str, Tensor]

CONFIG_NAME = "adapter_config.json"
_USUAL_NAMES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# Limits that no adapter comes near: the largest have some ten thousand tensors, and metadata of a few megabytes.
_MAX_HEADER_BYTES = 32 * 2**20
_MAX_TENSORS = 100_000
_MAX_NAME = 1000
_DTYPES: dict[str, torch.dtype] = {
    spelled: getattr(torch, name)
    for spelled, name in {
        "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "C64": "complex64", "BOOL": "bool",
        "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
        "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz",
        "I8": "int8", "I16": "int16", "I32": "int32", "I64": "int64",
        "U8": "uint8", "U16": "uint16", "U32": "uint32", "U64": "uint64",
    }.items()
    if hasattr(torch, name)
}  # fmt: skip
"""safetensors' names of the dtypes that have an element for every number, so far as this torch has them."""
_KNOWN = frozenset(_DTYPES.values())
_EVERY_ENTRY = b'"data_offsets"'
"""What the header has once for every tensor, unless it spells it with escapes."""
_BEGINNINGS = {
    b"PK\x03\x04": "a zip file, as torch.save writes; convert it to safetensors",
    b"\x80": "a pickle; convert it to safetensors",
    b"version ": "the pointer that Git LFS leaves instead of a file; fetch the file with git lfs pull",
    b"<": "a web page; download the file itself",
    b"{": "JSON, perhaps the index of several files; pass one of those",
}
"""What files that end in `.safetensors` sometimes are, by their first bytes."""


@dataclass(frozen=True)
class Checkpoint:
    """The content of one source.

    Attributes:
        origin: what to call the source in messages.
        name: a name for the adapter, from the file's; `None` for a state dict.
        tensors: all tensors, or placeholders on the meta device when only headers were read.
        headers_only: which of the two.
        mapped: the tensors are pages of a file, which may change on disk.
    """

    origin: str
    name: str | None
    tensors: Mapping[str, Tensor]
    header: Header
    headers_only: bool = False
    mapped: bool = False


class OpenFile:
    """A safetensors file that is held open. Of its tensors nothing is read before it is used.

    Attributes:
        origin: what to call it in messages.
        tensors: pages of the file.
    """

    def __init__(self, file: Path) -> None:
        """
        Raises:
            AdapterError: it cannot be opened, is no safetensors file, or is damaged.
        """
        self.origin = str(file)
        try:
            # Open, it is the same file even when another gets its name.
            self._handle = os.open(file, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        except OSError as error:
            raise AdapterError(f"{file}: cannot be opened ({error.strerror})") from error
        weakref.finalize(self, os.close, self._handle)
        self._state = self._present_state()
        self.tensors = _from_file(file, file.stem, None, headers_only=False).tensors

    @property
    def is_unchanged(self) -> bool:
        """Whether nobody has written it meanwhile. What has been cut off must not be read: that ends the process."""
        return self._state == self._present_state()

    def named(self, name: str) -> Iterator[str]:
        """Keys of the tensors that may be what a model calls `name`: that, or the more of their last words are the
        same the earlier, from three on.

        transformers changes the beginnings of names from version to version, and the original layouts have others.
        """
        if name in self.tensors:
            yield name
        else:
            yield from dict.fromkeys(key for ending in _endings(name) for key in self._by_ending.get(ending, ()))

    @cached_property
    def _by_ending(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for key in self.tensors:
            for ending in _endings(key):
                found.setdefault(ending, []).append(key)
        return found

    def _present_state(self) -> tuple[int, int]:
        state = os.fstat(self._handle)
        return state.st_size, state.st_mtime_ns


def _endings(name: str) -> list[str]:
    words = name.split(".")
    return [".".join(words[start:]) for start in range(len(words) - 2)]


@dataclass(frozen=True)
class Location:
    """The arguments of `load_adapter` that say where a file is; those of `huggingface_hub`, with the same meaning."""

    weight_name: str | None = None
    subfolder: str | None = None
    revision: str | None = None
    token: str | bool | None = None
    cache_dir: str | os.PathLike[str] | None = None
    local_files_only: bool = False


def read(source: Source, where: Location = Location(), *, headers_only: bool = False) -> Checkpoint:
    """Read a file, a folder, a hub repository or a state dict.

    Args:
        headers_only: read names, shapes, metadata and scalars only; other tensors are on the meta device.

    Raises:
        AdapterError: nothing is there, it is no safetensors file, or it is damaged.
    """
    if isinstance(source, Mapping):
        return _from_state_dict(source, headers_only)
    text = os.fspath(source)
    path = Path(text).expanduser()
    if path.is_dir():
        file = _in_folder(_within(path, where.subfolder or ""), where.weight_name)
    elif path.is_file():
        file = path
    else:
        file = _from_hub(text, where)
    config = _read_config(_within(file.parent, CONFIG_NAME))
    generic = file.name in _USUAL_NAMES
    named_after = (path if path.is_dir() else Path(text)) if generic and path != file else file.with_suffix("")
    return _from_file(file, named_after.name.replace(".", "_"), config, headers_only)


def cached_folder(repo: str) -> Path | None:
    """What the hub's cache has of a repository, if anything. Asks no network."""
    try:
        validate_repo_id(repo)
        return Path(snapshot_download(repo, local_files_only=True))
    except (hub_errors.HFValidationError, hub_errors.LocalEntryNotFoundError):
        return None


def read_pickle(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The state dict in a pickle file, to be passed on as a source: `pipe.load_adapter(read_pickle(path))`.

    Unpickles with `weights_only=True`, so tensors and containers only.

    Raises:
        AdapterError: the file is no pickled state dict, holds more than tensors, or unpacks to more than its size.
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
    return dict(_from_state_dict(content, headers_only=False).tensors)


def _refuse_bomb(file: Path) -> None:
    """Raise for a zip that says to unpack to more bytes than it has: `torch.save` stores tensors as they are."""
    if not zipfile.is_zipfile(file):
        return
    with zipfile.ZipFile(file) as archive:
        unpacked = sum(entry.file_size for entry in archive.infolist())
    size = file.stat().st_size
    if unpacked > size:
        raise AdapterError(
            f"{file}: {size} bytes that unpack to {unpacked}, expected no more than there are, since torch.save does "
            "not compress; load it with torch and pass the state dict if you trust it"
        )


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
        if target.suffix in (".safetensors", *_PICKLES):
            raise AdapterError(f"{target}: a PEFT adapter is a folder with two files; pass the path of a folder")
        return target / folder / _USUAL_NAMES[1]
    if target.suffix != ".safetensors":
        if target.suffix in _PICKLES:
            raise AdapterError(f"{target}: adapters are written as .safetensors, not {target.suffix}")
        target = target / _USUAL_NAMES[0]
    return target


def _temporary(target: Path) -> Path:
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
    os.close(handle)
    return Path(name)


def _from_state_dict(source: Mapping[Any, Any], headers_only: bool) -> Checkpoint:
    if isinstance(source.get("ip_adapter"), Mapping):
        # IP-Adapters are published as a dict of two.
        flat: dict[Any, Any] = {}
        for outer, found in source.items():
            inner = found.items() if isinstance(found, Mapping) else ()
            flat.update({f"{outer}.{key}": value for key, value in inner} if inner else {outer: found})
        source = flat
    for key, value in source.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise AdapterError(
                f"a state dict maps str to Tensor; found {type(key).__name__} -> {type(value).__name__} at {key!r}"
            )
        if value.layout != torch.strided or value.dtype not in _KNOWN:
            raise AdapterError(f"the state dict: {key} is {value.layout} of {value.dtype}, expected an ordinary tensor")
        if value.is_meta and not headers_only:
            raise AdapterError(f"the state dict: {key} is on the meta device, where it has no values")
        if not (value.is_contiguous() or value.is_meta) and value.nbytes > value.untyped_storage().nbytes():
            raise AdapterError(f"the state dict: {key} is larger than its memory; pass {key}.contiguous()")
    _refuse_names("the state dict", source)
    tensors = {key: _placeholder(value) if headers_only else value for key, value in source.items()}
    return Checkpoint("the state dict", None, tensors, Header(tuple(tensors), shapes=_shapes(tensors)), headers_only)


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in tensors.items()}


def _from_file(file: Path, name: str, config: Mapping[str, Any] | None, headers_only: bool) -> Checkpoint:
    if file.suffix in _PICKLES:
        raise AdapterError(
            f"{file}: pickle files can run code and are not loaded; convert it to safetensors, or, if you trust it, "
            f"pass diffadapt.read_pickle({file.name!r}) as the source"
        )
    try:
        header = _read_header(file)
        count = header.count(_EVERY_ENTRY)
        if count > _MAX_TENSORS:
            raise AdapterError(f"{file}: {count} tensors, expected at most {_MAX_TENSORS} in an adapter")
        with safe_open(file, framework="pt") as opened:
            names: list[str] = list(opened.keys())
            _refuse_names(str(file), names)
            if count != len(names) or b"\\u" in header:
                _refuse_twins(file, header)
            tensors = _tensors(file, header, names, headers_only)
            metadata = opened.metadata() or {}
    except AdapterError:
        raise
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise AdapterError(f"{file}: not a readable safetensors file ({error}); download or export it again") from error
    return Checkpoint(
        str(file), name, tensors, Header(tuple(tensors), metadata, config, _shapes(tensors)), headers_only, mapped=True
    )


def _read_header(file: Path) -> bytes:
    """The JSON that a safetensors file begins with, if its length, which comes first, can be that of an adapter's."""
    with file.open("rb") as opened:
        start = opened.read(8)
        size, rest = int.from_bytes(start, "little"), os.fstat(opened.fileno()).st_size - 8
        if len(start) < 8 or size > rest:
            cut = f"cut off: its header should have {size} bytes, and {max(rest, 0)} follow; download it again"
            what = next((what for begin, what in _BEGINNINGS.items() if start.startswith(begin)), cut)
            raise AdapterError(f"{file}: no safetensors file but {what}")
        if size > _MAX_HEADER_BYTES:
            raise AdapterError(f"{file}: a header of {size} bytes, expected at most {_MAX_HEADER_BYTES} in an adapter")
        header = opened.read(size)
    return header


def _refuse_names(origin: str, names: Collection[str]) -> None:
    """Raise if there are more names, or longer ones, than an adapter has."""
    if len(names) > _MAX_TENSORS:
        raise AdapterError(f"{origin}: {len(names)} tensors, expected at most {_MAX_TENSORS} in an adapter")
    longest = max(names, key=len, default="")
    if len(longest) > _MAX_NAME:
        raise AdapterError(f"{origin}: the name {longest[:50]}... has {len(longest)} characters, expected {_MAX_NAME}")


def _refuse_twins(file: Path, header: bytes) -> None:
    """Raise if two tensors have one name: of those, readers of JSON keep the last one and say nothing."""

    def unique(pairs: list[tuple[str, Any]]) -> None:
        names = Counter(name for name, _ in pairs)
        if len(names) < len(pairs):
            raise AdapterError(f"{file}: {names.most_common(1)[0][0]!r} is there twice; export the file again")

    json.loads(header, object_pairs_hook=unique)


def _tensors(file: Path, header: bytes, names: Iterable[str], headers_only: bool) -> dict[str, Tensor]:
    """Tensors that are pages of the file. safetensors has checked the header; its own way to them takes thrice as long.

    Args:
        headers_only: on the meta device, but for scalars.
    """
    entries: dict[str, Any] = json.loads(header)
    mapped = torch.from_file(str(file), shared=False, size=file.stat().st_size, dtype=torch.uint8)
    begin = 8 + len(header)
    blocks: dict[torch.dtype, Tensor] = {}
    strides: dict[tuple[int, ...], tuple[int, ...]] = {}
    tensors: dict[str, Tensor] = {}
    for key in names:
        entry = entries[key]
        shape, (start, stop) = tuple(entry["shape"]), entry["data_offsets"]
        dtype = _DTYPES.get(entry["dtype"])
        if dtype is None:
            raise AdapterError(f"{file}: {key} has dtype {entry['dtype']}, expected one of {', '.join(_DTYPES)}")
        if headers_only and shape:
            tensors[key] = torch.empty(shape, dtype=dtype, device="meta")
            continue
        size = dtype.itemsize
        if (begin + start) % size:
            # A header of an odd length.
            tensors[key] = mapped[begin + start : begin + stop].clone().view(dtype).view(shape)
            continue
        if dtype not in blocks:
            blocks[dtype] = mapped[: len(mapped) // size * size].view(dtype)
        if shape not in strides:
            strides[shape] = torch.empty(shape, device="meta").stride()
        tensors[key] = blocks[dtype].as_strided(shape, strides[shape], (begin + start) // size)
    return tensors


def _placeholder(tensor: Tensor) -> Tensor:
    return tensor if tensor.ndim == 0 else torch.empty_like(tensor, device="meta")


def _read_config(path: Path) -> Mapping[str, Any] | None:
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


def _in_folder(folder: Path, weight_name: str | None) -> Path:
    if not folder.is_dir():
        raise AdapterError(f"{folder}: no such folder")
    found = sorted(path.name for path in folder.iterdir() if path.suffix == ".safetensors" and path.is_file())
    return _within(folder, _choose(found, weight_name, str(folder), lambda name: _within(folder, name).is_file()))


def _within(folder: Path, name: str) -> Path:
    """`folder / name`, if that is in the folder, or in the hub's cache, where all files are links to its blobs.

    Raises:
        AdapterError: it leads out of the folder, by its name or by a link.
    """
    _refuse_leading_out(str(folder), name)
    file, root = folder / name, folder.resolve()
    blobs = [parent.parent / "blobs" for parent in root.parents if parent.name == "snapshots"]
    target = file.resolve()
    if not any(target.is_relative_to(allowed) for allowed in (root, *blobs)):
        raise AdapterError(f"{file}: a link out of the folder, to {target}; pass that path itself if you mean it")
    return file


def _refuse_leading_out(origin: str, name: str) -> None:
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or Path(name).is_absolute():
        raise AdapterError(f"{origin}: {name!r} leads out of it; expected the name of a file or folder inside")


def _choose(found: list[str], weight_name: str | None, origin: str, exists: Callable[[str], bool]) -> str:
    """The one file meant: the one asked for, one of the usual names, or the only one there."""
    if weight_name is not None:
        if exists(weight_name):
            return weight_name
        raise AdapterError(f"{origin}: no file {weight_name!r}; it has {', '.join(found) or 'no .safetensors file'}")
    for usual in _USUAL_NAMES:
        if usual in found:
            return usual
    if len(found) == 1:
        return found[0]
    if not found:
        raise AdapterError(f"{origin}: no .safetensors file there; pass weight_name= if it has another name")
    raise AdapterError(f"{origin}: several files, pass weight_name= one of: {', '.join(found)}")


def _from_hub(repo: str, where: Location) -> Path:
    for name in (where.subfolder, where.weight_name):
        _refuse_leading_out(repo, name or "")
    try:
        validate_repo_id(repo)
    except hub_errors.HFValidationError:
        raise AdapterError(f"{repo}: no such file or folder, and not a hub id either") from None
    try:
        return _download(repo, where)
    except hub_errors.LocalEntryNotFoundError as error:
        raise _unreachable(repo, error) from error
    except hub_errors.EntryNotFoundError as error:
        raise AdapterError(f"{repo}: the repository has no file {where.weight_name!r}") from error
    except hub_errors.GatedRepoError as error:
        raise AdapterError(f"{repo}: gated; accept its terms on the hub and pass token=") from error
    except hub_errors.RepositoryNotFoundError as error:
        raise AdapterError(f"{repo}: no such file here and no such repository; private ones need token=") from error
    except hub_errors.RevisionNotFoundError as error:
        raise AdapterError(f"{repo}: no revision {where.revision!r}") from error
    except AdapterError:
        raise
    except Exception as error:  # which ones the network raises depends on the HTTP library of huggingface_hub
        raise _unreachable(repo, error) from error


def _download(repo: str, where: Location) -> Path:
    folder = f"{where.subfolder}/" if where.subfolder else ""
    options: dict[str, Any] = {"revision": where.revision, "cache_dir": where.cache_dir}
    fetch: dict[str, Any] = {**options, "token": where.token, "local_files_only": where.local_files_only}
    name = where.weight_name
    if name is None and (where.local_files_only or constants.HF_HUB_OFFLINE):
        cached = (
            usual for usual in _USUAL_NAMES if isinstance(try_to_load_from_cache(repo, folder + usual, **options), str)
        )
        name = next(cached, None)
        if name is None:
            raise AdapterError(
                f"{repo}: none of {', '.join(_USUAL_NAMES)} is in the cache and the hub is switched off; "
                "pass weight_name=, or the path of a local file"
            )
    elif name is None:
        listed = list_repo_files(repo, revision=where.revision, token=where.token)
        inside = [file.removeprefix(folder) for file in listed if file.startswith(folder)]
        found = sorted(file for file in inside if file.endswith(".safetensors") and "/" not in file)
        name = _choose(found, None, repo, found.__contains__)
        if CONFIG_NAME in inside:
            hf_hub_download(repo, folder + CONFIG_NAME, **fetch)
    return Path(hf_hub_download(repo, folder + name, **fetch))


def _unreachable(repo: str, error: BaseException) -> AdapterError:
    return AdapterError(
        f"{repo}: no such file here, and the hub cannot be reached or is switched off ({_first_line(error)}); "
        "download the file once while online, or pass the path of a local file"
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
