"""A way back from a merged quantised weight: copies of its packed parts, which are small."""

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from diffadapt.merging.stored import NO_ROUNDING, Rounding
from diffadapt.runtime.bank import bank_of
from diffadapt.runtime.undo import Undo
from diffadapt.weights import codec_of, decoded, write
from diffadapt.weights.resting import resting_tensor

_LARGE = 0.5
"""The error, as a share of the change, that rounding may make without a warning."""

_NAMED = 3
"""So many layers are named in a warning."""


@dataclass
class UndoByParts:
    """A way back (see `Undo`) by copies of all parts of a quantised weight.

    The parts are looked up in the layer whenever they are needed, because backends put others in their place.

    Attributes:
        contents: part -> its original content.
        layout: the layout of the parts; see `WeightCodec.layout`.
        where: path of the layer, for messages.
        rounding: what rounding the merged weight made of the adapters' change.
    """

    host: nn.Module
    name: str
    where: str
    contents: Mapping[str, Tensor]
    layout: Any
    rounding: Rounding = NO_ROUNDING

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
    """Return `Rounding.error` of every quantised layer that adapters are merged into, by path."""
    return {where: rounding.error for where, rounding in _roundings(models).items()}


def warn_of_losses(models: Iterable[nn.Module]) -> None:
    """Warn of the layers where the error of rounding is more than half of the change of the merged adapters."""
    roundings = _roundings(models)
    large = sorted((r for r in roundings.items() if r[1].error > _LARGE), key=lambda r: r[1].error, reverse=True)
    if large:
        named = [f"{where} (error {r.error:.0%}, {max(r.left, 0.0):.0%} of the change left)" for where, r in large]
        more = f", and {len(named) - _NAMED} more" if len(named) > _NAMED else ""
        warnings.warn(
            f"quantising again lost much of the merged adapters in {len(large)} of {len(roundings)} quantised layers, "
            f"where its error is more than {_LARGE:.0%} of their change, which is small against the steps of the "
            f"storage: {', '.join(named[:_NAMED])}{more}; call unmerge() and keep the adapters unmerged, or merge them "
            "before the model is quantised; `requantisation_errors` has the error in every layer",
            stacklevel=2,
        )


def _roundings(models: Iterable[nn.Module]) -> dict[str, Rounding]:
    ways = [way for model in models if (bank := bank_of(model)) is not None for way in bank.undo]
    return {way.where: way.rounding for way in ways if isinstance(way, UndoByParts)}


def restore_(way: Undo) -> None:
    """Write the original content of a base tensor."""
    if isinstance(way, UndoByParts):
        way.restore_()
    else:
        way.tensor.copy_(way.restored())
