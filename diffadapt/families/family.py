"""What a model family is: the names its layers have in the checkpoints it was published with."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from diffadapt.pieces import Piece
from diffadapt.targets import Targets

Aliases: TypeAlias = Mapping[str, tuple[Piece, ...]]
"""A layer's name in the original layout -> the model's layers that it consists of, in the order of its outputs."""


@dataclass(frozen=True)
class Family:
    """One model family.

    Attributes:
        name: as in reports ("flux").
        models: class names of its denoisers in diffusers.
        signs: a regular expression that finds a key of this family, dotted or flattened, in a file, and in no file of
            another family before it in the registry.
        layers: original name -> names in diffusers, several where the original has them in one layer. `{}` is the
            number of a block, the first number in either name.
        swapped: original names whose two halves of outputs are the other way round in diffusers.
        aliases: the same as a function of the model, for layouts that a table cannot express.
        fits: whether the first matrix that `signs` found has a shape of this family, where names alone do not tell.
            Arguments: key, shape.
    """

    name: str
    models: tuple[str, ...]
    signs: str | None = None
    layers: Mapping[str, str | tuple[str, ...]] = field(default_factory=dict[str, str | tuple[str, ...]])
    swapped: frozenset[str] = frozenset()
    aliases: Callable[[Targets], Aliases] | None = None
    fits: Callable[[str, tuple[int, ...]], bool] = lambda key, shape: True

    def names(self, targets: Targets) -> Aliases:
        """The original names of everything that this model really has."""
        if self.aliases is not None:
            return self.aliases(targets)
        places: dict[str, tuple[str, int, int]] = {}
        for original, ours in self.layers.items():
            parts = (ours,) if isinstance(ours, str) else ours
            for position, part in enumerate(parts):
                places[part] = original, position, len(parts)
        found: dict[str, list[Piece | None]] = {}
        for path in targets.modules:
            number = _BLOCK.search(path)
            place = places.get(_BLOCK.sub(".{}.", path, count=1) if number else path)
            if place is None:
                continue
            original, position, count = place
            name = original.replace("{}", number[1]) if number else original
            found.setdefault(name, [None] * count)[position] = Piece(path, original in self.swapped)
        complete: dict[str, tuple[Piece, ...]] = {}
        for name, pieces in found.items():
            present = tuple(piece for piece in pieces if piece is not None)
            if len(present) == len(pieces):
                complete[name] = present
        return complete


_BLOCK = re.compile(r"\.(\d+)\.")
