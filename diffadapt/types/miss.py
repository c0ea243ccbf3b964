"""MiSS: one small block, repeated along the inputs, is added to the weight. It was called Bone before.

Kang and Yin, "Balancing LoRA Performance and Efficiency with Simple Shard Sharing", arXiv 2409.15371, as in PEFT 0.21.2
`tuners/miss/layer.py`. With j counting the columns of the flattened weight, over channels and kernel:

| variant | `miss_block` | `W'` |
|---|---|---|
| plain | (rank, out) | `W[o, j] + block[j mod rank, o]` |
| mini | (rank, m) | `W[o, j] + block[j mod rank, o mod m]`; m divides the outputs |
| bat | (out / rank, rank, rank) | every rank x rank block `V` of `W`, in block row k: `V + V block[k] + block[k]` |

The rank need not divide the inputs, except in the variant "bat". The shape of the tensor tells the variants apart.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from diffadapt.errors import AdapterError
from diffadapt.types.adapter_type import AdapterType, Surroundings, Tensors
from diffadapt.types.config import SizedConfig, refuse_unless_whole
from diffadapt.types.formulas import flat, uniform
from diffadapt.types.layer_spec import LayerSpec
from diffadapt.types.tensor_ops import scaled, shape_of

_BLOCK, _DELTA = "miss_block", "miss_delta"


@dataclass(frozen=True, kw_only=True)
class MiSSConfig(SizedConfig):
    """Settings of a new MiSS (Kang and Yin, arXiv 2409.15371).

    Attributes:
        variant: "plain", "mini" or "bat"; see the module. "bat" reads the base weight, and its rank must divide the
            inputs and outputs.
        mini_rank: the number of columns of the block in the variant "mini"; it must divide the outputs.
    """

    variant: Literal["plain", "mini", "bat"] = "plain"
    mini_rank: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.variant not in ("plain", "mini", "bat"):
            raise AdapterError(f"variant is {self.variant!r}, expected 'plain', 'mini' or 'bat'")
        refuse_unless_whole("mini_rank", self.mini_rank)
        if self.mini_rank != 1 and self.variant != "mini":
            raise AdapterError("mini_rank has no effect without variant='mini'")


def fit(tensors: Tensors, spec: LayerSpec) -> dict[str, Tensor]:
    """Check that the block fits the layer, and return it."""
    if _BLOCK not in tensors:
        raise AdapterError(f"{_BLOCK} missing, only {', '.join(sorted(tensors))} found")
    block, out, columns = tensors[_BLOCK], spec.out_features, spec.fan_in
    shape = shape_of(block)
    if len(shape) == 3:
        rank = shape[2]
        fits = rank > 0 and shape == (out // rank, rank, rank) and out % rank == 0 and columns % rank == 0
    else:
        fits = len(shape) == 2 and 0 < shape[0] <= columns and shape[1] > 0 and out % shape[1] == 0
    if not fits:
        raise AdapterError(
            f"{_BLOCK} has shape {shape}, expected (rank, {out}), or (out / rank, rank, rank) for a rank that divides "
            f"{out} and {columns}"
        )
    return {_BLOCK: block}


def init(
    spec: LayerSpec, config: MiSSConfig, *, generator: torch.Generator, weight: Callable[[], Tensor]
) -> dict[str, Tensor]:
    """Return a block of zeros."""
    rank, out, columns = config.rank, spec.out_features, spec.fan_in
    if config.variant == "bat" and (out % rank or columns % rank):
        raise AdapterError(f"rank is {rank}, which does not divide {out} outputs and {columns} inputs; bat needs that")
    if config.variant == "mini" and out % config.mini_rank:
        raise AdapterError(f"mini_rank is {config.mini_rank}, which does not divide the {out} outputs")
    if rank > columns:
        raise AdapterError(f"rank is {rank}, expected at most {columns}, the number of inputs")
    shapes = {"plain": (rank, out), "mini": (rank, config.mini_rank), "bat": (out // rank, rank, rank)}
    shape = shapes[config.variant]
    return {_BLOCK: torch.zeros(shape) if config.init else uniform(shape, generator)}


def prepare(tensors: Tensors, spec: LayerSpec, surroundings: Surroundings) -> Tensors:
    """Return, for the variant "bat", the change of the weight."""
    block = tensors[_BLOCK]
    if block.ndim == 2:
        return tensors
    weight, rank = surroundings.weight().to(block), block.shape[-1]
    rows = weight.reshape(block.shape[0], rank, -1, rank).transpose(1, 2)
    delta = (rows @ block.unsqueeze(1) + block.unsqueeze(1)).transpose(1, 2)
    return {_DELTA: delta.reshape(spec.weight_shape)}


def as_low_rank(tensors: Tensors, spec: LayerSpec) -> tuple[Tensor, Tensor] | None:
    """Return repeated identity matrices as `down`, and the transposed block as `up`."""
    if _DELTA in tensors:
        return None
    up = _up(tensors[_BLOCK], spec)
    return _repeated(up.t(), spec), up


def delta_weight(tensors: Tensors, spec: LayerSpec) -> Tensor:
    """Return the block, repeated along the inputs, or the prepared change."""
    if _DELTA in tensors:
        return tensors[_DELTA]
    block = _up(tensors[_BLOCK], spec).t()
    repeats = -(-spec.fan_in // block.shape[0])
    return block.repeat(repeats, 1)[: spec.fan_in].t().reshape(spec.weight_shape)


def delta_output(
    tensors: Tensors, spec: LayerSpec, *, input: Tensor, gate: Tensor, onto: Tensor | None = None
) -> Tensor:
    """Return `onto` plus the gated change. In a linear layer, it costs a sum over the inputs and `up`."""
    if _DELTA in tensors:
        return spec.dense(input, tensors[_DELTA], gate, onto)
    up = _up(tensors[_BLOCK], spec)
    if spec.kind != "linear":
        return spec.low_rank(input, _repeated(up.t(), spec), up, gate, onto)
    rank = up.shape[1]
    padded = F.pad(input, (0, -input.shape[-1] % rank)) if input.shape[-1] % rank else input
    return spec.expand(scaled(padded.unflatten(-1, (-1, rank)).sum(-2), gate), up, onto)


def _up(block: Tensor, spec: LayerSpec) -> Tensor:
    """Return the block as (out, rank)."""
    return block.repeat(1, spec.out_features // block.shape[1]).t()


def _repeated(block: Tensor, spec: LayerSpec) -> Tensor:
    """Return identity matrices side by side, in the shape of `down`."""
    rank = block.shape[0]
    identity = torch.eye(rank, dtype=block.dtype, device=block.device)
    return flat(identity.repeat(1, -(-spec.fan_in // rank))[:, : spec.fan_in].contiguous(), spec)


MISS = AdapterType(
    name="miss",
    tensors=(_BLOCK,),
    identified_by=frozenset({_BLOCK}),
    config=MiSSConfig,
    fit=fit,
    init=init,
    prepare=prepare,
    reads_weight=lambda tensors: tensors[_BLOCK].ndim == 3,
    delta_weight=delta_weight,
    delta_output=delta_output,
    in_weight=lambda tensors, spec: _DELTA in tensors or tensors[_BLOCK].ndim == 3,
    as_low_rank=as_low_rank,
)
