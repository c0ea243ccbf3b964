"""`Slot`: room of a fixed shape on one layer. `Needs`: the room that adapters need there. `Seat`: an adapter's room."""

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from diffadapt.runtime.adapter_layer import AdapterLayer
from diffadapt.runtime.slots.forms import ROWS, Form
from diffadapt.runtime.slots.row_ranges import Rows
from diffadapt.types.adapter_type import Tensors
from diffadapt.types.layer_spec import LayerSpec

_MAX_CACHED_VIEWS = 8


class Slot(AdapterLayer):
    """Room on one layer for one form or, if its key is `ROWS`, for many. A slot runs like an adapter layer.

    Attributes:
        key: the key of the forms that fit into the slot.
        cells: the indices of the slot's gates in the gate tensor of the reservation, one per row.
        free: the rows that no adapter has taken.
    """

    key: Hashable
    cells: range
    free: Rows
    _dtype: torch.dtype
    _view_cache: dict[Rows, tuple[tuple[int, int], list[Tensor]]]

    def __init__(self, form: Form, spec: LayerSpec, rows: int, dtype: torch.dtype, device: torch.device) -> None:
        """Make an empty slot, with zeros in its tensors.

        Args:
            form: an example of the forms that will fit; only its shapes and dtypes are used.
            spec: the geometry of the layer.
            rows: the number of rows; 1 unless the key of `form` is `ROWS`.
            dtype: the dtype to compute in, which all tensors get except those that are float32 or wider or integers in
                `form`.
            device: the device of the tensors.
        """
        if form.key == ROWS:
            down, up = (rows, *spec.weight_shape[1:]), (spec.out_features, rows)
            shapes = {"lora_down": (down, dtype), "lora_up": (up, dtype)}
        else:
            kept = torch.float32, torch.float64, torch.int32, torch.int64
            shapes = {
                name: (tuple(tensor.shape), tensor.dtype if tensor.dtype in kept else dtype)
                for name, tensor in form.tensors.items()
            }
        tensors = {name: torch.zeros(shape, dtype=own, device=device) for name, (shape, own) in shapes.items()}
        super().__init__(form.adapter_type, spec, tensors, stages=form.stages)
        self.__dict__.update(
            key=form.key,
            free=(range(rows),),
            cells=range(rows),
            gates_ranks=form.key == ROWS,
            training=False,
            _dtype=dtype,
            _view_cache={},
        )

    def train(self, mode: bool = True) -> "Slot":
        """Change nothing, since nothing in a slot is trained."""
        return self

    @property
    def dtype(self) -> torch.dtype:
        """The dtype to compute in, which differs from the dtype of tensors that are kept in float32."""
        return self._dtype

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Slot":
        self.__dict__["_dtype"] = fn(torch.empty(0, dtype=self._dtype, device=next(self.parameters()).device)).dtype
        super()._apply(fn, recurse)
        return self

    def views(self, rows: Rows) -> list[Tensor]:
        """Return the memory of these rows, to be written to: for the key `ROWS`, parts of both factors per range."""
        if self.key != ROWS:
            return list(self.tensors.values())
        down: Any = self._parameters["lora_down"]
        up: Any = self._parameters["lora_up"]
        if len(rows) == 1 and len(rows[0]) == len(self.cells):
            return [down, up]
        # Making views takes about as long as writing to them. They are valid until offloading moves the parameters.
        memory = down.data_ptr(), up.data_ptr()
        known, views = self._view_cache.get(rows, (None, []))
        if known != memory:
            if len(self._view_cache) >= _MAX_CACHED_VIEWS:
                self._view_cache.clear()
            views = [part for r in rows for part in (down.data[r.start : r.stop], up.data[:, r.start : r.stop])]
            self._view_cache[rows] = memory, views
        return views

    def content(self, form: Form, rows: Rows) -> list[Tensor]:
        """Return the tensors of `form` that go into `views(rows)`, in the same order."""
        if form.key != ROWS:
            return [form.tensors[name] for name in self.tensors]
        down, up = form.tensors["lora_down"], form.tensors["lora_up"]
        if len(rows) == 1:
            return [down, up]
        counts = [len(r) for r in rows]
        return [part for pair in zip(down.split(counts), up.split(counts, 1), strict=True) for part in pair]

    def prepared_tensors(self) -> Tensors:
        """Return the tensors of the slot, which are prepared ones."""
        return self.tensors


@dataclass
class Needs:
    """The room that adapters need on one layer.

    Attributes:
        spec: the geometry of the layer.
        rows: the largest rank of a low-rank change; 0 if there is none.
        forms: an example of every other form, by key.
    """

    spec: LayerSpec
    rows: int = 0
    forms: dict[Hashable, Form] = field(default_factory=dict[Hashable, Form])

    def include(self, other: "Needs") -> None:
        """Grow to cover `other` too."""
        self.rows = max(self.rows, other.rows)
        self.forms.update(other.forms)

    def cover(self, forms: Iterable[Form]) -> None:
        """Grow to cover an adapter layer that consists of `forms`."""
        for form in forms:
            if form.key == ROWS:
                self.rows = max(self.rows, form.rows)
            else:
                self.forms.setdefault(form.key, form)


@dataclass(frozen=True)
class Seat:
    """The room of one adapter in a reservation.

    Attributes:
        taken: slots and the rows of each that the adapter takes, in the order of the adapter's forms.
        cells: the indices of the adapter's gates in the gate tensor of the reservation, one per row.
        layers: for each of these gates, the index of its adapter layer.
    """

    taken: Sequence[tuple[Slot, Rows]]
    cells: Tensor
    layers: Tensor
