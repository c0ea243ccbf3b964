"""A slot: room of a fixed shape on one layer."""

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from diffadapt.runtime.adapter_layer import AdapterLayer, Dropout
from diffadapt.runtime.slots.forms import ROWS, Form
from diffadapt.runtime.slots.row_ranges import Rows
from diffadapt.types.adapter_type import Tensors
from diffadapt.types.layer_spec import LayerSpec

_MOST_VIEWS = 8


class Slot(AdapterLayer):
    """Room for one form, or for many of the form "rows", on one layer. It runs like an adapter layer.

    Attributes:
        key: of the forms that have room here.
        cells: where its gates are in the flat tensor of the reservation.
        free: the rows that are nobody's.
    """

    key: Hashable
    cells: range
    free: Rows
    _dtype: torch.dtype
    _views: dict[Rows, tuple[tuple[int, int], list[Tensor]]]

    def __init__(self, form: Form, spec: LayerSpec, rows: int, dtype: torch.dtype, device: torch.device) -> None:
        """
        Args:
            form: the shapes and, but for what computes in `dtype`, the dtypes it is for.
            rows: how many rows there are, 1 unless the form is "rows".
        """
        nn.Module.__init__(self)
        self.__dict__.update(
            adapter_type=form.adapter_type,
            spec=spec,
            alpha=None,
            settings={},
            stages=form.stages,
            key=form.key,
            free=(range(rows),),
            cells=range(rows),
            gates_ranks=form.key == ROWS,
            dropout=Dropout(),
            inputs=spec.in_features,
            widens=False,
            training=False,
            _dtype=dtype,
            _views={},
        )
        shapes = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in form.tensors.items()}
        if form.key == ROWS:
            down, up = (rows, *spec.weight_shape[1:]), (spec.out_features, rows)
            shapes = {"lora_down": (down, dtype), "lora_up": (up, dtype)}
        for name, (shape, own) in shapes.items():
            wide = own in (torch.float32, torch.float64)
            tensor = torch.zeros(shape, dtype=own if wide else dtype, device=device)
            self._parameters[name] = nn.Parameter(tensor, requires_grad=False)

    def train(self, mode: bool = True) -> "Slot":
        """Stays as it is: nothing in a slot is trained."""
        return self

    @property
    def dtype(self) -> torch.dtype:
        """The one to compute in, which is not that of tensors that are kept in float32."""
        return self._dtype

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Slot":
        self.__dict__["_dtype"] = fn(torch.empty(0, dtype=self._dtype, device=next(self.parameters()).device)).dtype
        super()._apply(fn, recurse)
        return self

    def at(self, rows: Rows) -> list[Tensor]:
        """What these rows consist of, to be written: of the form "rows" stretches of both factors."""
        if self.key != ROWS:
            return list(self.tensors.values())
        down: Any = self._parameters["lora_down"]
        up: Any = self._parameters["lora_up"]
        if len(rows) == 1 and len(rows[0]) == len(self.cells):
            return [down, up]
        # Making these views takes about as long as writing to them. Offloading gives parameters other memory.
        memory = down.data_ptr(), up.data_ptr()
        known, views = self._views.get(rows, (None, []))
        if known != memory:
            if len(self._views) >= _MOST_VIEWS:
                self._views.clear()
            views = [part for r in rows for part in (down.data[r.start : r.stop], up.data[:, r.start : r.stop])]
            self._views[rows] = memory, views
        return views

    def content(self, form: Form, rows: Rows) -> list[Tensor]:
        """What a form writes to `at(rows)`."""
        if form.key != ROWS:
            return [form.tensors[name] for name in self._parameters]
        down, up = form.tensors["lora_down"], form.tensors["lora_up"]
        if len(rows) == 1:
            return [down, up]
        counts = [len(r) for r in rows]
        return [part for pair in zip(down.split(counts), up.split(counts, 1), strict=True) for part in pair]

    def _prepared(self) -> Tensors:
        return self.tensors


@dataclass
class Needs:
    """What adapters need on one layer.

    Attributes:
        rows: the largest rank of a low-rank change.
        forms: one of each other form, by key.
    """

    spec: LayerSpec
    rows: int = 0
    forms: dict[Hashable, Form] = field(default_factory=dict[Hashable, Form])

    def include(self, other: "Needs") -> None:
        """Grow to what either needs."""
        self.rows = max(self.rows, other.rows)
        self.forms.update(other.forms)

    def cover(self, forms: Iterable[Form]) -> None:
        """Grow to what an adapter layer of these forms needs."""
        for form in forms:
            if form.key == ROWS:
                self.rows = max(self.rows, form.rows)
            else:
                self.forms.setdefault(form.key, form)


@dataclass(frozen=True)
class Seat:
    """Where an adapter is in a reservation.

    Attributes:
        taken: `(slot, its rows)`.
        cells: of its gates in the flat tensor.
        layers: the number of the adapter layer that each of those gates belongs to.
    """

    taken: Sequence[tuple[Slot, Rows]]
    cells: Tensor
    layers: Tensor
