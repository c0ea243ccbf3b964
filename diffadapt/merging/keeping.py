"""The choice of what to keep of the weights that merging overwrites."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from diffadapt.files.safetensors_file import OpenFile
from diffadapt.merging.undo_by_correction import UndoByCorrection
from diffadapt.merging.undo_from_file import UndoFromFile
from diffadapt.runtime.bank import bank_of
from diffadapt.runtime.undo import UndoByCopy


@dataclass(frozen=True)
class Keeping:
    """The choice of what to keep of the weights that merging overwrites.

    Attributes:
        compact: `True` keeps corrections instead of a copy wherever they take less memory, `False` keeps copies.
            `None` keeps corrections where they are also faster: for sums of low-rank changes on half-precision weights.
        files: component -> files that its weights were read from. Nothing is kept of a weight that one of them has.
    """

    compact: bool | None = None
    files: Mapping[str, Sequence[OpenFile]] = field(default_factory=dict[str, Sequence[OpenFile]])

    @classmethod
    def of(cls, models: Mapping[str, nn.Module]) -> "Keeping":
        """Return the choice that was made for the adapters merged into `models` now."""
        undos = {component: bank.undo for component, model in models.items() if (bank := bank_of(model)) is not None}
        classes = {type(way) for ways in undos.values() for way in ways}
        files = {
            component: tuple(dict.fromkeys(way.file for way in ways if isinstance(way, UndoFromFile)))
            for component, ways in undos.items()
        }
        return cls(True if UndoByCorrection in classes else False if UndoByCopy in classes else None, files)
