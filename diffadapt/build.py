"""From the tensors that a file has for one layer to adapter layers of the model."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from diffadapt.adapter import AdapterLayer
from diffadapt.errors import AdapterError
from diffadapt.formats.format import Alphas, Settings
from diffadapt.hooks import compute_dtype, execution_device
from diffadapt.io import Checkpoint
from diffadapt.kind import AdapterType, Tensors
from diffadapt.layer import LayerSpec, pick
from diffadapt.pieces import Piece
from diffadapt.targets import Targets
from diffadapt.types import identify, named


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
    """What a file says of one of its layers, checked."""

    kind: AdapterType
    tensors: Tensors
    alpha: float | None
    settings: Mapping[str, float]


class Builder:
    """Builds adapter layers from groups of tensors; knows each component's dtype and device."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        targets: Mapping[str, Targets] | None,
        alphas: Alphas,
        settings: Settings,
        dtype: torch.dtype | None,
    ) -> None:
        self._checkpoint = checkpoint
        self._targets = targets
        self._alphas = alphas
        self._settings = settings
        self._dtype = dtype
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
        built: dict[str, AdapterLayer] = {}
        start = 0
        for piece, spec in zip(group.pieces, specs, strict=True):
            part = _part(content, whole, piece.rows(start, spec.out_features))
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
        return _Content(kind, fitted, alpha, settings)

    def _layer(self, component: str, spec: LayerSpec, content: _Content) -> AdapterLayer:
        tensors = content.tensors
        if not self._checkpoint.headers_only:
            dtype, device = self._home(component)
            # A caller's tensors are taken as they are where they fit: a copy is half the time and twice the memory.
            tensors = {
                name: tensor.detach().to(device=device, dtype=dtype, copy=self._checkpoint.mapped).contiguous()
                for name, tensor in tensors.items()
            }
        return AdapterLayer(content.kind, spec, tensors, content.alpha, settings=content.settings)

    def _spec(self, component: str, path: str, tensors: Mapping[str, Tensor], kind: AdapterType) -> LayerSpec:
        if self._targets is not None:
            return self._targets[component].spec(path, kind.layers)
        return kind.geometry({name: tensor for name, tensor in tensors.items() if name != "alpha"})

    def _home(self, component: str) -> tuple[torch.dtype, torch.device]:
        if component not in self._homes:
            assert self._targets is not None
            model = self._targets[component]
            self._homes[component] = (self._dtype or compute_dtype(model.all), execution_device(model.all))
        return self._homes[component]


def _identified(group: Group) -> AdapterType:
    tensors = {name: tensor for name, tensor in group.tensors.items() if name != "alpha"}
    kind = identify(tensors)
    if kind is None or not set(tensors) <= set(kind.tensors):
        unknown = ", ".join(sorted(set(tensors) - set(kind.tensors if kind else ()))) or "only an alpha"
        raise AdapterError(f"{unknown}: no adapter type that can be loaded has these tensors")
    return kind


def _part(content: _Content, layer: LayerSpec, rows: Sequence[range]) -> _Content:
    """What belongs to some rows of a layer; as a dense change where the tensors cannot be taken apart."""
    kind, tensors = content.kind, content.tensors
    cut = kind.rows(tensors, layer, rows)
    if cut is not None:
        rank, was = kind.rank(cut), kind.rank(tensors)
        alpha = content.alpha
        if alpha is not None and rank and was:
            # A part may do with fewer ranks than the whole, at the same scale.
            alpha = alpha * rank / was
        return replace(content, tensors=cut, alpha=alpha)
    if kind.is_prepared:
        raise AdapterError(f"its {kind.name} joins outputs that are in different layers of the model")
    wide = {name: tensor.float() for name, tensor in tensors.items()}
    rank = kind.rank(tensors) or content.settings.get("rank")
    scale = 1.0 if content.alpha is None or not rank else content.alpha / rank
    change = kind.delta_weight(wide, layer) * scale
    full = named("full")
    diff = pick(change, rows)
    return _Content(full, full.fit({"diff": diff}, _of_rows(layer, rows)), None, {})


def _of_rows(layer: LayerSpec, rows: Sequence[range]) -> LayerSpec:
    """The layer that has only these rows of the weight."""
    return replace(layer, out_features=sum(len(r) for r in rows))


def _alpha(tensor: Tensor, rank: int | None) -> float | None:
    if tensor.numel() != 1 or tensor.device.type == "meta":
        raise AdapterError(f"alpha has shape {tuple(tensor.shape)}, expected a single number")
    alpha = float(tensor)
    if rank is not None and (alpha == 0 or not math.isfinite(alpha)):
        raise AdapterError(f"alpha is {alpha}, expected a finite number other than 0")
    return alpha
