"""What becomes of a file: loaded here, saved in every format and loaded again, and loaded in plain diffusers."""

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from diffusers.loaders.lora_base import LoraBaseMixin
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from diffadapt import AdapterError
from diffadapt.files.checkpoint import Location
from diffadapt.formats import FORMATS, ONETRAINER
from diffadapt.management.manager import Adapters
from diffadapt.management.owner import Owner
from diffadapt.types.layer_state import LayerState
from tests.support.matrix import File, Where, Workbench, file_of
from tests.support.silence import ignored
from tests.support.versions import diffusers

WRITERS = tuple(sorted(format.name for format in (*FORMATS, ONETRAINER) if format.dump is not None))


@dataclass
class RoundTrips:
    """What becomes of an adapter that is saved in every format and loaded again.

    Attributes:
        saved: The formats from which it came back bit for bit.
        joined: The formats from which it came back with other factors, but the same weights.
        changed: The formats from which it came back different, with the difference.
        refused: The formats that cannot express it, with the reason.
    """

    saved: tuple[str, ...] = ()
    joined: tuple[str, ...] = ()
    changed: dict[str, str] = field(default_factory=dict[str, str])
    refused: dict[str, str] = field(default_factory=dict[str, str])


@dataclass
class Outcome:
    """One row of the matrix.

    Attributes:
        family: The name of the family.
        dialect: The name of the dialect.
        kind: The name of the kind, in `matrix.KINDS`.
        layers: The number of layers of the models that the file changes.
        tensors: The number of tensors in the file.
        loads: "yes", or why not.
        equals: "yes", or which outputs or weights differ.
        trips: The round trips through all formats.
        diffusers: What plain diffusers makes of the file.
    """

    family: str
    dialect: str
    kind: str
    layers: int
    tensors: int
    loads: str
    equals: str = ""
    trips: RoundTrips = field(default_factory=RoundTrips)
    diffusers: str = ""


def judge(bench: Workbench, file: File, folder: Path, *, peer: bool = True) -> Outcome:
    """Load a file, compare it with the formulas, save it and load it again, and, with `peer`, load it in diffusers."""
    path = file.write(folder / "file")
    outcome = Outcome(bench.name, file.dialect.name, file.kind, len(file.wanted), len(file.tensors), "yes")
    if peer:
        outcome.diffusers = _in_diffusers(bench, file, path, folder / "tall")
    manager = bench.manager
    try:
        report = manager.load(path, "a")
    except AdapterError as error:
        outcome.loads = f"refused: {reason(error)}"
        return outcome
    if (report.format, report.used, report.unused) != (file.dialect.format, len(file.tensors), []):
        outcome.loads = f"as {report.format}, {report.used} of {len(file.tensors)} tensors"
        return outcome
    outcome.equals = _equals(bench, file)
    manager.merge("a")
    if outcome.equals == "yes":
        wrong = [
            where
            for where, wanted in file.wanted.items()
            if not wanted.is_weight(bench.models[where[0]].get_submodule(where[1]).weight)
        ]
        outcome.equals = f"{len(wrong)} merged weights differ, {'.'.join(wrong[0])}" if wrong else "yes"
    manager.unmerge()
    outcome.trips = round_trips(bench, file, folder)
    manager.clear()
    return outcome


def _equals(bench: Workbench, file: File) -> str:
    wrong: list[str] = []
    for where, wanted in file.wanted.items():
        with torch.no_grad():
            found = bench.models[where[0]].get_submodule(where[1])(bench.input(where))
        if wanted.is_base(found) or not wanted.is_output(found):
            wrong.append(".".join(where))
    return f"{len(wrong)} of {len(file.wanted)} outputs differ, {wrong[0]}" if wrong else "yes"


_tripped: WeakKeyDictionary[Workbench, dict[str, RoundTrips]] = WeakKeyDictionary()


def round_trips(bench: Workbench, file: File, folder: Path, formats: Sequence[str] = WRITERS) -> RoundTrips:
    """Save the adapter "a" in every format, load it again, and compare it bit for bit.

    Dialects differ in names only, so many files contain the same adapter. Each adapter is saved once.
    """
    before, known = states(bench.loaded), _tripped.setdefault(bench, {})
    content = _fingerprint(before)
    if content not in known:
        known[content] = _round_trips(bench, file, before, folder, formats)
    return known[content]


def _round_trips(
    bench: Workbench, file: File, before: Mapping[Where, LayerState], folder: Path, formats: Sequence[str]
) -> RoundTrips:
    written: dict[str, Path] = {}
    found = RoundTrips()
    for format in formats:
        target = folder / format / ("" if format == "peft" else "saved.safetensors")
        try:
            bench.loaded.save("a", target, format)
        except AdapterError as error:
            found.refused[format] = reason(error)
        else:
            written[format] = target
    for format, target in written.items():
        try:
            _load(bench, target)
        except AdapterError as error:
            found.changed[format] = f"not loaded: {reason(error)}"
            continue
        difference = _difference(before, states(bench.loaded))
        if difference is None:
            found.saved += (format,)
        elif _equals(bench, file) == "yes":
            found.joined += (format,)
        else:
            found.changed[format] = difference
    return found


def _fingerprint(found: Mapping[Where, LayerState]) -> str:
    digest = hashlib.sha256()
    for where, layer in found.items():
        digest.update(repr((where, layer.type, layer.scale, sorted(layer.settings.items()))).encode())
        for name, tensor in layer.tensors.items():
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.detach().numpy().tobytes())
    return digest.hexdigest()


def _load(bench: Workbench, target: Path) -> None:
    """Load a saved adapter as "a"; PEFT has a folder for each component."""
    manager = bench.manager
    folders = sorted(path.name for path in target.iterdir() if path.is_dir()) if target.is_dir() else []
    if not folders:
        manager.load(target, "a")
    for folder in folders:
        # Loaded one after the other into the same manager, they would need different names.
        part = Adapters(Owner(lambda folder=folder: {folder: bench.models[folder]}))
        part.load(target, "a", where=Location(subfolder=folder))


def states(manager: Adapters) -> dict[Where, LayerState]:
    """Return the content of the adapter "a" by layer."""
    return {
        (component, path): layer.state
        for component, adapter in manager["a"].components.items()
        for path, layer in adapter.layers.items()
    }


def _difference(before: Mapping[Where, LayerState], after: Mapping[Where, LayerState]) -> str | None:
    if before.keys() != after.keys():
        return f"{len(before.keys() ^ after.keys())} layers more or less"
    for where, left in before.items():
        right, at = after[where], ".".join(where)
        if (left.type, left.scale, _settings_of(left)) != (right.type, right.scale, _settings_of(right)):
            return f"{at}: {left.type} of scale {left.scale:g} became {right.type} of scale {right.scale:g}"
        if left.tensors.keys() != right.tensors.keys():
            return f"{at}: {', '.join(sorted(left.tensors.keys() ^ right.tensors.keys()))}"
        for name, tensor in left.tensors.items():
            other = right.tensors[name]
            if tensor.dtype != other.dtype or not torch.equal(tensor, other):
                return f"{at}: {name}"
    return None


def _settings_of(layer: LayerState) -> dict[str, float]:
    """Return all settings except the rank, which is part of the scale."""
    return {name: value for name, value in layer.settings.items() if name != "rank"}


def reason(error: Exception) -> str:
    """Return the first line of a message that states the reason."""
    lines = [line.strip() for line in str(error).splitlines()]
    why = [line for line in lines[1:] if not line.startswith("this looks like")]
    return why[0] if why and "cannot be used" in lines[0] else lines[0]


# diffusers


def loader(pipeline: str) -> type[LoraBaseMixin] | None:
    """Return the class that loads adapters in a pipeline of diffusers; `None` if there is none."""
    mixins = [base for base in getattr(diffusers, pipeline).__mro__ if "LoraLoaderMixin" in base.__name__]
    return mixins[0] if mixins else None


def _in_diffusers(bench: Workbench, file: File, path: Path, folder: Path) -> str:
    """Return what diffusers makes of the file, on models with the published number of outputs if that matters."""
    other = bench.for_diffusers
    if other is bench or not file.kind.startswith(("LoRA", "DoRA", "control")):
        return in_diffusers(bench, file, path)
    tall = file_of(other, file.dialect, file.kind, of_each_shape=file.of_each_shape)
    assert tall is not None
    return in_diffusers(other, tall, tall.write(folder))


def in_diffusers(bench: Workbench, file: File, path: Path) -> str:
    """Return what `load_lora_weights` of the family's pipeline makes of a file, with peft and without this library.

    Returns:
        "yes", "wrong" (an output differs), "drops n of m keys" (some layers are unchanged, all others are right),
        "refuses" (an error), or "no loader" (the pipeline has no such method).
    """
    mixin = loader(bench.small.pipeline)
    if mixin is None:
        return "no loader"
    models = bench.lend()
    pipe = _stub(mixin, models)
    weights = path / "adapter_model.safetensors" if path.is_dir() else path
    logging.disable(logging.CRITICAL)
    try:
        with ignored():
            pipe.load_lora_weights(weights.parent, weight_name=weights.name, adapter_name="a")
    except Exception:
        if not _touched(models):
            bench.give_back(models)
        return "refuses"
    finally:
        logging.disable(logging.NOTSET)
    dropped = 0
    for layer in file.layers:
        hosts = [(layer.component, path) for path in layer.parts]
        with torch.no_grad():
            found = {host: models[host[0]].get_submodule(host[1])(bench.input(host)) for host in hosts}
        if all(file.wanted[host].is_base(output) for host, output in found.items()):
            dropped += file.keys[layer.stem]
        elif not all(file.wanted[host].is_output(output) for host, output in found.items()):
            return "wrong"
    if dropped == len(file.tensors) and not _touched(models):
        bench.give_back(models)
    return f"drops {dropped} of {len(file.tensors)} keys" if dropped else "yes"


def _touched(models: Mapping[str, nn.Module]) -> bool:
    return any(isinstance(module, BaseTunerLayer) for model in models.values() for module in model.modules())


def _stub(mixin: type[LoraBaseMixin], models: Mapping[str, nn.Module]) -> Any:
    """Return a pipeline that has only models and a loader."""
    pipe = type("Pipeline", (mixin,), {"components": dict(models), "hf_device_map": None})()
    for name in ("unet", "transformer", "text_encoder", "text_encoder_2", "text_conditioner"):
        setattr(pipe, name, models.get(name))
    return pipe
