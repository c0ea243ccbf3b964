"""The third step of a plan: build adapter layers from the values of the tensors that fit."""

from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from diffadapt import families
from diffadapt.errors import AdapterError, Fault
from diffadapt.files.checkpoint import Checkpoint
from diffadapt.loading.content import AlphaSource, Content, Group, part_of, rounded
from diffadapt.loading.duplicates import without_duplicates
from diffadapt.loading.fit import Fitted
from diffadapt.loading.starts import without_start
from diffadapt.loading.values import read_values
from diffadapt.progress import with_progress
from diffadapt.runtime import input_width
from diffadapt.runtime.adapter_layer import AdapterLayer
from diffadapt.runtime.foreign_hooks import compute_dtype, execution_device
from diffadapt.runtime.targets import Targets
from diffadapt.types.layer_spec import LayerSpec
from diffadapt.weights import decoded, unreadable
from diffadapt.weights.resting import resting_tensor

ForWriting: TypeAlias = Literal["whole", "split"]
"""What a plan for writing a file does with fused layers: keep them "whole", or "split" them as for attaching."""

_TWICE = "the file has this layer in another way, too, and that is used"


@dataclass(frozen=True)
class Built:
    """The adapter layers built from a file.

    Attributes:
        layers: component -> module path -> adapter layer.
        used: the number of tensors that they were built from.
        alphas_from: `(component, module path)` -> where the alpha of the adapter layer comes from; see `Content`.
        faults, ignored: see `Plan`.
    """

    layers: dict[str, dict[str, AdapterLayer]]
    used: int
    faults: list[Fault]
    ignored: list[Fault]
    alphas_from: dict[tuple[str, str], AlphaSource]


class Builder:
    """Builds adapter layers in the dtype and on the device of each component."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        targets: Mapping[str, Targets] | None,
        dtype: torch.dtype | None,
        device: torch.device | None,
        for_writing: ForWriting | None,
    ) -> None:
        """
        Args:
            targets: the models' paths, by component; `None` to trust the names in the file.
            dtype, device: see `plan`.
            for_writing: if not `None`, tensors keep the file's dtype; see `ForWriting`.
        """
        self._checkpoint = checkpoint
        self._targets = targets
        self._dtype = dtype
        self._device = device
        self._for_writing = for_writing
        self._pins_memory = device is not None and device.type == "cpu" and torch.cuda.is_available()
        self._dtypes_and_devices: dict[str, tuple[torch.dtype, torch.device]] = {}
        self._shared: dict[tuple[str, int], tuple[Tensor, nn.Parameter]] = {}
        self._copies: dict[int, Tensor] = {}

    def read(self, fitted: Fitted, further: Iterable[tuple[str, Tensor]] = ()) -> set[str]:
        """Read the values of all tensors. Return the keys of those that hold NaN or infinite values.

        Args:
            fitted: the layers of the file; their tensors are copied as adapters have them, if that is necessary.
            further: keys and tensors that are only checked.
        """
        broken = read_values(further).broken
        copies = self._checkpoint.mapped and not self._keeps_tensors
        for component, values in fitted.values.items():
            found = read_values(values.items(), partial(self._moved, component) if copies else None)
            broken |= found.broken
            self._copies.update(found.copies)
        return broken

    def layers(self, contents: Iterable[Content]) -> dict[str, AdapterLayer]:
        """Return the adapter layers by module path: one for each content or, if it is fused, for each of its parts.

        Raises:
            AdapterError: the tensors cannot be cut into parts, or their values are invalid.
        """
        built: dict[str, AdapterLayer] = {}
        for content in contents:
            parts: dict[str, AdapterLayer] = {}
            own = self._copied(content) if content.parts else None
            for path, spec, part in self._split(self._with_values(own or content)):
                if self._for_writing is not None:
                    part = rounded(part, {tensor.dtype for tensor in content.tensors.values()})
                parts[path] = self._layer(path, spec, part, is_own=own is not None)
            if len(parts) > 1 and content.adapter_type.joint(content.tensors):
                for layer in parts.values():
                    layer.__dict__["siblings"] = tuple(other for other in parts.values() if other is not layer)
            built.update(parts)
        return built

    def moved(self, component: str, tensor: Tensor, *, is_own: bool = False) -> Tensor:
        """Return a tensor of the file in the dtype and on the device that adapters of `component` have.

        Args:
            is_own: whether the tensor is in memory that belongs to the adapter already.
        """
        if self._keeps_tensors:
            return tensor
        copy = self._copies.get(id(tensor))
        return self._moved(component, tensor, is_own=is_own) if copy is None else copy

    def _moved(self, component: str, tensor: Tensor, *, is_own: bool = False) -> Tensor:
        dtype, device = self._dtype_and_device(component)
        if not tensor.is_floating_point():
            dtype = tensor.dtype
        # `data` has a version counter of its own, unlike a view of a tensor that other layers have, too.
        own = tensor.data if is_own else tensor.detach() if tensor.requires_grad else tensor
        if own.dtype != dtype or own.device != device:
            own = own.to(device, dtype)
        elif not is_own and (self._checkpoint.mapped or own.is_inference()):
            # Any other tensor is the caller's and used as it is: copying would double the memory.
            own = own.clone()
        own = own.contiguous()
        return own.pin_memory() if self._pins_memory else own

    @property
    def _keeps_tensors(self) -> bool:
        """Whether the layers get the tensors of the file as they are."""
        return self._checkpoint.headers_only or self._for_writing is not None

    def _common(self, component: str, tensor: Tensor) -> nn.Parameter:
        """Return a tensor that all layers of a component share, as one parameter."""
        key = component, id(tensor)
        if key not in self._shared:
            # The entry keeps the tensor, so that no other one gets its `id`.
            self._shared[key] = tensor, nn.Parameter(self.moved(component, tensor), requires_grad=False)
        return self._shared[key][1]

    def _copied(self, content: Content) -> Content | None:
        """Return the content with the copies of its tensors, if they have the dtype of the file; else `None`."""
        copies = {name: self._copies.get(id(tensor)) for name, tensor in content.tensors.items()}
        own = {
            name: copy
            for name, copy in copies.items()
            if copy is not None and copy.dtype == content.tensors[name].dtype
        }
        return replace(content, tensors=own) if len(own) == len(copies) else None

    def _with_values(self, content: Content) -> Content:
        """Return the content with everything that needs values computed: see `Content.bias` and `Content.rest`."""
        if content.bias == "new":
            assert self._targets is not None
            content = content.with_bias(decoded(self._targets[content.component].modules[content.path], "bias"))
        elif content.bias == "change":
            content = content.with_bias(None)
        if content.start is not None:
            assert self._targets is not None
            targets = self._targets[content.component]
            content = without_start(content, targets.model, targets.modules[content.path])
        return content if content.rest is None else content.with_rest(_dense(*content.rest, content.spec))

    def _split(self, content: Content) -> Iterator[tuple[str, LayerSpec, Content]]:
        """Yield the path, the geometry and the content of each layer that becomes an adapter layer."""
        if not content.parts:
            yield content.path, content.spec, content
            return
        assert self._targets is not None
        targets = self._targets[content.component]
        if self._for_writing == "whole" and content.parts == families.aliases(targets).get(content.path):
            yield content.path, content.spec, content
            return
        start = 0
        for part in content.parts:
            spec = targets.spec(part.path, content.adapter_type.layers)
            yield part.path, spec, part_of(content, part.rows(start, spec.out_features))
            start += spec.out_features

    def _layer(self, path: str, spec: LayerSpec, content: Content, *, is_own: bool) -> AdapterLayer:
        component = content.component
        shared = content.adapter_type.shared
        tensors = {
            name: self._common(component, tensor) if name in shared else self.moved(component, tensor, is_own=is_own)
            for name, tensor in content.tensors.items()
        }
        own = None if self._targets is None else input_width.own_inputs(self._targets[component].model, path)
        widens = own is not None and spec.in_features > own
        layer = AdapterLayer(
            content.adapter_type, spec, tensors, content.alpha, settings=content.settings, widens=widens
        )
        is_loaded = self._targets is not None and self._for_writing is None and not self._checkpoint.headers_only
        if is_loaded and layer.reads_weight:
            self._refuse_unreadable(component, path, layer)
        return layer

    def _refuse_unreadable(self, component: str, path: str, layer: AdapterLayer) -> None:
        """Raise `AdapterError` if the adapter layer needs a base weight that cannot be decoded."""
        assert self._targets is not None
        host = self._targets[component].modules[path]
        weight = resting_tensor(host, "weight")
        # A model may get its weights later.
        if weight is not None and weight.device.type == "meta":
            return
        problem = unreadable(host, "weight")
        if problem is not None:
            raise AdapterError(
                f"a {layer.adapter_type.name} needs the values of the layer's weight: {problem}; convert it to a plain "
                "LoRA on an unquantised model (to_lora), or leave this layer unquantised"
            )

    def _dtype_and_device(self, component: str) -> tuple[torch.dtype, torch.device]:
        found = self._dtypes_and_devices.get(component)
        if found is None:
            assert self._targets is not None
            modules = self._targets[component].all
            found = self._dtype or compute_dtype(modules), self._device or execution_device(modules)
            self._dtypes_and_devices[component] = found
        return found


def build(layers: Sequence[tuple[Group, list[Content]]], builder: Builder, broken: Set[str]) -> Built:
    """Build the adapter layers of a file, at most one for each layer of the models.

    Args:
        layers: see `Fitted`.
        builder: the builder for the models.
        broken: the keys of tensors that hold NaN or infinite values, which are faults.
    """
    built: dict[str, dict[str, AdapterLayer]] = {}
    sources: dict[tuple[str, str], Group] = {}
    alphas_from: dict[tuple[str, str], AlphaSource] = {}
    done: list[Group] = []
    faults: list[Fault] = []
    # A layer that the file contains by itself takes precedence over one that is fused with others.
    alone_first = sorted(layers, key=lambda layer: bool(layer[0].parts))
    for group, contents in with_progress(alone_first, "loading"):
        component, paths = group.component, {path for content in contents for path in content.paths}
        taken = sorted(path for path in paths if (component, path) in sources)
        try:
            if broken:
                _refuse_broken(group, broken)
            new = builder.layers(contents)
            if taken:
                new = _remaining(built[component], new, paths, taken)
        except AdapterError as error:
            faults += group.faults(error)
            continue
        done.append(group)
        built.setdefault(component, {}).update(new)
        alphas_from.update(((component, path), contents[0].alpha_from) for path in new)
        # A fused layer that is written whole has a path of its own, and stands for all of its parts.
        covered = new.keys() & paths or (paths if new else ())
        sources.update(((component, path), group) for path in covered)
    used = set(sources.values())
    ignored = [Fault(key, _TWICE) for group in done if group not in used for key in group.keys.values()]
    keys = {key for group in used for key in group.keys.values()}
    return Built(built, len(keys), faults, ignored, alphas_from)


def _refuse_broken(group: Group, broken: Set[str]) -> None:
    keys = sorted(broken & set(group.keys.values()))
    if keys:
        raise AdapterError(f"{', '.join(keys)} holds NaN or infinite values")


def _remaining(
    present: Mapping[str, AdapterLayer], new: Mapping[str, AdapterLayer], paths: Set[str], taken: Sequence[str]
) -> dict[str, AdapterLayer]:
    """Return the `new` adapter layers to use if some of their `paths` are `taken` by layers that are present."""
    chosen = without_duplicates(present, new) if paths == new.keys() else None
    if chosen is None:
        raise AdapterError(f"{', '.join(taken)} has tensors under another name already")
    return chosen


def _dense(indices: Tensor, values: Tensor, spec: LayerSpec) -> Tensor:
    """Return a sparse change of the weight (`Content.rest`) as a canonical one, in float32."""
    if indices.is_meta or values.is_meta:
        return torch.empty(spec.weight_shape, device="meta")
    shape = (spec.out_features, spec.fan_in)
    places = indices.long()
    if (places < 0).any() or (places >= torch.tensor(shape, device=places.device).view(2, 1)).any():
        raise AdapterError(f"bias_indices are not all places in a matrix of shape {shape}")
    rest = torch.zeros(shape, dtype=torch.float32, device=values.device)
    return rest.index_put((places[0], places[1]), values.flatten().float(), accumulate=True).view(spec.weight_shape)
