"""GraLoRA: a low-rank change for every block of the weight.

Jung et al., "GraLoRA: Granular Low-Rank Adaptation", arXiv 2505.20355, as in PEFT 0.21.2 `tuners/gralora/layer.py`. The
flattened weight has k x k blocks. With s = rank / k, block row j and block column n:

    W'[j, n] = W[j, n] + scale * B[j, n s : (n + 1) s]' A[n, :, j s : (j + 1) s]'

and, in the hybrid form, `scale * B_general A_general` for the whole weight. The scale is alpha over the sum of the two
ranks.

| tensor | shape |
|---|---|
| `gralora_A` | (k, in / k, rank) |
| `gralora_B` | (k, rank, out / k) |
| `gralora_A_general` | (hybrid rank, in) |
| `gralora_B_general` | (out, hybrid rank) |
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from diffadapt.errors import AdapterError
from diffadapt.types.adapter_type import AdapterType, Tensors
from diffadapt.types.config import RankedConfig, refuse_unless_whole
from diffadapt.types.formulas import checked, flat, rank_of, uniform
from diffadapt.types.layer_spec import LayerSpec
from diffadapt.types.tensor_ops import add, can_accumulate, scaled

_A, _B, _GENERAL_A, _GENERAL_B = "gralora_A", "gralora_B", "gralora_A_general", "gralora_B_general"


@dataclass(frozen=True, kw_only=True)
class GraLoRAConfig(RankedConfig):
    """Settings of a new GraLoRA (Jung et al., arXiv 2505.20355).

    Attributes:
        blocks: k, the number of blocks along each side of the weight (`gralora_k` in PEFT). It must divide the rank,
            the inputs and the outputs.
        hybrid_rank: the rank of the additional change of the whole weight; 0 for none. Alpha is divided by the sum of
            the two ranks, and defaults to it.
    """

    blocks: int = 2
    hybrid_rank: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_unless_whole("blocks", self.blocks)
        refuse_unless_whole("hybrid_rank", self.hybrid_rank, least=0)
        for rank in (self.rank, *self.rank_pattern.values()):
            if rank % self.blocks:
                raise AdapterError(f"blocks is {self.blocks}, which does not divide the rank {rank}")
        if self.use_dora:
            raise AdapterError("use_dora: there is no DoRA of GraLoRA")

    def alpha_of(self) -> float:
        """Return the alpha for which `alpha / (rank + hybrid_rank)` is the scale."""
        total = self.rank + self.hybrid_rank
        alpha = total if self.alpha is None else self.alpha
        return alpha * total**0.5 if self.rank_stabilized else float(alpha)


def fit(tensors: Tensors, spec: LayerSpec) -> dict[str, Tensor]:
    """Check that the blocks cover the weight, and return the tensors in the shapes of the table above."""
    k, rank, hybrid = rank_of(tensors, _A, 0), rank_of(tensors, _A, -1), rank_of(tensors, _GENERAL_A, 0)
    _refuse_blocks(k or 1, rank, spec)
    k = k or 1
    shapes = {_A: (k, spec.fan_in // k, rank), _B: (k, rank, spec.out_features // k)}
    if _GENERAL_A in tensors or _GENERAL_B in tensors:
        shapes |= {_GENERAL_A: (hybrid, spec.fan_in), _GENERAL_B: (spec.out_features, hybrid)}
    return checked(tensors, shapes)


def init(
    spec: LayerSpec, config: GraLoRAConfig, *, generator: torch.Generator, weight: Callable[[], Tensor]
) -> dict[str, Tensor]:
    """Return Kaiming-uniform `A` and zero `B`."""
    k, rank, hybrid = config.blocks, config.rank, config.hybrid_rank
    _refuse_blocks(k, rank, spec)
    down, up = (k, rank, spec.fan_in // k), (k, spec.out_features // k, rank)

    def drawn(shape: tuple[int, ...], is_zero: bool) -> Tensor:
        return torch.zeros(shape) if is_zero else uniform(shape, generator)

    tensors = {
        _A: torch.stack([uniform(down[1:], generator) for _ in range(k)]).mT.contiguous(),
        _B: torch.stack([drawn(up[1:], bool(config.init)) for _ in range(k)]).mT.contiguous(),
    }
    if hybrid:
        tensors[_GENERAL_A] = uniform((hybrid, spec.fan_in), generator)
        tensors[_GENERAL_B] = drawn((spec.out_features, hybrid), bool(config.init))
    return tensors


def rank(tensors: Tensors) -> int:
    """Return the sum of the two ranks, by which alpha is divided."""
    return tensors[_A].shape[-1] + rank_of(tensors, _GENERAL_A, 0)


def delta_weight(tensors: Tensors, spec: LayerSpec) -> Tensor:
    """Return the change of all blocks in the canonical weight shape."""
    a, b = tensors[_A], tensors[_B]
    k, rank = a.shape[0], a.shape[-1]
    blocks = torch.einsum("nijs,jnso->joni", a.unflatten(-1, (k, rank // k)), b.unflatten(1, (k, rank // k)))
    delta = blocks.reshape(spec.weight_shape)
    return delta if _GENERAL_A not in tensors else delta + spec.product(*_general(tensors, spec))


def delta_output(
    tensors: Tensors, spec: LayerSpec, *, input: Tensor, gate: Tensor, onto: Tensor | None = None
) -> Tensor:
    """Return `onto` plus the gated change; in a linear layer, every block goes through its own factors."""
    if spec.kind != "linear":
        return spec.dense(input, delta_weight(tensors, spec), gate, onto)
    a, b = tensors[_A], tensors[_B]
    k, rank = a.shape[0], a.shape[-1]
    hidden = scaled(torch.bmm(input.reshape(-1, k, a.shape[1]).transpose(0, 1), a), gate)
    # (n, tokens, j, s) -> (j, tokens, n, s)
    hidden = hidden.view(k, -1, k, rank // k).permute(2, 1, 0, 3).reshape(k, -1, rank)
    if onto is not None and can_accumulate(onto, hidden, b):
        rows = onto.view(-1, k, b.shape[-1]).transpose(0, 1)
        torch.baddbmm(rows, hidden, b, out=rows)
        output = onto
    else:
        product = torch.bmm(hidden, b).transpose(0, 1).reshape(*input.shape[:-1], spec.out_features)
        output = product if onto is None else add(product, onto)
    return output if _GENERAL_A not in tensors else spec.low_rank(input, *_general(tensors, spec), gate, output)


def _general(tensors: Tensors, spec: LayerSpec) -> tuple[Tensor, Tensor]:
    return flat(tensors[_GENERAL_A], spec), tensors[_GENERAL_B]


def _refuse_blocks(k: int, rank: int, spec: LayerSpec) -> None:
    if rank % k or spec.fan_in % k or spec.out_features % k:
        raise AdapterError(
            f"{k} x {k} blocks do not divide the rank {rank} and a weight of shape ({spec.out_features}, {spec.fan_in})"
        )


GRALORA = AdapterType(
    name="gralora",
    tensors=(_A, _B, _GENERAL_A, _GENERAL_B),
    identified_by=frozenset({_A, _B}),
    config=GraLoRAConfig,
    fit=fit,
    init=init,
    rank=rank,
    delta_weight=delta_weight,
    delta_output=delta_output,
    masked={_B: 1},
)
