"""From the tensors that a file has for one layer to adapter layers of the model."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from diffadapt import families
from diffadapt.adapter import AdapterLayer
from diffadapt.errors import AdapterError
from diffadapt.formats.format import Alphas, Settings
from diffadapt.hooks import compute_dtype, execution_device
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
        kind, layer = self.kind, self.layer
        wide = {name: t if t.dtype == torch.float64 else t.float() for name, t in self.tensors.items()}
        rank = kind.rank(wide) or self.settings.get("rank")
        scale = 1.0 if self.alpha is None or not rank else self.alpha / rank
        bias = kind.delta_bias(wide)
        factors = kind.as_low_rank(wide, layer) if layer.groups == 1 else None
        if factors is not None:
            lora = {"lora_down": factors[0], "lora_up": factors[1], **({} if bias is None else {"lora_bias": bias})}
            return _Content(named("lora"), layer, lora, scale * factors[0].shape[0], {})
        full = {"diff": layer.to_stored(kind.delta_weight(wide, layer) * scale)}
        if bias is not None:
            full["diff_b"] = bias * scale
        return _Content(named("full"), layer, full, None, {})


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
        kind = _identified(group)
        if not group.pieces:
            spec = self._spec(component, path, group.tensors, kind)
            return {path: self._layer(component, spec, self._content(component, kind, spec, group))}
        assert self._targets is not None
        specs = [self._targets[component].spec(piece.path, kind.layers) for piece in group.pieces]
        whole = replace(specs[0], out_features=sum(spec.out_features for spec in specs))
        content = self._content(component, kind, whole, group)
        if self._for_writing == "whole" and path in families.aliases(self._targets[component]):
            return {path: self._layer(component, whole, content)}
        built: dict[str, AdapterLayer] = {}
        start = 0
        for piece, spec in zip(group.pieces, specs, strict=True):
            part = _part(content, piece.rows(start, spec.out_features))
            built[piece.path] = self._layer(component, spec, part)
            start += spec.out_features
        return built

    def _content(self, component: str, kind: AdapterType, spec: LayerSpec, group: Group) -> _Content:
        """The tensors, shaped for `spec`, with the alpha and the settings that the file means for them."""
        tensors = {name: tensor for name, tensor in group.tensors.items() if name != "alpha"}
        fitted = kind.fit(tensors, spec)
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
        return _Content(kind, spec, fitted, alpha, settings)

    def _layer(self, component: str, spec: LayerSpec, content: _Content) -> AdapterLayer:
        tensors = {name: self.settled(component, tensor) for name, tensor in content.tensors.items()}
        return AdapterLayer(content.kind, spec, tensors, content.alpha, settings=content.settings)

    def settled(self, component: str, tensor: Tensor) -> Tensor:
        """A tensor of the file in the dtype and on the device in which an adapter of `component` keeps it."""
        if self._checkpoint.headers_only or self._for_writing is not None:
            return tensor
        dtype, device = self._home(component)
        # A caller's tensors are taken as they are where they fit: a copy is half the time and twice the memory.
        own = tensor.detach().to(device=device, dtype=dtype, copy=self._checkpoint.mapped).contiguous()
        return own.pin_memory() if self._pinned else own

    def _spec(self, component: str, path: str, tensors: Mapping[str, Tensor], kind: AdapterType) -> LayerSpec:
        if self._targets is not None:
            return self._targets[component].spec(path, kind.layers)
        return kind.geometry({name: tensor for name, tensor in tensors.items() if name != "alpha"})

    def _home(self, component: str) -> tuple[torch.dtype, torch.device]:
        if component not in self._homes:
            assert self._targets is not None
            model = self._targets[component]
            device = self._device or execution_device(model.all)
            self._homes[component] = (self._dtype or compute_dtype(model.all), device)
        return self._homes[component]


def _identified(group: Group) -> AdapterType:
    tensors = {name: tensor for name, tensor in group.tensors.items() if name != "alpha"}
    kind = identify(tensors)
    if kind is None or not set(tensors) <= set(kind.tensors):
        unknown = ", ".join(sorted(set(tensors) - set(kind.tensors if kind else ()))) or "only an alpha"
        raise AdapterError(f"{unknown}: no adapter type that can be loaded has these tensors")
    return kind


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
