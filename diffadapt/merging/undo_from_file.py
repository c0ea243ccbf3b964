"""A way back from a merged weight that keeps nothing: read the original again from the file it was loaded from."""

import os
from collections.abc import Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from diffadapt.errors import AdapterError
from diffadapt.files.hub import cached_folder
from diffadapt.files.safetensors_file import OpenFile
from diffadapt.merging.corrections import same_bits
from diffadapt.runtime.bank import bank_of
from diffadapt.runtime.undo import UndoByCopy
from diffadapt.weights.resting import resting_tensor

BaseFiles: TypeAlias = bool | str | os.PathLike[str] | Mapping[str, str | os.PathLike[str]]
"""`True` for the files that `from_pretrained` read, `False` for none; or a path for all components, or one for each."""


@dataclass(frozen=True)
class UndoFromFile:
    """A way back (see `Undo`) that reads the original from a file and, if necessary, rounds it to its dtype.

    Attributes:
        where: path of the tensor, for messages.
        dtype: dtype of the original.
        key: name of the tensor in the file.
    """

    tensor: Tensor
    where: str
    dtype: torch.dtype
    file: OpenFile
    key: str

    @classmethod
    def of(cls, tensor: Tensor, where: str, name: str, files: Iterable[OpenFile]) -> "UndoFromFile | None":
        """Find the unmerged `tensor` in one of `files`; `None` if none of them has these bits.

        Args:
            where: path of the tensor, for messages.
            name: name of the tensor in its model.
        """
        for file in files:
            for key in file.named(name):
                way = cls(tensor, where, tensor.dtype, file, key)
                # Most of the other candidates already differ in the first row.
                is_likely = file.tensors[key].shape == tensor.shape and (key == name or way._has_rows(slice(1)))
                if is_likely and way._has_rows(slice(None)):
                    return way
        return None

    @property
    def nbytes(self) -> int:
        return 0

    def restored(self) -> Tensor:
        if not self.file.is_unchanged:
            raise AdapterError(
                f"{self.where}: its weight cannot be read from {self.file.origin} any more, because the file has been "
                "written since; load the model again"
            )
        return self._read(slice(None))

    def _read(self, rows: slice) -> Tensor:
        return self.file.tensors[self.key][rows].to(self.tensor.device, self.dtype)

    def _has_rows(self, rows: slice) -> bool:
        return self.file.is_unchanged and same_bits(self._read(rows), self.tensor[rows])

    def __deepcopy__(self, memo: dict[int, Any]) -> "UndoFromFile":
        return UndoFromFile(deepcopy(self.tensor, memo), self.where, self.dtype, self.file, self.key)

    def __reduce__(self) -> tuple[Any, ...]:
        # A pickle may be read where the file does not exist.
        return UndoByCopy, (self.tensor, self.restored())


def open_base_files(models: Mapping[str, nn.Module], given: BaseFiles) -> dict[str, tuple[OpenFile, ...]]:
    """Open the base files of every component that `given` has files for.

    Returns:
        component -> its files.

    Raises:
        AdapterError: a component or file does not exist, a file is not a safetensors file, or the files have none of
            the weights of a component.
    """
    if given is False:
        return {}
    if isinstance(given, Mapping):
        unknown = sorted(set(given) - set(models))
        if unknown:
            raise AdapterError(f"base_files: no component {', '.join(unknown)}; the pipeline has {', '.join(models)}")
        paths = {component: Path(path) for component, path in given.items()}
    elif given is True:
        paths = {component: _remembered(component, model) for component, model in models.items()}
    else:
        paths = dict.fromkeys(models, Path(given))
    return {component: _opened(component, models[component], path.expanduser()) for component, path in paths.items()}


def _remembered(component: str, model: nn.Module) -> Path:
    """Return the folder that the config of `model` says it was loaded from."""
    config: Any = getattr(model, "config", None)
    name = getattr(config, "_name_or_path", None) or ""
    folder = Path(name) if os.path.isdir(name) else cached_folder(name)
    if folder is None:
        raise AdapterError(
            f"base_files: {component} does not say what folder it was loaded from (found {name!r}); pass the path"
        )
    return folder


def _opened(component: str, model: nn.Module, path: Path) -> tuple[OpenFile, ...]:
    """Open the file `path`, or the files in the folder `path`, its subfolder `component`, or any of its subfolders.

    The first of these places that has safetensors files is used.
    """
    patterns = ("*.safetensors", f"{component}/*.safetensors", "*/*.safetensors")
    groups = ([path], *(path.glob(pattern) for pattern in patterns))
    found = next(filter(None, (sorted(filter(Path.is_file, group)) for group in groups)), None)
    if found is None:
        raise AdapterError(f"base_files: {path} has no .safetensors file for {component}; pass the file or its folder")
    files = tuple(OpenFile(file) for file in found)
    if not any(UndoFromFile.of(original, component, name, files) for name, original in _originals(model)):
        raise AdapterError(
            f"base_files: {path} has none of the weights of {component} as they are; expected the files that the model "
            "was read from"
        )
    return files


def _originals(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the names and contents of a model's weights as they were before any merging."""
    bank = bank_of(model)
    merged = {} if bank is None else bank.ways
    for path, module in model.named_modules():
        for name in module._parameters:
            tensor = resting_tensor(module, name)
            # Vectors tell nothing: many models have the same ones and zeros in norms and biases.
            is_plain = tensor is not None and type(tensor) in (Tensor, nn.Parameter) and tensor.is_floating_point()
            if tensor is not None and is_plain and tensor.ndim > 1:
                original = merged[id(tensor)].restored() if id(tensor) in merged else tensor
                yield f"{path}.{name}".removeprefix("."), original
