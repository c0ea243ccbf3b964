"""A way back from a merged quantised weight: copies of its packed parts, which are small."""

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from diffadapt.runtime.bank import bank_of
from diffadapt.runtime.undo import Undo
from diffadapt.weights import codec_of, decoded, write
from diffadapt.weights.resting import resting_tensor

_LARGE = 0.5
"""The share of a change that rounding may lose without a warning."""


@dataclass
class UndoByParts:
    """A way back (see `Undo`) by copies of all parts of a quantised weight.

    The parts are looked up in the layer whenever they are needed, because backends put others in their place.

    Attributes:
        contents: part -> its original content.
        layout: the layout of the parts; see `WeightCodec.layout`.
        where: path of the layer, for messages.
        lost: what rounding changed of the merged weight, as a share of the norm of the adapters' change.
    """

    host: nn.Module
    name: str
    where: str
    contents: Mapping[str, Tensor]
    layout: Any
    lost: float = 0.0

    @classmethod
    def of(cls, host: nn.Module, name: str, where: str) -> "UndoByParts":
        """Return a way back to the present content of parameter `name` of `host`."""
        codec = codec_of(host, name)
        contents = {part: tensor.detach().clone() for part, tensor in codec.parts(host, name).items()}
        return cls(host, name, where, contents, None if codec.layout is None else codec.layout(host, name))

    @property
    def tensor(self) -> Tensor:
        tensor = resting_tensor(self.host, self.name)
        assert tensor is not None
        return tensor

    @property
    def nbytes(self) -> int:
        return sum(content.nbytes for content in self.contents.values())

    def restored(self) -> Tensor:
        # Only the layer can decode its parts, so they go back into it for a moment.
        now = UndoByParts.of(self.host, self.name, self.where)
        try:
            self.restore_()
            return decoded(self.host, self.name)
        finally:
            now.restore_()

    def restore_(self) -> None:
        """Write the original content."""
        codec = codec_of(self.host, self.name)
        if codec.lay_out is not None:
            codec.lay_out(self.host, self.name, self.layout, self.contents)
        write(codec.parts(self.host, self.name), self.contents)


def lost_by_rounding(models: Iterable[nn.Module]) -> dict[str, float]:
    """Return `UndoByParts.lost` of every quantised layer that adapters are merged into, by path."""
    ways = [way for model in models if (bank := bank_of(model)) is not None for way in bank.undo]
    return {way.where: way.lost for way in ways if isinstance(way, UndoByParts)}


def warn_of_losses(models: Iterable[nn.Module]) -> None:
    """Warn if rounding lost most of the change of merged adapters in any layer."""
    losses = lost_by_rounding(models)
    large = {where: lost for where, lost in losses.items() if lost > _LARGE}
    if large:
        worst = max(large, key=lambda where: large[where])
        warnings.warn(
            f"rounding lost much of the merged adapters in {len(large)} of {len(losses)} quantised layers, where their "
            f"change is smaller than the steps of the storage (most in {worst}: an error of {large[worst]:.0%} of the "
            "change); see `requantisation_errors`, and keep the adapters unmerged",
            stacklevel=2,
        )


def restore_(way: Undo) -> None:
    """Write the original content of a base tensor."""
    if isinstance(way, UndoByParts):
        way.restore_()
    else:
        way.tensor.copy_(way.restored())
