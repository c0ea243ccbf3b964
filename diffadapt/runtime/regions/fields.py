"""Masks over a picture, as factors for the positions that the layers of a model get.

A **field** is what one mask is at the positions of one layer: the mean of the mask over the part of the picture that a
position stands for. Tokens without a position in the picture (text, padding, reference pictures), and layers that see
no picture at all, get the mean of the mask over the whole picture. That is the only number that is 1 for a mask of
ones, 0 for one of zeros, and sums up to 1 for complementary masks, and is the same for all masks of the same area.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffadapt.errors import AdapterError
from diffadapt.runtime.regions.token_layout import Role, TokenLayout, Tokens
from diffadapt.types.layer_spec import LayerSpec

_ROOM = 8
"""The number of fields is a multiple of this, so that a compiled model takes more masks without a recompile."""


class Regions:
    """The masks of the adapters of one model, and their fields for its present call.

    The first field is 1 everywhere: that of adapters without a mask. A row of a field is a row of the batch; there is
    one row if all have the same masks.

    Attributes:
        masks: adapter name -> its mask, (samples, height, width) or (1, height, width), in float64.
        layout: where the tokens of a picture are in this model; `None` if it sees no picture, as a text encoder.
        samples: how many prompts have masks of their own; 0 if all have the same.
        prepared: whether fields have all rows of the batch in any case, so that compiled graphs, which depend on their
            shapes, take masks of both kinds.
        means: the mean of every mask, (rows, fields).
        sequences: (role, length of a sequence) -> fields of its tokens, (rows, length, fields). The length is negative
            for sequences that layers get joined, whose fields are (length, fields).
        grids: (height, width) -> fields on a grid, (rows, fields, height, width).
        batch: the number of rows of the model's input in this call; 0 before the first.
    """

    def __init__(self, masks: Mapping[str, Tensor], layout: TokenLayout | None, *, prepared: bool = False) -> None:
        self.masks = dict(masks)
        self.layout = layout
        self.prepared = prepared
        self.samples = max((len(mask) for mask in masks.values()), default=1)
        self.samples = 0 if self.samples == 1 else self.samples
        self.batch = 0
        self.sequences: dict[tuple[str, int], Tensor] = {}
        self.grids: dict[tuple[int, int], Tensor] = {}
        self._numbers = {name: number for number, name in enumerate(self.masks, start=1)}
        self._spread: Callable[[Tensor], Tensor] = self._for_all_rows
        self._call: tuple[Any, ...] | None = None
        self._device = torch.device("cpu")
        self._means = self._stacked([mask.mean((1, 2), keepdim=True) for mask in self.masks.values()], (1, 1))
        self.means = self._means.flatten(1)

    def number(self, name: str) -> int:
        """Return the index of an adapter's field; 0 for an adapter without a mask."""
        return self._numbers.get(name, 0)

    def begin(
        self,
        model: nn.Module,
        args: Any,
        kwargs: Mapping[str, Any],
        rows: tuple[int, int],
        spread: Callable[[Tensor], Tensor],
    ) -> None:
        """Compute the fields for a call of `model`.

        Args:
            rows: the number of rows of the model's input, and the number of images of each prompt.
            spread: returns the rows of the batch, given one for each prompt that has masks of its own.

        Raises:
            AdapterError: it is not known where the picture is in this call.
        """
        if torch.is_grad_enabled() and getattr(model, "is_gradient_checkpointing", False):
            raise AdapterError(
                "regions: blocks that are computed again during backward have no regions then; call "
                "disable_gradient_checkpointing(), or run under torch.no_grad()"
            )
        picture = None if self.layout is None else self.layout.of_call(model, args, kwargs)
        device = _device_of((*args, *kwargs.values()))
        call = picture, rows, device
        if call == self._call:
            return
        batch, _ = rows
        self._call, self._device, self.batch = call, device, batch
        self._spread = spread if self.samples else self._for_all_rows
        self.means = self._spread(self._means.flatten(1).to(device))
        self.sequences, self.grids = {}, {}
        for grid in picture.grids if picture is not None else ():
            self.grids[grid] = self.on_grid(*grid)
        for tokens in picture.sequences if picture is not None else ():
            key = tokens.role, -tokens.length * batch if tokens.flat else tokens.length
            if key in self.sequences:
                raise AdapterError(
                    f"regions: a {type(model).__name__} has layers that get {tokens.length} tokens, which may be "
                    "those of the picture or of the text; draw a picture of another size"
                )
            self.sequences[key] = self._along_sequence(tokens)

    def on_grid(self, height: int, width: int) -> Tensor:
        """Return the fields on a grid over the picture, (rows, fields, height, width)."""
        known = self.grids.get((height, width))
        if known is not None:
            return known
        resized = [F.adaptive_avg_pool2d(mask, (height, width)) for mask in self.masks.values()]
        return self._spread(self._stacked(resized, (height, width)).to(self._device))

    def _along_sequence(self, tokens: Tokens) -> Tensor:
        """Return the fields of a sequence, (rows, length, fields)."""
        fields = self.on_grid(*tokens.grid).flatten(2).mT.repeat(1, tokens.frames, 1)
        rows = max(len(fields), len(tokens.starts) if len(tokens.starts) > 1 else 1, self.batch if tokens.flat else 1)
        found = self.means.unsqueeze(1).repeat(rows // len(self.means), tokens.length, 1)
        fields = fields.expand(rows, -1, -1)
        for row in range(rows):
            start = tokens.starts[row if len(tokens.starts) > 1 else 0]
            if start >= 0:
                found[row, start : start + fields.shape[1]] = fields[row]
        return found.flatten(0, 1) if tokens.flat else found

    def _for_all_rows(self, fields: Tensor) -> Tensor:
        """Return the fields of all rows of the batch, which are the same, or the only row."""
        return fields.repeat(self.batch, *(1,) * (fields.ndim - 1)) if self.prepared and self.batch else fields

    def _stacked(self, masks: list[Tensor], size: tuple[int, int]) -> Tensor:
        """Return masks of one size as (samples, fields, height, width) in float32, after one of ones."""
        shape = (self.samples or 1, *size)
        together = [torch.ones(shape), *(mask.float().expand(shape) for mask in masks)]
        return torch.stack([*together, *[torch.zeros(shape)] * (-len(together) % _ROOM)], dim=1)


class Region:
    """The fields of one adapter layer, or of one slot.

    Attributes:
        regions: the masks of the model.
        path: the module path of the host.
        role: the tokens that the host gets.
        index: the indices of the fields: one for an adapter layer, one for every row of a slot.
    """

    def __init__(self, regions: Regions, path: str, index: Tensor) -> None:
        self.regions = regions
        self.path = path
        self.role: Role = "none" if regions.layout is None else regions.layout.role(path)
        self.index = index

    def uniform(self) -> Tensor:
        """Return the mean of the mask, 0-d, for a change that all rows share.

        Raises:
            AdapterError: prompts have masks of their own.
        """
        if self.regions.samples:
            raise AdapterError(
                f"regions: {self.path} is one parameter for the whole batch, so it takes no mask per prompt; draw the "
                "pictures one by one"
            )
        means = self.regions.means[0]
        return means.index_select(0, self.index.to(means.device))[0]

    def field(self, vectors: Tensor, spec: LayerSpec) -> Tensor:
        """Return the fields at the positions of `vectors`, the input or output of a layer, in a shape to multiply them.

        Returns:
            A float32 tensor with as many dimensions as `vectors`. Its channels are those of `index`, one or many.

        Raises:
            AdapterError: the positions of these vectors in the picture are not known.
        """
        shape = tuple(vectors.shape)
        # The channels come before the positions, or after them.
        before = spec.kind in ("conv", "batch_norm") or spec.norm_groups > 0
        found = None if self.role == "none" else self._positions(shape, before, spec)
        if found is None:
            found = self._means(shape, before)
        elif len(found) not in (1, shape[0]):
            raise self._unknown(shape)
        index = self.index
        if index.device != found.device:
            index = index.to(found.device)
        found = found.index_select(1 if before else -1, index)
        return found if found.device == vectors.device else found.to(vectors.device)

    def _positions(self, shape: tuple[int, ...], before: bool, spec: LayerSpec) -> Tensor | None:
        """Return the fields of all masks for vectors of a shape; `None` if they have no positions."""
        regions, dimensions = self.regions, len(shape)
        if dimensions < 2:
            return None
        if before:
            if dimensions < 4:
                found = regions.sequences.get((self.role, shape[-1])) if dimensions == 3 else None
                return self._known(found, shape).mT
            fields = regions.on_grid(shape[-2], shape[-1])
            return fields if dimensions == 4 else fields.unsqueeze(2)
        if dimensions == 2:
            found = regions.sequences.get((self.role, -shape[0]))
            if found is None and shape[0] != regions.batch:
                raise self._unknown(shape)
            return found
        if dimensions == 4 and spec.kind == "norm":
            # A norm of queries or keys, whose heads come after the tokens or before them.
            after, ahead = (regions.sequences.get((self.role, shape[axis])) for axis in (1, 2))
            if (after is None) == (ahead is None):
                raise self._unknown(shape)
            return ahead.unsqueeze(1) if after is None and ahead is not None else self._known(after, shape).unsqueeze(2)
        if dimensions == 4:
            return regions.on_grid(shape[1], shape[2]).permute(0, 2, 3, 1)
        if dimensions == 3 and shape[1] == 1:
            return None
        return self._known(regions.sequences.get((self.role, shape[1])) if dimensions == 3 else None, shape)

    def _means(self, shape: tuple[int, ...], before: bool) -> Tensor:
        """Return the mean of every mask for vectors of a shape."""
        means = self.regions.means
        if len(shape) < 2:
            return means[0]
        rows, ones = shape[0], (1,) * (len(shape) - 2)
        if len(means) != rows and not self.regions.samples:
            means = means[:1]
        if len(means) not in (1, rows):
            # The rows of a matrix may be tokens of texts of different lengths.
            if rows % len(means) or len(shape) == 2:
                raise self._unknown(shape)
            means = means.repeat_interleave(rows // len(means), 0)
        return means.view(*means.shape, *ones) if before else means.view(len(means), *ones, -1)

    def _known(self, found: Tensor | None, shape: tuple[int, ...]) -> Tensor:
        if found is None:
            raise self._unknown(shape)
        return found

    def _unknown(self, shape: tuple[int, ...]) -> AdapterError:
        lengths = sorted({abs(length) for role, length in self.regions.sequences if role == self.role})
        expected = f"; known are sequences of {', '.join(map(str, lengths))} tokens" if lengths else ""
        return AdapterError(
            f"regions: {self.path} gets vectors of shape {shape}, and it is not known where they are in the picture"
            f"{expected}. Draw without regions, or load the adapter without this layer"
        )


def _device_of(arguments: Any) -> torch.device:
    """Return the device of the first tensor among the arguments of a call."""
    for value in arguments:
        first = value[0] if isinstance(value, list) and value else value  # type: ignore[misc]
        if isinstance(first, Tensor):
            return first.device
    return torch.device("cpu")
