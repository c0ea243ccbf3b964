"""The adapter: its adapter layers, named after the model's module paths, and the gates of all of them.

A layer's change is multiplied by `alpha / rank x strength x call scale`. The first two factors make up the gate. An
adapter keeps its gates in one flat float32 tensor, of which every adapter layer has a view, so that rescaling a whole
adapter is one write and never a recompile. The call scale is diffusers' per-call `scale`; see `CallState`.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from diffadapt.runtime.adapter_layer import AdapterLayer
from diffadapt.runtime.inference_mode import ordinary_tensors
from diffadapt.strengths.by_prefix import Strength
from diffadapt.types.tensor_ops import FLOAT8


class LayerTree(nn.Module):
    """Adapter layers or slots, named after the model's module paths, with their gates in one tensor.

    Saving, moving, freezing, counting and deleting are the ordinary module operations on this tree.
    """

    _gates: Tensor

    def _assign_gates(self, gates: Tensor) -> None:
        """Make `gates` the gates of this tree and give every layer its view.

        Gates are not buffers, because group offloading would replace a buffer's storage and detach the views from it.
        """
        raise NotImplementedError

    def _insert(self, path: str, leaf: nn.Module) -> None:
        """Make `leaf` a child, named after `path` with slashes for dots and a slash at the end.

        Other libraries (PEFT) search all modules of a model for names that end like those of its layers, or that match
        a pattern. No name of a child does.
        """
        self._modules[path.replace(".", "/") + "/"] = leaf

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "LayerTree":
        def keep_precision(tensor: Tensor) -> Tensor:
            # Layerwise casting of a whole model casts every parameter to float8; adapters keep their dtype.
            moved = fn(tensor)
            return tensor.to(moved.device) if moved.dtype in FLOAT8 else moved

        super()._apply(keep_precision, recurse)
        device = fn(self._gates).device
        if device != self._gates.device and device.type != "meta":
            self._assign_gates(self._gates.to(device))
        return self

    @property
    def bytes(self) -> int:
        """The size of all parameters in bytes."""
        return sum(parameter.numel() * parameter.element_size() for parameter in self.parameters())


class Adapter(LayerTree):
    """One adapter over one model. It owns its parameters.

    Attributes:
        layers: module path of the model -> adapter layer, sorted by path.
        metadata: the metadata of the file that the adapter came from, verbatim.
        strength: the strength that the user set: a number or a schedule, or these by path prefix.
        active: whether the adapter acts in a forward pass.
        outside_slots: on a model with slots, whether the adapter runs outside them: it has no room there, or it is
            being trained. Activating such an adapter costs a recompile.
    """

    def __init__(self, layers: Mapping[str, AdapterLayer], metadata: Mapping[str, str] | None = None) -> None:
        """Make an inactive adapter of strength 1 from `layers`, given by module path of the model."""
        super().__init__()
        self.layers = {path: layers[path] for path in sorted(layers)}
        self.metadata = dict(metadata or {})
        self.strength: Strength = 1.0
        self.active = False
        self.outside_slots = False
        for path, layer in self.layers.items():
            self._insert(path, layer)
        self._scales = torch.tensor([layer.scale for layer in self.layers.values()], dtype=torch.float64)
        device = next((p.device for p in self.parameters() if p.device.type != "meta"), torch.device("cpu"))
        self._assign_gates(torch.zeros(len(self.layers), dtype=torch.float32, device=device))
        self.set_strengths(1.0)

    def __repr__(self) -> str:
        types = sorted({layer.adapter_type.name for layer in self.layers.values()})
        state = "active" if self.active else "inactive"
        return f"<Adapter: {', '.join(types)}, {len(self.layers)} layers, {self.bytes / 2**20:.1f} MiB, {state}>"

    def set_strengths(self, strengths: float | Sequence[float] | Sequence[Sequence[float]]) -> None:
        """Set the gates to the scales times `strengths`, in a single write.

        Args:
            strengths: one strength for all layers, or one per layer in the order of `layers`, or such a list for every
                sample.
        """
        factor = strengths if isinstance(strengths, float) else torch.tensor(strengths, dtype=torch.float64)
        self.set_gates(self._scales * factor)

    def set_gates(self, gates: Tensor) -> None:
        """Write `gates`, of shape (layers,) or (samples, layers)."""
        if gates.shape != self._gates.shape:
            # Outside inference mode, or these gates could not be written outside it any more.
            with ordinary_tensors():
                self._assign_gates(torch.empty(gates.shape, dtype=torch.float32, device=self._gates.device))
            self._gates.copy_(gates)
        else:
            self._gates.copy_(gates)

    @property
    def scales(self) -> list[float]:
        """`alpha / rank` of every layer, in the order of `layers`."""
        return self._scales.tolist()

    @property
    def gates(self) -> Tensor:
        """The gates, of shape (layers,) or (samples, layers), in the order of `layers`."""
        return self._gates

    def _assign_gates(self, gates: Tensor) -> None:
        self._gates = gates
        for layer, gate in zip(self.layers.values(), gates.unbind(-1), strict=True):
            layer.__dict__["gate"] = gate
