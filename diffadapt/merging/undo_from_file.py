"""The files that the weights of a model were read from: what is in them need not be kept to undo a merge."""

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
from diffadapt.runtime.base_weights import resting_tensor
from diffadapt.runtime.undo import UndoByCopy

BaseFiles: TypeAlias = bool | str | os.PathLike[str] | Mapping[str, str | os.PathLike[str]]
"""`True` for where `from_pretrained` read the models, a file or folder, or one for each component."""


@dataclass(frozen=True)
class UndoFromFile:
    """See `undo.Undo`: a tensor of a file that is the original, perhaps after rounding to another dtype.

    Attributes:
        where, dtype: as of `Compact`.
        key: of the tensor in the file.
    """

    tensor: Tensor
    where: str
    dtype: torch.dtype
    file: OpenFile
    key: str

    @classmethod
    def of(cls, tensor: Tensor, where: str, name: str, files: Iterable[OpenFile]) -> "UndoFromFile | None":
        """That of a base tensor which nothing is merged into, if one of the files has what is in it.

        Args:
            name: of the tensor in its model.
        """
        for file in files:
            for key in file.named(name):
                stored = cls(tensor, where, tensor.dtype, file, key)
                # Of several that could be it, most differ in the first row.
                likely = file.tensors[key].shape == tensor.shape and (key == name or stored._has_rows(slice(1)))
                if likely and stored._has_rows(slice(None)):
                    return stored
        return None

    @property
    def nbytes(self) -> int:
        return 0

    def restored(self) -> Tensor:
        if not self.file.is_unchanged:
            raise AdapterError(
                f"{self.where}: its weight cannot be read from {self.file.origin} any more, which has been written "
                "since; load the model again"
            )
        return self._read(slice(None))

    def _read(self, rows: slice) -> Tensor:
        return self.file.tensors[self.key][rows].to(self.tensor.device, self.dtype)

    def _has_rows(self, rows: slice) -> bool:
        return self.file.is_unchanged and same_bits(self._read(rows), self.tensor[rows])

    def __deepcopy__(self, memo: dict[int, Any]) -> "UndoFromFile":
        return UndoFromFile(deepcopy(self.tensor, memo), self.where, self.dtype, self.file, self.key)

    def __reduce__(self) -> tuple[Any, ...]:
        # Who unpickles it may not have the file.
        return UndoByCopy, (self.tensor, self.restored())


def open_base_files(models: Mapping[str, nn.Module], given: BaseFiles) -> dict[str, tuple[OpenFile, ...]]:
    """The files by component; those that nothing is given for have none.

    Raises:
        AdapterError: nothing is there, or it is no safetensors file.
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
    config: Any = getattr(model, "config", None)
    name = getattr(config, "_name_or_path", None) or ""
    folder = Path(name) if os.path.isdir(name) else cached_folder(name)
    if folder is None:
        raise AdapterError(
            f"base_files: {component} does not say what folder it was loaded from (found {name!r}); pass its path"
        )
    return folder


def _opened(component: str, model: nn.Module, path: Path) -> tuple[OpenFile, ...]:
    """A file, or those of a folder or else of its folder for this component, or of all of its folders."""
    patterns = ("*.safetensors", f"{component}/*.safetensors", "*/*.safetensors")
    groups = ([path], *(path.glob(pattern) for pattern in patterns))
    found = next(filter(None, (sorted(filter(Path.is_file, group)) for group in groups)), None)
    if found is None:
        raise AdapterError(f"base_files: {path} has no .safetensors file for {component}; pass the file or its folder")
    files = tuple(OpenFile(file) for file in found)
    if not any(UndoFromFile.of(original, component, name, files) for name, original in _originals(model)):
        raise AdapterError(
            f"base_files: {path} has none of the weights of {component} as they are; expected the files that it was "
            "read from"
        )
    return files


def _originals(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The weights of a model by name, as they were before any merging."""
    bank = bank_of(model)
    merged = {} if bank is None else bank.ways
    for path, module in model.named_modules():
        for name in module._parameters:
            tensor = resting_tensor(module, name)
            # Many models have the same ones and zeros in norms and biases.
            if tensor is not None and tensor.ndim > 1:
                original = merged[id(tensor)].restored() if id(tensor) in merged else tensor
                yield f"{path}.{name}".removeprefix("."), original
