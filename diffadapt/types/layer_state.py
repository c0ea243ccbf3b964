"""The canonical content of one adapter layer, independent of a model. Format readers produce it, writers consume it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor


def scale_of(alpha: float | None, rank: int | None, settings: Mapping[str, float]) -> float:
    """Return `alpha / rank`, the factor of an adapter layer's change, or 1 without an alpha or a rank.

    Args:
        alpha: the alpha of the adapter layer.
        rank: the rank according to the shapes of its tensors, if they have one.
        settings: the settings of the adapter layer. `settings["rank"]` takes the place of a missing `rank`.
    """
    divisor = rank or settings.get("rank")
    return 1.0 if alpha is None or not divisor else alpha / divisor


@dataclass(frozen=True, slots=True)
class LayerState:
    """The content of a file for one adapter layer.

    Attributes:
        type: the name of the adapter type.
        tensors: the tensors by the names of the adapter type.
        alpha: the numerator of the scale `alpha / rank`; `None` means that the scale is 1.
        rank: the rank according to the shapes of the tensors; `None` if the adapter type has none.
        kernel: spatial kernel size of a convolution; empty for other layers.
        is_embedding: whether the layer is an embedding.
        settings: numbers that are not tensors; see `AdapterType.settings`.
        inputs: the number of inputs that one output depends on (`LayerSpec.fan_in`). Without a model, as far as the
            tensors show it.
        outputs: the number of outputs of the layer (`LayerSpec.out_features`), known as far as `inputs` is.
        groups: the number of groups of a convolution, known as far as `inputs` is.
        widens: whether the tensors have more inputs than the model's layer has by itself; see `input_width.py`.
        group: identifies the parts of a layer that files have as one, if they need one another
            (`AdapterType.joint`): a number for each part. Empty for any other layer.
    """

    type: str
    tensors: Mapping[str, Tensor]
    alpha: float | None
    rank: int | None
    kernel: tuple[int, ...] = ()
    is_embedding: bool = False
    settings: Mapping[str, float] = field(default_factory=dict[str, float])
    inputs: int = 0
    outputs: int = 0
    widens: bool = False
    group: frozenset[int] = frozenset()
    groups: int = 1

    @property
    def scale(self) -> float:
        """`alpha / rank`; see `scale_of`."""
        return scale_of(self.alpha, self.rank, self.settings)

    @property
    def kernel_dims(self) -> int:
        """The number of dimensions of the kernel; 0 without a kernel."""
        return len(self.kernel)

    @property
    def taps(self) -> int:
        """The number of positions in the kernel; 1 without a kernel."""
        return math.prod(self.kernel)
