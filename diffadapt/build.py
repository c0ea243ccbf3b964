"""From the tensors that a file has for one layer to adapter layers of the model."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from diffadapt import families, widen
from diffadapt.adapter import AdapterLayer
from diffadapt.attach import bank_of
from diffadapt.errors import AdapterError
from diffadapt.formats.format import BESIDE, Alphas, Settings
from diffadapt.hooks import compute_dtype, decoded, execution_device, resting_tensor
from diffadapt.io import Checkpoint
from diffadapt.kind import AdapterType, Tensors
from diffadapt.layer import LayerSpec
from diffadapt.pieces import Piece
from diffadapt.targets import Targets
from diffadapt.types import identify, named

ForWriting: TypeAlias = Literal["whole", "split"]


@dataclass
class Group:
    """The tensors that a file has for one layer, by canonical name, and the keys they came under.

    Attributes:
        written: the layer's path as the file has it.
        pieces: see `Place.pieces`.
    """

    written: str
    pieces: tuple[Piece, ...] = ()
    keys: dict[str, str] = field(default_factory=dict[str, str])
    tensors: dict[str, Tensor] = field(default_factory=dict[str, Tensor])


@dataclass(frozen=True)
class _Content:
    """What a file says of one of its layers, checked.

    Attributes:
        layer: that the tensors have the shapes for.
    """

    kind: AdapterType
    layer: LayerSpec
    tensors: Tensors
    alpha: float | None
    settings: Mapping[str, float]

    @cached_property
    def plain(self) -> "_Content":
        """The same additive change as a LoRA or, where that is no saving, as the matrix; in float32 or wider."""
        kind, layer, scale, wide = self.kind, self.layer, self.scale, self._wide
        bias = kind.delta_bias(wide)
        factors = kind.as_low_rank(wide, layer) if layer.groups == 1 else None
        if factors is not None:
            lora = {"lora_down": factors[0], "lora_up": factors[1], **({} if bias is None else {"lora_bias": bias})}
            return _Content(named("lora"), layer, lora, scale * factors[0].shape[0], {})
        return self.with_rest(torch.zeros(()))

    def with_rest(self, rest: Tensor) -> "_Content":
        """The same additive change plus another, canonical one at the same scale, as the matrix."""
        kind, layer, scale, wide = self.kind, self.layer, self.scale, self._wide
        bias = kind.delta_bias(wide)
        full = {"diff": layer.to_stored((kind.delta_weight(wide, layer) + rest) * scale)}
        if bias is not None:
            full["diff_b"] = bias * scale
        return _Content(named("full"), layer, full, None, {})

    @property
    def scale(self) -> float:
        """`alpha / rank`."""
        rank = self.kind.rank(self.tensors) or self.settings.get("rank")
        return 1.0 if self.alpha is None or not rank else self.alpha / rank

    @property
    def _wide(self) -> Tensors:
        return {name: t if t.dtype == torch.float64 else t.float() for name, t in self.tensors.items()}


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

    def build(self, component: str, path: str, group: Group) -> dict[str, AdapterLayer]:
        """The adapter layers, by path of the model: one, or one for every piece.

        Raises:
            AdapterError: the tensors are of no type, do not belong to the layer, or cannot be taken apart.
        """
        parts = _numbered(group)
        if parts:
            return self._parts(component, path, group, parts)
        if "set_bias" in group.tensors:
            group = replace(group, tensors=self._with_change_of_bias(component, path, group))
        kind = _identified(group)
        if not group.pieces:
            spec = self._spec(component, path, _of_type(group), kind)
            return {path: self._layer(component, path, spec, self._content(component, kind, spec, group))}
        assert self._targets is not None
        specs = [self._targets[component].spec(piece.path, kind.layers) for piece in group.pieces]
        whole = replace(specs[0], out_features=sum(spec.out_features for spec in specs))
        content = self._content(component, kind, whole, group)
        if self._for_writing == "whole" and path in families.aliases(self._targets[component]):
            return {path: self._layer(component, path, whole, content)}
        built: dict[str, AdapterLayer] = {}
        start = 0
        for piece, spec in zip(group.pieces, specs, strict=True):
            part = _part(content, piece.rows(start, spec.out_features))
            built[piece.path] = self._layer(component, piece.path, spec, part)
            start += spec.out_features
        return built

    def _with_change_of_bias(self, component: str, path: str, group: Group) -> dict[str, Tensor]:
        """The tensors with the change of the model's own bias in place of a new one."""
        tensors = {name: tensor for name, tensor in group.tensors.items() if name != "set_bias"}
        new = group.tensors["set_bias"]
        if self._targets is None or new.is_meta:
            return {**tensors, "diff_b": new}
        targets = self._targets[component]
        host, bank = targets.modules.get(path), bank_of(targets.model)
        if host is None or resting_tensor(host, "bias") is None:
            raise AdapterError("the file has a new bias for a layer that has none")
        if bank is not None and bank.merged:
            raise AdapterError(f"its change of the bias cannot be told while {', '.join(bank.merged)} is merged")
        own = decoded(host, "bias")
        if own.shape != new.shape:
            raise AdapterError(f"the new bias has shape {tuple(new.shape)}, expected {tuple(own.shape)}")
        return {**tensors, "diff_b": new.to(own) - own}

    def _parts(self, component: str, path: str, group: Group, parts: Sequence[Group]) -> dict[str, AdapterLayer]:
        """A layer of the file with tensors of their own for all of its pieces."""
        paths = [piece.path for piece in group.pieces]
        if self._targets is None:
            paths = [f"{path}.{number}" for number in range(len(parts))]
        elif not paths and len(parts) == 1:
            paths = [path]
        if len(paths) != len(parts) or any(piece.swapped for piece in group.pieces):
            raise AdapterError(f"{len(parts)} parts found, expected {len(paths) or 1} as in the model")
        built: dict[str, AdapterLayer] = {}
        for at, part in zip(paths, parts, strict=True):
            built.update(self.build(component, at, part))
        return built

    def _content(self, component: str, kind: AdapterType, spec: LayerSpec, group: Group) -> _Content:
        """The tensors, shaped for `spec`, with the alpha and the settings that the file means for them."""
        tensors = _of_type(group)
        change = None if "diff_b" in kind.tensors else tensors.pop("diff_b", None)
        if change is not None and tensors.setdefault("lora_bias", change) is not change:
            raise AdapterError("the change of its bias is there twice, as diff_b and beside lora_up")
        fitted = kind.fit(tensors, spec)
        _check_shape(group, spec)
        # Not before: a type may read a flag.
        for name, tensor in fitted.items():
            if not tensor.is_floating_point():
                raise AdapterError(f"{name} has dtype {tensor.dtype}, expected a floating-point one")
        rank = kind.rank(fitted)
        settings = dict(self._settings(component, group.written, kind.name))
        alpha = _alpha(group.tensors["alpha"], rank) if "alpha" in group.tensors else None
        if alpha is None and (rank is not None or "rank" in settings):
            alpha = self._alphas(component, group.written, rank or int(settings["rank"]))
        if alpha is not None and kind.alpha_is is not None:
            settings[kind.alpha_is], alpha = alpha, None
        content = _Content(kind, spec, fitted, alpha, settings)
        if change is not None and content.scale != 1:
            # It is the change itself, while a LoRA's bias is scaled like its factors.
            fitted["lora_bias"] = fitted["lora_bias"].double().div(content.scale).to(change.dtype)
        rest = _rest(group, spec)
        if rest is None:
            return content
        if kind.stages(fitted, spec) != ("add",):
            raise AdapterError(f"the rest of a weight's change (bias_values) cannot be added to a {kind.name}")
        return content.with_rest(rest)

    def _layer(self, component: str, path: str, spec: LayerSpec, content: _Content) -> AdapterLayer:
        tensors = {name: self.settled(component, tensor) for name, tensor in content.tensors.items()}
        own = None if self._targets is None else widen.own_inputs(self._targets[component].model, path)
        widens = own is not None and spec.in_features > own
        return AdapterLayer(content.kind, spec, tensors, content.alpha, settings=content.settings, widens=widens)

    def settled(self, component: str, tensor: Tensor) -> Tensor:
        """A tensor of the file in the dtype and on the device in which an adapter of `component` keeps it."""
        if self._checkpoint.headers_only or self._for_writing is not None:
            return tensor
        dtype, device = self._home(component)
        # A caller's tensors are taken as they are where they fit: a copy is half the time and twice the memory.
        own = tensor.detach().to(device=device, dtype=dtype, copy=self._checkpoint.mapped).contiguous()
        return own.pin_memory() if self._pinned else own

    def _spec(self, component: str, path: str, tensors: Mapping[str, Tensor], kind: AdapterType) -> LayerSpec:
        if self._targets is None:
            return kind.geometry(tensors)
        targets = self._targets[component]
        return widen.spec_for(targets.model, path, targets.spec(path, kind.layers), kind.columns, tensors)

    def _home(self, component: str) -> tuple[torch.dtype, torch.device]:
        if component not in self._homes:
            assert self._targets is not None
            model = self._targets[component]
            device = self._device or execution_device(model.all)
            self._homes[component] = (self._dtype or compute_dtype(model.all), device)
        return self._homes[component]


def _identified(group: Group) -> AdapterType:
    tensors = _of_type(group)
    kind = identify(tensors)
    # The change of a bias may stand beside the factors for the weight, which have a place for it.
    known = {*kind.tensors, *({"diff_b"} if "lora_bias" in kind.tensors else ())} if kind else set[str]()
    if kind is None or not set(tensors) <= known:
        unknown = ", ".join(sorted(set(tensors) - set(kind.tensors if kind else ()))) or "only an alpha"
        raise AdapterError(f"{unknown}: no adapter type that can be loaded has these tensors")
    return kind


def _numbered(group: Group) -> list[Group]:
    """For a group with numbered tensors: one without numbers for every part, with what all have in common.

    Raises:
        AdapterError: a number is missing.
    """
    split = {name: name.rpartition(".") for name in group.tensors if "." in name}
    numbers = {int(number) for _, _, number in split.values()}
    if numbers != set(range(len(numbers))):
        raise AdapterError(f"parts {', '.join(map(str, sorted(numbers)))} found, expected 0 to {max(numbers)}")
    common = {name: tensor for name, tensor in group.tensors.items() if name not in split}
    return [
        Group(
            group.written,
            tensors={**common, **{split[n][0]: group.tensors[n] for n in split if split[n][2] == str(number)}},
        )
        for number in sorted(numbers)
    ]


def _of_type(group: Group) -> dict[str, Tensor]:
    """The tensors that a type has names for."""
    return {name: tensor for name, tensor in group.tensors.items() if name not in BESIDE}


def _check_shape(group: Group, layer: LayerSpec) -> None:
    """ComfyUI's word for the shape that a weight has to be filled up to, which the other tensors have anyway."""
    shape = group.tensors.get("reshape_weight")
    if shape is not None and not shape.is_meta and shape.flatten().tolist() != list(layer.weight_shape):
        raise AdapterError(f"reshape_weight is {shape.flatten().tolist()}, expected {list(layer.weight_shape)}")


def _rest(group: Group, layer: LayerSpec) -> Tensor | None:
    """What LyCORIS' extraction keeps of a weight's change beside the factors, or `None`: a sparse matrix.

    Source: KohakuBlueleaf/LyCORIS f49d30d `lycoris/utils/__init__.py` (`use_bias`).
    """
    found = [group.tensors.get(f"bias_{name}") for name in ("indices", "values", "size")]
    if all(tensor is None for tensor in found):
        return None
    indices, values, size = found
    if indices is None or values is None or size is None:
        raise AdapterError("a sparse change needs all of bias_indices, bias_values and bias_size")
    shape = (layer.out_features, layer.fan_in)
    if indices.is_meta or values.is_meta or size.is_meta:
        return torch.empty(layer.weight_shape, device="meta")
    if tuple(size.flatten().tolist()) != shape:
        raise AdapterError(f"bias_size is {size.flatten().tolist()}, expected {list(shape)}")
    places = indices.long()
    inside = places.ndim == 2 and places.shape == (2, values.numel()) and not (places < 0).any()
    if not inside or (places >= torch.tensor(shape, device=places.device).view(2, 1)).any():
        raise AdapterError(f"bias_indices are no {values.numel()} places in a matrix of shape {shape}")
    rest = torch.zeros(shape, device=values.device)
    return rest.index_put((places[0], places[1]), values.flatten().float(), accumulate=True).view(layer.weight_shape)


def _part(content: _Content, rows: Sequence[range]) -> _Content:
    """What belongs to some rows of the layer; as a plain change of them where the tensors cannot be taken apart."""
    kind, tensors, layer = content.kind, content.tensors, content.layer
    stages = kind.stages(tensors, layer)
    limit = content.settings.get(kind.alpha_is or "", 0.0)
    if limit > 0 and "output" in stages and sum(map(len, rows)) < layer.out_features:
        raise AdapterError(f"its {kind.alpha_is} is over all outputs, which are in different layers of the model")
    cut = kind.rows(tensors, layer, rows)
    if cut is None and stages == ("add",):
        return _part(content.plain, rows)
    if cut is None:
        raise AdapterError(f"its {kind.name} joins outputs that are in different layers of the model")
    rank, was = kind.rank(cut), kind.rank(tensors)
    alpha = content.alpha
    if alpha is not None and rank and was:
        # A part may do with fewer ranks than the whole, at the same scale.
        alpha = alpha * rank / was
    # What the parts have in common becomes a parameter of each.
    own = {name: tensor.clone() if tensor is tensors.get(name) else tensor for name, tensor in cut.items()}
    return replace(content, tensors=own, alpha=alpha)


def _alpha(tensor: Tensor, rank: int | None) -> float | None:
    if tensor.numel() != 1 or tensor.device.type == "meta":
        raise AdapterError(f"alpha has shape {tuple(tensor.shape)}, expected a single number")
    alpha = float(tensor)
    if rank is not None and (alpha == 0 or not math.isfinite(alpha)):
        raise AdapterError(f"alpha is {alpha}, expected a finite number other than 0")
    return alpha
