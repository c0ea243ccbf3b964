"""The account of a LoRA made from other adapters."""

import math
from dataclasses import dataclass

_SHOWN = 10


@dataclass(frozen=True)
class ConvertedLayer:
    """The account of one layer.

    Attributes:
        path: with the component in front.
        types: adapter types it was made from.
        rank: of the LoRA (of one group); 0 where the change is zero, and the layer is left out.
        exact: nothing but rounding is missing.
        error: Frobenius norm of what is missing, in parts of `norm`; measured on the tensors as they are stored.
        norm: Frobenius norm of the change that was asked for.
    """

    path: str
    types: tuple[str, ...]
    rank: int
    exact: bool
    error: float
    norm: float


@dataclass(frozen=True)
class Conversion:
    """The account of a LoRA made from other adapters; `print` gives a table, the worst layers first.

    Attributes:
        name: of the new adapter.
        layers: one entry for each layer of the adapters it was made from.
    """

    name: str
    layers: tuple[ConvertedLayer, ...]

    @property
    def error(self) -> float:
        """Frobenius norm of all that is missing, in parts of that of the whole change."""
        norm = math.hypot(*(layer.norm for layer in self.layers))
        return math.hypot(*(layer.error * layer.norm for layer in self.layers)) / norm if norm else 0.0

    @property
    def exact(self) -> bool:
        """Whether every layer is exact."""
        return all(layer.exact for layer in self.layers)

    def __str__(self) -> str:
        worst = sorted(self.layers, key=lambda layer: -layer.error)
        rows = [("layer", "from", "rank", "exact", "error")]
        rows += [
            (layer.path, ",".join(layer.types), str(layer.rank), "yes" if layer.exact else "no", f"{layer.error:.2%}")
            for layer in worst[:_SHOWN]
        ]
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        if len(worst) > _SHOWN:
            lines.append(f"... and {len(worst) - _SHOWN} more with smaller errors")
        exact, used = sum(layer.exact for layer in worst), sum(layer.rank > 0 for layer in worst)
        lines.append(
            f"{self.name}: {used} of {len(worst)} layers changed, {exact} exact, error {self.error:.2%} overall"
        )
        return "\n".join(lines)
