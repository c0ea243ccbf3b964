"""The adapter: its adapter layers, named after the model's module paths, and the gates of all of them.

A layer's change is multiplied by `alpha / rank x strength x call scale`. The first two factors make up the gate. An
adapter keeps its gates in one flat float32 tensor, of which every adapter layer has a view, so that rescaling a whole
adapter is one write and never a recompile. The call scale is diffusers' per-call `scale`; see `CallState`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from diffadapt.errors import AdapterError
from diffadapt.runtime.adapted_layers import ACTIVE
from diffadapt.runtime.adapter_layer import AdapterLayer
from diffadapt.runtime.inference_mode import ordinary_tensors
from diffadapt.strengths.by_prefix import Strength
from diffadapt.types.tensor_ops import FLOAT8


class LayerTree(nn.Module):
    """Adapter layers or slots, named after the model's module paths, with their gates in one tensor.

    Saving, moving, freezing, counting and deleting are the ordinary module operations on this tree. On a model that is
    spread over several devices, every device has a copy of the gates.
    """

    _gates: Tensor

    def __init__(self) -> None:
        super().__init__()
        self._placed: dict[nn.Module, torch.device] = {}
        self._copies: dict[torch.device, Tensor] = {}

    def _assign_gates(self, gates: Tensor) -> None:
        """Make `gates` the gates of this tree and give every layer its view.

        Gates are not buffers, because group offloading would replace a buffer's storage and detach the views from it.
        """
        raise NotImplementedError

    def leaves(self) -> Iterator[tuple[str, AdapterLayer]]:
        """Yield every adapter layer or slot with the module path of its host."""
        raise NotImplementedError

    def place_(self, devices: Mapping[str, torch.device]) -> None:
        """Move every adapter layer or slot to the device on which its host computes.

        Parameters that layers on several devices share stay where they are, and are copied in every call.

        Args:
            devices: module path -> device.
        """
        leaves = [(leaf, devices[path]) for path, leaf in self.leaves() if path in devices]
        sharing: dict[int, set[torch.device]] = {}
        for leaf, device in leaves:
            for tensor in leaf.tensors.values():
                sharing.setdefault(id(tensor), set()).add(device)
        for leaf, device in leaves:
            if all(len(sharing[id(tensor)]) == 1 for tensor in leaf.tensors.values()):
                leaf.to(device)
        self._placed = dict(leaves)
        with ordinary_tensors():
            self._assign_gates(self._gates)

    def _gates_for(self, leaf: AdapterLayer) -> Tensor:
        """Return the gates on the device of a layer or slot."""
        device = self._placed.get(leaf, self._gates.device)
        if device == self._gates.device:
            return self._gates
        if device not in self._copies:
            self._copies[device] = self._gates.to(device)
        return self._copies[device]

    def _update_copies(self) -> None:
        """Write the gates to the further devices of the model."""
        for copy in self._copies.values():
            copy.copy_(self._gates)

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
        devices = {gates.device: fn(gates).device for gates in (self._gates, *self._copies.values())}
        device = devices[self._gates.device]
        if device.type != "meta" and any(old != new for old, new in devices.items()):
            self._placed = {}
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
        self._samples: frozenset[int] | None = None
        for path, layer in self.layers.items():
            self._insert(path, layer)
            if layer.spec.kind == "parameter":
                layer.__dict__["parameter"] = path.rpartition(".")[2]
        self._scales = torch.tensor([layer.scale for layer in self.layers.values()], dtype=torch.float64)
        tensors = (tensor for layer in self.layers.values() for tensor in layer._parameters.values())
        device = next((t.device for t in tensors if t is not None and not t.is_meta), torch.device("cpu"))
        self._assign_gates(torch.zeros(len(self.layers), dtype=torch.float32, device=device))
        self.set_strengths(1.0)

    def __repr__(self) -> str:
        types = sorted({layer.adapter_type.name for layer in self.layers.values()}) or ["new words"]
        state = "active" if self.active else "inactive"
        return f"<Adapter: {', '.join(types)}, {len(self.layers)} layers, {self.bytes / 2**20:.1f} MiB, {state}>"

    def train_(self) -> "Adapter":
        """Make the parameters trainable: float32 tensors of its own that require gradients. Return the adapter.

        They may be those of a file in half precision, or the caller's. Random projections and the like stay fixed.

        Raises:
            AdapterError: it does not run by itself, but in slots or merged into the weights.
        """
        for path, layer in self.layers.items():
            running: tuple[AdapterLayer, ...] = layer.host.__dict__.get(ACTIVE, ()) if hasattr(layer, "host") else ()
            if self.active and all(other is not layer for other in running) and hasattr(layer, "host"):
                raise AdapterError(
                    f"{path}: the adapter runs in slots or is merged, so training would not change it; call train_() "
                    "of pipe.adapters[name]"
                )
        fixed = {
            id(layer.tensors[name])
            for layer in self.layers.values()
            for name in layer.adapter_type.fixed & layer.tensors.keys()
        }
        with ordinary_tensors(), torch.no_grad():
            for parameter in self.parameters():
                dtype = torch.promote_types(parameter.dtype, torch.float32)
                parameter.data = parameter.detach().to(dtype, copy=True)
                parameter.requires_grad_(id(parameter) not in fixed)
        return self

    def set_strengths(self, strengths: float | Sequence[float] | Sequence[Sequence[float]]) -> None:
        """Set the gates to the scales times `strengths`, in a single write.

        Args:
            strengths: one strength for all layers, or one per layer in the order of `layers`, or a list for every
                sample, with one strength for all layers or one per layer.
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
        self._update_copies()
        samples = frozenset(gates.any(1).nonzero().flatten().tolist()) if gates.ndim == 2 else None
        if samples != self._samples:
            self._samples = samples
            for layer in self.layers.values():
                layer.__dict__["samples"] = samples

    @property
    def scales(self) -> list[float]:
        """`alpha / rank` of every layer, in the order of `layers`."""
        return self._scales.tolist()

    @property
    def gates(self) -> Tensor:
        """The gates, of shape (layers,) or (samples, layers), in the order of `layers`."""
        return self._gates

    def leaves(self) -> Iterator[tuple[str, AdapterLayer]]:
        """Yield every adapter layer with the module path of its host."""
        yield from self.layers.items()

    def _assign_gates(self, gates: Tensor) -> None:
        self._gates, self._copies = gates, {}
        for number, (layer, gate) in enumerate(zip(self.layers.values(), gates.unbind(-1), strict=True)):
            layer.__dict__["gate"] = self._gates_for(layer)[..., number] if self._placed else gate
