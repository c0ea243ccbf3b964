"""The first step of a plan: find the layer, or the token, that each key of a file belongs to."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from diffadapt.errors import Fault
from diffadapt.files.checkpoint import Checkpoint
from diffadapt.formats.format import Format
from diffadapt.formats.names import Names
from diffadapt.formats.verdicts import Unused, Vectors
from diffadapt.loading.content import Group
from diffadapt.runtime.targets import Targets


@dataclass(frozen=True)
class Located:
    """The keys of a file, sorted by what they belong to. The tensors have not been looked at.

    Attributes:
        groups: the tensors of each layer.
        vectors: key -> the verdict on a tensor of learned vectors.
        faults, ignored: see `Plan`.
    """

    groups: list[Group] = field(default_factory=list[Group])
    vectors: dict[str, Vectors] = field(default_factory=dict[str, Vectors])
    faults: list[Fault] = field(default_factory=list[Fault])
    ignored: list[Fault] = field(default_factory=list[Fault])


def locate(
    file_format: Format, checkpoint: Checkpoint, targets: Mapping[str, Targets] | None, wanted: Collection[str] | None
) -> Located:
    """Return what each key of a file belongs to, according to the format of the file.

    Args:
        targets: the models' paths, by component; `None` to trust the names in the file.
        wanted: the components that were asked for; `None` for all.

    Raises:
        AdapterError: the format cannot tell what the file's keys belong to.
    """
    located = Located()
    by_layer: dict[tuple[str, str], Group] = {}
    for key, verdict in file_format.locate(checkpoint.header, Names(targets)).items():
        if isinstance(verdict, Vectors):
            located.vectors[key] = verdict
        elif wanted is not None and verdict.component is not None and verdict.component not in wanted:
            located.ignored.append(Fault(key, f"component {verdict.component} was not asked for"))
        elif isinstance(verdict, Unused):
            (located.ignored if verdict.harmless else located.faults).append(Fault(key, verdict.reason))
        else:
            new = Group(verdict.component, verdict.path, verdict.written, verdict.parts)
            group = by_layer.setdefault((verdict.component, verdict.path), new)
            if verdict.name in group.keys:
                located.faults.append(Fault(key, f"the same tensor as {group.keys[verdict.name]}"))
            else:
                group.keys[verdict.name] = key
                group.tensors[verdict.name] = checkpoint.tensors[key]
    located.groups.extend(by_layer.values())
    return located
