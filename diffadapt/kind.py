"""What an adapter type is: a frozen record of pure functions over named tensors.

There is no class hierarchy. A type is one file in `types/` that fills in one `AdapterType`; training, inference,
merging, loading and saving are all derived from it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from diffadapt.layer import LayerSpec

Tensors: TypeAlias = Mapping[str, Tensor]


@dataclass(frozen=True)
class AdapterType:
    """One adapter type.

    Attributes:
        name: as in reports and configs ("lora").
        tensors: every tensor name a layer of this type may own.
        identified_by: any of these present means this type.
        fit: tensors as a file has them -> tensors in the shapes the formulas use, for this layer. Raises
            `AdapterError` with expected and found where they cannot belong to the layer.
        init: `(layer, rank, generator, bias)` -> float32 tensors of an adapter that changes nothing yet.
        rank: from the shapes; `None` where alpha does not apply to the type.
        delta_weight: canonical weight change at scale 1, in the dtype of the tensors.
        delta_output: `onto + gate * op(input, delta_weight)`, plus the bias change, at the cost of the factors.
            Arguments: tensors, layer, input, gate (0-d float32), onto (may be overwritten without autograd).
        delta_bias: bias change at scale 1, or `None`; most types have none.
    """

    name: str
    tensors: tuple[str, ...]
    identified_by: frozenset[str]
    fit: Callable[[Tensors, LayerSpec], dict[str, Tensor]]
    init: Callable[[LayerSpec, int, torch.Generator | None, bool], dict[str, Tensor]]
    rank: Callable[[Tensors], int | None]
    delta_weight: Callable[[Tensors, LayerSpec], Tensor]
    delta_output: Callable[[Tensors, LayerSpec, Tensor, Tensor, Tensor | None], Tensor]
    delta_bias: Callable[[Tensors], Tensor | None] = lambda tensors: None
