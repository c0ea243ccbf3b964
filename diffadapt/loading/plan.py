"""From a file to adapters on models: plan everything first, then attach everything or nothing."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from diffadapt import families
from diffadapt.errors import AdapterError, LoadError
from diffadapt.files.checkpoint import Checkpoint
from diffadapt.formats import detect
from diffadapt.formats.names import Names
from diffadapt.formats.verdicts import Place, Unused, Vectors
from diffadapt.loading.build import Builder, ForWriting
from diffadapt.loading.content import Content, Group
from diffadapt.loading.duplicates import winners
from diffadapt.loading.finite import non_finite
from diffadapt.loading.report import Report, explained
from diffadapt.runtime.adapter import Adapter
from diffadapt.runtime.adapter_layer import AdapterLayer
from diffadapt.runtime.targets import Targets
from diffadapt.tokens.learned_tokens import LearnedTokens, vectors_by_token
from diffadapt.tokens.plan import plan_tokens, resolve_vectors

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
        kinds = Counter(layer.adapter_type.name for layers in self.layers.values() for layer in layers.values())
        return Report(
            name=name,
            format=self.format,
            family=self.family,
            types=dict(kinds),
            components={component: len(layers) for component, layers in self.layers.items()},
            tokens=vectors_by_token(self.tokens.values()),
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
    resolved = resolve_vectors(learned, checkpoint, models, wanted)
    broken = non_finite([*(value for place in contents for value in groups[place].values), *resolved.values])
    layers: dict[str, dict[str, AdapterLayer]] = {}
    origins: dict[tuple[str, str], _Id] = {}
    good: list[_Id] = []
    # What the file has for a layer alone comes before what it has for several in one.
    for place in sorted(contents, key=lambda place: bool(groups[place].parts)):
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
    tokens = plan_tokens(
        resolved, checkpoint, models, tokenizers, broken=broken, settled=builder.settled, leaving=leaving
    )
    used, faults, ignored = used + tokens.used, faults + tokens.faults, ignored + tokens.ignored
    family = families.of_models(models) if models is not None else None
    if family is None:
        family = families.of_file((key, tuple(tensor.shape)) for key, tensor in checkpoint.tensors.items())
    return Plan(
        checkpoint, recognised.name, family, layers, tokens.components, used, faults, ignored, targets or {}, device
    )


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
    group = groups.setdefault((place.component, place.path), Group(place.written, place.parts))
    if place.name in group.tensors:
        faults.append((key, f"the same tensor as {group.keys[place.name]}"))
        return
    group.keys[place.name] = key
    group.tensors[place.name] = tensor


def _faults(component: str, path: str, group: Group, error: AdapterError) -> list[tuple[str, str]]:
    return [(key, f"{component}.{path}: {error}") for key in group.keys.values()]
