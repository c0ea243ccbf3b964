"""The second step of a plan: fit the tensors of each layer of a file to the model's layer.

A file may come from anyone, so this step goes by shapes and dtypes alone: it reads nothing but alphas and a few sizes,
and allocates nothing large.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from diffadapt.errors import AdapterError, Fault
from diffadapt.formats.format import Settings
from diffadapt.formats.header_alpha import HeaderAlphas
from diffadapt.formats.verdicts import BESIDE
from diffadapt.loading.content import AlphaSource, Content, Group, bias_name
from diffadapt.runtime import input_width
from diffadapt.runtime.bank import bank_of
from diffadapt.runtime.targets import Targets
from diffadapt.types import identify, oft
from diffadapt.types.adapter_type import AdapterType, Tensors
from diffadapt.types.layer_spec import LayerSpec
from diffadapt.types.tensor_ops import shape_of
from diffadapt.weights.resting import resting_tensor

_MOST_PER_CHANNEL = 2**15
"""Elements of a tensor for each input and output of its layer: a rank that nobody trains, or the largest blocks."""
_LOKR = ("lokr", "dora-lokr")
_OF_PARAMETERS = {"lora_down": "param_down", "lora_up": "param_up"}
_BESIDE = frozenset(BESIDE)
_Shapes: TypeAlias = tuple[tuple[str, torch.Size, torch.dtype], ...]
"""The name, shape and dtype of each tensor of a layer."""
_MOST_IN_A_WEIGHT = 2**40
"""Elements of a layer's weight; without a model, a file may claim to be for a layer of any size."""


@dataclass(frozen=True)
class Fitted:
    """The layers of a file whose tensors fit. Their values have not been read.

    Attributes:
        layers: the group and the contents of each layer: one content, or one for each numbered part.
        faults, notes: see `Plan`.
    """

    layers: list[tuple[Group, list[Content]]] = field(default_factory=list[tuple[Group, list[Content]]])
    faults: list[Fault] = field(default_factory=list[Fault])
    notes: list[Fault] = field(default_factory=list[Fault])

    @property
    def values(self) -> dict[str, dict[str, Tensor]]:
        """Component -> key -> tensor, of everything but alphas. Layers may have tensors in common."""
        found: dict[str, dict[str, Tensor]] = {}
        for group, _ in self.layers:
            found.setdefault(group.component, {}).update(group.values)
        return found


def fit(
    groups: Iterable[Group],
    targets: Mapping[str, Targets] | None,
    alphas: HeaderAlphas,
    settings: Settings,
    *,
    is_oft_of_peft: bool = False,
) -> Fitted:
    """Fit the tensors of each group to their layer. If they do not fit, each of them is a fault.

    Args:
        groups: the tensors of each layer.
        targets: the models' paths, by component; `None` if there is no model, so that the tensors decide the geometry.
        alphas: the alphas in the file's header.
        settings: the settings in the file's metadata; see `Format`.
        is_oft_of_peft: see `suffixes.is_oft_of_peft`.
    """
    fitted = Fitted()
    fitter = _Fitter(targets, alphas, settings, is_oft_of_peft, fitted.notes)
    for group in groups:
        try:
            fitted.layers.append((group, fitter.contents(group)))
        except AdapterError as error:
            fitted.faults.extend(group.faults(error))
    return fitted


class _Fitter:
    """Fits groups of tensors to layers of the models, or to one another if there are no models."""

    def __init__(
        self,
        targets: Mapping[str, Targets] | None,
        alphas: HeaderAlphas,
        settings: Settings,
        is_oft_of_peft: bool,
        notes: list[Fault],
    ) -> None:
        self._targets = targets
        self._alphas = alphas
        self._settings = settings
        self._is_oft_of_peft = is_oft_of_peft
        self._notes = notes
        self._types: dict[_Shapes, AdapterType] = {}
        self._unchanged: dict[tuple[_Shapes, LayerSpec], tuple[str, ...]] = {}

    def contents(self, group: Group) -> list[Content]:
        """Return one content, or one for each part if the group has numbered tensors.

        Raises:
            AdapterError: the tensors belong to no adapter type, or do not fit the layer.
        """
        parts = _numbered(group)
        if not parts:
            return [self._content(group)]
        paths = self._part_paths(group, len(parts))
        return [self._content(replace(part, path=path)) for path, part in zip(paths, parts, strict=True)]

    def _part_paths(self, group: Group, count: int) -> list[str]:
        """Return the path of the model's layer for each of the `count` numbered parts of a layer."""
        paths = [part.path for part in group.parts]
        if self._targets is None:
            paths = [f"{group.path}.{number}" for number in range(count)]
        elif not paths and count == 1:
            paths = [group.path]
        if len(paths) != count or any(part.swapped for part in group.parts):
            raise AdapterError(f"{count} parts found, expected {len(paths) or 1} as in the model")
        return paths

    def _content(self, group: Group) -> Content:
        """Return the content of a group without numbered tensors."""
        tensors = _type_tensors(group)
        if self._targets is not None and not group.parts:
            if group.path not in self._targets[group.component].modules:
                # A bare parameter, which a file may treat as the weight of a layer.
                tensors = {_OF_PARAMETERS.get(name, name): tensor for name, tensor in tensors.items()}
        shapes = tuple((name, tensor.shape, tensor.dtype) for name, tensor in tensors.items())
        adapter_type = self._types.get(shapes)
        if adapter_type is None:
            adapter_type = self._types[shapes] = _identified(tensors)
        spec = self._spec(group, tensors, adapter_type)
        bias = self._bias(group, adapter_type)
        fitted = self._fitted(tensors, shapes, spec, adapter_type)
        _refuse_other_shape(group, "reshape_weight", spec.weight_shape)
        alpha, alpha_from, settings = self._alpha_and_settings(group, adapter_type, adapter_type.rank(fitted))
        rest = _rest(group, spec)
        if rest is not None and adapter_type.stages(fitted, spec) != ("add",):
            raise AdapterError(f"the rest of a weight's change (bias_values) cannot be added to a {adapter_type.name}")
        return Content(
            group.component,
            group.path,
            group.parts,
            adapter_type,
            spec,
            fitted,
            alpha,
            settings,
            alpha_from,
            bias,
            rest,
        )

    def _fitted(
        self, tensors: dict[str, Tensor], shapes: _Shapes, spec: LayerSpec, adapter_type: AdapterType
    ) -> dict[str, Tensor]:
        """Return the tensors as the type has them on a layer of this geometry.

        Most files have the same shapes on many layers. Those that fit without a change are checked once: `fit` goes by
        shapes, apart from integers, which are positions, and single numbers.
        """
        order = self._unchanged.get((shapes, spec))
        if order is not None:
            return {name: tensors[name] for name in order}
        fitted = adapter_type.fit(_with_bias_named(tensors, adapter_type), spec)
        if not self._is_oft_of_peft:
            fitted = oft.of_other_program(fitted, spec.kernel)
        _refuse_unusable(fitted, spec, adapter_type)
        is_unchanged = fitted.keys() == tensors.keys() and all(fitted[name] is tensors[name] for name in tensors)
        if is_unchanged and all(tensor.ndim and tensor.is_floating_point() for tensor in tensors.values()):
            self._unchanged[shapes, spec] = tuple(fitted)
        return fitted

    def _spec(self, group: Group, tensors: Tensors, adapter_type: AdapterType) -> LayerSpec:
        """Return the geometry of the file's layer: of one layer of the model, or of several with all their outputs."""
        if self._targets is None:
            return adapter_type.geometry(tensors)
        targets = self._targets[group.component]
        if not group.parts:
            spec = targets.spec(group.path, adapter_type.layers)
            return input_width.spec_for(targets.model, group.path, spec, adapter_type.columns, tensors)
        specs = [targets.spec(part.path, adapter_type.layers) for part in group.parts]
        return replace(specs[0], out_features=sum(spec.out_features for spec in specs))

    def _bias(self, group: Group, adapter_type: AdapterType) -> Literal["change", "new"] | None:
        """Return `Content.bias`, and check the shape of a new bias."""
        new = group.tensors.get("set_bias")
        if new is None:
            return "change" if "diff_b" in group.tensors and bias_name(adapter_type) != "diff_b" else None
        if self._targets is None:
            # There is no bias to subtract, and the change has the same shape.
            return "change"
        targets = self._targets[group.component]
        host, bank = targets.modules.get(group.path), bank_of(targets.model)
        own = None if host is None else resting_tensor(host, "bias")
        if own is None:
            raise AdapterError("the file has a new bias for a layer that has none")
        if bank is not None and bank.merged:
            merged = ", ".join(bank.merged)
            raise AdapterError(f"the change of the bias cannot be computed while {merged} is merged; unmerge first")
        if own.shape != new.shape:
            raise AdapterError(f"the new bias has shape {shape_of(new)}, expected {shape_of(own)}")
        return "change" if new.is_meta else "new"

    def _alpha_and_settings(
        self, group: Group, adapter_type: AdapterType, rank: int | None
    ) -> tuple[float | None, AlphaSource, dict[str, float]]:
        """Return `Content.alpha`, `Content.alpha_from` and `Content.settings`.

        A tensor takes precedence over the header. A contradiction is noted.
        """
        settings = {**self._settings(group.component, group.written, adapter_type.name), **_marked(group, adapter_type)}
        rank = rank or int(settings.get("rank", 0)) or None
        stored = _number(group.tensors["alpha"]) if "alpha" in group.tensors else None
        is_scale = adapter_type.alpha_is is None and (rank is not None or adapter_type.name in _LOKR)
        header = self._alpha_of_header(group, rank) if is_scale and self._alphas.are_there else None
        alpha = header if stored is None else stored
        if alpha is None:
            return None, "none", settings
        _refuse_alpha(alpha, is_scale=rank is not None, is_setting=adapter_type.alpha_is is not None)
        if adapter_type.alpha_is is not None:
            return None, "none", {**settings, adapter_type.alpha_is: alpha}
        if rank is None:
            if is_scale and alpha != 1:
                self._note(group, f"its alpha ({alpha:g}) has no effect, because both factors of the LoKr are whole")
            return stored, "none", settings
        if stored is not None and header is not None and not math.isclose(stored, header, rel_tol=1e-3):
            self._note(
                group,
                f"its alpha tensor makes the scale {stored / rank:g} and the header makes it {header / rank:g}; the "
                "tensor is used",
            )
        return alpha, "header" if stored is None else "tensor", settings

    def _alpha_of_header(self, group: Group, rank: int | None) -> float | None:
        """Return the alpha of a layer according to the header, and note entries of the header that are not used."""
        paths = tuple(dict.fromkeys((group.written, group.path, *(part.path for part in group.parts))))
        names = any(".lora_A" in key or ".lora_B" in key for key in group.keys.values())
        found = self._alphas.of(group.component, paths, rank or 1, peft_names=names)
        if rank is not None and "alpha" not in group.tensors:
            for note in found.notes:
                self._note(group, note)
        return found.value

    def _note(self, group: Group, note: str) -> None:
        self._notes.append(Fault(f"{group.component}.{group.path}", note))


def _numbered(group: Group) -> list[Group]:
    """Return a group for each part of a layer whose tensors are numbered, or nothing if they are not.

    Names have no numbers in the result. Tensors without a number belong to all parts.

    Raises:
        AdapterError: a number is missing, or a tensor is stored both with and without one.
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
    parts = {
        str(number): Group(group.component, group.path, group.written, tensors=dict(common))
        for number in range(len(numbers))
    }
    for numbered, (name, _, number) in split.items():
        if number in parts:
            parts[number].tensors[name] = group.tensors[numbered]
    return list(parts.values())


def _type_tensors(group: Group) -> dict[str, Tensor]:
    """Return the tensors that belong to an adapter type. A new bias has the name of a change of the bias."""
    tensors = {name: tensor for name, tensor in group.tensors.items() if name not in _BESIDE}
    if "set_bias" in group.tensors:
        tensors["diff_b"] = group.tensors["set_bias"]
    return tensors


def _identified(tensors: Tensors) -> AdapterType:
    """Return the adapter type that the tensors belong to. Raise `AdapterError` if there is none."""
    variants = sorted(name for name in tensors if name.endswith("_oft"))
    if variants:
        raise AdapterError(
            f"{variants[0]} marks a variant of OFT whose rotation is computed in another way, which is not supported; "
            "merge the adapter in the program that made it"
        )
    adapter_type = identify(tensors)
    known = set(adapter_type.tensors) if adapter_type else set[str]()
    if adapter_type is not None and bias_name(adapter_type) in known:
        # Next to low-rank factors, files may store the change of the bias under this name.
        known.add("diff_b")
    if adapter_type is None or not set(tensors) <= known:
        unknown = ", ".join(sorted(set(tensors) - set(adapter_type.tensors if adapter_type else ()))) or "only an alpha"
        raise AdapterError(f"{unknown}: no adapter type that can be loaded has these tensors")
    return adapter_type


def _with_bias_named(tensors: dict[str, Tensor], adapter_type: AdapterType) -> dict[str, Tensor]:
    """Return the tensors with the change of the bias under the name that the type has for it."""
    name = bias_name(adapter_type)
    if "diff_b" not in tensors or name == "diff_b":
        return tensors
    if name in tensors:
        raise AdapterError("the change of its bias is there twice, as diff_b and as the bias of lora_up")
    return {**{other: tensor for other, tensor in tensors.items() if other != "diff_b"}, name: tensors["diff_b"]}


def _marked(group: Group, adapter_type: AdapterType) -> dict[str, float]:
    """Return the settings that a tensor sets to 1 by its presence; see `AdapterType.marks`."""
    if "scaled_oft" in group.tensors and "scaled_oft" not in adapter_type.marks:
        raise AdapterError(f"scaled_oft marks an OFT, but this is a {adapter_type.name}")
    return {name: 1.0 for name in adapter_type.marks if name in group.tensors}


def _rest(group: Group, spec: LayerSpec) -> tuple[Tensor, Tensor] | None:
    """Return `Content.rest`, the part of a weight's change that LyCORIS stores next to the factors it extracts.

    Source: KohakuBlueleaf/LyCORIS f49d30d `lycoris/utils/__init__.py` (`use_bias`).
    """
    names = ("bias_indices", "bias_values", "bias_size")
    if group.tensors.keys().isdisjoint(names):
        return None
    indices, values, size = (group.tensors.get(name) for name in names)
    if indices is None or values is None or size is None:
        raise AdapterError("a sparse change needs all of bias_indices, bias_values and bias_size")
    shape = (spec.out_features, spec.fan_in)
    _refuse_other_shape(group, "bias_size", shape)
    _refuse_unusable({"bias_values": values}, spec, None)
    if math.prod(shape) > _MOST_IN_A_WEIGHT:
        raise AdapterError(f"a sparse change of a weight of shape {shape}, which no layer has")
    if indices.is_complex() or shape_of(indices) != (2, values.numel()) or values.numel() > math.prod(shape):
        raise AdapterError(
            f"bias_indices ({indices.dtype}) have shape {shape_of(indices)}, expected {values.numel()} places in a "
            f"matrix of shape {shape}"
        )
    return indices, values


def _refuse_other_shape(group: Group, name: str, shape: tuple[int, ...]) -> None:
    """Raise `AdapterError` if the file stores a shape as tensor `name` and it is not `shape`."""
    stored = group.tensors.get(name)
    if stored is None:
        return
    if stored.numel() != len(shape):
        raise AdapterError(f"{name} has shape {shape_of(stored)}, expected {len(shape)} numbers")
    if not stored.is_meta and stored.flatten().tolist() != list(shape):
        raise AdapterError(f"{name} is {stored.flatten().tolist()}, expected {list(shape)}")


def _refuse_unusable(tensors: Tensors, spec: LayerSpec, adapter_type: AdapterType | None) -> None:
    """Raise `AdapterError` if a tensor is not floating-point or has more elements than that of any adapter."""
    most = _MOST_PER_CHANNEL * (spec.out_features + spec.fan_in)
    for name, tensor in tensors.items():
        is_fixed = adapter_type is not None and name in adapter_type.fixed
        if not tensor.is_floating_point() and not (is_fixed and tensor.dtype in (torch.int32, torch.int64)):
            raise AdapterError(f"{name} has dtype {tensor.dtype}, expected a floating-point one")
        if tensor.numel() > most and not (adapter_type is not None and name in adapter_type.shared):
            raise AdapterError(f"{name} has shape {shape_of(tensor)}, expected at most {most} elements")


def _number(tensor: Tensor) -> float:
    """Return the value of an alpha."""
    if tensor.numel() != 1 or tensor.is_meta:
        raise AdapterError(f"alpha has shape {shape_of(tensor)}, expected a single number")
    if tensor.is_complex():
        raise AdapterError(f"alpha has dtype {tensor.dtype}, expected a real number")
    return float(tensor)


def _refuse_alpha(alpha: float, *, is_scale: bool, is_setting: bool) -> None:
    """Raise `AdapterError` for an alpha that the adapter cannot be computed with.

    An alpha without effect may have almost any value: ai-toolkit writes 1e10 there, which is infinite in float16.
    """
    if is_scale and (alpha == 0 or not math.isfinite(alpha)):
        raise AdapterError(f"alpha is {alpha}, expected a finite number other than 0")
    if math.isnan(alpha) or (is_setting and math.isinf(alpha)):
        raise AdapterError(f"alpha is {alpha}, expected a finite number")
