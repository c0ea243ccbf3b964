"""Where the parameters of a model are stored in a file of any layout."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from diffadapt import families
from diffadapt.errors import AdapterError
from diffadapt.families.fused_parts import FusedPart
from diffadapt.families.published import published
from diffadapt.formats import prefixes
from diffadapt.formats.names import Names
from diffadapt.formats.verdicts import Place
from diffadapt.on_disk import openclip
from diffadapt.on_disk.whole_models import WholeModel, carriers, same_numbers
from diffadapt.runtime.targets import Targets
from diffadapt.types.layer_spec import LayerSpec

_SINGLE_FILE = {
    "model.diffusion_model.": "diffusion_model.",
    "cond_stage_model.transformer.": "clip_l.transformer.",
    "conditioner.embedders.0.transformer.": "clip_l.transformer.",
}
"""Prefix in a single file -> prefix that adapters have for the same model."""

_PACKED = {"in_proj_weight": ("in_proj", "weight"), "in_proj_bias": ("in_proj", "bias")}
_BARE = ("positional_embedding", "text_projection")


class Parameter(NamedTuple):
    """A parameter of a model.

    Attributes:
        component: the component of the model.
        path: path of its layer.
        name: "weight" or "bias".
    """

    component: str
    path: str
    name: str


@dataclass(frozen=True)
class Stored:
    """Where a parameter is stored.

    Attributes:
        key: the tensor.
        shape: shape of the parameter in the model.
        rows: the rows of the tensor that it consists of, in their order; empty for all.
        is_transposed: whether the tensor has to be transposed.
    """

    key: str
    shape: tuple[int, ...]
    rows: tuple[range, ...] = ()
    is_transposed: bool = False

    def cut(self, tensor: Tensor) -> Tensor:
        """Return the parameter out of the tensor `key`."""
        found = tensor.t() if self.is_transposed else tensor
        if self.rows:
            found = torch.cat([found[rows.start : rows.stop] for rows in self.rows])
        return found.reshape(self.shape)

    def put_(self, tensor: Tensor, value: Tensor) -> None:
        """Write the parameter into the tensor `key`, the inverse of `cut`."""
        target = tensor.t() if self.is_transposed else tensor
        start = 0
        for rows in self.rows or (range(target.shape[0]),):
            part = target[rows.start : rows.stop]
            part.copy_(value[start : start + len(rows)].reshape(part.shape))
            start += len(rows)


@dataclass
class Placed:
    """The tensors of a whole model, resolved against modules.

    Attributes:
        parameters: the parameters of layers that adapters can be on -> where they are stored.
        twins: key -> the key of an equal tensor that is the same parameter, as files have it for tied weights.
        others: the keys of all other tensors.
        wrong: key -> why a tensor of a layer does not fit it.
    """

    parameters: dict[Parameter, Stored] = field(default_factory=dict[Parameter, Stored])
    twins: dict[str, str] = field(default_factory=dict[str, str])
    others: list[str] = field(default_factory=list[str])
    wrong: dict[str, str] = field(default_factory=dict[str, str])


def targets_for(
    whole: WholeModel, family: str | None, models: Mapping[str, nn.Module] | None
) -> tuple[str | None, dict[str, Targets]]:
    """Return the family of a whole model, and the layers that its tensors belong to, by component.

    Args:
        family, models: see `extract`.

    Raises:
        AdapterError: neither the source nor the names of its tensors tell which model it is.
    """
    models = models or whole.models
    if models is not None:
        chosen = carriers(models) or dict(models)
        return family or families.of_models(chosen), {name: Targets(model) for name, model in chosen.items()}
    family = family or families.of_file(_as_changes(whole.shapes))
    if family is None:
        raise AdapterError(
            f"{whole.origin}: its names do not tell which model it is; pass family= or models=, or the folder with its "
            "config.json"
        )
    best: dict[str, Targets] = {}
    most = -1
    for candidate in published(family):
        targets = {name: Targets(model) for name, model in candidate.items()}
        fitting = len(place_all(whole, targets).parameters)
        if fitting > most:
            best, most = targets, fitting
    return family, best


def place_all(whole: WholeModel, targets: Mapping[str, Targets]) -> Placed:
    """Return where the parameters of the models are stored in a whole model.

    Args:
        targets: the layers of the models, by component.
    """
    placed, names = Placed(), Names(targets)
    for key, shape in whole.shapes.items():
        written, name = _layer_and_name(key)
        parts = _parts(written, targets, names) if name in ("weight", "bias") else None
        if parts is None:
            placed.others.append(key)
            continue
        component, found, is_transposed = parts
        fitted = _fit(component, found, is_transposed, key, name, shape, targets[component])
        if isinstance(fitted, str):
            placed.wrong[key] = fitted
            continue
        if not fitted:
            placed.others.append(key)
        for parameter, stored in fitted.items():
            other = placed.parameters.setdefault(parameter, stored).key
            if other == key:
                continue
            if same_numbers(whole.read(key), whole.read(other)):
                placed.twins[key] = other
            else:
                placed.wrong[key] = f"is another value of the same parameter as {other}"
    return placed


def _layer_and_name(key: str) -> tuple[str, str]:
    path, _, name = key.rpartition(".")
    if name in _PACKED:
        layer, name = _PACKED[name]
        return f"{path}.{layer}", name
    if name in _BARE:
        return key, "weight"
    return path, name


def _parts(written: str, targets: Mapping[str, Targets], names: Names) -> tuple[str, Sequence[FusedPart], bool] | None:
    """Return the component and the layers that a layer of a file consists of, and whether its weight is transposed."""
    for prefix, component in openclip.PREFIXES.items():
        if written.startswith(prefix):
            path = written.removeprefix(prefix)
            own = targets.get(component)
            found = [own.resolve(name) if own else None for name in openclip.in_transformers(path)]
            paths = [path for path in found if path is not None]
            if not paths or len(paths) < len(found):
                return None
            return component, [FusedPart(path) for path in paths], path in openclip.TRANSPOSED
    for prefix, other in _SINGLE_FILE.items():
        if written.startswith(prefix):
            written = other + written.removeprefix(prefix)
    verdict = prefixes.place(written, "weight", names)
    if not isinstance(verdict, Place) or verdict.component not in targets:
        return None
    parts = verdict.parts or (FusedPart(verdict.path),)
    if any(part.path not in targets[verdict.component].modules for part in parts):
        # A bare parameter.
        return None
    return verdict.component, parts, False


def _fit(
    component: str,
    parts: Sequence[FusedPart],
    is_transposed: bool,
    key: str,
    name: str,
    shape: tuple[int, ...],
    targets: Targets,
) -> dict[Parameter, Stored] | str:
    """Return the parameters that the tensor `key` consists of, or why it does not fit its layers.

    There are none if adapters cannot be on these layers.
    """
    specs = [spec for part in parts if (spec := LayerSpec.of(targets.modules[part.path])) is not None]
    if len(specs) < len(parts):
        return {}
    written = tuple(reversed(shape)) if is_transposed else shape
    shapes = [_shape_of(spec, name) for spec in specs]
    rows = sum(shape[0] for shape in shapes)
    if math.prod(written) != sum(map(math.prod, shapes)) or written[:1] != (rows,):
        return f"has shape {shape}, expected {(rows, *shapes[0][1:])} for {component}.{parts[0].path}"
    found: dict[Parameter, Stored] = {}
    start = 0
    for part, own in zip(parts, shapes, strict=True):
        ranges = part.rows(start, own[0]) if len(parts) > 1 or part.swapped else ()
        found[Parameter(component, part.path, name)] = Stored(key, own, ranges, is_transposed)
        start += own[0]
    return found


def _shape_of(spec: LayerSpec, name: str) -> tuple[int, ...]:
    """Return the shape of a parameter in the model's own layout."""
    if name == "bias":
        return (spec.out_features,)
    return tuple(reversed(spec.weight_shape)) if spec.transposed else spec.weight_shape


def _as_changes(shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield keys and shapes as a file of whole changes has them, by which families are recognised."""
    for key, shape in shapes.items():
        path, _, name = key.rpartition(".")
        yield (f"{path}.diff" if name == "weight" else key), shape
