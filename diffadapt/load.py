"""From a file to adapters on models: plan everything first, then attach everything or nothing."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from diffadapt import families
from diffadapt.adapter import Adapter, AdapterLayer
from diffadapt.attach import attach_, bank_of, detach_
from diffadapt.build import Builder, ForWriting, Group
from diffadapt.errors import AdapterError, LoadError
from diffadapt.formats import detect
from diffadapt.formats.format import Names, Place, Unused
from diffadapt.hooks import FLOAT8
from diffadapt.io import Checkpoint
from diffadapt.report import Report, explained
from diffadapt.targets import Targets


@dataclass(frozen=True)
class Plan:
    """A file resolved against models: what would be attached where, and what is wrong with it.

    Attributes:
        layers: component -> path -> the adapter layer, not attached yet.
        faults: `(key, reason)` for tensors that a complete load would need.
        ignored: `(key, reason)` for tensors nobody misses.
        targets: the models' paths, by component.
    """

    checkpoint: Checkpoint
    format: str
    family: str | None
    layers: Mapping[str, Mapping[str, AdapterLayer]]
    used: int
    faults: list[tuple[str, str]]
    ignored: list[tuple[str, str]]
    targets: Mapping[str, Targets]

    @cached_property
    def adapters(self) -> dict[str, Adapter]:
        """Component -> the adapter, not attached yet. They may be attached and detached again and again."""
        metadata = self.checkpoint.header.metadata
        return {component: Adapter(layers, metadata) for component, layers in self.layers.items()}

    def hosts(self, component: str) -> dict[str, nn.Module]:
        """Module path -> layer of the model, for every adapter layer of a component."""
        modules = self.targets[component].modules
        return {path: modules[path] for path in self.layers[component]}

    def report(self, name: str) -> Report:
        """The account of the file under the name `name`."""
        kinds = Counter(layer.kind.name for layers in self.layers.values() for layer in layers.values())
        return Report(
            name=name,
            format=self.format,
            family=self.family,
            types=dict(kinds),
            components={component: len(layers) for component, layers in self.layers.items()},
            used=self.used,
            unused=self.faults + self.ignored,
            metadata=dict(self.checkpoint.header.metadata),
        )

    def refuse_faults(self, strict: bool) -> None:
        """Raise `LoadError` if the file must not be applied."""
        if not self.layers or (strict and self.faults):
            raise LoadError(self._refusal(), self.faults + self.ignored)

    def _refusal(self) -> str:
        total = self.used + len(self.faults) + len(self.ignored)
        lines = [f"{self.checkpoint.origin}: {len(self.faults)} of {total} tensors cannot be used, nothing was loaded"]
        shapes = ((key, tuple(tensor.shape)) for key, tensor in self.checkpoint.tensors.items())
        family = families.of_file(shapes)
        if families.differ(family, self.family):
            lines.append(f"this looks like a {family} adapter; the model is {self.family}")
        lines += [f"  {line}" for line in explained(self.faults or self.ignored)]
        if self.layers:
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
) -> Plan:
    """Decide for every tensor of a file where it belongs, and build its layers. Touches no model.

    Args:
        models: component -> model; `None` to believe the names in the file.
        components: use these and leave the rest of the file aside.
        dtype: of the adapter; default the compute dtype of each model.
        device: of the adapter; default where each model computes. In page-locked memory if that is the CPU of a machine
            with CUDA.
        for_writing: see `Builder`; such a plan is for writing and not for attaching.
    """
    try:
        format = detect(checkpoint.header)
        wanted = None if components is None else set(components)
        targets = _targets(models, wanted)
        verdicts = format.locate(checkpoint.header, Names(targets))
        alphas, settings = format.alphas(checkpoint.header), format.settings(checkpoint.header)
    except AdapterError as error:
        raise LoadError(f"{checkpoint.origin}: {error}") from error
    faults: list[tuple[str, str]] = []
    ignored: list[tuple[str, str]] = []
    groups: dict[tuple[str, str], Group] = {}
    for key, verdict in verdicts.items():
        if wanted is not None and verdict.component is not None and verdict.component not in wanted:
            ignored.append((key, f"component {verdict.component} was not asked for"))
        elif isinstance(verdict, Unused):
            (ignored if verdict.harmless else faults).append((key, verdict.reason))
        else:
            _gather(groups, key, verdict, checkpoint.tensors[key], faults)
    broken = _non_finite(groups.values())
    builder = Builder(checkpoint, targets, alphas, settings, dtype, device, for_writing=for_writing)
    layers: dict[str, dict[str, AdapterLayer]] = {}
    used = 0
    for (component, path), group in groups.items():
        try:
            if not broken.isdisjoint(group.keys.values()):
                raise AdapterError(
                    f"{', '.join(sorted(broken & set(group.keys.values())))} holds NaN or infinite values"
                )
            built = builder.build(component, path, group)
            again = sorted(set(built) & set(layers.get(component, ())))
            if again:
                raise AdapterError(f"{', '.join(again)} has tensors under another name already")
        except AdapterError as error:
            faults += [(key, f"{component}.{path}: {error}") for key in group.keys.values()]
            continue
        layers.setdefault(component, {}).update(built)
        used += len(group.keys)
    family = families.of_models(models) if models is not None else None
    if family is None:
        family = families.of_file((key, tuple(tensor.shape)) for key, tensor in checkpoint.tensors.items())
    return Plan(checkpoint, format.name, family, layers, used, faults, ignored, targets or {})


def attach_all_(models: Mapping[str, nn.Module], name: str, planned: Plan, *, replacing: bool = False) -> None:
    """Attach a plan's adapters under `name`: to every component, or, if one refuses, to none.

    Args:
        replacing: see `attach_`. The adapter of this name is removed from components that the plan has none for.
    """
    before = {component: bank.adapters.get(name) for component in models if (bank := bank_of(models[component]))}
    attached: list[str] = []
    try:
        for component, adapter in planned.adapters.items():
            attach_(models[component], name, adapter, planned.hosts(component), replacing=replacing)
            attached.append(component)
    except BaseException:
        for component in attached:
            old = before.get(component)
            if old is None:
                detach_(models[component], name)
            else:
                hosts = {path: layer.host for path, layer in old.layers.items()}
                attach_(models[component], name, old, hosts, replacing=True)
        raise
    for component, old in before.items():
        if old is not None and component not in attached and replacing:
            detach_(models[component], name)


def _targets(models: Mapping[str, nn.Module] | None, wanted: set[str] | None) -> dict[str, Targets] | None:
    if models is None:
        return None
    return {name: Targets(model) for name, model in models.items() if wanted is None or name in wanted}


def _gather(
    groups: dict[tuple[str, str], Group],
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


def _non_finite(groups: Iterable[Group]) -> set[str]:
    """Keys of tensors with NaN or infinite values, with one synchronisation for the whole file."""
    extremes: dict[tuple[torch.device, torch.dtype], list[tuple[str, Tensor]]] = {}
    for group in groups:
        for name, tensor in group.tensors.items():
            if tensor.is_floating_point() and tensor.numel() and not tensor.is_meta and name != "alpha":
                wide = tensor.float() if tensor.dtype in FLOAT8 else tensor
                same = extremes.setdefault((tensor.device, wide.dtype), [])
                same += ((group.keys[name], extreme) for extreme in torch.aminmax(wide))
    broken: set[str] = set()
    for found in extremes.values():
        finite = torch.isfinite(torch.stack([extreme for _, extreme in found]))
        if not finite.all():
            broken |= {key for (key, _), ok in zip(found, finite.tolist(), strict=True) if not ok}
    return broken
