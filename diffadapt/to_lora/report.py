"""The report on a LoRA made from other adapters."""

import math
from dataclasses import dataclass

_SHOWN = 10


@dataclass(frozen=True)
class ConvertedLayer:
    """The report on one layer of a LoRA made from other adapters.

    Attributes:
        path: component and module path.
        types: names of the adapter types that the layer was made from.
        rank: rank of the LoRA (per group); 0 if the change is zero, in which case the LoRA leaves the layer out.
        exact: whether only rounding separates the LoRA from the requested change.
        error: Frobenius norm of what is missing from the requested change, divided by `norm`. It is measured on the
            tensors as stored, after rounding to their dtype.
        norm: Frobenius norm of the requested change of the weight.
    """

    path: str
    types: tuple[str, ...]
    rank: int
    exact: bool
    error: float
    norm: float


@dataclass(frozen=True)
class Conversion:
    """The report on a LoRA made from other adapters. `str` makes a table of it, with the worst layers first.

    Attributes:
        name: name of the new adapter.
        layers: one entry for each layer of the adapters that it was made from.
    """

    name: str
    layers: tuple[ConvertedLayer, ...]

    @property
    def error(self) -> float:
        """The Frobenius norm of what is missing from all layers, divided by the norm of the requested change."""
        norm = math.hypot(*(layer.norm for layer in self.layers))
        return math.hypot(*(layer.error * layer.norm for layer in self.layers)) / norm if norm else 0.0

    @property
    def exact(self) -> bool:
        """Whether all layers are exact."""
        return all(layer.exact for layer in self.layers)

    def __str__(self) -> str:
        worst = sorted((layer for layer in self.layers if layer.rank or layer.error), key=lambda layer: -layer.error)
        rows = [("layer", "from", "rank", "exact", "error")]
        rows += [
            (layer.path, ",".join(layer.types), str(layer.rank), "yes" if layer.exact else "no", f"{layer.error:.2%}")
            for layer in worst[:_SHOWN]
        ]
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        if len(worst) > _SHOWN:
            lines.append(f"... and {len(worst) - _SHOWN} more with smaller errors")
        exact, used = sum(layer.exact for layer in self.layers), sum(layer.rank > 0 for layer in self.layers)
        changed = f"{self.name}: {used} of {len(self.layers)} layers changed, {exact} exact"
        lines.append(f"{changed}, keeps {1 - self.error**2:.2%} of the energy (relative error {self.error:.2%})")
        return "\n".join(lines)

    def __repr__(self) -> str:
        used = sum(layer.rank > 0 for layer in self.layers)
        return f"<Conversion to {self.name!r}: {used} of {len(self.layers)} layers, relative error {self.error:.2%}>"
