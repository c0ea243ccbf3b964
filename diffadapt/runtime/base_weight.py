"""The weight of a model's own layer, as formulas use it."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from diffadapt.errors import AdapterError
from diffadapt.types.layer_spec import LayerSpec
from diffadapt.weights import codec_of, decoded
from diffadapt.weights.gguf import GGUF
from diffadapt.weights.plain import PLAIN
from diffadapt.weights.resting import resting_tensor

_CHUNK = 4096


class BaseWeight:
    """The weight of a layer, to be read whole (by calling this) or by rows, which copies nothing else."""

    def __init__(self, host: nn.Module, spec: LayerSpec, owner: dict[str, Any] | None = None) -> None:
        """
        Args:
            owner: the `__dict__` in which the last rows of a quantised weight, which is decoded as a whole, are kept.
        """
        self._host, self._spec, self._owner = host, spec, {} if owner is None else owner

    def __call__(self) -> Tensor:
        """Return the weight, canonical and decoded; see `weight_of`."""
        return weight_of(self._host, self._spec)

    def rows(self, ids: Tensor) -> Tensor:
        """Return rows of the weight as the layer stores it, of shape (len(ids), columns), in float32 or float64."""
        if torch.compiler.is_compiling():
            weight = self._host._parameters.get("weight")
            if weight is None or not _traced_as_plain(self._host):
                return self._rows_outside(ids)  # type: ignore[no-any-return]
            rows = weight.detach()[ids.to(weight.device)]
            return rows.to(torch.promote_types(rows.dtype, torch.float32))
        return self._rows(ids)

    @torch.compiler.disable
    def _rows_outside(self, ids: Tensor) -> Tensor:
        return self._rows(ids)

    def _rows(self, ids: Tensor) -> Tensor:
        tensor = resting_tensor(self._host, "weight")
        if tensor is not None and tensor.device.type != "meta" and codec_of(self._host, "weight") is PLAIN:
            rows = tensor.detach()[ids.to(tensor.device)]
            # `torch.promote_types` refuses float8.
            return rows if rows.dtype == torch.float64 else rows.float()
        version = None if tensor is None or tensor.is_inference() else tensor._version
        key = id(self._host), id(tensor), version, tuple(ids.tolist())
        kept: dict[Any, Tensor] = self._owner.setdefault("_rows", {})
        if key not in kept:
            values = decoded(self._host, "weight")
            rows = values[ids.to(values.device)].clone()
            kept.clear()
            kept[key] = rows
        return kept[key]

    def chunks(self) -> Iterator[Tensor]:
        """Yield all rows of the weight as the layer stores it, a few at a time if the storage allows it."""
        tensor = resting_tensor(self._host, "weight")
        if tensor is None or codec_of(self._host, "weight") is not PLAIN:
            yield decoded(self._host, "weight")
            return
        for start in range(0, len(tensor), _CHUNK):
            yield self._rows(torch.arange(start, min(start + _CHUNK, len(tensor))))


def weight_of(host: nn.Module, spec: LayerSpec) -> Tensor:
    """Return the weight of `host`, canonical and decoded: float32, or float64 if the layer has that.

    In a compiled graph, only plain weights are decoded without a graph break.
    """
    if not torch.compiler.is_compiling():
        return spec.to_stored(decoded(host, "weight"))
    weight = host._parameters.get("weight")
    if weight is not None and _traced_as_plain(host):
        return spec.to_stored(weight.detach().to(torch.promote_types(weight.dtype, torch.float32)))
    return spec.to_stored(_decoded_outside(host))  # type: ignore[arg-type]


def _traced_as_plain(host: nn.Module) -> bool:
    """Return `is_plain(host)` while a graph is traced, as a constant."""
    # Layers with adapters have a method for it.
    own = getattr(host, "_has_plain_weight", None)
    return _is_plain(host) if own is None else own()


@torch.compiler.assume_constant_result
def _is_plain(host: nn.Module) -> bool:
    return is_plain(host)


def is_plain(host: nn.Module) -> bool:
    """Return whether the weight of `host` is stored as the numbers it stands for.

    Raises:
        AdapterError: the weight can be decoded neither in the graph nor between two graphs.
    """
    codec = codec_of(host, "weight")
    if codec is GGUF:
        raise AdapterError(
            "DoRA and rotations read the weight of their layer, and a GGUF weight cannot be read in a compiled model "
            f"({host}); reserve slots before compiling (prepare_hotswap), or convert the adapter (to_lora)"
        )
    return host._parameters["weight"] is resting_tensor(host, "weight") and codec is PLAIN


@torch.compiler.disable
def _decoded_outside(host: nn.Module) -> Tensor:
    """Return the decoded weight of `host`, computed outside the graph."""
    return decoded(host, "weight")


def bias_of(host: nn.Module | None) -> Tensor | None:
    """Return the bias of a layer, or `None` if it has none."""
    return None if host is None else resting_tensor(host, "bias")
