"""VB-LoRA: the factors of a LoRA, composed of vectors from one bank that all layers share.

Li et al., "VB-LoRA: Extreme Parameter Efficient Fine-Tuning with Vector Banks", arXiv 2405.15179, as in PEFT 0.21.2
`tuners/vblora/layer.py`. Every piece of a factor is the sum of the k vectors with the largest logits, weighted by the
softmax of these logits. There is no alpha.

| tensor | shape |
|---|---|
| `vblora_logits_A` | (rank, in x kernel / length, vectors) |
| `vblora_logits_B` | (out / length, rank, vectors) |
| `vblora_vector_bank`, shared | (vectors, length) |

A file may have the indices and all but the last of the k weights instead of the logits; all other logits are then
infinitely small. Such an adapter runs, but cannot be trained further.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from diffadapt.errors import AdapterError
from diffadapt.types.adapter_type import AdapterType, Surroundings, Tensors, Unfinished
from diffadapt.types.config import AdapterConfig, refuse_unless_whole
from diffadapt.types.formulas import by_factors, checked, flat, rank_of, unified
from diffadapt.types.layer_spec import LayerSpec
from diffadapt.types.tensor_ops import promoted, shape_of

_A, _B, _BANK = "vblora_logits_A", "vblora_logits_B", "vblora_vector_bank"
_DOWN, _UP = "vblora_down", "vblora_up"
_INDICES, _WEIGHTS = "_topk_indices", "_topk_weights"
_APART = 10.0
"""How far the logits of the vectors that a factor does not start with are below the others."""


@dataclass(frozen=True, kw_only=True)
class VBLoRAConfig(AdapterConfig):
    """Settings of a new VB-LoRA (Li et al., arXiv 2405.15179).

    Attributes:
        rank: the rank of the factors.
        vectors: the number of vectors in the bank (`num_vectors` in PEFT).
        length: the length of a vector, which must divide the inputs and the outputs (`vector_length` in PEFT).
        topk: the number of vectors that a piece of a factor is composed of.
        init: with `True`, the factors that lead to the output start with the second half of the bank, which is zero,
            and the others with the first half. "peft" lets all of them start with all vectors, which has an effect.
            With `False` it has one, too.
    """

    rank: int = 4
    vectors: int = 256
    length: int = 256
    topk: int = 2

    def _inits(self) -> tuple[bool | str, ...]:
        return (True, "peft", False)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("rank", "vectors", "length", "topk"):
            refuse_unless_whole(name, getattr(self, name))
        if 2 * self.topk > self.vectors:
            raise AdapterError(f"topk is {self.topk}, expected at most half of the {self.vectors} vectors")

    @property
    def settings(self) -> dict[str, float]:
        """The number of vectors that a piece is composed of."""
        return {"topk": float(self.topk)}


def fit(tensors: Tensors, spec: LayerSpec) -> dict[str, Tensor]:
    """Check the tensors of a file and return logits in the shapes of the table above."""
    if _BANK not in tensors or tensors[_BANK].ndim != 2:
        raise AdapterError(f"{_BANK} missing, only {', '.join(sorted(tensors))} found")
    vectors, length = shape_of(tensors[_BANK])
    logits = dict(tensors)
    for name in (_A, _B):
        if name + _INDICES in tensors and name + _WEIGHTS in tensors:
            logits[name] = _logits(tensors[name + _INDICES], tensors[name + _WEIGHTS], vectors)
    rank = rank_of(logits, _A, 0)
    _refuse_length(length, spec)
    shapes = {_A: (rank, spec.fan_in // length, vectors), _B: (spec.out_features // length, rank, vectors)}
    return {**checked(logits, shapes), _BANK: tensors[_BANK]}


def init(
    spec: LayerSpec, config: VBLoRAConfig, *, generator: torch.Generator, weight: Callable[[], Tensor]
) -> dict[str, Tensor]:
    """Return random logits, and the bank."""
    _refuse_length(config.length, spec)
    rank, vectors, half = config.rank, config.vectors, config.vectors // 2
    a = torch.randn(rank, spec.fan_in // config.length, vectors, generator=generator) * 0.1
    b = torch.randn(spec.out_features // config.length, rank, vectors, generator=generator) * 0.1
    # All layers get the bank of the first one; see `complete`.
    bound = 0.02 if config.init else 1.0
    bank = torch.empty(vectors, config.length).uniform_(-bound, bound, generator=torch.Generator().manual_seed(0))
    if config.init is True:
        a[..., half:] -= _APART
        b[..., :half] -= _APART
        bank[half:] = 0
    return {_A: a, _B: b, _BANK: bank}


def complete(layers: Mapping[str, Unfinished]) -> Mapping[str, Tensors]:
    """Return the tensors with one bank for all layers."""
    return unified(layers, (_BANK,))


def prepare(tensors: Tensors, spec: LayerSpec, surroundings: Surroundings) -> Tensors:
    """Return the factors."""
    topk, bank = int(surroundings.settings["topk"]), promoted(tensors[_BANK])
    a, b = (_composed(promoted(tensors[name]), bank, topk) for name in (_A, _B))
    dtype = tensors[_BANK].dtype
    up = b.transpose(1, 2).reshape(spec.out_features, -1)
    return {_DOWN: flat(a.flatten(1), spec).to(dtype), _UP: up.to(dtype)}


def factors(tensors: Tensors, spec: LayerSpec) -> tuple[Tensor, Tensor]:
    """Return `down` and `up`."""
    return tensors[_DOWN], tensors[_UP]


def _composed(logits: Tensor, bank: Tensor, topk: int) -> Tensor:
    """Return the weighted sum of the `topk` vectors with the largest logits, (..., length)."""
    largest, indices = logits.topk(topk, dim=-1)
    return (largest.softmax(-1).unsqueeze(-1) * bank[indices]).sum(-2)


def _logits(indices: Tensor, weights: Tensor, vectors: int) -> Tensor:
    """Return logits with the softmax `weights`, to which the last one is added, at `indices`."""
    if shape_of(weights)[:-1] != shape_of(indices)[:-1] or weights.shape[-1] + 1 != indices.shape[-1]:
        raise AdapterError(f"weights of shape {shape_of(weights)} for indices of shape {shape_of(indices)}")
    if weights.is_meta:
        return weights.new_empty(*weights.shape[:-1], vectors)
    places = indices.long()
    if (places < 0).any() or (places >= vectors).any():
        raise AdapterError(f"indices of vectors are not below {vectors}, the size of the bank")
    complete = torch.cat([weights, 1 - weights.sum(-1, keepdim=True)], -1)
    # Not infinite: the check of a file's values and half precision do not allow that.
    least = torch.full((*weights.shape[:-1], vectors), -1e4, dtype=weights.dtype, device=weights.device)
    return least.scatter(-1, places, complete.clamp_min(1e-12).log())


def _refuse_length(length: int, spec: LayerSpec) -> None:
    if spec.fan_in % length or spec.out_features % length:
        raise AdapterError(
            f"vectors of length {length} do not divide {spec.fan_in} inputs and {spec.out_features} outputs"
        )


VBLORA = AdapterType(
    name="vblora",
    tensors=(_A, _B, _BANK, *(name + part for name in (_A, _B) for part in (_INDICES, _WEIGHTS))),
    identified_by=frozenset({_A, _A + _INDICES}),
    config=VBLoRAConfig,
    settings={"topk": 2.0},
    shared=frozenset({_BANK}),
    fit=fit,
    init=init,
    complete=complete,
    prepare=prepare,
    **by_factors(factors),
)
