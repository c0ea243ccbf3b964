"""The adapter between two models: a LoRA of what a finetuned model has that its base has not."""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from diffadapt import families
from diffadapt.errors import AdapterError, Fault, naming
from diffadapt.files.write import write
from diffadapt.formats import writer
from diffadapt.formats.document import AdapterState, Document
from diffadapt.on_disk.placing import Parameter, Placed, place_all, targets_for
from diffadapt.on_disk.whole_models import ModelSource, WholeModel, open_model, same_numbers
from diffadapt.progress import with_progress
from diffadapt.runtime.targets import Targets
from diffadapt.to_lora.change import Change
from diffadapt.to_lora.derive import stored_lora
from diffadapt.to_lora.report import Conversion, ConvertedLayer
from diffadapt.to_lora.truncation import check_limits, truncate
from diffadapt.types.layer_spec import LayerSpec
from diffadapt.types.layer_state import LayerState
from diffadapt.types.lora import LORA

_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_SHOWN = 10


class Extraction(Mapping[str, Tensor]):
    """An adapter extracted from two models, as a state dict, with the account of it.

    `pipe.load_adapter` takes it as it is, and `save` writes it to a file.

    Attributes:
        format: the format of the state dict: "diffusers" or, with changes that it cannot express, "kohya".
        conversion: the error of every LoRA layer; see `Conversion`.
        left_out: the differences between the models that are not in the adapter, and why.
    """

    def __init__(self, state: AdapterState, conversion: Conversion, left_out: Sequence[Fault]) -> None:
        self._state = state
        self.conversion = conversion
        self.left_out = tuple(left_out)
        self.format = "diffusers"
        try:
            documents = self._documents(self.format)
        except AdapterError:
            # Norms as a whole, for example.
            self.format = "kohya"
            documents = self._documents(self.format)
        self._tensors = documents[""].tensors

    def __getitem__(self, key: str) -> Tensor:
        return self._tensors[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    @property
    def error(self) -> float:
        """The Frobenius norm of what the LoRA layers miss, divided by the norm of the differences of their weights."""
        return self.conversion.error

    @property
    def layers(self) -> tuple[ConvertedLayer, ...]:
        """The account of every LoRA layer."""
        return self.conversion.layers

    def save(self, path: str | os.PathLike[str], format: str | None = None) -> Path:
        """Write the adapter to a file and return its path; see `pipe.adapters.save`.

        Args:
            path: the file to write.
            format: the format; defaults to `self.format`.

        Raises:
            AdapterError: the format cannot express the adapter. Nothing is written then.
        """
        return write(path, self._documents(format or self.format))

    def _documents(self, format: str) -> dict[str, Document]:
        dump = writer(format).dump
        assert dump is not None
        return dump(self._state)

    def __str__(self) -> str:
        whole = sum(layer.type == "full" for layers in self._state.layers.values() for layer in layers.values())
        lines = [str(self.conversion)]
        if whole:
            lines.append(f"{whole} norms and biases changed as a whole")
        lines += [f"left out: {fault.key}: {fault.reason}" for fault in self.left_out[:_SHOWN]]
        if len(self.left_out) > _SHOWN:
            lines.append(f"... and {len(self.left_out) - _SHOWN} more left out")
        return "\n".join(lines)

    def __repr__(self) -> str:
        used = sum(layer.rank > 0 for layer in self.layers)
        return (
            f"<Extraction: {used} LoRA layers, relative error {self.error:.2%}, {len(self)} tensors, "
            f"{len(self.left_out)} differences left out>"
        )


@torch.no_grad()
def extract(
    base: ModelSource,
    tuned: ModelSource,
    target: str | os.PathLike[str] | None = None,
    *,
    rank: int | None = None,
    energy: float | None = None,
    format: str | None = None,
    dtype: torch.dtype | None = None,
    family: str | None = None,
    models: Mapping[str, nn.Module] | None = None,
) -> Extraction:
    """Return the LoRA between two models: what has to be added to `base` to get `tuned`, as close as its rank allows.

    The change of every layer's weight is truncated by its singular values, which is the closest in the Frobenius norm.
    Changes of norms and biases are kept whole. Layers that are equal once the numbers of one model are rounded to the
    dtype of the other are left out. One layer of either model is in memory at a time.

    Args:
        base, tuned: the models, each a safetensors file, the folder of a saved pipeline or of one of its components, a
            state dict, a module or a pipeline. They may have different dtypes and layouts, such as a single file in the
            original layout and a folder of diffusers.
        target: the file to write; `None` to return the adapter only.
        rank: the largest rank of a layer.
        energy: share of the squared Frobenius norm of each layer's change to keep, in (0, 1]; each layer gets the
            smallest rank that does.
        format: the format to write, as for `pipe.adapters.save`; defaults to "diffusers" or, with changes of norms that
            it cannot express, "kohya".
        dtype: dtype of the adapter; defaults to that of the tuned model's weights, bfloat16 if they are float8 as they
            are, and float32 if they have a scale beside them.
        family: the family of the models ("sdxl", "flux", ...); defaults to the one recognised from the names.
        models: component -> model with the layers of both, also on the meta device; needed only where neither source
            tells them and `family` is not published.

    Raises:
        AdapterError: neither `rank` nor `energy` is given, a source cannot be read, both are not the same kind of
            model, or nothing differs. Nothing is written then.
    """
    check_limits(rank, energy)
    if rank is None and energy is None:
        raise AdapterError("pass rank=, the largest rank of a layer, or energy=, the share of each change to keep")
    if dtype is not None and dtype not in _DTYPES:
        raise AdapterError(f"dtype is {dtype}, expected one of {', '.join(map(str, _DTYPES))}")
    if format is not None:
        writer(format)
    before, after = open_model(base), open_model(tuned)
    known = models or before.models or after.models
    found, targets = targets_for(before, family, known)
    places = place_all(before, targets), place_all(after, targets)
    for whole, placed in zip((before, after), places, strict=True):
        _refuse_other_model(whole, placed, targets)
    layers, rows = _Differences(before, after, places, targets, rank, energy, dtype).layers()
    left_out = [*_one_sided(before, after, places), *_others(before, after, places)]
    if not any(layers.values()):
        more = f"; {left_out[0].key}: {left_out[0].reason}" if left_out else ""
        raise AdapterError(f"{after.origin} does not differ from {before.origin} in any layer{more}")
    layouts = {component: families.layout(targets[component]) for component in layers}
    state = AdapterState(layers, {}, found, layouts)
    extraction = Extraction(state, Conversion("the extracted LoRA", tuple(rows)), left_out)
    if target is not None:
        extraction.save(target, format)
    return extraction


class _Differences:
    """The differences of two models, layer by layer."""

    def __init__(
        self,
        before: WholeModel,
        after: WholeModel,
        places: tuple[Placed, Placed],
        targets: Mapping[str, Targets],
        rank: int | None,
        energy: float | None,
        dtype: torch.dtype | None,
    ) -> None:
        self._models = before, after
        self._places = places
        self._targets = targets
        self._limits = rank, energy
        self._dtype = dtype

    def layers(self) -> tuple[dict[str, dict[str, LayerState]], list[ConvertedLayer]]:
        """Return the content of the adapter by component and path, and the account of its LoRA layers."""
        found: dict[str, dict[str, LayerState]] = {}
        rows: list[ConvertedLayer] = []
        # Parameters of one layer are next to each other in few files.
        paths = dict.fromkeys((p.component, p.path) for p in self._places[0].parameters)
        for component, path in with_progress(paths, "extracting"):
            where = f"{component}.{path}"
            with naming(where):
                layer, row = self._layer(component, path, where)
            if row is not None:
                rows.append(row)
            if layer is not None:
                found.setdefault(component, {})[path] = layer
        return found, rows

    def _layer(self, component: str, path: str, where: str) -> tuple[LayerState | None, ConvertedLayer | None]:
        spec = LayerSpec.of(self._targets[component].modules[path])
        assert spec is not None
        weight, bias = (self._pair(Parameter(component, path, name)) for name in ("weight", "bias"))
        if weight is None and bias is None:
            return None, None
        some = weight or bias
        assert some is not None
        stored_dtype = self._dtype or _dtype_for(some[1])
        changed_bias = None if bias is None else bias[1].double() - bias[0].double()
        if spec.kind not in LORA.layers or weight is None:
            changes = {} if weight is None else {"diff": weight[1].double() - weight[0].double()}
            if changed_bias is not None:
                changes["diff_b"] = changed_bias
            tensors = {name: change.to(stored_dtype) for name, change in changes.items()}
            if not all(tensor.isfinite().all() for tensor in tensors.values()):
                raise AdapterError(f"the change has values that {stored_dtype} cannot hold")
            return layer_state("full", tensors, None, spec), None
        difference = spec.to_stored(weight[1].double() - weight[0].double())
        by_group = difference.reshape(spec.groups, spec.out_features // spec.groups, spec.fan_in)
        change = Change(spec, by_group, changed_bias, stored_dtype)
        tensors, row = stored_lora(where, ("difference",), change, truncate(change, *self._limits))
        if tensors is None:
            return None, row
        return layer_state("lora", tensors, tensors["lora_down"].shape[0], spec), row

    def _pair(self, parameter: Parameter) -> tuple[Tensor, Tensor] | None:
        """Return a parameter before and after, or `None` if it is the same or one of the models does not have it."""
        values: list[Tensor] = []
        for model, placed in zip(self._models, self._places, strict=True):
            stored = placed.parameters.get(parameter)
            if stored is None:
                return None
            values.append(stored.cut(model.read(stored.key)).cpu())
        return None if same_numbers(*values) else (values[0], values[1])


def layer_state(type: str, tensors: Mapping[str, Tensor], rank: int | None, spec: LayerSpec) -> LayerState:
    """Return the content of an adapter layer with the scale 1 on a layer of geometry `spec`."""
    return LayerState(
        type,
        tensors,
        None if rank is None else float(rank),
        rank,
        spec.kernel,
        spec.kind == "embedding",
        inputs=spec.fan_in,
    )


def _dtype_for(tensor: Tensor) -> torch.dtype:
    return tensor.dtype if tensor.dtype in _DTYPES else torch.bfloat16


def _refuse_other_model(whole: WholeModel, placed: Placed, targets: Mapping[str, Targets]) -> None:
    """Raise `AdapterError` if the tensors of a model do not fit the layers of the other."""
    if placed.wrong:
        key, reason = next(iter(placed.wrong.items()))
        raise AdapterError(f"{whole.origin}: {key} {reason}; the two models are not of the same kind")
    if not placed.parameters:
        classes = ", ".join(type(own.model).__name__ for own in targets.values())
        raise AdapterError(f"{whole.origin}: none of its {len(whole.shapes)} tensors is of a layer of {classes}")


def _one_sided(before: WholeModel, after: WholeModel, places: tuple[Placed, Placed]) -> list[Fault]:
    """Return the parameters that only one of the models has; a component that one lacks is one entry."""
    faults: list[Fault] = []
    pairs = ((before, places[0], places[1]), (after, places[1], places[0]))
    components = [{parameter.component for parameter in placed.parameters} for placed in places]
    common = components[0] & components[1]
    for whole, placed, other in pairs:
        lacking = dict.fromkeys(p.component for p in placed.parameters if p.component not in common)
        faults += [Fault(component, f"only {whole.origin} has it") for component in lacking]
        faults += [
            Fault(".".join(parameter), f"only {whole.origin} has it")
            for parameter in placed.parameters
            if parameter.component in common and parameter not in other.parameters
        ]
    return faults


def _others(before: WholeModel, after: WholeModel, places: tuple[Placed, Placed]) -> list[Fault]:
    """Return the tensors that belong to no layer an adapter can be on and differ between the models."""
    faults: list[Fault] = []
    for key in places[0].others:
        if key not in after.shapes:
            continue
        if before.shapes[key] != after.shapes[key]:
            faults.append(Fault(key, f"has shape {before.shapes[key]} before and {after.shapes[key]} after"))
        elif _differ(before, after, key):
            faults.append(Fault(key, "differs, but is no weight, bias or norm of a layer that adapters are on"))
    return faults


def _differ(before: WholeModel, after: WholeModel, key: str) -> bool:
    try:
        return not same_numbers(before.read(key).cpu(), after.read(key).cpu())
    except AdapterError:
        # Counters and other integers say nothing about a weight.
        return False
