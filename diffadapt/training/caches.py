"""Caches on disk whose names are digests of everything that the content depends on, so that none can be stale."""

import hashlib
import os
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffadapt.errors import UsageError

_VERSION = 1
"""To be raised whenever the same key would mean other content."""
_SAMPLES = 64
_REMEMBERED_BYTES = 2 << 30


def digest(*parts: object) -> str:
    """Return a digest of values with a `repr`."""
    return hashlib.blake2b(repr((_VERSION, *parts)).encode(), digest_size=20).hexdigest()


def fingerprint(model: nn.Module) -> str:
    """Return a digest of a model: its config, and of every tensor name, shape, dtype, sum of bits and some elements."""
    found = hashlib.blake2b(digest_size=20)
    found.update(repr(getattr(model, "config", None)).encode())
    for name, tensor in sorted([*model.named_parameters(), *model.named_buffers()], key=lambda entry: entry[0]):
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        flat = tensor.detach().reshape(-1)
        if not flat.numel() or flat.device.type == "meta":
            continue
        bits = flat.view(torch.uint8) if flat.element_size() == 1 else flat.view(_INTEGERS[flat.element_size()])
        found.update(str(int(bits.sum(dtype=torch.int64))).encode())
        stride = max(1, len(bits) // _SAMPLES)
        found.update(bits[::stride][:_SAMPLES].cpu().numpy().tobytes())
    return found.hexdigest()


_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class Store:
    """Tensors by key, in one safetensors file each.

    Attributes:
        folder: the folder of the files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._remembered: OrderedDict[str, dict[str, Tensor]] = OrderedDict()
        self._bytes = 0

    def path(self, key: str) -> Path:
        """Return the file of a key."""
        return self.folder / f"{key}.safetensors"

    def get(self, key: str) -> dict[str, Tensor] | None:
        """Return the tensors of a key; `None` if they are not cached. A damaged file is removed."""
        if key in self._remembered:
            self._remembered.move_to_end(key)
            return self._remembered[key]
        path = self.path(key)
        try:
            tensors = load_file(path)
        except FileNotFoundError:
            return None
        except SafetensorError:
            path.unlink(missing_ok=True)
            return None
        self._remember(key, tensors)
        return tensors

    def put(self, key: str, tensors: dict[str, Tensor]) -> None:
        """Write the tensors of a key. The file appears complete or not at all.

        Raises:
            UsageError: it cannot be written.
        """
        content = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        temporary: str | None = None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=self.folder, prefix=f".{key}.", suffix=".tmp")
            os.close(handle)
            save_file(content, temporary)
            os.replace(temporary, self.path(key))
        except (OSError, SafetensorError) as error:
            raise UsageError(
                f"{self.path(key)} cannot be written ({error}); free space, or name another folder with --cache_dir"
            ) from error
        finally:
            if temporary is not None:
                Path(temporary).unlink(missing_ok=True)
        self._remember(key, content)

    def fill(
        self,
        keys: Sequence[str],
        make: Callable[[int], dict[str, Tensor]],
        *,
        progress: Callable[[Iterable[int]], Iterable[int]] = lambda items: items,
        turn: tuple[int, int] = (0, 1),
    ) -> int:
        """Make what is not cached yet and return how much that was.

        Args:
            keys: the keys.
            make: returns the tensors of the key at this position.
            progress: wraps the positions that have to be made.
            turn: (rank, number of processes): which part of the work is this process's.
        """
        unique = {key: position for position, key in enumerate(keys)}
        missing = [position for key, position in unique.items() if self.get(key) is None]
        mine = missing[turn[0] :: turn[1]]
        for position in progress(mine):
            self.put(keys[position], make(position))
        return len(mine)

    def _remember(self, key: str, tensors: dict[str, Tensor]) -> None:
        self._remembered[key] = tensors
        self._bytes += _size(tensors)
        while self._bytes > _REMEMBERED_BYTES and len(self._remembered) > 1:
            self._bytes -= _size(self._remembered.popitem(last=False)[1])


def _size(tensors: dict[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
