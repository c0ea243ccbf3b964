"""The plan for loading a file: what it will do to the models, decided before any of them is changed."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn

from diffadapt import families
from diffadapt.errors import AdapterError, Fault, LoadError
from diffadapt.files.checkpoint import Checkpoint
from diffadapt.formats import detect, network_args
from diffadapt.formats.header_alpha import HeaderAlphas
from diffadapt.formats.header_options import (
    dropouts,
    is_tied,
    options_by_component,
    options_for,
    refuse_options,
    unknown_options,
)
from diffadapt.formats.names import Names
from diffadapt.formats.peft import PEFT
from diffadapt.formats.stored_settings import with_stored
from diffadapt.formats.suffixes import is_oft_of_peft
from diffadapt.formats.verdicts import Unused
from diffadapt.loading.build import Builder, ForWriting, build
from diffadapt.loading.completion import complete
from diffadapt.loading.content import AlphaSource
from diffadapt.loading.fit import fit
from diffadapt.loading.locate import Located, locate
from diffadapt.loading.report import Report, ScaleRange, explained
from diffadapt.loading.starts import with_starts
from diffadapt.loading.twins import add_tied_
from diffadapt.runtime.adapter import Adapter
from diffadapt.runtime.adapter_layer import AdapterLayer
from diffadapt.runtime.dropout import Dropout
from diffadapt.runtime.targets import Targets
from diffadapt.tokens.learned_tokens import LearnedTokens, vectors_by_token
from diffadapt.tokens.plan import plan_tokens, resolve_vectors
from diffadapt.types.tokens import TOKENS


@dataclass(frozen=True)
class Plan:
    """A file resolved against models: what is attached where, and which tensors cannot be used.

    Attributes:
        checkpoint: the content of the file.
        format: the name of the file's format.
        family: the model family, or `None` if it is unknown.
        layers: component -> module path -> adapter layer, not attached yet.
        tokens: text encoder -> the learned tokens it gets, not installed yet.
        used: the number of tensors that are used.
        faults: the unused tensors that a complete load would need.
        ignored: the unused tensors that nobody misses.
        alphas_from: see `Built`.
        notes: see `Report`.
        lost: those of the ignored tensors that other models have a place for, so that a converted file needs them.
        targets: the models' paths, by component; empty if there are no models.
        device: the device that was asked for the adapters; `None` for the device on which each model computes.
        dropout: component -> the dropout probabilities that the file was trained with, if its header has them.
    """

    checkpoint: Checkpoint
    format: str
    family: str | None
    layers: Mapping[str, Mapping[str, AdapterLayer]]
    tokens: Mapping[str, LearnedTokens]
    used: int
    faults: list[Fault]
    ignored: list[Fault]
    lost: list[Fault]
    targets: Mapping[str, Targets]
    alphas_from: Mapping[tuple[str, str], AlphaSource]
    notes: list[Fault]
    device: torch.device | None = None
    dropout: Mapping[str, Dropout] = field(default_factory=dict[str, Dropout])

    def __repr__(self) -> str:
        layers = (
            ", ".join(f"{component} {len(found)} layers" for component, found in self.layers.items()) or "no layers"
        )
        unused = len(self.faults) + len(self.ignored)
        name = self.checkpoint.name or "a state dict"
        return f"<Plan of {name}: {self.format}, {layers}, {self.used} used, {unused} unused>"

    @cached_property
    def bytes(self) -> int:
        """The size of the adapters in bytes, as they were when this was read first."""
        return sum(adapter.bytes for adapter in self.adapters.values())

    @cached_property
    def adapters(self) -> dict[str, Adapter]:
        """The adapter of each component, not attached yet. It may be attached and detached any number of times."""
        metadata = self.checkpoint.header.metadata
        components = {**self.layers, **self.tokens}
        return {component: Adapter(self.layers.get(component, {}), metadata) for component in components}

    def hosts(self, component: str) -> dict[str, nn.Module]:
        """Return the model's layer for every adapter layer of a component, by module path."""
        return {path: self.targets[component].host(path) for path in self.layers.get(component, {})}

    def report(self, name: str) -> Report:
        """Return the account of the file, loaded as adapter `name`."""
        scales: dict[str, list[tuple[float, str]]] = {}
        ranks: set[int] = set()
        for component, adapter in self.adapters.items():
            for (path, layer), scale in zip(adapter.layers.items(), adapter.scales, strict=True):
                if layer.twin_of is not None:
                    continue
                rank = layer.rank
                if rank is not None:
                    ranks.add(rank)
                scales.setdefault(layer.adapter_type.name, []).append((scale, self.alphas_from[component, path]))
        return Report(
            name=name,
            format=self.format,
            family=self.family,
            types={name: len(found) for name, found in scales.items()},
            scales={name: ScaleRange.of(found) for name, found in scales.items()},
            ranks=tuple(sorted(ranks)),
            components={
                component: sum(layer.twin_of is None for layer in layers.values())
                for component, layers in self.layers.items()
            },
            tokens=vectors_by_token(self.tokens.values()),
            used=self.used,
            unused=self.faults + self.ignored,
            metadata=dict(self.checkpoint.header.metadata),
            notes=self.notes,
        )

    def refuse_faults(self, strict: bool, *, for_writing: bool = False) -> None:
        """Raise `LoadError` if nothing of the file can be used or, with `strict`, if there are any faults.

        Args:
            strict: whether to refuse faults.
            for_writing: whether tensors that the written file would lack are faults.
        """
        faults = [*self.faults, *(self.lost if for_writing else ())]
        if not (self.layers or self.tokens) or (strict and faults):
            raise LoadError(self._refusal(faults), self.faults + self.ignored)

    def _refusal(self, faults: list[Fault]) -> str:
        total = self.used + len(self.faults) + len(self.ignored)
        unused = faults or self.ignored
        lines = [f"{self.checkpoint.origin}: {len(unused)} of {total} tensors cannot be used, nothing was loaded"]
        family = _family_of_file(self.checkpoint)
        if families.differ(family, self.family):
            lines.append(f"this looks like a {family} adapter; the model is {self.family}")
        if all(fault.reason.endswith("was not asked for") for fault in unused):
            lines.append("the file has nothing for these components; leave components= out, or name some that it has")
        lines += [f"  {line}" for line in explained(unused)]
        if (self.layers or self.tokens) and faults == self.faults:
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
    empty: Collection[str] = (),
) -> Plan:
    """Decide where every tensor of a file belongs, and build its adapter layers and learned tokens. Changes no model.

    Args:
        checkpoint: the content of the file.
        models: the models by component; `None` to trust the names in the file.
        components: the components to load for; tensors for others are ignored. Defaults to all of `models`.
        dtype: the dtype of the adapters; defaults to the dtype in which each model computes.
        device: the device of the adapters; defaults to the one on which each model computes. Adapters on the CPU of a
            machine with CUDA are in page-locked memory if `device` is given.
        for_writing: see `ForWriting`; the plan can then be written to a file, but not attached.
        tokenizers: the tokenizer of each text encoder; without it, learned tokens cannot be installed.
        leaving: the name of an adapter that is about to be removed, along with its tokens.
        format: the name of the file's format; defaults to the one that its names match.
        empty: components that the pipeline has room for, but that are not loaded (`None`). Their tensors are no fault.

    Raises:
        LoadError: the file is of no known format, or its metadata is invalid. Tensors that cannot be used do not raise
            here; see `Plan.refuse_faults`.
    """
    wanted = None if components is None else set(components)
    if checkpoint.parts:
        options: dict[str, Any] = {"dtype": dtype, "device": device, "for_writing": for_writing, "format": format}
        return _plan_parts(checkpoint, models, wanted, empty, options)
    try:
        file_format = detect(checkpoint.header, format)
        targets = _targets(models, wanted)
        located = locate(file_format, checkpoint, targets, wanted, empty)
        alphas, settings = (
            HeaderAlphas(checkpoint.header),
            with_stored(file_format.settings(checkpoint.header), checkpoint.header),
        )
        options_of_header, tied = options_by_component(checkpoint.header), is_tied(checkpoint.header)
        for component in options_of_header:
            if wanted is None or not component or component in wanted:
                refuse_options(options_of_header[component])
    except AdapterError as error:
        raise LoadError(f"{checkpoint.origin}: {error}") from error
    # Shapes come first: values are read only after the shapes have shown that there are not too many of them.
    fitted = fit(located.groups, targets, alphas, settings, is_oft_of_peft=is_oft_of_peft(checkpoint.header))
    vectors = resolve_vectors(located.vectors, checkpoint, models, wanted, empty)
    builder = Builder(checkpoint, targets, dtype, device, for_writing)
    broken = builder.read(fitted, vectors.values)
    fitted = complete(fitted, targets, for_writing=for_writing is not None)
    fitted = with_starts(fitted, targets, options_of_header)
    built = build(fitted.layers, builder, broken)
    if targets is not None and for_writing is None:
        # PEFT always ties the rows of tokens.
        ties_tokens = file_format is PEFT
        twins = add_tied_(built.layers, targets, lambda layer: tied or (ties_tokens and layer.adapter_type is TOKENS))
        built.faults.extend(twins)
    tokens = plan_tokens(vectors, checkpoint, models, tokenizers, broken=broken, moved=builder.moved, leaving=leaving)
    family = None if models is None else families.of_models(models)
    return Plan(
        checkpoint=checkpoint,
        format=file_format.name,
        family=_family_of_file(checkpoint) if family is None else family,
        layers=built.layers,
        tokens=tokens.components,
        used=built.used + tokens.used,
        faults=[*located.faults, *fitted.faults, *built.faults, *tokens.faults],
        ignored=[*located.ignored, *built.ignored, *tokens.ignored],
        lost=located.lost,
        targets=targets or {},
        alphas_from=built.alphas_from,
        notes=[*fitted.notes, *unknown_options(checkpoint.header), *network_args.notes(checkpoint.header)],
        device=device,
        dropout={
            component: Dropout(*dropouts(options_for(options_of_header, component))) for component in built.layers
        },
    )


def _plan_parts(
    checkpoint: Checkpoint,
    models: Mapping[str, nn.Module] | None,
    wanted: set[str] | None,
    empty: Collection[str],
    options: Mapping[str, Any],
) -> Plan:
    """Plan every part of a checkpoint for the component that it is named after, and return all as one plan.

    Args:
        options: further arguments of `plan`.
    """
    plans: list[Plan] = []
    outside = Located()
    for component, part in checkpoint.parts.items():
        unused = None
        if wanted is not None and component not in wanted:
            unused = Unused(f"component {component} was not asked for", component, harmless=True)
        elif models is not None and component not in models:
            verdict = Names(_targets(models, None), empty).dotted(component, component, "")
            assert isinstance(verdict, Unused)
            unused = verdict
        if unused is not None:
            for key in part.tensors:
                outside.add_unused(f"{component}/{key}", unused)
            continue
        own = None if models is None else {component: models[component]}
        plans.append(_renamed(plan(part, own, **options), component))
    family = None if models is None else families.of_models(models)
    return Plan(
        checkpoint=checkpoint,
        format=plans[0].format if plans else PEFT.name,
        family=_family_of_file(checkpoint) if family is None else family,
        layers={component: layers for part in plans for component, layers in part.layers.items()},
        tokens={},
        used=sum(part.used for part in plans),
        faults=[*outside.faults, *(fault for part in plans for fault in part.faults)],
        ignored=[*outside.ignored, *(fault for part in plans for fault in part.ignored)],
        lost=[*outside.lost, *(fault for part in plans for fault in part.lost)],
        targets={component: targets for part in plans for component, targets in part.targets.items()},
        alphas_from={place: source for part in plans for place, source in part.alphas_from.items()},
        notes=[note for part in plans for note in part.notes],
        device=options["device"],
        dropout={component: dropout for part in plans for component, dropout in part.dropout.items()},
    )


def _renamed(part: Plan, component: str) -> Plan:
    """Return the plan of one part, with the keys of the whole and with the part's name for the only component."""

    def keyed(faults: list[Fault]) -> list[Fault]:
        return [Fault(f"{component}/{key}", reason) for key, reason in faults]

    return replace(
        part,
        layers=dict(zip((component,), part.layers.values(), strict=False)),
        alphas_from={(component, path): source for (_, path), source in part.alphas_from.items()},
        dropout=dict.fromkeys((component,), next(iter(part.dropout.values()), Dropout())),
        faults=keyed(part.faults),
        ignored=keyed(part.ignored),
        lost=keyed(part.lost),
        notes=keyed(part.notes),
    )


def _targets(models: Mapping[str, nn.Module] | None, wanted: set[str] | None) -> dict[str, Targets] | None:
    if models is None:
        return None
    return {name: Targets(model) for name, model in models.items() if wanted is None or name in wanted}


def _family_of_file(checkpoint: Checkpoint) -> str | None:
    return families.of_file((key, tuple(tensor.shape)) for key, tensor in checkpoint.tensors.items())
