"""The adapter: a tree of parameters that mirrors the model's paths, and the adapter layer, its part in one layer.

Two rules live here and nowhere else.

*Scale.* What multiplies a layer's change is `alpha / rank x strength x call scale`. The first two make up the gate: one
element of a flat float32 tensor per adapter, of which every adapter layer holds a view, so that rescaling a whole
adapter is one write and never a recompile. The call scale is diffusers' per-call `scale`, shared by a whole model.

*Dtype.* The input is cast to the dtype of the adapter's parameters, and only the result is cast back.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffadapt.errors import AdapterError
from diffadapt.hooks import FLOAT8, decoded, resting_tensor
from diffadapt.kind import AdapterType, Stage, Surroundings, Tensors
from diffadapt.layer import LayerSpec, add
from diffadapt.scales import Strength
from diffadapt.state import LayerState

BANK = "diffadapt"
"""Name of the child module that holds a model's adapters."""

PATCH_DELTA = "patch_delta"
"""Name of the prepared tensor that a type at the stage "patch" runs as: `W (R - I)`, in the shape of the weight."""


class CallState:
    """What the adapter layers of one model have to know of a call.

    Attributes:
        value: the per-call scale, a 0-d tensor, or `None` when no caller asked for one.
        outer: what `value` falls back to between two calls of the model (set while a pipeline encodes its prompt).
        samples: how many samples have a mix of adapters of their own; 0 if all have the same.
        images: of every sample, next to one another in the batch (`num_images_per_prompt`).
        asks_images: that number is what the pipeline says when it encodes its prompts.
        batch: rows of the model's input in this call; guidance makes it a multiple of `samples * images`.
    """

    def __init__(self) -> None:
        self.value: Tensor | None = None
        self.outer: Tensor | None = None
        self.samples = 0
        self.images = 1
        self.asks_images = True
        self.batch = 0

    def spread(self, gate: Tensor, rows: int) -> Tensor:
        """One gate, or one row of gates, for every row of a layer's input, from one for every sample.

        A batch is made of copies of all samples (for guidance), each sample of its images, and a layer may split every
        row of the batch into several (frames, windows).

        Raises:
            AdapterError: so many rows cannot be told apart by samples.
        """
        count, batch = len(gate), self.batch or rows
        if rows % batch or batch % (count * self.images):
            if not self.samples:
                # Room for samples is reserved, and they are all alike.
                return gate[0]
            problem = (
                f"a layer gets {rows} rows of a batch of {batch}, and whose they are is not known; run them one by one"
                if rows % batch
                else f"a batch of {batch} is no multiple of {count} x {self.images} images; pass as many prompts and "
                "negative prompts as samples"
            )
            raise AdapterError(f"{count} samples have adapters of their own, but {problem}")
        copies = batch // (count * self.images)
        each = gate.unsqueeze(1).unsqueeze(0).expand(copies, -1, rows // batch * self.images, *gate.shape[1:])
        return each.flatten(0, 2)


@dataclass(frozen=True)
class Dropout:
    """Probabilities while training, see `AdapterConfig` and `RankedConfig`."""

    input: float = 0.0
    rank: float = 0.0
    module: float = 0.0


_NO_DROPOUT = Dropout()


class Ready(NamedTuple):
    """An adapter layer for one call: prepared tensors on the call's device, the number they are scaled with, and the
    dtype to compute in.
    """

    layer: "AdapterLayer"
    tensors: Tensors
    gate: Tensor
    dtype: torch.dtype

    def turned(self, vectors: Tensor, axis: int, transposed: bool = False, onto: Tensor | None = None) -> Tensor:
        """`onto + gate * (T - 1) vectors`, the latter in the adapter's dtype."""
        layer, own = self.layer, vectors.to(self.dtype)
        if self.gate.ndim:
            change = layer.kind.turn(self.tensors, layer.spec, own, axis, _one(own), transposed, None)
            change = change * _leading(self.gate, change)
            return change if onto is None else onto + change
        if onto is not None and onto.dtype != own.dtype:
            return onto + layer.kind.turn(self.tensors, layer.spec, own, axis, self.gate, transposed, None)
        return layer.kind.turn(self.tensors, layer.spec, own, axis, self.gate, transposed, onto)

    def gained(self) -> Tensor:
        """`gate * (s - 1)` in float32 or wider: (out,), or (samples, out)."""
        gain = self.layer.kind.gain(self.tensors)
        return gain.to(torch.promote_types(gain.dtype, torch.float32)) * self.gate.unsqueeze(-1)

    def added(self, output: Tensor, input: Tensor) -> Tensor:
        """`output` plus the additive change for `input`. `output` may be overwritten."""
        layer = self.layer
        input = self.dropped(input)
        if self.gate.ndim and not layer.gates_ranks:
            change = self._change(input, _one(input), None)
            return add(change * _leading(self.gate, change).to(change.dtype), output)
        return self._change(input, self.gate, output)

    def _change(self, input: Tensor, gate: Tensor, onto: Tensor | None) -> Tensor:
        layer = self.layer
        if "patch" in layer.stages:
            return layer.spec.dense(input, self.tensors[PATCH_DELTA], gate, onto)
        return layer.kind.delta_output(self.tensors, layer.spec, input, gate, onto)

    def rank_gates(self, rank: int) -> Tensor:
        """The gate of each rank: (rank,), or (samples, rank)."""
        return self.gate if self.layer.gates_ranks else self.gate.unsqueeze(-1).expand(*self.gate.shape, rank)

    def dropped(self, input: Tensor) -> Tensor:
        """The input as the additive change sees it."""
        layer = self.layer
        if input.is_floating_point():
            input = input.to(self.dtype)
        if layer.training and layer.dropout.input and not layer.kind.blocks:
            input = F.dropout(input, layer.dropout.input)
        return input

    def as_low_rank(self) -> tuple[Tensor, Tensor] | None:
        """The additive change as factors, if it can share a product with others."""
        layer = self.layer
        if "add" not in layer.stages or (layer.training and layer.dropout.input):
            return None
        if layer.kind.delta_bias(self.tensors) is not None:
            return None
        return layer.kind.as_low_rank(self.tensors, layer.spec)


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
    kind: AdapterType
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
        kind: AdapterType,
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
            tensors: what `kind.fit` or `kind.init` returned; they become this module's parameters as they are.
            alpha: `None` means the rank, which makes the scale 1.
            settings: numbers of the type that are no tensors; the others have the type's defaults.
        """
        super().__init__()
        # Plain attributes, set without nn.Module's search for parameters: it is a fifth of the time of loading a file.
        self.__dict__.update(
            kind=kind,
            spec=spec,
            alpha=alpha,
            dropout=dropout,
            settings={**kind.settings, **(settings or {})},
            stages=kind.stages(tensors, spec),
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
        columns = self.kind.columns
        return {n: t.narrow(columns[n], 0, self.inputs) if n in columns else t for n, t in self.tensors.items()}

    @property
    def rank(self) -> int | None:
        """Rank by the tensors' shapes, `None` if the type has none."""
        return self.kind.rank(self.tensors)

    @property
    def scale(self) -> float:
        """`alpha / rank`; 1 where the file gives no alpha or the type has no rank."""
        rank = self.rank or self.settings.get("rank")
        return 1.0 if not rank or self.alpha is None else self.alpha / rank

    @property
    def is_additive(self) -> bool:
        """Whether the layer's own result stays as it is and something is added to it."""
        return "add" in self.stages and len(self.stages) == 1

    @property
    def state(self) -> LayerState:
        """What a file would say of this layer."""
        return LayerState(
            type=self.kind.name,
            tensors=self.own_tensors,
            alpha=self.alpha,
            rank=self.rank,
            kernel=self.spec.kernel,
            is_embedding=self.spec.kind == "embedding",
            settings=self.settings,
            inputs=self.spec.fan_in,
            widens=self.widens,
        )

    def ready(self, device: torch.device, rows: int) -> Ready:
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
        return Ready(self, tensors, gate, self.dtype)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype it computes in."""
        return next(iter(self._parameters.values())).dtype  # type: ignore[union-attr]

    def prepared(
        self, weight: Callable[[], Tensor], dtype: torch.dtype | None = None, device: torch.device | None = None
    ) -> Tensors:
        """What `kind.prepare` makes of the tensors, for a layer with this weight, in `dtype` and on `device`."""
        tensors: Tensors = self.tensors
        if dtype is not None or device is not None:
            tensors = {name: tensor.to(device, dtype) for name, tensor in tensors.items()}
        prepared = self.kind.prepare(tensors, self.spec, Surroundings(self.settings, self.scale, weight))
        if "patch" not in self.stages:
            return prepared
        # A rotation of whole patches cannot be applied to the input, where patches overlap.
        rows = weight().to(next(iter(tensors.values()))).flatten(1)
        one = torch.ones((), device=rows.device)
        delta = self.kind.turn(prepared, self.spec, rows, 1, one, True, None)
        return {**prepared, PATCH_DELTA: delta.view(self.spec.weight_shape)}

    def base_weight(self) -> Tensor:
        """The layer's own weight, canonical and decoded."""
        return weight_of(self.host, self.spec)

    def _prepared(self) -> Tensors:
        if not self.kind.is_prepared and "patch" not in self.stages:
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
            for name, axis in self.kind.masked.items():
                if name in changed:
                    mask = _slices(changed[name], axis, dropout.rank) / (1 - dropout.rank)
                    changed[name] = changed[name] * mask
        if dropout.input:
            for name, axis in self.kind.blocks.items():
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
        return f"{self.kind.name}, {shapes}, scale={self.scale:g}"


def weight_of(host: nn.Module, spec: LayerSpec) -> Tensor:
    """A layer's own weight, canonical and decoded."""
    return spec.to_stored(decoded(host, "weight"))


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


class LayerTree(nn.Module):
    """Adapter layers, or slots for them, in a tree that mirrors the model's module paths, and their gates.

    Saving, moving, freezing, counting and deleting are the ordinary module operations on this tree.
    """

    _gates: Tensor

    def _deal(self, gates: Tensor) -> None:
        """Give every layer its element of `gates`.

        Views and not buffers: group offloading would replace a buffer's storage and cut it from the flat tensor.
        """
        raise NotImplementedError

    def _graft(self, path: str, leaf: nn.Module) -> None:
        *parents, last = path.split(".")
        node: nn.Module = self
        for name in parents:
            child = node._modules.get(name)
            if child is None:
                child = node._modules[name] = nn.Module()
            node = child
        node._modules[last] = leaf

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "LayerTree":
        def keep_precision(tensor: Tensor) -> Tensor:
            # Layerwise casting of a whole model casts every parameter it finds; adapters keep theirs.
            moved = fn(tensor)
            return tensor.to(moved.device) if moved.dtype in FLOAT8 else moved

        super()._apply(keep_precision, recurse)
        device = fn(self._gates).device
        if device != self._gates.device and device.type != "meta":
            self._deal(self._gates.to(device))
        return self


class Adapter(LayerTree):
    """One adapter on one model: it owns its parameters.

    Attributes:
        layers: module path of the model -> adapter layer.
        metadata: of the file it came from, verbatim.
        strength: what the user set: a number or a schedule, or these by prefix.
        active: whether it takes part in the forward.
        beside: on a model with slots, whether it runs beside them, which costs a recompile: it has no room there, or is
            being trained.
    """

    def __init__(self, layers: Mapping[str, AdapterLayer], metadata: Mapping[str, str] | None = None) -> None:
        super().__init__()
        self.layers = {path: layers[path] for path in sorted(layers)}
        self.metadata = dict(metadata or {})
        self.strength: Strength = 1.0
        self.active = False
        self.beside = False
        for path, layer in self.layers.items():
            self._graft(path, layer)
        self._scales = torch.tensor([layer.scale for layer in self.layers.values()], dtype=torch.float64)
        device = next((p.device for p in self.parameters() if p.device.type != "meta"), torch.device("cpu"))
        self._deal(torch.zeros(len(self.layers), device=device))
        self.set_strengths(1.0)

    def set_strengths(self, strengths: float | Sequence[float] | Sequence[Sequence[float]]) -> None:
        """A strength, or one per layer in the order of `layers`, or for every sample one per layer.

        A single write to the tensor the layers read.
        """
        factor = strengths if isinstance(strengths, float) else torch.tensor(strengths, dtype=torch.float64)
        self.set_gates(self._scales * factor)

    def set_gates(self, gates: Tensor) -> None:
        """What `gates` has to be from now on."""
        if gates.shape != self._gates.shape:
            self._deal(gates.to(self._gates))
        else:
            self._gates.copy_(gates)

    @property
    def gates(self) -> Tensor:
        """What multiplies the change of each layer: (layers,), in the order of `layers`, or (samples, layers)."""
        return self._gates

    def _deal(self, gates: Tensor) -> None:
        self._gates = gates
        for layer, gate in zip(self.layers.values(), gates.unbind(-1), strict=True):
            layer.__dict__["gate"] = gate
