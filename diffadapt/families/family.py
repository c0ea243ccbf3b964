"""What a model family is: names of its models, and names of their layers in the checkpoints as published."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Literal, TypeAlias

from diffadapt.families.fused_parts import FusedPart
from diffadapt.runtime.targets import Targets

Aliases: TypeAlias = Mapping[str, tuple[FusedPart, ...]]
"""Name of a layer in the original layout -> the model's layers that it consists of, in the order of its outputs."""

Table: TypeAlias = Mapping[str, str | tuple[str, ...]]
"""Original name of a layer -> its name in diffusers, or a tuple of several names if the original fuses these layers.

The first `{}` stands for the first number between two dots in a name, the second `{}` for the second one; other numbers
are written out.
"""

Layout: TypeAlias = Mapping[str, tuple[tuple[FusedPart, int], ...]]
"""Name of a layer in a model's original layout -> the parts that it consists of, each with its number of outputs."""

_QKV = ("q", "k", "v")


@dataclass(frozen=True, eq=False)
class Family:
    """A model family.

    Attributes:
        name: the name in reports ("flux").
        models: names of the diffusers classes of its denoisers.
        signs: a regular expression that matches some keys of this family's files and none of any later family; see
            `recognise`. `None` if keys alone do not identify the family.
        layers: the names of the original layout, without those that are the same in diffusers.
        also: other names of these layers in files, which are read but never written.
        swapped: original names of layers whose halves of outputs diffusers has in the opposite order.
        by_head: original names of fused layers that the checkpoint stores head by head. Programs that do not reorder it
            write the rows of the first head of every part, then those of the second, and so on.
        aliases: returns further names, for what a table cannot express. They take precedence over those of the tables.
        optional: parts that some models of the family are built without, such as the embedder of the guidance of a
            distilled model: what messages call the part -> a regular expression for some of its names, in both layouts
            and with underscores for dots. A file that has more parts than the model suits it all the same.
    """

    name: str
    models: tuple[str, ...] = ()
    signs: str | None = None
    layers: Table = field(default_factory=dict[str, str | tuple[str, ...]])
    also: Table = field(default_factory=dict[str, str | tuple[str, ...]])
    swapped: frozenset[str] = frozenset()
    by_head: frozenset[str] = frozenset()
    aliases: Callable[[Targets], Aliases] | None = None
    optional: Mapping[str, str] = field(default_factory=dict[str, str])

    def original(self, targets: Targets) -> Aliases:
        """Return the names in the original layout of the layers that have another name there."""
        found = _of_table(self, "layers", tuple(targets.modules))
        return found if self.aliases is None else {**found, **self.aliases(targets)}

    def names(self, targets: Targets) -> Aliases:
        """Return all names that files may have for layers of this model besides those of diffusers."""
        return {**_of_table(self, "also", tuple(targets.modules)), **self.original(targets)}

    def parameters(self, targets: Targets) -> Aliases:
        """Return the names in the original layout of bare parameters that have another name there."""
        return _of_table(self, "layers", tuple(bare_parameters(targets)))

    def stored_by_head(self, targets: Targets) -> Aliases:
        """Return the layers of `by_head`, with parts whose rows are in the order of the checkpoint."""
        head = getattr(getattr(targets.model, "config", None), "attention_head_dim", None)
        if not self.by_head or head is None:
            return {}
        table = {name: parts for name, parts in self.layers.items() if name in self.by_head}
        return {
            name: tuple(replace(part, head=head, count=len(parts)) for part in parts)
            for name, parts in _named(table, self.swapped, targets.modules).items()
        }


def block(original: str, ours: str, layers: Table) -> dict[str, str | tuple[str, ...]]:
    """Return the table of a block: `layers` with the prefix `original` on original names and `ours` on the others."""
    return {
        f"{original}.{name}": f"{ours}.{own}" if isinstance(own, str) else tuple(f"{ours}.{each}" for each in own)
        for name, own in layers.items()
    }


def qkv(before: str, after: str = "") -> tuple[str, ...]:
    """Return the names of the query, key and value projections: `qkv("attn.to_")`."""
    return tuple(f"{before}{letter}{after}" for letter in _QKV)


def bare_parameters(targets: Targets) -> Iterator[str]:
    """Yield the paths of parameters that are not the weight or bias of a layer, such as tables of shifts and scales."""
    for path, module in (("", targets.model), *targets.modules.items()):
        for name, parameter in module._parameters.items():
            if parameter is not None and name not in ("weight", "bias"):
                yield f"{path}.{name}".removeprefix(".")


def weighted(targets: Targets) -> Iterator[str]:
    """Yield the paths of a model's modules that have parameters of their own."""
    for path, module in targets.modules.items():
        if any(parameter is not None for parameter in module._parameters.values()):
            yield path


_NUMBER = re.compile(r"\.(\d+)(?=\.)")


@lru_cache(maxsize=64)
def _of_table(family: Family, table: Literal["layers", "also"], paths: tuple[str, ...]) -> Aliases:
    """Return the aliases by a table of a family for the layers at `paths`, which are the same at every load."""
    return _named(getattr(family, table), family.swapped, paths)


def _named(table: Table, swapped: frozenset[str], paths: Iterable[str]) -> dict[str, tuple[FusedPart, ...]]:
    """Return the aliases by a table for the layers at `paths`; fused layers only if all their parts are there."""
    if not table:
        return {}
    places: dict[str, list[tuple[str, int, int]]] = {}
    for original, ours in table.items():
        names = (ours,) if isinstance(ours, str) else ours
        for position, name in enumerate(names):
            places.setdefault(name, []).append((original, position, len(names)))
    found: dict[str, list[FusedPart | None]] = {}
    for path in paths:
        numbers = _NUMBER.findall(path)
        for count in range(min(len(numbers), 2) + 1):
            for original, position, size in places.get(_NUMBER.sub(".{}", path, count) if count else path, ()):
                name = original
                for number in numbers[:count]:
                    name = name.replace("{}", number, 1)
                found.setdefault(name, [None] * size)[position] = FusedPart(path, original in swapped)
    complete: dict[str, tuple[FusedPart, ...]] = {}
    for name, parts in found.items():
        present = tuple(part for part in parts if part is not None)
        if len(present) == len(parts):
            complete[name] = present
    return complete
