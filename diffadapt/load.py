"""From a file to adapters on models: plan everything first, then attach everything or nothing."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from diffadapt import families, textual_inversion
from diffadapt.adapter import Adapter, AdapterLayer
from diffadapt.attach import attach_, bank_of, detach_
from diffadapt.build import Builder, Content, ForWriting, Group
from diffadapt.duplicates import winners
from diffadapt.errors import AdapterError, LoadError
from diffadapt.formats import detect
from diffadapt.formats.format import Names, Place, Unused, Vectors
from diffadapt.hooks import FLOAT8
from diffadapt.io import Checkpoint
from diffadapt.report import Report, explained
from diffadapt.targets import Targets
from diffadapt.textual_inversion import LearnedTokens

_Id: TypeAlias = tuple[str, str]
"""Component and path of a layer of the file."""

_TWICE = "the file has this layer in another way, too, and that is used"


@dataclass(frozen=True)
class Plan:
    """A file resolved against models: what would be attached where, and what is wrong with it.

    Attributes:
        layers: component -> path -> the adapter layer, not attached yet.
        tokens: text encoder -> the tokens it gets, not installed yet.
        faults: `(key, reason)` for tensors that a complete load would need.
        ignored: `(key, reason)` for tensors nobody misses.
        targets: the models' paths, by component.
        device: where the adapters were asked to be; `None` for where their models compute.
    """

    checkpoint: Checkpoint
    format: str
    family: str | None
    layers: Mapping[str, Mapping[str, AdapterLayer]]
    tokens: Mapping[str, LearnedTokens]
    used: int
    faults: list[tuple[str, str]]
    ignored: list[tuple[str, str]]
    targets: Mapping[str, Targets]
    device: torch.device | None = None

    @cached_property
    def adapters(self) -> dict[str, Adapter]:
        """Component -> the adapter, not attached yet. They may be attached and detached again and again."""
        metadata = self.checkpoint.header.metadata
        components = {**self.layers, **self.tokens}
        return {component: Adapter(self.layers.get(component, {}), metadata) for component in components}

    def hosts(self, component: str) -> dict[str, nn.Module]:
        """Module path -> layer of the model, for every adapter layer of a component."""
        modules = self.targets[component].modules
        return {path: modules[path] for path in self.layers.get(component, {})}

    def report(self, name: str) -> Report:
        """The account of the file under the name `name`."""
        kinds = Counter(layer.kind.name for layers in self.layers.values() for layer in layers.values())
        return Report(
            name=name,
            format=self.format,
            family=self.family,
            types=dict(kinds),
            components={component: len(layers) for component, layers in self.layers.items()},
            tokens=textual_inversion.counted(self.tokens.values()),
            used=self.used,
            unused=self.faults + self.ignored,
            metadata=dict(self.checkpoint.header.metadata),
        )

    def refuse_faults(self, strict: bool) -> None:
        """Raise `LoadError` if the file must not be applied."""
        if not (self.layers or self.tokens) or (strict and self.faults):
            raise LoadError(self._refusal(), self.faults + self.ignored)

    def _refusal(self) -> str:
        total = self.used + len(self.faults) + len(self.ignored)
        lines = [f"{self.checkpoint.origin}: {len(self.faults)} of {total} tensors cannot be used, nothing was loaded"]
        shapes = ((key, tuple(tensor.shape)) for key, tensor in self.checkpoint.tensors.items())
        family = families.of_file(shapes)
        if families.differ(family, self.family):
            lines.append(f"this looks like a {family} adapter; the model is {self.family}")
        lines += [f"  {line}" for line in explained(self.faults or self.ignored)]
        if self.layers or self.tokens:
            lines.append("pass strict=False to load the rest")
        return "\n".join(lines)


def plan(
    checkpoint: Checkpoint,
    models: Mapping[str, nn.Module] | None,
    *,
    components: Iterable[str] | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    for_writing: ForWriting | None = None,
    tokenizers: Mapping[str, Any] | None = None,
    leaving: str | None = None,
    format: str | None = None,
) -> Plan:
    """Decide for every tensor of a file where it belongs, and build its layers. Touches no model.

    Args:
        models: component -> model; `None` to believe the names in the file.
        components: use these and leave the rest of the file aside.
        dtype: of the adapter; default the compute dtype of each model.
        device: of the adapter; default where each model computes. In page-locked memory if that is the CPU of a machine
            with CUDA.
        for_writing: see `Builder`; such a plan is for writing and not for attaching.
        tokenizers: by their text encoder; without them, learned tokens cannot be installed.
        leaving: an adapter that will be gone, with its tokens.
        format: of the file; default what its names tell.
    """
    try:
        recognised = detect(checkpoint.header, format)
        wanted = None if components is None else set(components)
        targets = _targets(models, wanted)
        verdicts = recognised.locate(checkpoint.header, Names(targets))
        alphas, settings = recognised.alphas(checkpoint.header), recognised.settings(checkpoint.header)
    except AdapterError as error:
        raise LoadError(f"{checkpoint.origin}: {error}") from error
    faults: list[tuple[str, str]] = []
    ignored: list[tuple[str, str]] = []
    groups: dict[_Id, Group] = {}
    learned: dict[str, Vectors] = {}
    for key, verdict in verdicts.items():
        if isinstance(verdict, Vectors):
            learned[key] = verdict
        elif wanted is not None and verdict.component is not None and verdict.component not in wanted:
            ignored.append((key, f"component {verdict.component} was not asked for"))
        elif isinstance(verdict, Unused):
            (ignored if verdict.harmless else faults).append((key, verdict.reason))
        else:
            _gather(groups, key, verdict, checkpoint.tensors[key], faults)
    builder = Builder(checkpoint, targets, alphas, settings, dtype, device, for_writing=for_writing)
    # Shapes first: values are not read before it is known that they are no more than they should be.
    contents: dict[_Id, list[Content]] = {}
    for place, group in groups.items():
        component, path = place
        try:
            contents[place] = builder.contents(component, path, group)
        except AdapterError as error:
            faults += _faults(component, path, group, error)
    resolved = textual_inversion.resolve(learned, checkpoint, models, wanted)
    broken = _non_finite([*(value for place in contents for value in groups[place].values), *resolved.values])
    layers: dict[str, dict[str, AdapterLayer]] = {}
    origins: dict[tuple[str, str], _Id] = {}
    good: list[_Id] = []
    # What the file has for a layer alone comes before what it has for several in one.
    for place in sorted(contents, key=lambda place: bool(groups[place].pieces)):
        component, path = place
        group, found = groups[place], contents[place]
        try:
            if not broken.isdisjoint(group.keys.values()):
                raise AdapterError(
                    f"{', '.join(sorted(broken & set(group.keys.values())))} holds NaN or infinite values"
                )
            built = builder.build(component, found)
            paths = {at for content in found for at in content.paths}
            again = sorted(at for at in paths if (component, at) in origins)
            if again:
                held = layers[component]
                chosen = winners(held, built) if paths == built.keys() else None
                if chosen is None:
                    raise AdapterError(f"{', '.join(again)} has tensors under another name already")
                built = chosen
        except AdapterError as error:
            faults += _faults(component, path, group, error)
            continue
        good.append(place)
        layers.setdefault(component, {}).update(built)
        origins.update({(component, at): place for at in ({*built} & paths or paths if built else ())})
    kept = set(origins.values())
    used = sum(len(groups[place].keys) for place in good if place in kept)
    ignored += ((key, _TWICE) for place in good if place not in kept for key in groups[place].keys.values())
    tokens = textual_inversion.plan(
        resolved, checkpoint, models, tokenizers, broken=broken, settled=builder.settled, leaving=leaving
    )
    used, faults, ignored = used + tokens.used, faults + tokens.faults, ignored + tokens.ignored
    family = families.of_models(models) if models is not None else None
    if family is None:
        family = families.of_file((key, tuple(tensor.shape)) for key, tensor in checkpoint.tensors.items())
    return Plan(
        checkpoint, recognised.name, family, layers, tokens.components, used, faults, ignored, targets or {}, device
    )


def attach_all_(models: Mapping[str, nn.Module], name: str, planned: Plan, *, replacing: bool = False) -> None:
    """Attach a plan's adapters and install its tokens under `name`: all, or, if one component refuses, none.

    Args:
        replacing: see `attach_`. The adapter of this name is removed from components that the plan has none for.
    """
    before: dict[str, Adapter] = {}
    for component, model in models.items():
        bank = bank_of(model)
        if bank is not None and name in bank.adapters and replacing:
            before[component] = bank.adapters[name]
    tokens = {component: held for component, old in before.items() if (held := textual_inversion.of(old)) is not None}
    textual_inversion.uninstall_(models, name)
    attached: list[str] = []
    try:
        for component, adapter in planned.adapters.items():
            attach_(models[component], name, adapter, planned.hosts(component), replacing=replacing)
            attached.append(component)
        textual_inversion.install_(models, name, planned.tokens)
    except BaseException:
        textual_inversion.uninstall_(models, name)
        for component in attached:
            if component not in before:
                detach_(models[component], name)
            else:
                hosts = {path: layer.host for path, layer in before[component].layers.items()}
                attach_(models[component], name, before[component], hosts, replacing=True)
        textual_inversion.install_(models, name, tokens)
        raise
    for component in before.keys() - planned.adapters.keys():
        detach_(models[component], name)


def detach_all_(models: Mapping[str, nn.Module], name: str) -> None:
    """Remove adapter `name` with its tokens.

    Raises:
        AdapterError: the tokens cannot be removed. Nothing has changed then.
    """
    textual_inversion.uninstall_(models, name)
    for model in models.values():
        detach_(model, name)


def _targets(models: Mapping[str, nn.Module] | None, wanted: set[str] | None) -> dict[str, Targets] | None:
    if models is None:
        return None
    return {name: Targets(model) for name, model in models.items() if wanted is None or name in wanted}


def _gather(
    groups: dict[_Id, Group],
    key: str,
    place: Place,
    tensor: Tensor,
    faults: list[tuple[str, str]],
) -> None:
    group = groups.setdefault((place.component, place.path), Group(place.written, place.pieces))
    if place.name in group.tensors:
        faults.append((key, f"the same tensor as {group.keys[place.name]}"))
        return
    group.keys[place.name] = key
    group.tensors[place.name] = tensor


def _faults(component: str, path: str, group: Group, error: AdapterError) -> list[tuple[str, str]]:
    return [(key, f"{component}.{path}: {error}") for key in group.keys.values()]


def _non_finite(values: Iterable[tuple[str, Tensor]]) -> set[str]:
    """Of tensors by key, the keys of those with NaN or infinite values, with one synchronisation for all."""
    alike: dict[tuple[torch.device, torch.dtype], list[tuple[str, Tensor]]] = {}
    for key, tensor in values:
        if tensor.is_floating_point() and tensor.numel() and not tensor.is_meta:
            wide = tensor.float() if tensor.dtype in FLOAT8 else tensor
            alike.setdefault((wide.device, wide.dtype), []).append((key, wide))
    broken: set[str] = set()
    for found in alike.values():
        # A sum is quick, and finite only if all of its terms are; a large one need not be.
        block = _block([tensor for _, tensor in found])
        if block is not None and torch.isfinite(block.sum()):
            continue
        finite = torch.isfinite(torch.stack([tensor.sum() for _, tensor in found])).tolist()
        suspects = (item for item, ok in zip(found, finite, strict=True) if not ok)
        broken |= {key for key, tensor in suspects if not torch.isfinite(tensor).all()}
    return broken


def _block(tensors: list[Tensor]) -> Tensor | None:
    """One tensor in which these are, if they are most of a stretch of the same memory, as those of a file are."""
    first, memory = tensors[0], tensors[0].untyped_storage().data_ptr()
    if any(not tensor.is_contiguous() or tensor.untyped_storage().data_ptr() != memory for tensor in tensors):
        return None
    start = min(tensor.storage_offset() for tensor in tensors)
    size = max(tensor.storage_offset() + tensor.numel() for tensor in tensors) - start
    return first.as_strided((size,), (1,), start) if size <= 2 * sum(map(Tensor.numel, tensors)) else None
