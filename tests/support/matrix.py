"""Files of every family, dialect and adapter type, made in memory, and the weights and outputs that they must produce.

A file has all layers of a small model for which the dialect has names. The expected output of every layer for a random
input, and its expected weight, are computed in float64 by the plain formulas of `formulas`, from the tensors and the
layers of the file. `judge` compares them with what becomes of a file.
"""

import copy
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from diffadapt.management.manager import Adapters
from diffadapt.management.owner import Owner
from diffadapt.types.layer_spec import LayerSpec
from tests.support.denoisers import SMALL
from tests.support.dialects import DIALECTS, Dialect, Layer
from tests.support.formulas import (
    VARIANTS,
    Content,
    Method,
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
    tlora,
    tucker_factors,
)
from tests.support.peft_formulas import METHODS, ON_CONVOLUTIONS
from tests.support.silence import ignored

TOLERANCE = 1e-4
"""Allowed error, relative to the largest change that an adapter makes to the compared tensor."""

Where = tuple[str, str]
"""Component, and path of a layer in it."""


@dataclass(frozen=True)
class Kind:
    """An adapter type, or a variant of one, that is a row of the matrix.

    Attributes:
        variants: Formulas; a dialect writes the first one that it can express.
        layers: The kinds of layers that get the adapter.
        paths: A regular expression for the paths of these layers.
        dialect: The only dialect that has this row; it has no other.
        of_peft: PEFT alone trains the type, so that only some dialects have it.
    """

    variants: tuple[Variant, ...]
    layers: tuple[str, ...] = ("linear", "conv")
    paths: str = ".*"
    dialect: str | None = None
    of_peft: bool = False


def _of(*names: str) -> Kind:
    return Kind(tuple(VARIANTS[name][1] for name in names))


_PEFT_WHOLE = added(lokr(""), 0.5, {"r": 4, "alpha": 2.0}, **alpha(2.0))
"""PEFT divides alpha by the rank in its config even if no tensor has this rank."""

KINDS: dict[str, Kind] = {
    # What most trainers write by default.
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
    "OFT on inputs, scaled": _of("oft-scaled"),
    "DoRA of OFT": _of("oft-scaled-lengths"),
    "BOFT": Kind((boft_of_lycoris(eight, 2, rescaled=True),)),
    "BOFT on inputs": _of("boft-peft"),
    "IA3": _of("ia3-lycoris", "ia3"),
    "IA3 on inputs": _of("ia3-lycoris-input", "ia3-input"),
    "GLoRA": Kind((glora,)),
    "T-LoRA": Kind((tlora,), ("linear",)),
    "full": _of("full"),
    "norms": Kind((norm,), ("norm",)),
    "control": Kind((control,), ("linear", "norm"), dialect="BFL control"),
    **{
        name: Kind((method,), ("linear", "conv") if name in ON_CONVOLUTIONS else ("linear",), of_peft=True)
        for name, method in METHODS.items()
    },
}


@dataclass(frozen=True)
class Wanted:
    """The weight, bias and output that a layer must have with the adapter, and those it has without."""

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
    """Return whether a tensor is equal to `expected` within `TOLERANCE` of the difference between it and `other`."""
    if found.shape != expected.shape or not found.isfinite().all():
        return False
    error = (found.detach().double() - expected).abs().max()
    return bool(error <= TOLERANCE * (expected - other).abs().max())


@dataclass(frozen=True)
class Made:
    """The content of one layer of a file, and what the layers of the model must become."""

    content: Content
    wanted: Mapping[Where, Wanted]


class Workbench:
    """The small models of one family, and what they compute."""

    def __init__(self, name: str, *, tall: bool = False) -> None:
        self.name = name
        self.small = SMALL[name]
        self.models = self.small.build(tall)
        self._in_float64 = {component: copy.deepcopy(model).double() for component, model in self.models.items()}
        self.loaded = Adapters(Owner(lambda: self.models))
        self._made: dict[Any, list[Made | None]] = {}
        self._spare: dict[str, nn.Module] | None = None

    @cached_property
    def for_diffusers(self) -> "Workbench":
        """The workbench with as many outputs as diffusers' converters expect."""
        return self if self.small.tall is None else Workbench(self.name, tall=True)

    def lend(self) -> dict[str, nn.Module]:
        """Return copies of the models, which may be changed."""
        spare, self._spare = self._spare, None
        return spare or {component: copy.deepcopy(model) for component, model in self.models.items()}

    def give_back(self, models: dict[str, nn.Module]) -> None:
        """Take back unchanged copies for the next `lend`."""
        self._spare = models

    @property
    def manager(self) -> Adapters:
        """What `pipe.adapters` is for these models, with no adapter loaded."""
        self.loaded.clear()
        return self.loaded

    def layers(self, dialect: Dialect, kind: Kind) -> list[Layer]:
        """Return the layers of a file of this kind."""
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
        """Return contents for layers, given as (component, parts, swapped); always the same for the same layers."""
        key = (kind, variant, tuple(layers))
        if key not in self._made:
            torch.default_generator.manual_seed(3)
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
        weights = layer.split(content.weight, sizes)
        biases = [None] * len(parts) if content.bias is None else layer.split(content.bias, sizes)
        wanted: dict[Where, Wanted] = {}
        for (where, (base, shift)), weight, bias in zip(before.items(), weights, biases, strict=True):
            output = self.output(where, weight, bias)
            wanted[where] = Wanted(weight, bias, output, base, self.output(where, base, shift))
        return Made(content, wanted)

    def parameters(self, where: Where) -> tuple[Tensor, Tensor | None]:
        """Return weight and bias of a layer in float64."""
        host = self._in_float64[where[0]].get_submodule(where[1])
        return host.weight.detach(), None if getattr(host, "bias", None) is None else host.bias.detach()

    def shape(self, layer: Layer) -> tuple[object, ...]:
        """Return what layers have in common that a type treats alike: component, parts and their parameters."""
        parts = [self.parameters((layer.component, path)) for path in layer.parts]
        shapes = ((tuple(weight.shape), bias is None) for weight, bias in parts)
        return layer.component, layer.swapped, *shapes

    def input(self, where: Where) -> Tensor:
        """Return a random input for a layer, always the same one."""
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
        """Return the output of a layer if it had this weight and bias."""
        host = self._in_float64[where[0]].get_submodule(where[1])
        parameters = {"weight": weight, **({} if bias is None else {"bias": bias})}
        with ignored(UserWarning):
            # Some norms compute in float32 and warn about weights in float64.
            return torch.func.functional_call(host, parameters, (self.input(where).double(),))


@dataclass
class File:
    """A file in a dialect, and what the layers of the models must become.

    Attributes:
        dialect: The dialect.
        kind: The name of the kind, in `KINDS`.
        layers: The layers of the file.
        contents: The content of every layer, in the same order.
        wanted: The expected weights and outputs by layer of the model.
        keys: Stem of a layer -> its number of tensors.
        tensors: The tensors by key.
        metadata: The metadata of the safetensors file.
        config: The config of a PEFT folder; `None` for a single file.
        of_each_shape: It has only one layer of every shape.
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
    of_each_shape: bool = False

    def write(self, folder: Path) -> Path:
        """Write a `.safetensors` file or a PEFT folder, and return its path."""
        folder.mkdir(parents=True, exist_ok=True)
        content = {key: tensor.clone().contiguous() for key, tensor in self.tensors.items()}
        if self.config is None:
            save_file(content, folder / "adapter.safetensors", metadata=self.metadata)
            return folder / "adapter.safetensors"
        save_file(content, folder / "adapter_model.safetensors", metadata=self.metadata)
        (folder / "adapter_config.json").write_text(json.dumps(self.config))
        return folder


def files(
    bench: Workbench, dialect: Dialect, *, most: int | None = None, kinds: Iterable[str] = KINDS
) -> Iterator[File]:
    """Yield a file of every kind that the dialect can express.

    Args:
        most: The maximum number of layers per component; defaults to all.
        kinds: The kinds; defaults to all.
    """
    for kind in kinds:
        file = file_of(bench, dialect, kind, most=most)
        if file is not None:
            yield file


def file_of(
    bench: Workbench, dialect: Dialect, kind: str, *, most: int | None = None, of_each_shape: bool = False
) -> File | None:
    """Return the file of one kind; `None` if nobody writes such files for these models.

    Args:
        most: The maximum number of layers per component; defaults to all.
        of_each_shape: Only one layer of every shape.
    """
    chosen = KINDS[kind]
    only = {other.small: other.name for other in DIALECTS if other.small is not None}
    if only.get(bench.name) != chosen.dialect or chosen.dialect not in (None, dialect.name):
        return None
    if chosen.of_peft and not dialect.methods:
        return None
    layers = [] if dialect.small not in (None, bench.name) else bench.layers(dialect, chosen)
    if most is not None and not dialect.whole:
        layers = _picked(layers, most)
    if of_each_shape and not dialect.whole:
        layers = list({bench.shape(layer): layer for layer in reversed(layers)}.values())[::-1]
    for number in range(len(chosen.variants)):
        made = bench.made(kind, number, [(layer.component, layer.parts, layer.swapped) for layer in layers])
        found = [(layer, one) for layer, one in zip(layers, made, strict=True) if one is not None]
        if found and all(dialect.holds(one.content) for _, one in found):
            return replace(_assembled(dialect, kind, found), of_each_shape=of_each_shape)
    return None


def _picked(layers: Sequence[Layer], most: int) -> list[Layer]:
    """Return the first layers of every component, beginning with those that are several layers of the model."""
    found: dict[str, list[Layer]] = {}
    for layer in sorted(layers, key=lambda layer: (-len(layer.parts), not layer.swapped)):
        found.setdefault(layer.component, []).append(layer)
    return [layer for own in found.values() for layer in own[:most]]


def _assembled(dialect: Dialect, kind: str, found: Sequence[tuple[Layer, Made]]) -> File:
    file = File(dialect, kind, [layer for layer, _ in found], [one.content for _, one in found], {})
    for layer, one in found:
        spelled = dialect.spelled(layer, one.content)
        file.keys[layer.stem] = len(spelled)
        file.tensors |= {key: t.float() if t.is_floating_point() else t for key, t in spelled.items()}
        file.wanted |= one.wanted
    method = file.contents[0].method
    if method is None:
        _settle(file)
    else:
        _settle_method(file, method)
    return file


def _settle_method(file: File, method: Method) -> None:
    """Add the tensors that all layers share, and the metadata or the config."""
    weights = [content.weight for content in file.contents]
    shared = method.shared(max(map(len, weights)), max(weight[0].numel() for weight in weights))
    is_peft = file.dialect.alpha == "config"
    for layer in file.layers if method.repeats or not is_peft else ():
        # PEFT's names end in the group of layers.
        file.tensors |= {f"{layer.stem}.{name.partition('.')[0]}": t.float() for name, t in shared.items()}
        file.keys[layer.stem] += len(shared)
    if is_peft:
        file.tensors |= {f"base_model.{name}": tensor.float() for name, tensor in shared.items()}
        version = {"peft_type": method.peft_type, "peft_version": "0.21.2"}
        targets = [layer.parts[0] for layer in file.layers]
        file.config = {**version, "target_modules": targets, **file.contents[0].config}
    file.metadata = {"format": "pt"}
    if not is_peft and method.settings:
        file.metadata["adapter_settings"] = json.dumps({method.type: dict(method.settings)})


_PEFT_TYPES = {"hada": "LOHA", "lokr": "LOKR", "oft_": "OFT", "boft": "BOFT", "ia3_": "IA3", "lora": "LORA"}


def _settle(file: File) -> None:
    """Set the metadata or the config that the tensors need."""
    if file.dialect.alpha == "tensor":
        file.metadata = {"format": "pt", "ss_network_module": "somebody's"}
        return
    file.metadata = {"format": "pt"}
    if file.dialect.alpha is None:
        return
    if file.dialect.alpha == "entries":
        first = file.contents[0].tensors
        file.metadata |= {"alpha": f"{float(first['alpha']):g}", "rank": str(len(first["lora_A.weight"]))}
        return
    ranks: dict[str, dict[str, int]] = {}
    alphas: dict[str, dict[str, float]] = {}
    for layer, content in zip(file.layers, file.contents, strict=True):
        names = ("lora_A.weight", "lokr_w1_b", "lokr_w2_b")
        down = next((content.tensors[name] for name in names if name in content.tensors), None)
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
    """Return the settings of PEFT's config: those of the first layer, and patterns for all others."""
    rank, number = next(iter(ranks.values())), next(iter(alphas.values()))

    def pattern(path: str) -> str:
        # In files CLIP's paths have a level that transformers 5 does not have.
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
