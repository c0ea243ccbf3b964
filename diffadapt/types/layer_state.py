"""The canonical content of one adapter layer, without a model: what readers produce and writers consume."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor


def scale_of(alpha: float | None, rank: int | None, settings: Mapping[str, float]) -> float:
    """Return `alpha / rank`, the factor of an adapter layer's change.

    It is 1 without an alpha or a rank. `settings["rank"]` stands in for the rank of tensors that do not show one.
    """
    rank_given = rank or settings.get("rank")
    return 1.0 if alpha is None or not rank_given else alpha / rank_given


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
        """`alpha / rank`; see `scale_of`."""
        return scale_of(self.alpha, self.rank, self.settings)

    @property
    def kernel_dims(self) -> int:
        """Number of dimensions of the kernel, 0 without one."""
        return len(self.kernel)

    @property
    def taps(self) -> int:
        """Positions of the kernel."""
        return math.prod(self.kernel)
