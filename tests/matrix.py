"""Files of every family, dialect and adapter type, made in memory, and what becomes of them here and in diffusers.

A file has all the layers of a small model that the dialect has names for. What is right is computed in float64 by the
plain formulas of `formulas`, from the tensors as the file has them, on the layer as the file has it: the output of
every layer on random inputs, and its weight.
"""

import copy
import hashlib
import json
import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.loaders.lora_base import LoraBaseMixin
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from torch import Tensor, nn

from diffadapt import AdapterError, families, inspect
from diffadapt.families.published import published
from diffadapt.formats import FORMATS, ONETRAINER, detect
from diffadapt.formats.format import Header, Names, Unused
from diffadapt.io import Location
from diffadapt.layer import LayerSpec
from diffadapt.manager import Adapters
from diffadapt.state import LayerState
from diffadapt.targets import Targets
from tests.denoisers import SMALL
from tests.dialects import DIALECTS, Dialect, Layer
from tests.files import shapes_of
from tests.formulas import (
    VARIANTS,
    Content,
    Variant,
    added,
    alpha,
    boft_of_lycoris,
    control,
    dora,
    dora_of_peft,
    eight,
    glora,
    lokr,
    lora_factors,
    lora_of_any_scale,
    lora_with_bias,
    norm,
    oft_of_lycoris,
    oft_of_peft,
    tucker_factors,
)

TOLERANCE = 1e-4
"""Of the largest change that an adapter makes to what is compared."""

WRITERS = tuple(sorted(format.name for format in (*FORMATS, ONETRAINER) if format.dump is not None))

Where = tuple[str, str]
"""Component, and path of a layer there."""


@dataclass(frozen=True)
class Kind:
    """A type of adapter as rows of the matrix have it.

    Attributes:
        variants: the first that a dialect has a place for is the one that it writes.
        layers: kinds of layers it is put on.
        paths: those of them whose paths are like this.
        dialect: the only one it is in, and that has no other.
    """

    variants: tuple[Variant, ...]
    layers: tuple[str, ...] = ("linear", "conv")
    paths: str = ".*"
    dialect: str | None = None


def _of(*names: str) -> Kind:
    return Kind(tuple(VARIANTS[name][1] for name in names))


_PEFT_WHOLE = added(lokr(""), 0.5, {"r": 4, "alpha": 2.0}, **alpha(2.0))
"""PEFT divides alpha by the rank in its config also where no tensor has it."""

KINDS: dict[str, Kind] = {
    # What most trainers write if nothing is set.
    "LoRA in blocks, one alpha": Kind(
        (added(lora_factors, 0.5, **alpha(2.0)), VARIANTS["lora"][1]),
        ("linear",),
        r"(.*\.)?\w*(block|blocks|layers|refiner)\.\d+\..*",
    ),
    "LoRA": Kind((lora_of_any_scale, VARIANTS["lora"][1])),
    "LoRA with biases": Kind((lora_with_bias,)),
    "LoRA with Tucker cores": Kind((added(tucker_factors, 0.5, **alpha(2.0)),), ("conv",)),
    "LoHa": _of("loha-alpha", "loha"),
    "LoKr, whole": Kind((VARIANTS["lokr-whole"][1], _PEFT_WHOLE, added(lokr(""), 1.0))),
    "LoKr, one factor low-rank": Kind((VARIANTS["lokr-low-rank"][1], added(lokr("2"), 1.0))),
    "LoKr, both low-rank": Kind((VARIANTS["lokr-low-rank-both"][1], added(lokr("12"), 1.0))),
    "DoRA": Kind((dora(lora_of_any_scale), dora_of_peft(lora_of_any_scale), VARIANTS["dora-peft"][1])),
    "DoRA by input": Kind((dora(lora_of_any_scale, by_input=True),)),
    "DoRA of LoHa": _of("dora-loha"),
    "DoRA of LoKr": _of("dora-lokr"),
    "OFT": Kind((oft_of_lycoris(eight),)),
    "OFT, limited": Kind((oft_of_lycoris(eight, constraint=0.01),)),
    "OFT, rescaled": Kind((oft_of_lycoris(eight, rescaled=True),)),
    "OFT of 2023": _of("oft-old"),
    "OFT on inputs": Kind((oft_of_peft(),)),
    "OFT on inputs, exact": Kind((oft_of_peft(exact=True),)),
    "BOFT": Kind((boft_of_lycoris(eight, 2, rescaled=True),)),
    "BOFT on inputs": _of("boft-peft"),
    "IA3": _of("ia3-lycoris", "ia3"),
    "IA3 on inputs": _of("ia3-lycoris-input", "ia3-input"),
    "GLoRA": Kind((glora,)),
    "full": _of("full"),
    "norms": Kind((norm,), ("norm",)),
    "control": Kind((control,), ("linear", "norm"), dialect="BFL control"),
}


@dataclass(frozen=True)
class Wanted:
    """What a layer has to be and to compute with the adapter, and what without."""

    weight: Tensor
    bias: Tensor | None
    output: Tensor
    base_weight: Tensor
    base_output: Tensor

    def is_output(self, output: Tensor) -> bool:
        return _close(output, self.output, self.base_output)

    def is_weight(self, weight: Tensor) -> bool:
        return _close(weight, self.weight, self.base_weight)

    def is_base(self, output: Tensor) -> bool:
        return _close(output, self.base_output, self.output)


def _close(found: Tensor, expected: Tensor, other: Tensor) -> bool:
    """Equal within `TOLERANCE` of the difference between what is expected and what it could be mistaken for."""
    if found.shape != expected.shape or not found.isfinite().all():
        return False
    error = (found.detach().double() - expected).abs().max()
    return bool(error <= TOLERANCE * (expected - other).abs().max())


@dataclass(frozen=True)
class Made:
    """What is in a file for one of its layers, and what the model's layers have to become."""

    content: Content
    wanted: Mapping[Where, Wanted]


class Workbench:
    """One family's small models, and what they compute."""

    def __init__(self, name: str, *, tall: bool = False) -> None:
        self.name = name
        self.small = SMALL[name]
        self.models = self.small.build(tall)
        self._wide = {component: copy.deepcopy(model).double() for component, model in self.models.items()}
        self.loaded = Adapters(lambda: self.models)
        self._made: dict[Any, list[Made | None]] = {}
        self._spare: dict[str, nn.Module] | None = None
        self.trips: dict[str, RoundTrips] = {}

    @cached_property
    def for_diffusers(self) -> "Workbench":
        """The same with as many outputs as diffusers' converters count on."""
        return self if self.small.tall is None else Workbench(self.name, tall=True)

    def lend(self) -> dict[str, nn.Module]:
        """Copies of the models, for others to change."""
        spare, self._spare = self._spare, None
        return spare or {component: copy.deepcopy(model) for component, model in self.models.items()}

    def give_back(self, models: dict[str, nn.Module]) -> None:
        """Copies that nobody has changed, for the next one."""
        self._spare = models

    @property
    def manager(self) -> Adapters:
        """What `pipe.adapters` is, with nothing loaded."""
        self.loaded.clear()
        return self.loaded

    def layers(self, dialect: Dialect, kind: Kind) -> list[Layer]:
        """The layers of a file of this kind."""
        hosts = {
            component: [
                path
                for path, found in self._layers[component].items()
                if found in kind.layers and re.fullmatch(kind.paths, path)
            ]
            for component in self.models
        }
        return dialect.layers(self.name, self.models, {name: paths for name, paths in hosts.items() if paths})

    @cached_property
    def _layers(self) -> dict[str, dict[str, str]]:
        found: dict[str, dict[str, str]] = {}
        for component, model in self.models.items():
            specs = ((path, LayerSpec.of(module)) for path, module in model.named_modules() if path)
            found[component] = {path: spec.kind for path, spec in specs if spec is not None and spec.groups == 1}
        return found

    def made(self, kind: str, variant: int, layers: Sequence[tuple[str, tuple[str, ...], bool]]) -> list[Made | None]:
        """Contents for these layers, by component, parts and whether they are swapped; the same for the same layers."""
        key = (kind, variant, tuple(layers))
        if key not in self._made:
            torch.manual_seed(3)
            self._made[key] = [self._make(KINDS[kind].variants[variant], *layer) for layer in layers]
        return self._made[key]

    def _make(self, variant: Variant, component: str, parts: tuple[str, ...], swapped: bool) -> Made | None:
        layer = Layer("", component, parts, swapped)
        before = {(component, path): self.parameters((component, path)) for path in parts}
        shifts = [bias for _, bias in before.values() if bias is not None]
        weight = layer.joined([weight for weight, _ in before.values()])
        content = variant(weight, layer.joined(shifts) if len(shifts) == len(before) else None)
        if content is None:
            return None
        sizes = [len(weight) for weight, _ in before.values()]
        weights = layer.cut(content.weight, sizes)
        biases = [None] * len(parts) if content.bias is None else layer.cut(content.bias, sizes)
        wanted: dict[Where, Wanted] = {}
        for (where, (base, shift)), weight, bias in zip(before.items(), weights, biases, strict=True):
            output = self.output(where, weight, bias)
            wanted[where] = Wanted(weight, bias, output, base, self.output(where, base, shift))
        return Made(content, wanted)

    def parameters(self, where: Where) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of a layer in float64."""
        host = self._wide[where[0]].get_submodule(where[1])
        return host.weight.detach(), None if getattr(host, "bias", None) is None else host.bias.detach()

    def input(self, where: Where) -> Tensor:
        """Always the same random input for a layer."""
        host = self.models[where[0]].get_submodule(where[1])
        generator = torch.Generator().manual_seed(7)
        spec = LayerSpec.of(host)
        assert spec is not None
        if spec.kind == "conv":
            shape = (1, spec.in_features, *(2 * size for size in spec.kernel))
        elif isinstance(host, nn.GroupNorm):
            shape = (2, spec.in_features, 3, 3)
        else:
            shape = (2, 3, spec.in_features)
        return torch.randn(shape, generator=generator)

    def output(self, where: Where, weight: Tensor, bias: Tensor | None) -> Tensor:
        """What the layer would compute with this weight and bias."""
        host = self._wide[where[0]].get_submodule(where[1])
        parameters = {"weight": weight, **({} if bias is None else {"bias": bias})}
        with warnings.catch_warnings(category=UserWarning, action="ignore"):
            # Some norms compute in single precision and tell that their weights are wider.
            return torch.func.functional_call(host, parameters, (self.input(where).double(),))


@dataclass
class File:
    """A file in a dialect, and what it has to become.

    Attributes:
        contents: of every layer of the file, in its order.
        keys: of every layer.
    """

    dialect: Dialect
    kind: str
    layers: list[Layer]
    contents: list[Content]
    wanted: dict[Where, Wanted]
    keys: dict[str, int] = field(default_factory=dict[str, int])
    tensors: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    metadata: dict[str, str] = field(default_factory=dict[str, str])
    config: dict[str, Any] | None = None

    def write(self, folder: Path) -> Path:
        """A `.safetensors` file, or a PEFT folder."""
        folder.mkdir(parents=True, exist_ok=True)
        content = {key: tensor.clone().contiguous() for key, tensor in self.tensors.items()}
        if self.config is None:
            save_file(content, folder / "adapter.safetensors", metadata=self.metadata)
            return folder / "adapter.safetensors"
        save_file(content, folder / "adapter_model.safetensors", metadata=self.metadata)
        (folder / "adapter_config.json").write_text(json.dumps(self.config))
        return folder


def files(bench: Workbench, dialect: Dialect, *, most: int | None = None) -> Iterator[File]:
    """A file of every type that the dialect has a place for.

    Args:
        most: layers of a component; default all there are.
    """
    if (dialect.small or bench.name) == bench.name and (dialect.small is not None or bench.name not in _ONLY):
        for name, kind in KINDS.items():
            if kind.dialect != (dialect.name if dialect.small else None):
                continue
            layers = bench.layers(dialect, kind)
            if most is not None and not dialect.whole:
                layers = _picked(layers, most)
            if layers and (file := _file(bench, dialect, name, kind, layers)) is not None:
                yield file


_ONLY = {dialect.small for dialect in DIALECTS}


def _picked(layers: Sequence[Layer], most: int) -> list[Layer]:
    """Of every component those first that are several layers of the model."""
    found: dict[str, list[Layer]] = {}
    for layer in sorted(layers, key=lambda layer: (-len(layer.parts), not layer.swapped)):
        found.setdefault(layer.component, []).append(layer)
    return [layer for own in found.values() for layer in own[:most]]


def _file(bench: Workbench, dialect: Dialect, name: str, kind: Kind, layers: Sequence[Layer]) -> File | None:
    for number in range(len(kind.variants)):
        made = bench.made(name, number, [(layer.component, layer.parts, layer.swapped) for layer in layers])
        chosen = [(layer, one) for layer, one in zip(layers, made, strict=True) if one is not None]
        if not chosen or not all(dialect.holds(one.content) for _, one in chosen):
            continue
        file = File(dialect, name, [layer for layer, _ in chosen], [one.content for _, one in chosen], {})
        for layer, one in chosen:
            spelled = dialect.spelled(layer, one.content)
            file.keys[layer.stem] = len(spelled)
            file.tensors |= {key: t.float() if t.is_floating_point() else t for key, t in spelled.items()}
            file.wanted |= one.wanted
        _settle(file)
        return file
    return None


_PEFT_TYPES = {"hada": "LOHA", "lokr": "LOKR", "oft_": "OFT", "boft": "BOFT", "ia3_": "IA3", "lora": "LORA"}


def _settle(file: File) -> None:
    """The metadata or the config that the tensors need beside them."""
    if file.dialect.alpha == "tensor":
        file.metadata = {"format": "pt", "ss_network_module": "somebody's"}
        return
    file.metadata = {"format": "pt"}
    if file.dialect.alpha is None:
        return
    ranks: dict[str, dict[str, int]] = {}
    alphas: dict[str, dict[str, float]] = {}
    for layer, content in zip(file.layers, file.contents, strict=True):
        down = content.tensors.get("lora_A.weight")
        rank = int(content.config.get("r") or (4 if down is None else len(down)))
        ranks.setdefault(layer.component, {})[layer.parts[0]] = rank
        number = content.tensors.get("alpha")
        alphas.setdefault(layer.component, {})[layer.parts[0]] = rank if number is None else float(number)
    first = file.contents[0]
    if file.dialect.alpha == "metadata":
        settings: dict[str, Any] = {}
        for component in ranks:
            found = _settings(ranks[component], alphas[component], first)
            settings |= {f"{component}.{option}": value for option, value in found.items()}
        file.metadata["lora_adapter_metadata"] = json.dumps(settings)
        return
    ((component, paths),) = ranks.items()
    peft_type = next(type for start, type in _PEFT_TYPES.items() if any(n.startswith(start) for n in first.tensors))
    options = _settings(paths, alphas[component], first)
    if peft_type != "LORA":
        options = {"alpha": options.pop("lora_alpha"), **options}
    if not any("alpha" in content.tensors for content in file.contents):
        options = {option: value for option, value in options.items() if "alpha" not in option and option != "r"}
    inputs = [
        layer.parts[0]
        for layer, content in zip(file.layers, file.contents, strict=True)
        if "ia3_l" in content.tensors and content.tensors["ia3_l"].ndim == 2 and content.tensors["ia3_l"].shape[1] > 1
    ]
    common = {key: value for key, value in first.config.items() if key not in ("alpha", "oft_block_size")}
    file.config = {
        "peft_type": peft_type,
        "peft_version": "0.21.2",
        "feedforward_modules": inputs,
        **options,
        **common,
    }


def _settings(ranks: Mapping[str, int], alphas: Mapping[str, float], content: Content) -> dict[str, Any]:
    """As PEFT's config has them: those of the first layer, and patterns for all others."""
    rank, number = next(iter(ranks.values())), next(iter(alphas.values()))

    def pattern(path: str) -> str:
        # In files CLIP's paths have a level that they do not have in transformers 5.
        return path if path.startswith("encoder.layers.") else f"^{path}"

    return {
        "r": rank,
        "lora_alpha": number,
        "rank_pattern": {pattern(path): value for path, value in ranks.items() if value != rank},
        "alpha_pattern": {pattern(path): value for path, value in alphas.items() if value != number},
        "target_modules": list(ranks),
        "use_dora": "lora_magnitude_vector" in content.tensors,
        "lora_bias": "lora_B.bias" in content.tensors,
        "use_rslora": False,
    }


# What becomes of it


@dataclass
class RoundTrips:
    """What becomes of an adapter that is saved in every format and loaded again.

    Attributes:
        saved: the formats it came back from bit for bit.
        joined: the formats in which it came back as the same weights by other factors.
        changed: the formats it came back from otherwise, with what was wrong.
        refused: the formats that cannot hold it, with the reason.
    """

    saved: tuple[str, ...] = ()
    joined: tuple[str, ...] = ()
    changed: dict[str, str] = field(default_factory=dict[str, str])
    refused: dict[str, str] = field(default_factory=dict[str, str])


@dataclass
class Outcome:
    """One row of the matrix.

    Attributes:
        loads: "yes", or why not.
        equals: "yes", or which outputs or weights do not.
        diffusers: what plain diffusers makes of the file.
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
    """Load a file, compare, save and load again, and have diffusers load it."""
    path = file.write(folder / "file")
    outcome = Outcome(bench.name, file.dialect.name, file.kind, len(file.wanted), len(file.tensors), "yes")
    if peer:
        outcome.diffusers = peer_cell(bench, file, path, folder / "tall")
    manager = bench.manager
    try:
        report = manager.load(path, "a")
    except AdapterError as error:
        outcome.loads = f"refused: {_reason(error)}"
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


def round_trips(bench: Workbench, file: File, folder: Path, formats: Sequence[str] = WRITERS) -> RoundTrips:
    """Save the adapter "a" in every format, and compare what comes back with what is there, bit for bit.

    Dialects differ in names only, so many files are the same adapter: each is saved once.
    """
    before = states(bench.loaded)
    print = _fingerprint(before)
    if print not in bench.trips:
        bench.trips[print] = _round_trips(bench, file, before, folder, formats)
    return bench.trips[print]


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
            found.refused[format] = _reason(error)
        else:
            written[format] = target
    for format, target in written.items():
        try:
            _load(bench, target)
        except AdapterError as error:
            found.changed[format] = f"not loaded: {_reason(error)}"
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
    """The adapter as it comes back; of several components PEFT has a folder for each."""
    manager = bench.manager
    folders = sorted(path.name for path in target.iterdir() if path.is_dir()) if target.is_dir() else []
    if not folders:
        manager.load(target, "a")
    for folder in folders:
        # One after the other they would need a name each.
        part = Adapters(lambda folder=folder: {folder: bench.models[folder]})
        part.load(target, "a", where=Location(subfolder=folder))


def states(manager: Adapters) -> dict[Where, LayerState]:
    """The content of the adapter "a", by layer."""
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
    """All but the rank, which is in the scale."""
    return {name: value for name, value in layer.settings.items() if name != "rank"}


def _reason(error: Exception) -> str:
    """The first line that says why."""
    lines = [line.strip() for line in str(error).splitlines()]
    why = [line for line in lines[1:] if not line.startswith("this looks like")]
    return why[0] if why and "cannot be used" in lines[0] else lines[0]


# diffusers


def loader(pipeline: str) -> type[LoraBaseMixin] | None:
    """What loads adapters in a pipeline of diffusers, if anything does."""
    mixins = [base for base in getattr(diffusers, pipeline).__mro__ if "LoraLoaderMixin" in base.__name__]
    return mixins[0] if mixins else None


def peer_cell(bench: Workbench, file: File, path: Path, folder: Path) -> str:
    """What diffusers makes of the file, where that matters on models of the published number of outputs."""
    other = bench.for_diffusers
    if other is bench or not file.kind.startswith(("LoRA", "DoRA")):
        return in_diffusers(bench, file, path)
    tall = _file(other, file.dialect, file.kind, KINDS[file.kind], other.layers(file.dialect, KINDS[file.kind]))
    assert tall is not None
    return in_diffusers(other, tall, tall.write(folder))


def in_diffusers(bench: Workbench, file: File, path: Path) -> str:
    """What `load_lora_weights` of the family's pipeline makes of a file, with peft and without this library.

    "yes", "wrong" (an output differs), "drops n of m keys" (layers are left as they were, all others are right),
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
        with warnings.catch_warnings(action="ignore"):
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
    """A pipeline of which only the models and the loader are there."""
    pipe = type("Pipeline", (mixin,), {"components": dict(models), "hf_device_map": None})()
    for name in ("unet", "transformer", "text_encoder", "text_encoder_2", "text_conditioner"):
        setattr(pipe, name, models.get(name))
    return pipe


# Real files, of which only the names and shapes are known


@dataclass(frozen=True)
class Listed:
    """What becomes of a real file's tensors on the published models.

    Attributes:
        kind: how much of the file is known, as the list says.
        family: recognised, or "".
        used: tensors that are used or, where shapes are not known, whose layer is found; `None` without such models.
        reason: why the first of the others is not.
    """

    name: str
    kind: str
    tensors: int
    format: str
    family: str
    used: int | None
    reason: str = ""
    by_name: bool = False


@cache
def _published(family: str) -> list[dict[str, nn.Module]]:
    return list(published(family))


def listed(file: Path) -> Listed:
    """A list of keys and shapes on models without weights."""
    content = json.loads(file.read_text())
    shapes = shapes_of(content)
    known = {key: shape for key, shape in shapes.items() if shape is not None}
    header = Header(tuple(shapes), content.get("metadata") or {}, None, known)
    format = detect(header).name
    family = families.of_file((key, known.get(key, ())) for key in shapes) or ""
    found = Listed(file.stem, content.get("kind", ""), len(shapes), format, family, None)
    if not family:
        return replace(found, reason="its names alone do not tell for which models it is")
    try:
        candidates = _published(family)
    except AdapterError as error:
        return replace(found, reason=_reason(error))
    # As in `convert`: of a family's models the one that has most of the file's layers.
    return max((_listed_on(on, found, shapes, header) for on in candidates), key=lambda listed: listed.used or 0)


def _listed_on(
    on: Mapping[str, nn.Module], found: Listed, shapes: Mapping[str, tuple[int, ...] | None], header: Header
) -> Listed:
    if any(shape is None for shape in shapes.values()):
        verdicts = detect(header).locate(header, Names({name: Targets(model) for name, model in on.items()}))
        missed = [verdict.reason for verdict in verdicts.values() if isinstance(verdict, Unused)]
        return replace(found, used=len(shapes) - len(missed), reason=missed[0] if missed else "", by_name=True)
    # Alphas are read with the names.
    tensors = {
        key: torch.empty(shape, device="meta") if shape else torch.tensor(4.0)
        for key, shape in shapes.items()
        if shape is not None
    }
    report = inspect(tensors, on)
    return replace(found, used=report.used, reason=report.unused[0][1] if report.unused else "")


# Files that are no adapters

FOREIGN: dict[str, tuple[str, ...]] = {
    "IP-Adapter": ("image_proj.proj.0.weight", "ip_adapter.1.to_k_ip.weight"),
    "IP-Adapter of XLabs": ("double_blocks.0.processor.ip_adapter_double_stream_k_proj.weight",),
    "ControlNet-LLLite": ("lllite_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.down.0.weight",),
}


def refusal(keys: Sequence[str]) -> tuple[str, str]:
    """The format that a file with these keys is recognised as, and what its refusal says."""
    header = Header(tuple(keys))
    format = detect(header)
    try:
        format.locate(header, Names(None))
    except AdapterError as error:
        return format.name, str(error)
    return format.name, ""
