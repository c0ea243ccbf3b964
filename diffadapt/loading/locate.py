"""The first step of a plan: find the layer, or the token, that each key of a file belongs to."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from diffadapt.errors import AdapterError, Fault
from diffadapt.files.checkpoint import Checkpoint
from diffadapt.formats.format import Format
from diffadapt.formats.names import Names
from diffadapt.formats.second_denoiser import is_for_second
from diffadapt.formats.suffixes import is_by_head
from diffadapt.formats.verdicts import OwnWeight, Shared, Unused, Vectors
from diffadapt.loading.content import Group
from diffadapt.runtime.targets import Targets
from diffadapt.weights import decoded


@dataclass(frozen=True)
class Located:
    """The keys of a file, sorted by what they belong to. The tensors have not been looked at.

    Attributes:
        groups: the tensors of each layer.
        vectors: key -> the verdict on a tensor of learned vectors.
        faults, ignored, lost: see `Plan`.
    """

    groups: list[Group] = field(default_factory=list[Group])
    vectors: dict[str, Vectors] = field(default_factory=dict[str, Vectors])
    faults: list[Fault] = field(default_factory=list[Fault])
    ignored: list[Fault] = field(default_factory=list[Fault])
    lost: list[Fault] = field(default_factory=list[Fault])

    def add_unused(self, key: str, verdict: Unused) -> None:
        """Add the verdict on a tensor that has no place."""
        fault = Fault(key, verdict.reason)
        (self.ignored if verdict.harmless else self.faults).append(fault)
        if verdict.lost:
            self.lost.append(fault)


def locate(
    file_format: Format,
    checkpoint: Checkpoint,
    targets: Mapping[str, Targets] | None,
    wanted: Collection[str] | None,
    empty: Collection[str] = (),
) -> Located:
    """Return what each key of a file belongs to, according to the format of the file.

    Args:
        targets: the models' paths, by component; `None` to trust the names in the file.
        wanted: the components that were asked for; `None` for all.
        empty: see `loading.plan.plan`.

    Raises:
        AdapterError: the format cannot tell what the file's keys belong to.
    """
    located = Located()
    by_layer: dict[tuple[str, str], Group] = {}
    shared: dict[str, Shared] = {}
    header = checkpoint.header
    names = Names(targets, empty, is_for_second=is_for_second(header.metadata), is_by_head=is_by_head(header.keys))
    for key, verdict in file_format.locate(checkpoint.header, names).items():
        if isinstance(verdict, Vectors):
            located.vectors[key] = verdict
        elif isinstance(verdict, OwnWeight):
            located.add_unused(key, _verdict_on_weight(checkpoint.tensors[key], verdict, targets))
        elif wanted is not None and verdict.component is not None and verdict.component not in wanted:
            located.ignored.append(Fault(key, f"component {verdict.component} was not asked for"))
        elif isinstance(verdict, Unused):
            located.add_unused(key, verdict)
        elif isinstance(verdict, Shared):
            shared[key] = verdict
        else:
            layer = verdict.component, verdict.path
            group = by_layer.get(layer)
            if group is None:
                group = by_layer[layer] = Group(*layer, verdict.written, verdict.parts)
            if verdict.name in group.keys:
                located.faults.append(Fault(key, f"the same tensor as {group.keys[verdict.name]}"))
            else:
                group.keys[verdict.name] = key
                group.tensors[verdict.name] = checkpoint.tensors[key]
                if verdict.ids:
                    group.tensors["token_ids"] = torch.tensor(verdict.ids)
    for key, verdict in shared.items():
        for path in verdict.paths:
            by_layer.setdefault((verdict.component, path), Group(verdict.component, path, path))
        for group in by_layer.values():
            if group.component != verdict.component or (verdict.group is not None and group.path not in verdict.group):
                continue
            if verdict.name in group.tensors:
                # The file has it for every layer, too (RandLora of PEFT).
                group.keys[f"{verdict.name} of all layers"] = key
            else:
                group.keys[verdict.name], group.tensors[verdict.name] = key, checkpoint.tensors[key]
    located.groups.extend(by_layer.values())
    return located


def _verdict_on_weight(tensor: Tensor, verdict: OwnWeight, targets: Mapping[str, Targets] | None) -> Unused:
    """Return the verdict on a copy of a layer's own weight, which is harmless if the model has the same weight."""
    copy = "a copy of the layer's own weight, which the model has, too"
    parameters = [] if targets is None else targets[verdict.component].model.parameters()
    if targets is None or tensor.is_meta or all(parameter.is_meta for parameter in parameters):
        return Unused(copy, verdict.component, harmless=True)
    where = f"{verdict.component}.{verdict.path}"
    try:
        own = decoded(targets[verdict.component].modules[verdict.path], "weight")
    except AdapterError as error:
        return Unused(f"cannot be compared with the weight of {where}: {error}", verdict.component)
    if tensor.shape != own.shape:
        return Unused(
            f"the weight of {where} has shape {tuple(tensor.shape)} where the file was made, and {tuple(own.shape)} "
            "here",
            verdict.component,
        )
    # Either of the two may have been rounded.
    if torch.equal(own.to(tensor), tensor) or torch.equal(tensor.to(own), own):
        return Unused(copy, verdict.component, harmless=True)
    return Unused(f"{where} had another weight where the file was made: it is for another model", verdict.component)
