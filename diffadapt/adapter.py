"""The adapter: a tree of parameters that mirrors the model's paths, and the adapter layer, its part in one layer.

Two rules live here and nowhere else.

*Scale.* What multiplies a layer's change is `alpha / rank x strength x call scale`. The first two make up the gate: one
element of a flat float32 tensor per adapter, of which every adapter layer holds a view, so that rescaling a whole
adapter is one write and never a recompile. The call scale is diffusers' per-call `scale`, shared by a whole model.

*Dtype.* The input is cast to the dtype of the adapter's parameters, and only the result is cast back.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffadapt.hooks import FLOAT8
from diffadapt.kind import AdapterType
from diffadapt.layer import LayerSpec

BANK = "diffadapt"
"""Name of the child module that holds a model's adapters."""


class CallScale:
    """The per-call scale of one model, a 0-d tensor, or `None` when no caller asked for one.

    Attributes:
        value: what layers read.
        outer: what `value` falls back to between two calls of the model (set while a pipeline encodes its prompt).
    """

    def __init__(self) -> None:
        self.value: Tensor | None = None
        self.outer: Tensor | None = None


class AdapterLayer(nn.Module):
    """The part of an adapter that belongs to one layer. Called with tensors only: accelerate moves what is called."""

    kind: AdapterType
    spec: LayerSpec
    alpha: float | None
    dropout: float
    gate: Tensor  # given by the adapter
    call: CallScale  # given when the adapter is attached

    def __init__(
        self,
        kind: AdapterType,
        spec: LayerSpec,
        tensors: Mapping[str, Tensor],
        alpha: float | None = None,
        *,
        trainable: bool = False,
        dropout: float = 0.0,
    ) -> None:
        """
        Args:
            tensors: what `kind.fit` or `kind.init` returned; they become this module's parameters as they are.
            alpha: `None` means the rank, which makes the scale 1.
        """
        super().__init__()
        # Plain attributes, set without nn.Module's search for parameters: it is a fifth of the time of loading a file.
        self.__dict__.update(kind=kind, spec=spec, alpha=alpha, dropout=dropout)
        for name, tensor in tensors.items():
            self._parameters[name] = nn.Parameter(tensor, requires_grad=trainable)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """This layer's parameters by the names its type uses."""
        return {name: tensor for name, tensor in self._parameters.items() if tensor is not None}

    @property
    def rank(self) -> int | None:
        """Rank by the tensors' shapes, `None` if the type has none."""
        return self.kind.rank(self.tensors)

    @property
    def scale(self) -> float:
        """`alpha / rank`; 1 where the file gives no alpha or the type has no rank."""
        rank = self.rank
        return 1.0 if rank is None or self.alpha is None else self.alpha / rank

    def forward(self, output: Tensor, input: Tensor) -> Tensor:
        """`output` of the layer for `input`, plus this adapter's change. `output` may be overwritten."""
        tensors = self.tensors
        home = next(iter(tensors.values()))
        dtype, gate = home.dtype, self.gate
        if home.device != output.device:
            # The layer's weights come and go by someone's offloading; ours follow for this call.
            tensors = {name: tensor.to(output.device, non_blocking=True) for name, tensor in tensors.items()}
        if gate.device != output.device:
            gate = gate.to(output.device)
        if self.call.value is not None:
            gate = gate * self.call.value.to(gate.device)
        if input.is_floating_point():
            input = input.to(dtype)
        if self.training and self.dropout:
            input = F.dropout(input, self.dropout)
        return self.kind.delta_output(tensors, self.spec, input, gate, output)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        # A state dict of the adapted model is the base model's and says nothing of adapters.
        if BANK not in prefix.split("."):
            super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        shapes = ", ".join(f"{name}={tuple(tensor.shape)}" for name, tensor in self.tensors.items())
        return f"{self.kind.name}, {shapes}, scale={self.scale:g}"


class Adapter(nn.Module):
    """One adapter on one model: it owns its parameters, in a tree that mirrors the model's module paths.

    Saving, moving, freezing, counting and deleting are the ordinary module operations on this tree.

    Attributes:
        layers: module path of the model -> adapter layer.
        metadata: of the file it came from, verbatim.
        strength: what the user set: a number, or numbers by module-path prefix of this model.
        active: whether it takes part in the forward.
    """

    def __init__(self, layers: Mapping[str, AdapterLayer], metadata: Mapping[str, str] | None = None) -> None:
        super().__init__()
        self.layers = {path: layers[path] for path in sorted(layers)}
        self.metadata = dict(metadata or {})
        self.strength: float | Mapping[str, float] = 1.0
        self.active = False
        for path, layer in self.layers.items():
            self._graft(path, layer)
        self._scales = torch.tensor([layer.scale for layer in self.layers.values()], dtype=torch.float64)
        device = next((p.device for p in self.parameters() if p.device.type != "meta"), torch.device("cpu"))
        self._deal(torch.zeros(len(self.layers), device=device))
        self.set_strengths([1.0] * len(self.layers))

    def set_strengths(self, strengths: Sequence[float]) -> None:
        """One strength per layer, in the order of `layers`: a single write to the tensor the layers read."""
        self._gates.copy_(self._scales * torch.tensor(strengths, dtype=torch.float64))

    def _deal(self, gates: Tensor) -> None:
        """Give every layer its element of `gates`.

        Views and not buffers: group offloading would replace a buffer's storage and cut it from the flat tensor.
        """
        self._gates = gates
        for layer, gate in zip(self.layers.values(), gates.unbind(), strict=True):
            layer.__dict__["gate"] = gate

    def _graft(self, path: str, layer: AdapterLayer) -> None:
        *parents, leaf = path.split(".")
        node: nn.Module = self
        for name in parents:
            child = node._modules.get(name)
            if child is None:
                child = node._modules[name] = nn.Module()
            node = child
        node._modules[leaf] = layer

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Adapter":
        def keep_precision(tensor: Tensor) -> Tensor:
            # Layerwise casting of a whole model casts every parameter it finds; adapters keep theirs.
            moved = fn(tensor)
            return tensor.to(moved.device) if moved.dtype in FLOAT8 else moved

        super()._apply(keep_precision, recurse)
        device = fn(self._gates).device
        if device != self._gates.device and device.type != "meta":
            self._deal(self._gates.to(device))
        return self
