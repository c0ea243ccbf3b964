"""The canonical form of an adapter's content: what every reader produces and every writer consumes.

`{component: {module path: {tensor name: tensor}}}`, with alpha per path and the file's metadata. No file spelling
and no model is left in it, so N readers and M writers are N + M functions.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from torch import Tensor

from diffadapt.pieces import Piece


@dataclass(frozen=True, slots=True)
class LayerState:
    """What a file says of one layer: the type's tensors by name, and the alpha that makes `alpha / rank` its scale.

    Attributes:
        inputs: numbers that one output is made of; of a layer without a model, as far as the tensors tell.
        widens: the tensors have more inputs than the model's layer by itself, see `widen.py`.
    """

    type: str
    tensors: Mapping[str, Tensor]
    alpha: float | None
    rank: int | None
    kernel: tuple[int, ...] = ()
    is_embedding: bool = False
    settings: Mapping[str, float] = field(default_factory=dict[str, float])
    inputs: int = 0
    widens: bool = False

    @property
    def scale(self) -> float:
        """`alpha / rank`, 1 where either is missing."""
        rank = self.rank or self.settings.get("rank")
        return 1.0 if self.alpha is None or not rank else self.alpha / rank

    @property
    def kernel_dims(self) -> int:
        """Number of dimensions of the kernel, 0 without one."""
        return len(self.kernel)

    @property
    def taps(self) -> int:
        """Positions of the kernel."""
        return math.prod(self.kernel)


@dataclass(frozen=True)
class Document:
    """What a writer puts into one folder: the tensors and metadata of one file, and PEFT's config beside it."""

    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]
    config: Mapping[str, Any] | None = None


Layout: TypeAlias = Mapping[str, tuple[tuple[Piece, int], ...]]
"""A layer's name in a model's original layout -> the model's layers it consists of, each with its number of outputs."""


@dataclass(frozen=True)
class AdapterState:
    """An adapter without a model.

    Attributes:
        layouts: component -> the original layout of that model, where it has one.
        embeddings: learned vectors (count, width), by token and by what files call the text encoder.
    """

    layers: Mapping[str, Mapping[str, LayerState]]
    metadata: Mapping[str, str] = field(default_factory=dict[str, str])
    family: str | None = None
    layouts: Mapping[str, Layout] = field(default_factory=dict[str, Layout])
    embeddings: Mapping[tuple[str, str], Tensor] = field(default_factory=dict[tuple[str, str], Tensor])
