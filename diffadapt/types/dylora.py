"""DyLoRA: a LoRA whose leading components are useful by themselves, so that its rank can be chosen after training.

Valipour et al., "DyLoRA: Parameter-Efficient Tuning of Pre-trained Models using Dynamic Search-Free Low-Rank
Adaptation", arXiv 2210.07558, as in LyCORIS 4.1.3 `modules/dylora.py`. Every call in training draws a number of blocks
of components. These act, at the scale `alpha / their number`, and only the last of them learns. Otherwise all
components act. A file has a plain LoRA.

LyCORIS divides alpha by the number of blocks in training, but by the rank in its files. So with blocks of n components,
a file of LyCORIS is n times as weak as what was trained. It means here what it means to LyCORIS, and what is trained
here is what is stored.

| tensor | shape |
|---|---|
| `lora_down` | (rank, in / groups, *kernel) |
| `lora_up` | (out, rank) |
| `dylora_block`, not trained and not stored | (components in a block), zeros |
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from diffadapt.errors import AdapterError
from diffadapt.types import lora
from diffadapt.types.adapter_type import AdapterType, Tensors
from diffadapt.types.config import RankedConfig, refuse_unless_whole
from diffadapt.types.formulas import by_factors, rank_of, uniform
from diffadapt.types.layer_spec import LayerSpec
from diffadapt.types.layer_state import LayerState

_DOWN, _UP, _BLOCK = "lora_down", "lora_up", "dylora_block"


@dataclass(frozen=True, kw_only=True)
class DyLoRAConfig(RankedConfig):
    """Settings of a new DyLoRA (Valipour et al., arXiv 2210.07558).

    Attributes:
        block_size: the number of components that are added together; it divides the rank.
    """

    block_size: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_unless_whole("block_size", self.block_size)
        for rank in (self.rank, *self.rank_pattern.values()):
            if rank % self.block_size:
                raise AdapterError(f"rank is {rank}, expected a multiple of block_size, {self.block_size}")
        if self.use_dora or self.rank_dropout:
            raise AdapterError("use_dora and rank_dropout: a DyLoRA has no DoRA, and leaves out components by itself")


def fit(tensors: Tensors, spec: LayerSpec) -> dict[str, Tensor]:
    """Check the factors as those of a LoRA, and the size of a block, and return them."""
    fitted = lora.fit({name: tensor for name, tensor in tensors.items() if name != _BLOCK}, spec)
    size = rank_of(tensors, _BLOCK, 0)
    if not size or fitted[_DOWN].shape[0] % size:
        raise AdapterError(f"{_BLOCK} has {size} elements, expected a divisor of the rank, {fitted[_DOWN].shape[0]}")
    return {**fitted, _BLOCK: tensors[_BLOCK]}


def init(
    spec: LayerSpec, config: DyLoRAConfig, *, generator: torch.Generator, weight: Callable[[], Tensor]
) -> dict[str, Tensor]:
    """Return a Kaiming-uniform `lora_down`, and a `lora_up` of zeros."""
    up = (spec.out_features, config.rank)
    return {
        _DOWN: uniform((config.rank, *spec.weight_shape[1:]), generator),
        _UP: torch.zeros(up) if config.init else uniform(up, generator),
        _BLOCK: torch.zeros(config.block_size, dtype=torch.int64),
    }


def in_training(tensors: Tensors) -> Tensors:
    """Return the factors with a random number of leading blocks, the last of which learns."""
    down, up, size = tensors[_DOWN], tensors[_UP], tensors[_BLOCK].shape[0]
    rank = down.shape[0]
    before = int(torch.randint(rank // size, ())) * size
    used = before + size
    up = torch.cat([up[:, :before].detach(), up[:, before:used]], 1)
    # The gate divides alpha by the whole rank.
    return {**tensors, _DOWN: torch.cat([down[:before].detach(), down[before:used]]), _UP: up * (rank / used)}


def factors(tensors: Tensors, spec: LayerSpec) -> tuple[Tensor, Tensor]:
    """Return `down` and `up`."""
    return tensors[_DOWN], tensors[_UP]


def stored_as(state: LayerState) -> LayerState:
    """Return the plain LoRA that a file has."""
    return replace(state, type="lora", tensors={name: state.tensors[name] for name in (_DOWN, _UP)})


DYLORA = AdapterType(
    name="dylora",
    tensors=(_DOWN, _UP, _BLOCK),
    identified_by=frozenset({_BLOCK}),
    config=DyLoRAConfig,
    fixed=frozenset({_BLOCK}),
    stored_as=stored_as,
    fit=fit,
    init=init,
    rank=lambda tensors: tensors[_DOWN].shape[0],
    in_training=in_training,
    **by_factors(factors),
)
