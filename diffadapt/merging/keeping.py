"""What to keep of the weights that merging overwrites."""

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
    """What to keep of the weights that merging overwrites.

    Attributes:
        compact: what rounding lost instead of copies, where that is less; `None` for where it also is faster: sums of
            low-rank changes on weights of half precision.
        files: component -> files that its weights were read from. Nothing is kept of what one of them has.
    """

    compact: bool | None = None
    files: Mapping[str, Sequence[OpenFile]] = field(default_factory=dict[str, Sequence[OpenFile]])

    @classmethod
    def of(cls, models: Mapping[str, nn.Module]) -> "Keeping":
        """As it is done for what is merged now."""
        ways = {component: bank.undo for component, model in models.items() if (bank := bank_of(model)) is not None}
        kinds = {type(way) for undo in ways.values() for way in undo}
        files = {
            component: tuple(dict.fromkeys(way.file for way in undo if isinstance(way, UndoFromFile)))
            for component, undo in ways.items()
        }
        return cls(True if UndoByCorrection in kinds else False if UndoByCopy in kinds else None, files)
