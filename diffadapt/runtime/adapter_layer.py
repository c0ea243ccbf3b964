"""The adapter layer: the part of an adapter that belongs to one layer of the model."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffadapt.runtime.base_weights import resting_tensor, weight_of
from diffadapt.runtime.call_state import CallState
from diffadapt.types.adapter_type import AdapterType, Stage, Surroundings, Tensors
from diffadapt.types.layer_spec import LayerSpec
from diffadapt.types.layer_state import LayerState, scale_of
from diffadapt.types.tensor_ops import add

BANK = "diffadapt"
"""Name of the child module that holds a model's adapters."""

PATCH_DELTA = "patch_delta"
"""Name of the prepared tensor that a type at the stage "patch" runs as: `W (R - I)`, in the shape of the weight."""


@dataclass(frozen=True)
class Dropout:
    """Probabilities while training, see `AdapterConfig` and `RankedConfig`."""

    input: float = 0.0
    rank: float = 0.0
    module: float = 0.0


_NO_DROPOUT = Dropout()


class PreparedLayer(NamedTuple):
    """An adapter layer for one call: prepared tensors on the call's device, the number they are scaled with, and the
    dtype to compute in.
    """

    layer: "AdapterLayer"
    tensors: Tensors
    gate: Tensor
    dtype: torch.dtype

    def mapped(self, vectors: Tensor, axis: int, transposed: bool = False, onto: Tensor | None = None) -> Tensor:
        """`onto + gate * (T - 1) vectors`, the latter in the adapter's dtype."""
        layer, own = self.layer, vectors.to(self.dtype)
        if self.gate.ndim:
            change = layer.adapter_type.apply_map(
                self.tensors, layer.spec, vectors=own, axis=axis, gate=_one(own), transposed=transposed
            )
            change = change * _leading(self.gate, change)
            return change if onto is None else onto + change
        apart = onto is not None and onto.dtype != own.dtype
        change = layer.adapter_type.apply_map(
            self.tensors,
            layer.spec,
            vectors=own,
            axis=axis,
            gate=self.gate,
            transposed=transposed,
            onto=None if apart else onto,
        )
        return onto + change if apart and onto is not None else change

    def gain_change(self) -> Tensor:
        """`gate * (s - 1)` in float32 or wider: (out,), or (samples, out)."""
        gain = self.layer.adapter_type.gain(self.tensors)
        return gain.to(torch.promote_types(gain.dtype, torch.float32)) * self.gate.unsqueeze(-1)

    def plus_change(self, output: Tensor, input: Tensor) -> Tensor:
        """`output` plus the additive change for `input`. `output` may be overwritten."""
        layer = self.layer
        input = self.seen_input(input)
        if self.gate.ndim and not layer.gates_ranks:
            change = self._change(input, _one(input), None)
            return add(change * _leading(self.gate, change).to(change.dtype), output)
        return self._change(input, self.gate, output)

    def _change(self, input: Tensor, gate: Tensor, onto: Tensor | None) -> Tensor:
        layer = self.layer
        if "patch" in layer.stages:
            return layer.spec.dense(input, self.tensors[PATCH_DELTA], gate, onto)
        return layer.adapter_type.delta_output(self.tensors, layer.spec, input=input, gate=gate, onto=onto)

    def rank_gates(self, rank: int) -> Tensor:
        """The gate of each rank: (rank,), or (samples, rank)."""
        return self.gate if self.layer.gates_ranks else self.gate.unsqueeze(-1).expand(*self.gate.shape, rank)

    def seen_input(self, input: Tensor) -> Tensor:
        """The input as the additive change sees it."""
        layer = self.layer
        if input.is_floating_point():
            input = input.to(self.dtype)
        if layer.training and layer.dropout.input and not layer.adapter_type.blocks:
            input = F.dropout(input, layer.dropout.input)
        return input

    def as_low_rank(self) -> tuple[Tensor, Tensor] | None:
        """The additive change as factors, if it can share a product with others."""
        layer = self.layer
        if "add" not in layer.stages or (layer.training and layer.dropout.input):
            return None
        if layer.adapter_type.delta_bias(self.tensors) is not None:
            return None
        return layer.adapter_type.as_low_rank(self.tensors, layer.spec)


class AdapterLayer(nn.Module):
    """The part of an adapter that belongs to one layer: its tensors, and how they get ready for a call.

    What the layer computes with them is in `compose.py`.

    Attributes:
        inputs: of the layer, as far as its tensors say something of them; fewer than `spec.in_features` where the layer
            was made wider for another adapter (`widen.py`).
        widens: whether that is more than the model's layer has by itself.
        gates_ranks: the gate is one number for every rank.
    """

    gates_ranks = False
    adapter_type: AdapterType
    spec: LayerSpec
    alpha: float | None
    dropout: Dropout
    settings: Mapping[str, float]
    stages: tuple[Stage, ...]
    inputs: int
    widens: bool
    gate: Tensor  # given by the adapter
    call: CallState  # given when the adapter is attached
    host: nn.Module  # given when the adapter is attached
    _kept: "_Kept | None"

    def __init__(
        self,
        adapter_type: AdapterType,
        spec: LayerSpec,
        tensors: Tensors,
        alpha: float | None = None,
        *,
        settings: Mapping[str, float] | None = None,
        trainable: bool = False,
        dropout: Dropout = _NO_DROPOUT,
        widens: bool = False,
    ) -> None:
        """
        Args:
            tensors: what `fit` or `init` of the type returned; they become the parameters of this module as they are.
            alpha: `None` means the rank, which makes the scale 1.
            settings: numbers of the type that are no tensors; the others have the type's defaults.
        """
        super().__init__()
        # Plain attributes, set without nn.Module's search for parameters: it is a fifth of the time of loading a file.
        self.__dict__.update(
            adapter_type=adapter_type,
            spec=spec,
            alpha=alpha,
            dropout=dropout,
            settings={**adapter_type.settings, **(settings or {})},
            stages=adapter_type.stages(tensors, spec),
            inputs=spec.in_features,
            widens=widens,
            _kept=None,
        )
        for name, tensor in tensors.items():
            self._parameters[name] = nn.Parameter(tensor, requires_grad=trainable)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """This layer's parameters by the names its type uses."""
        return {name: tensor for name, tensor in self._parameters.items() if tensor is not None}

    @property
    def own_tensors(self) -> dict[str, Tensor]:
        """The same without the zeros that only make them as wide as the layer."""
        if self.inputs == self.spec.in_features:
            return self.tensors
        columns = self.adapter_type.columns
        return {n: t.narrow(columns[n], 0, self.inputs) if n in columns else t for n, t in self.tensors.items()}

    @property
    def rank(self) -> int | None:
        """Rank by the tensors' shapes, `None` if the type has none."""
        return self.adapter_type.rank(self.tensors)

    @property
    def scale(self) -> float:
        """`alpha / rank`; see `scale_of`."""
        return scale_of(self.alpha, self.rank, self.settings)

    @property
    def is_additive(self) -> bool:
        """Whether the layer's own result stays as it is and something is added to it."""
        return "add" in self.stages and len(self.stages) == 1

    @property
    def state(self) -> LayerState:
        """What a file would say of this layer."""
        return LayerState(
            type=self.adapter_type.name,
            tensors=self.own_tensors,
            alpha=self.alpha,
            rank=self.rank,
            kernel=self.spec.kernel,
            is_embedding=self.spec.kind == "embedding",
            settings=self.settings,
            inputs=self.spec.fan_in,
            widens=self.widens,
        )

    def ready(self, device: torch.device, rows: int) -> PreparedLayer:
        """Tensors and gate for one call on `device`, with an input of so many rows."""
        tensors, gate = self._prepared(), self.gate
        if next(iter(tensors.values())).device != device:
            # The layer's weights come and go by someone's offloading; ours follow for this call.
            tensors = {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}
        if gate.device != device:
            gate = gate.to(device)
        if gate.ndim > self.gates_ranks:
            gate = self.call.spread(gate, rows)
        if self.call.value is not None:
            gate = gate * self.call.value.to(device)
        if self.training:
            tensors, gate = self._dropped(tensors, gate)
        return PreparedLayer(self, tensors, gate, self.dtype)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype it computes in."""
        return next(iter(self._parameters.values())).dtype  # type: ignore[union-attr]

    def prepared(
        self, weight: Callable[[], Tensor], dtype: torch.dtype | None = None, device: torch.device | None = None
    ) -> Tensors:
        """What the type prepares of the tensors, for a layer with this weight, in `dtype` and on `device`."""
        tensors: Tensors = self.tensors
        if dtype is not None or device is not None:
            tensors = {name: tensor.to(device, dtype) for name, tensor in tensors.items()}
        prepared = self.adapter_type.prepare(tensors, self.spec, Surroundings(self.settings, self.scale, weight))
        if "patch" not in self.stages:
            return prepared
        # A rotation of whole patches cannot be applied to the input, where patches overlap.
        rows = weight().to(next(iter(tensors.values()))).flatten(1)
        one = torch.ones((), device=rows.device)
        delta = self.adapter_type.apply_map(prepared, self.spec, vectors=rows, axis=1, gate=one, transposed=True)
        return {**prepared, PATCH_DELTA: delta.view(self.spec.weight_shape)}

    def base_weight(self) -> Tensor:
        """The layer's own weight, canonical and decoded."""
        return weight_of(self.host, self.spec)

    def _prepared(self) -> Tensors:
        if not self.adapter_type.is_prepared and "patch" not in self.stages:
            return self.tensors
        # In training, tensors may be written past autograd's version counters (`.data` of an averaged model); in a
        # compiled graph there are no versions to compare.
        if torch.compiler.is_compiling() or any(t.requires_grad or t.is_inference() for t in self.tensors.values()):
            return self.prepared(self.base_weight)
        if self._kept is None or not self._kept.is_current(self):
            with torch.inference_mode(False), torch.no_grad():
                self.__dict__["_kept"] = _Kept.of(self)
        assert self._kept is not None
        return self._kept.tensors

    def _dropped(self, tensors: Tensors, gate: Tensor) -> tuple[Tensors, Tensor]:
        dropout, changed = self.dropout, dict(tensors)
        if dropout.rank:
            for name, axis in self.adapter_type.masked.items():
                if name in changed:
                    mask = _slices(changed[name], axis, dropout.rank) / (1 - dropout.rank)
                    changed[name] = changed[name] * mask
        if dropout.input:
            for name, axis in self.adapter_type.blocks.items():
                if name in changed:
                    changed[name] = changed[name] * _slices(changed[name], axis, dropout.input)
        if dropout.module:
            gate = gate * (torch.rand((), device=gate.device) >= dropout.module)
        return changed, gate

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        # A state dict of the adapted model is the base model's and says nothing of adapters.
        if BANK not in prefix.split("."):
            super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        shapes = ", ".join(f"{name}={tuple(tensor.shape)}" for name, tensor in self.tensors.items())
        return f"{self.adapter_type.name}, {shapes}, scale={self.scale:g}"


@dataclass(frozen=True)
class _Kept:
    """Prepared tensors, and what they were made from.

    Attributes:
        sources: tensors, with version, storage and dtype at that time.
        used_weight: the layer's own weight is among the sources.
    """

    tensors: Tensors
    sources: tuple[tuple[Tensor, Any], ...]
    used_weight: bool

    @classmethod
    def of(cls, layer: AdapterLayer) -> "_Kept":
        read: list[Tensor] = []

        def weight() -> Tensor:
            read.append(layer.base_weight())
            return read[0]

        tensors = layer.prepared(weight)
        return cls(tensors, cls._sources(layer, bool(read)), bool(read))

    def is_current(self, layer: AdapterLayer) -> bool:
        now = self._sources(layer, self.used_weight)
        return len(now) == len(self.sources) and all(
            tensor is kept and state == was for (tensor, state), (kept, was) in zip(now, self.sources, strict=True)
        )

    @staticmethod
    def _sources(layer: AdapterLayer, with_weight: bool) -> tuple[tuple[Tensor, Any], ...]:
        sources: list[tuple[Tensor, Any]] = [
            (tensor, (tensor._version, tensor.data_ptr(), tensor.dtype)) for tensor in layer.tensors.values()
        ]
        if with_weight:
            weight = resting_tensor(layer.host, "weight")
            # Not its storage: casting and offloading hooks give it a new one in every forward.
            if weight is not None:
                sources.append((weight, None if weight.is_inference() else (weight._version, weight.dtype)))
        return tuple(sources)


def _one(like: Tensor) -> Tensor:
    return torch.ones((), device=like.device)


def _leading(gates: Tensor, values: Tensor) -> Tensor:
    """One number per row of `values`."""
    return gates.view(-1, *(1,) * (values.ndim - 1))


def _slices(tensor: Tensor, axis: int, probability: float) -> Tensor:
    """Ones, and zeros for the slices along `axis` that are dropped; they broadcast over `tensor`."""
    shape = [1] * tensor.ndim
    shape[axis] = tensor.shape[axis]
    return (torch.rand(shape, device=tensor.device) >= probability).to(tensor.dtype)
