"""The adapter: a tree of parameters that mirrors the model's paths, and the adapter layer, its part in one layer.

Two rules live here and nowhere else.

*Scale.* What multiplies a layer's change is `alpha / rank x strength x call scale`. The first two make up the gate: one
element of a flat float32 tensor per adapter, of which every adapter layer holds a view, so that rescaling a whole
adapter is one write and never a recompile. The call scale is diffusers' per-call `scale`, shared by a whole model.

*Dtype.* The input is cast to the dtype of the adapter's parameters, and only the result is cast back.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from diffadapt.runtime.adapter_layer import AdapterLayer
from diffadapt.strengths.by_prefix import Strength
from diffadapt.types.tensor_ops import FLOAT8


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

    @property
    def bytes(self) -> int:
        """The size of all parameters."""
        return sum(parameter.numel() * parameter.element_size() for parameter in self.parameters())


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
        self.outside_slots = False
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
