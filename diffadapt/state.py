"""The canonical form of an adapter's content: what every reader produces and every writer consumes.

`{component: {module path: {tensor name: tensor}}}`, with alpha per path and the file's metadata. No file spelling
and no model is left in it, so N readers and M writers are N + M functions.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True, slots=True)
class LayerState:
    """What a file says of one layer: the type's tensors by name, and the alpha that makes `alpha / rank` its scale."""

    type: str
    tensors: Mapping[str, Tensor]
    alpha: float | None
    rank: int | None
    kernel_dims: int = 0
    is_embedding: bool = False
    settings: Mapping[str, float] = field(default_factory=dict[str, float])


@dataclass(frozen=True)
class AdapterState:
    """An adapter without a model."""

    layers: Mapping[str, Mapping[str, LayerState]]
    metadata: Mapping[str, str] = field(default_factory=dict[str, str])
    family: str | None = None
