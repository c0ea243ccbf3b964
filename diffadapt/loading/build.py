"""From the tensors that a file has for one layer to adapter layers of the model."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from diffadapt import families
from diffadapt.errors import AdapterError
from diffadapt.families.fused_parts import FusedPart
from diffadapt.files.checkpoint import Checkpoint
from diffadapt.formats.format import Alphas, Settings
from diffadapt.formats.verdicts import BESIDE
from diffadapt.loading.content import Content, Group, bias_name, narrowed, part_of
from diffadapt.runtime import input_width
from diffadapt.runtime.adapter_layer import AdapterLayer
from diffadapt.runtime.bank import bank_of
from diffadapt.runtime.base_weights import decoded, resting_tensor
from diffadapt.runtime.foreign_hooks import compute_dtype, execution_device
from diffadapt.runtime.targets import Targets
from diffadapt.types import identify
from diffadapt.types.adapter_type import AdapterType, Tensors
from diffadapt.types.layer_spec import LayerSpec
from diffadapt.types.tensor_ops import shape_of

ForWriting: TypeAlias = Literal["whole", "split"]

_MOST_PER_CHANNEL = 2**15
"""Numbers in a tensor for every input and output of its layer: a rank that nobody trains, the widest of blocks."""
_MOST_IN_A_WEIGHT = 2**40
"""Numbers in the weight of a layer; without a model, a file may say that it is for any layer."""


class Builder:
    """Builds adapter layers from groups of tensors; knows each component's dtype and device."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        targets: Mapping[str, Targets] | None,
        alphas: Alphas,
        settings: Settings,
        dtype: torch.dtype | None,
        device: torch.device | None = None,
        *,
        for_writing: ForWriting | None = None,
    ) -> None:
        """
        Args:
            dtype, device: see `load.plan`.
            for_writing: keep the file's dtypes, and with "whole" its layers where they are pieces of the model.
        """
        self._checkpoint = checkpoint
        self._targets = targets
        self._alphas = alphas
        self._settings = settings
        self._dtype = dtype
        self._device = device
        self._pinned = device is not None and device.type == "cpu" and torch.cuda.is_available()
        self._for_writing = for_writing
        self._homes: dict[str, tuple[torch.dtype, torch.device]] = {}

    def contents(self, component: str, path: str, group: Group) -> list[Content]:
        """What the tensors of a group say, checked by their shapes and dtypes: nothing large is read or allocated.

        Returns:
            One, or one for each of its parts where the group has numbered tensors.

        Raises:
            AdapterError: the tensors are of no type, or do not belong to the layer.
        """
        parts = _numbered(group)
        if not parts:
            return [self._content(component, path, group)]
        paths = self._paths_of_parts(path, group, len(parts))
        return [self._content(component, at, part) for at, part in zip(paths, parts, strict=True)]

    def build(self, component: str, contents: Sequence[Content]) -> dict[str, AdapterLayer]:
        """The adapter layers, by path of the model: for each content one, or one for every piece.

        Raises:
            AdapterError: the tensors cannot be taken apart, or do not have the values they should.
        """
        built: dict[str, AdapterLayer] = {}
        for content in contents:
            for path, spec, part in self._cut(component, self._read(component, content)):
                if self._for_writing is not None:
                    part = narrowed(part, {tensor.dtype for tensor in content.tensors.values()})
                built[path] = self._layer(component, path, spec, part)
        return built

    def settled(self, component: str, tensor: Tensor) -> Tensor:
        """A tensor of the file in the dtype and on the device in which an adapter of `component` keeps it."""
        if self._checkpoint.headers_only or self._for_writing is not None:
            return tensor
        dtype, device = self._home(component)
        # A caller's tensors are taken as they are where they fit: a copy is half the time and twice the memory.
        own = tensor.detach()
        if self._checkpoint.mapped or own.dtype != dtype or own.device != device or not own.is_contiguous():
            own = own.to(device, dtype, copy=self._checkpoint.mapped).contiguous()
        return own.pin_memory() if self._pinned else own

    def _paths_of_parts(self, path: str, group: Group, count: int) -> list[str]:
        """The layers of the model that the numbered parts of a layer are for, one each."""
        paths = [part.path for part in group.parts]
        if self._targets is None:
            paths = [f"{path}.{number}" for number in range(count)]
        elif not paths and count == 1:
            paths = [path]
        if len(paths) != count or any(part.swapped for part in group.parts):
            raise AdapterError(f"{count} parts found, expected {len(paths) or 1} as in the model")
        return paths

    def _content(self, component: str, path: str, group: Group) -> Content:
        """The tensors, shaped for their layer, with the alpha and the settings that the file means for them."""
        tensors = _of_type(group)
        adapter_type = _identified(tensors)
        spec = self._spec(component, path, group.parts, tensors, adapter_type)
        bias = self._bias_beside(component, path, group, adapter_type)
        if "diff_b" in tensors and bias_name(adapter_type) != "diff_b":
            if bias_name(adapter_type) in tensors:
                raise AdapterError("the change of its bias is there twice, as diff_b and beside lora_up")
            tensors[bias_name(adapter_type)] = tensors.pop("diff_b")
        fitted = adapter_type.fit(tensors, spec)
        _refuse_unusable(fitted, spec)
        _refuse_shape(group, "reshape_weight", spec.weight_shape)
        rank = adapter_type.rank(fitted)
        settings = {**self._settings(component, group.written, adapter_type.name), **_marked(group, adapter_type)}
        alpha = _number(group.tensors["alpha"]) if "alpha" in group.tensors else None
        if alpha is None and (rank is not None or "rank" in settings):
            alpha = self._alphas(component, group.written, rank or int(settings["rank"]))
        if alpha is not None:
            _refuse_alpha(
                alpha, is_scale=rank is not None or "rank" in settings, is_setting=adapter_type.alpha_is is not None
            )
        if alpha is not None and adapter_type.alpha_is is not None:
            settings[adapter_type.alpha_is], alpha = alpha, None
        rest = _rest(group, spec)
        if rest is not None and adapter_type.stages(fitted, spec) != ("add",):
            raise AdapterError(f"the rest of a weight's change (bias_values) cannot be added to a {adapter_type.name}")
        return Content(path, group.parts, adapter_type, spec, fitted, alpha, settings, bias, rest)

    def _bias_beside(
        self, component: str, path: str, group: Group, adapter_type: AdapterType
    ) -> Literal["change", "new"] | None:
        """See `Content.bias`."""
        new = group.tensors.get("set_bias")
        if new is None:
            return "change" if "diff_b" in group.tensors and bias_name(adapter_type) != "diff_b" else None
        if self._targets is None:
            return "change"
        targets = self._targets[component]
        host, bank = targets.modules.get(path), bank_of(targets.model)
        own = None if host is None else resting_tensor(host, "bias")
        if own is None:
            raise AdapterError("the file has a new bias for a layer that has none")
        if bank is not None and bank.merged:
            raise AdapterError(f"its change of the bias cannot be told while {', '.join(bank.merged)} is merged")
        if own.shape != new.shape:
            raise AdapterError(f"the new bias has shape {shape_of(new)}, expected {shape_of(own)}")
        return "change" if new.is_meta else "new"

    def _read(self, component: str, content: Content) -> Content:
        """With what takes values to tell: the change that a new bias is, and the sum with a sparse rest."""
        if content.bias == "new":
            assert self._targets is not None
            content = content.with_bias(decoded(self._targets[component].modules[content.path], "bias"))
        elif content.bias == "change":
            content = content.with_bias(None)
        return content if content.rest is None else content.with_rest(_dense(*content.rest, content.spec))

    def _cut(self, component: str, content: Content) -> Iterator[tuple[str, LayerSpec, Content]]:
        """Path, layer and content for every layer of the model that a content is for."""
        if not content.parts:
            yield content.path, content.spec, content
            return
        assert self._targets is not None
        targets = self._targets[component]
        if self._for_writing == "whole" and content.path in families.aliases(targets):
            yield content.path, content.spec, content
            return
        start = 0
        for part in content.parts:
            spec = targets.spec(part.path, content.adapter_type.layers)
            yield part.path, spec, part_of(content, part.rows(start, spec.out_features))
            start += spec.out_features

    def _layer(self, component: str, path: str, spec: LayerSpec, content: Content) -> AdapterLayer:
        tensors = {name: self.settled(component, tensor) for name, tensor in content.tensors.items()}
        own = None if self._targets is None else input_width.own_inputs(self._targets[component].model, path)
        widens = own is not None and spec.in_features > own
        return AdapterLayer(
            content.adapter_type, spec, tensors, content.alpha, settings=content.settings, widens=widens
        )

    def _spec(
        self, component: str, path: str, parts: Sequence[FusedPart], tensors: Tensors, adapter_type: AdapterType
    ) -> LayerSpec:
        """The layer of the file: of a model one of its layers, or several with all their outputs."""
        if self._targets is None:
            return adapter_type.geometry(tensors)
        targets = self._targets[component]
        if not parts:
            return input_width.spec_for(
                targets.model, path, targets.spec(path, adapter_type.layers), adapter_type.columns, tensors
            )
        specs = [targets.spec(part.path, adapter_type.layers) for part in parts]
        return replace(specs[0], out_features=sum(spec.out_features for spec in specs))

    def _home(self, component: str) -> tuple[torch.dtype, torch.device]:
        if component not in self._homes:
            assert self._targets is not None
            model = self._targets[component]
            device = self._device or execution_device(model.all)
            self._homes[component] = (self._dtype or compute_dtype(model.all), device)
        return self._homes[component]


def _numbered(group: Group) -> list[Group]:
    """For a group with numbered tensors: one without numbers for every part, with what all have in common; else none.

    Raises:
        AdapterError: a number is missing, or there is a tensor without one, too.
    """
    split = {name: name.rpartition(".") for name in group.tensors if "." in name}
    if not split:
        return []
    numbers = {int(number) for _, _, number in split.values()}
    if numbers != set(range(len(numbers))):
        raise AdapterError(f"parts {', '.join(map(str, sorted(numbers)))} found, expected 0 to {max(numbers)}")
    common = {name: tensor for name, tensor in group.tensors.items() if name not in split}
    twice = sorted(common.keys() & {name for name, _, _ in split.values()})
    if twice:
        raise AdapterError(f"{', '.join(twice)} is there whole and in parts")
    return [
        Group(
            group.written,
            tensors={**common, **{split[n][0]: group.tensors[n] for n in split if split[n][2] == str(number)}},
        )
        for number in sorted(numbers)
    ]


def _marked(group: Group, adapter_type: AdapterType) -> dict[str, float]:
    """The settings that tensors beside the type's own stand for."""
    if "scaled_oft" in group.tensors and "scaled_oft" not in adapter_type.marks:
        raise AdapterError(f"scaled_oft marks an OFT, and this is a {adapter_type.name}")
    return {name: 1.0 for name in adapter_type.marks if name in group.tensors}


def _of_type(group: Group) -> dict[str, Tensor]:
    """The tensors that a type has names for; a new bias by the name of its change."""
    tensors = {name: tensor for name, tensor in group.tensors.items() if name not in BESIDE}
    if "set_bias" in group.tensors:
        tensors["diff_b"] = group.tensors["set_bias"]
    return tensors


def _identified(tensors: Tensors) -> AdapterType:
    adapter_type = identify(tensors)
    # The change of a bias may stand beside the factors for the weight, which have a place for it.
    known = (
        {*adapter_type.tensors, *({"diff_b"} if bias_name(adapter_type) in adapter_type.tensors else ())}
        if adapter_type
        else set[str]()
    )
    if adapter_type is None or not set(tensors) <= known:
        unknown = ", ".join(sorted(set(tensors) - set(adapter_type.tensors if adapter_type else ()))) or "only an alpha"
        raise AdapterError(f"{unknown}: no adapter type that can be loaded has these tensors")
    return adapter_type


def _rest(group: Group, spec: LayerSpec) -> tuple[Tensor, Tensor] | None:
    """What LyCORIS' extraction keeps of a weight's change beside the factors, or `None`: a sparse matrix.

    Source: KohakuBlueleaf/LyCORIS f49d30d `lycoris/utils/__init__.py` (`use_bias`).
    """
    names = ("bias_indices", "bias_values", "bias_size")
    if group.tensors.keys().isdisjoint(names):
        return None
    indices, values, size = (group.tensors.get(name) for name in names)
    if indices is None or values is None or size is None:
        raise AdapterError("a sparse change needs all of bias_indices, bias_values and bias_size")
    shape = (spec.out_features, spec.fan_in)
    _refuse_shape(group, "bias_size", shape)
    _refuse_unusable({"bias_values": values}, spec)
    if math.prod(shape) > _MOST_IN_A_WEIGHT:
        raise AdapterError(f"a sparse change of a weight of shape {shape}, which no layer has")
    if indices.is_complex() or shape_of(indices) != (2, values.numel()) or values.numel() > math.prod(shape):
        raise AdapterError(
            f"bias_indices ({indices.dtype}) have shape {shape_of(indices)}, expected {values.numel()} places in a "
            f"matrix of shape {shape}"
        )
    return indices, values


def _refuse_shape(group: Group, name: str, shape: tuple[int, ...]) -> None:
    """Raise if the file has a tensor of this name, which is the shape of something, and it is another one."""
    said = group.tensors.get(name)
    if said is None:
        return
    if said.numel() != len(shape):
        raise AdapterError(f"{name} has shape {shape_of(said)}, expected {len(shape)} numbers")
    if not said.is_meta and said.flatten().tolist() != list(shape):
        raise AdapterError(f"{name} is {said.flatten().tolist()}, expected {list(shape)}")


def _refuse_unusable(tensors: Tensors, spec: LayerSpec) -> None:
    """Raise for tensors that are no numbers of a weight, or more of them than any adapter has."""
    most = _MOST_PER_CHANNEL * (spec.out_features + spec.fan_in)
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise AdapterError(f"{name} has dtype {tensor.dtype}, expected a floating-point one")
        if tensor.numel() > most:
            raise AdapterError(f"{name} has shape {shape_of(tensor)}, expected at most {most} numbers in all")


def _dense(indices: Tensor, values: Tensor, spec: LayerSpec) -> Tensor:
    """A sparse change of the flat weight as a canonical one."""
    if indices.is_meta or values.is_meta:
        return torch.empty(spec.weight_shape, device="meta")
    shape = (spec.out_features, spec.fan_in)
    places = indices.long()
    if (places < 0).any() or (places >= torch.tensor(shape, device=places.device).view(2, 1)).any():
        raise AdapterError(f"bias_indices are not all places in a matrix of shape {shape}")
    rest = torch.zeros(shape, device=values.device)
    return rest.index_put((places[0], places[1]), values.flatten().float(), accumulate=True).view(spec.weight_shape)


def _number(tensor: Tensor) -> float:
    if tensor.numel() != 1 or tensor.is_meta:
        raise AdapterError(f"alpha has shape {shape_of(tensor)}, expected a single number")
    if tensor.is_complex():
        raise AdapterError(f"alpha has dtype {tensor.dtype}, expected a number")
    return float(tensor)


def _refuse_alpha(alpha: float, *, is_scale: bool, is_setting: bool) -> None:
    """Where an alpha means nothing it may be anything; ai-toolkit writes ten thousand million there, in any dtype."""
    if is_scale and (alpha == 0 or not math.isfinite(alpha)):
        raise AdapterError(f"alpha is {alpha}, expected a finite number other than 0")
    if math.isnan(alpha) or (is_setting and math.isinf(alpha)):
        raise AdapterError(f"alpha is {alpha}, expected a finite number")
