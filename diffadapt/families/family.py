"""What a model family is: the names its layers have in the checkpoints it was published with."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from diffadapt.families.fused_parts import FusedPart
from diffadapt.runtime.targets import Targets

Aliases: TypeAlias = Mapping[str, tuple[FusedPart, ...]]
"""A layer's name in the original layout -> the model's layers that it consists of, in the order of its outputs."""

Table: TypeAlias = Mapping[str, str | tuple[str, ...]]
"""Original name -> names in diffusers, several where the original has them in one layer.

The first `{}` is the first number between two dots in a name, the second the second; other numbers are spelled out.
"""

Layout: TypeAlias = Mapping[str, tuple[tuple[FusedPart, int], ...]]
"""A layer's name in a model's original layout -> the model's layers it consists of, each with its number of outputs."""

_QKV = ("q", "k", "v")


@dataclass(frozen=True)
class Family:
    """One model family.

    Attributes:
        name: as in reports ("flux").
        models: class names of its denoisers in diffusers.
        signs: a regular expression that finds a key of this family in a file; see `recognise`.
        layers: the names of the original layout. Those that are the same in diffusers are left out.
        also: other names that files have for these layers; read, but never written.
        swapped: original names whose two halves of outputs are the other way round in diffusers.
        aliases: further names, for what a table cannot express. They win over the table's.
    """

    name: str
    models: tuple[str, ...] = ()
    signs: str | None = None
    layers: Table = field(default_factory=dict[str, str | tuple[str, ...]])
    also: Table = field(default_factory=dict[str, str | tuple[str, ...]])
    swapped: frozenset[str] = frozenset()
    aliases: Callable[[Targets], Aliases] | None = None

    def original(self, targets: Targets) -> Aliases:
        """The names in the original layout, one for every layer of this model that has another name there."""
        found = _named(self.layers, self.swapped, targets.modules)
        return found if self.aliases is None else {**found, **self.aliases(targets)}

    def names(self, targets: Targets) -> Aliases:
        """The same, and all other names that files have for these layers."""
        return {**_named(self.also, self.swapped, targets.modules), **self.original(targets)}


def block(original: str, ours: str, layers: Table) -> dict[str, str | tuple[str, ...]]:
    """A table for what is in a block: `original` and `ours` before every name."""
    return {
        f"{original}.{name}": f"{ours}.{parts}" if isinstance(parts, str) else tuple(f"{ours}.{part}" for part in parts)
        for name, parts in layers.items()
    }


def joined(before: str, after: str = "") -> tuple[str, ...]:
    """The layers that an original has in one for query, key and value: `joined("attn.to_")`."""
    return tuple(f"{before}{letter}{after}" for letter in _QKV)


def weighted(targets: Targets) -> Iterator[str]:
    """Paths of the layers of a model that have weights of their own."""
    for path, module in targets.modules.items():
        if any(parameter is not None for parameter in module._parameters.values()):
            yield path


_NUMBER = re.compile(r"\.(\d+)(?=\.)")


def _named(table: Table, swapped: frozenset[str], paths: Iterable[str]) -> dict[str, tuple[FusedPart, ...]]:
    if not table:
        return {}
    places: dict[str, list[tuple[str, int, int]]] = {}
    for original, ours in table.items():
        parts = (ours,) if isinstance(ours, str) else ours
        for position, part in enumerate(parts):
            places.setdefault(part, []).append((original, position, len(parts)))
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
