"""LoKr: `W' = W + scale * kron(w1, w2)`, where each factor is stored whole or decomposed into a low-rank product.

Edalati et al., "KronA", arXiv 2212.10650; introduced as an adapter for diffusion models by LyCORIS (Yeh et al., arXiv
2309.14859). The tensor layout is that in KohakuBlueleaf/LyCORIS f49d30d `lycoris/modules/lokr.py`, with out = o1 x o2
and in / groups = i1 x i2:

| factor | whole | decomposed |
|---|---|---|
| w1 | `lokr_w1` (o1, i1) | `lokr_w1_a` (o1, rank), `lokr_w1_b` (rank, i1) |
| w2 | `lokr_w2` (o2, i2, *kernel) | `lokr_w2_a` (o2, rank), `lokr_w2_b` (rank, i2 x kernel) |
| w2 with a Tucker core `lokr_t2` (rank, rank, *kernel) | | `lokr_w2_a` (rank, o2), `lokr_w2_b` (rank, i2) |

The sizes come from the tensors, never from a "factor" in the metadata, which libraries interpret differently. Alpha
applies only if a factor is decomposed: with two whole factors, LyCORIS and its relatives write an alpha and ignore it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from diffadapt.errors import AdapterError
from diffadapt.types.adapter_type import AdapterType, Tensors
from diffadapt.types.config import RankedConfig
from diffadapt.types.layer_spec import LayerSpec, plain_spec
from diffadapt.types.tensor_ops import add, can_accumulate, scaled, shape_of, take_rows

_TENSORS = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")


@dataclass(frozen=True, kw_only=True)
class LoKrConfig(RankedConfig):
    """Settings of a new LoKr (Yeh et al., arXiv 2309.14859).

    Attributes:
        rank: the rank of a decomposed factor. A factor stays whole if `2 * rank` is at least its larger side. Leave
            `rank` out with `full_matrix`.
        factor: the largest number of rows and columns of the smaller factor; -1 makes the two factors as equal in size
            as possible.
        decompose_both: whether to decompose the smaller factor, too.
        full_matrix: whether to keep both factors whole. The adapter then has no rank, and alpha has no effect.
        use_tucker: whether convolutions get a Tucker core (`use_effective_conv2d` in PEFT).
    """

    rank: int = 0
    factor: int = -1
    decompose_both: bool = False
    full_matrix: bool = False
    use_tucker: bool = False

    def __post_init__(self) -> None:
        self._refuse_wrong_kinds()
        if not self.full_matrix:
            super().__post_init__()
        else:
            replace(self, full_matrix=False, rank=1)
            for name in ("rank", "alpha", "rank_stabilized", "rank_pattern", "alpha_pattern", "rank_dropout"):
                if getattr(self, name):
                    raise AdapterError(f"{name} has no effect with full_matrix=True")
            if self.decompose_both or self.use_tucker:
                raise AdapterError("full_matrix=True excludes decompose_both and use_tucker")
        if self.factor == 0 or self.factor < -1:
            raise AdapterError(f"factor is {self.factor}, expected at least 1, or -1 for as square as possible")

    def most_rank(self, spec: LayerSpec) -> int | None:
        """Return `None`, since a large rank leaves both factors whole."""
        return None

    def alpha_of(self) -> float | None:
        """Return the alpha of every adapter layer, or `None` with two whole factors."""
        return None if self.full_matrix else super().alpha_of()


def fit(tensors: Tensors, spec: LayerSpec) -> dict[str, Tensor]:
    """Check that both factors are complete and that their Kronecker product fits the layer, and return the tensors."""
    for number in "12":
        whole, pair = f"lokr_w{number}", {f"lokr_w{number}_a", f"lokr_w{number}_b"}
        core = {f"lokr_t{number}"} if whole in tensors else set[str]()
        if (whole in tensors) == bool(pair & set(tensors)) or 0 < len(pair & set(tensors)) < 2 or core & set(tensors):
            raise AdapterError(f"{whole}, or {whole}_a and {whole}_b expected, {', '.join(sorted(tensors))} found")
    shapes = {name: shape_of(tensor) for name, tensor in tensors.items()}
    fitted = dict(tensors)
    if any(len(shape) < 2 or 0 in shape for shape in shapes.values()):
        raise AdapterError(f"factors have shapes {shapes}, expected matrices")
    if "lokr_w2_b" in tensors and "lokr_t2" not in tensors:
        fitted["lokr_w2_a"], fitted["lokr_w2_b"] = tensors["lokr_w2_a"].flatten(1), tensors["lokr_w2_b"].flatten(1)
    if "lokr_t2" in tensors and shapes["lokr_t2"][2:] == (*spec.kernel, 1):
        # For 1-d convolutions PEFT writes a core with a 2-d kernel.
        fitted["lokr_t2"] = tensors["lokr_t2"].squeeze(-1)
    found = _product_shape(fitted, spec)
    if found is None:
        raise AdapterError(
            f"factors of shapes {shapes} cannot be multiplied, expected a product of shape {spec.weight_shape}"
        )
    if found != spec.weight_shape:
        raise AdapterError(f"factors of shapes {shapes} multiply to {found}, expected {spec.weight_shape}")
    return fitted


def geometry(tensors: Tensors) -> LayerSpec:
    """Return the spec of a layer that the product fits. A kernel in the columns of `lokr_w2_b` counts as columns."""
    core = tensors.get("lokr_t2", tensors.get("lokr_w2", tensors.get("lokr_w2_b")))
    kernel = () if core is None else tuple(core.shape[2:])
    found = _product_shape(tensors, plain_spec(0, 0, kernel))
    return LayerSpec("linear", 0, 0) if found is None else plain_spec(found[0], found[1], kernel)


def init(
    spec: LayerSpec, config: LoKrConfig, *, generator: torch.Generator, weight: Callable[[], Tensor]
) -> dict[str, Tensor]:
    """Return normal factors of unit gain, with one zero tensor in the second factor."""
    (o1, o2), (i1, i2) = (_balanced(size, config.factor) for size in spec.weight_shape[:2])
    rank, taps = config.rank, spec.fan_in // spec.weight_shape[1]
    shapes: dict[str, tuple[int, ...]] = {"lokr_w1": (o1, i1)}
    if config.decompose_both and 2 * rank < max(o1, i1):
        shapes = {"lokr_w1_a": (o1, rank), "lokr_w1_b": (rank, i1)}
    if config.full_matrix or 2 * rank >= max(o2, i2):
        shapes["lokr_w2"] = (o2, i2, *spec.kernel)
    elif config.use_tucker and taps > 1:
        shapes |= {"lokr_w2_a": (rank, o2), "lokr_w2_b": (rank, i2), "lokr_t2": (rank, rank, *spec.kernel)}
    else:
        shapes |= {"lokr_w2_a": (o2, rank), "lokr_w2_b": (rank, i2 * taps)}
    tensors = {name: torch.randn(shape, generator=generator) / shape[1] ** 0.5 for name, shape in shapes.items()}
    if config.init:
        tensors["lokr_w2" if "lokr_w2" in tensors else "lokr_w2_a"].zero_()
    return tensors


def rank(tensors: Tensors) -> int | None:
    """Return the rank of a decomposed factor; `None` if both are whole, so that alpha does not apply."""
    for name in ("lokr_w1_b", "lokr_w2_b"):
        if name in tensors:
            return tensors[name].shape[0]
    return None


def delta_weight(tensors: Tensors, spec: LayerSpec) -> Tensor:
    """Return the Kronecker product in the canonical weight shape."""
    return _kron(_w1(tensors), _w2(tensors, spec))


def delta_output(
    tensors: Tensors, spec: LayerSpec, *, input: Tensor, gate: Tensor, onto: Tensor | None = None
) -> Tensor:
    """Return `onto` plus the gated change, in linear layers and ungrouped convolutions without the Kronecker product.

    `w2` acts on every block of the input, and `w1` across the blocks. If `w2` is decomposed, `w1` acts between the two
    matrices of `w2`, where the data is smallest.
    """
    if spec.kind == "embedding" or spec.groups > 1:
        # An embedding only looks up rows of the product, which is as cheap as it gets. Groups cut across the blocks.
        return spec.dense(input, delta_weight(tensors, spec), gate, onto)
    w1, factors = scaled(_w1(tensors), gate), _w2_factors(tensors, spec)
    if factors is not None and _costs_more(w1, *factors):
        factors = None
    apply = _linear if spec.kind == "linear" else _convolution
    down, up = factors or (None, _w2(tensors, spec))
    return apply(spec, input, w1, down, up, onto)


def _linear(spec: LayerSpec, input: Tensor, w1: Tensor, down: Tensor | None, up: Tensor, onto: Tensor | None) -> Tensor:
    """Return `onto` plus `down` on every block of the input, then `w1` across the blocks, then `up` on every block.

    Without `down`, `up` is the whole `w2`.
    """
    blocks = input.unflatten(-1, (w1.shape[1], -1))
    if down is None:
        hidden = torch.bmm(w1.expand(blocks[..., 0, 0].numel(), -1, -1), blocks.reshape(-1, *blocks.shape[-2:]))
        hidden = hidden.view(*blocks.shape[:-2], w1.shape[0], -1)
    else:
        hidden = F.linear(F.linear(blocks, down).mT, w1).mT
    output = spec.expand(hidden, up, onto)
    return output if onto is not None else output.flatten(-2)


def _convolution(
    spec: LayerSpec, input: Tensor, w1: Tensor, down: Tensor | None, up: Tensor, onto: Tensor | None
) -> Tensor:
    """Return the same as `_linear` for the channels of a convolution.

    A whole `w2` (`up` without `down`) has a kernel and is applied before `w1`.
    """
    lead = input.shape[: -1 - len(spec.kernel)]
    blocks = input.reshape(-1, input.shape[len(lead)] // w1.shape[1], *input.shape[len(lead) + 1 :])
    blocks = spec.op(blocks, up if down is None else down)
    space = blocks.shape[2:]
    blocks = blocks.reshape(-1, w1.shape[1], blocks[0].numel())
    across = w1.expand(len(blocks), -1, -1)
    if down is not None:
        hidden = torch.bmm(across, blocks).view(-1, down.shape[0], *space)
        output = spec.expand(hidden, up, onto)
    elif onto is not None and can_accumulate(onto, blocks, w1):
        onto.view(-1, w1.shape[0], blocks.shape[2]).baddbmm_(across, blocks)
        return onto
    else:
        output = torch.bmm(across, blocks)
        output = output if onto is None else add(output, onto.reshape(output.shape))
    return output.reshape(*lead, spec.out_features, *space)


def _costs_more(w1: Tensor, down: Tensor, up: Tensor) -> bool:
    """Return whether the two matrices of `w2` take more multiplications than their product."""
    (rows, columns), fan = w1.shape, down[0].numel()
    return down.shape[0] * (columns * fan + columns * rows + rows * up.shape[0]) > (
        columns * up.shape[0] * (fan + rows)
    )


def as_low_rank(tensors: Tensors, spec: LayerSpec) -> tuple[Tensor, Tensor] | None:
    """Return `down` and `up` of the equivalent LoRA, by `kron(a @ b, c @ d) = kron(a, c) @ kron(b, d)`.

    A whole `w1` is taken as the product of itself and an identity matrix, so its rank is its smaller side. Return
    `None` if `w2` is whole, or if `delta_output` takes fewer multiplications than the LoRA would.
    """
    w1, w2 = _w1_factors(tensors), _w2_factors(tensors, spec)
    if w2 is None:
        return None
    (down_1, up_1), (down_2, up_2) = w1, w2
    rank = down_1.shape[0] * down_2.shape[0]
    if spec.kind == "embedding" or spec.groups > 1:
        cost = spec.out_features * spec.fan_in
    else:
        cost = down_1.shape[1] * up_2.shape[0] * (down_2[0].numel() + up_1.shape[0])
    if rank * (spec.out_features + spec.fan_in) > cost:
        return None
    return _kron(down_1, down_2), _kron(up_1, up_2)


def rows(tensors: Tensors, spec: LayerSpec, rows: Sequence[range]) -> dict[str, Tensor] | None:
    """Return the tensors with the rows of `w1` that make up the given rows of the product.

    Every row of `w1` makes o2 rows of the product. Return `None` if a range does not start and end at multiples of o2,
    unless `w1` is a single number and `w2` whole, so that their rows are the same.
    """
    if spec.groups == 1 and "lokr_w2" in tensors and "lokr_w1" in tensors and tensors["lokr_w1"].numel() == 1:
        return {**tensors, "lokr_w2": take_rows(tensors["lokr_w2"], rows)}
    if "lokr_w2" in tensors:
        size = tensors["lokr_w2"].shape[0]
    else:
        size = tensors["lokr_w2_a"].shape[1 if "lokr_t2" in tensors else 0]
    if spec.groups > 1 or any(part.start % size or part.stop % size for part in rows):
        return None
    name = "lokr_w1" if "lokr_w1" in tensors else "lokr_w1_a"
    return {**tensors, name: take_rows(tensors[name], [range(part.start // size, part.stop // size) for part in rows])}


def _kron(left: Tensor, right: Tensor) -> Tensor:
    """Return the Kronecker product of two matrices; `right` may have a kernel.

    `torch.kron` is not used because it refuses some factors with axes of size 1.
    """
    rows, columns = left.shape
    product = left.reshape(rows, 1, columns, 1, *(1,) * (right.ndim - 2)) * right[None, :, None]
    return product.flatten(2, 3).flatten(0, 1)


def _w1_factors(tensors: Tensors) -> tuple[Tensor, Tensor]:
    """Return `w1` as `down` (rank, i1) and `up` (o1, rank); one of them is an identity matrix if `w1` is whole."""
    if "lokr_w1" not in tensors:
        return tensors["lokr_w1_b"], tensors["lokr_w1_a"]
    w1 = tensors["lokr_w1"]
    identity = torch.eye(min(w1.shape), dtype=w1.dtype, device=w1.device)
    return (identity, w1) if w1.shape[1] < w1.shape[0] else (w1, identity)


def _w2_factors(tensors: Tensors, spec: LayerSpec) -> tuple[Tensor, Tensor] | None:
    """Return `w2` as `down` (rank, i2, *kernel) and `up` (o2, rank), or `None` if it is whole."""
    if "lokr_w2" in tensors:
        return None
    up, down = tensors["lokr_w2_a"], tensors["lokr_w2_b"]
    if "lokr_t2" in tensors:
        return torch.einsum("ij...,jr->ir...", tensors["lokr_t2"], down).contiguous(), up.t()
    return down.view(down.shape[0], -1, *spec.kernel), up


def _w1(tensors: Tensors) -> Tensor:
    return tensors["lokr_w1"] if "lokr_w1" in tensors else tensors["lokr_w1_a"] @ tensors["lokr_w1_b"]


def _w2(tensors: Tensors, spec: LayerSpec) -> Tensor:
    """Return `w2` as one tensor (o2, i2, *kernel)."""
    if "lokr_w2" in tensors:
        w2 = tensors["lokr_w2"]
        return w2.reshape(*w2.shape, *(1,) * len(spec.kernel)) if w2.ndim == 2 else w2
    up, down = tensors["lokr_w2_a"], tensors["lokr_w2_b"]
    if "lokr_t2" in tensors:
        return torch.einsum("ij...,ip,jr->pr...", tensors["lokr_t2"], up, down).contiguous()
    return (up @ down).view(up.shape[0], -1, *spec.kernel)


def _product_shape(tensors: Tensors, spec: LayerSpec) -> tuple[int, ...] | None:
    """Return the shape of the Kronecker product, without computing it; `None` if the tensors do not fit together."""
    w1, w2 = (_shape(tensors, f"lokr_w{number}") for number in "12")
    core = shape_of(tensors["lokr_t2"]) if "lokr_t2" in tensors else None
    if core is not None and "lokr_w2_a" in tensors:
        # The core multiplies both matrices along its first two axes, and `lokr_w2_a` is transposed.
        up, down = shape_of(tensors["lokr_w2_a"]), shape_of(tensors["lokr_w2_b"])
        w2 = (up[1], down[1], *core[2:]) if len(up) == len(down) == 2 and core[:2] == (up[0], down[0]) else None
    elif "lokr_w2_b" in tensors and w2 is not None:
        taps = math.prod(spec.kernel)
        w2 = (w2[0], w2[1] // taps, *spec.kernel) if w2[1] % taps == 0 else None
    elif w2 is not None and len(w2) == 2:
        w2 = (*w2, *(1,) * len(spec.kernel))
    if w1 is None or w2 is None or len(w1) != 2 or len(w2) < 2:
        return None
    return (w1[0] * w2[0], w1[1] * w2[1], *w2[2:])


def _shape(tensors: Tensors, factor: str) -> tuple[int, ...] | None:
    """Return the shape of a factor, whole or decomposed; `None` if it is missing or its matrices do not fit."""
    if factor in tensors:
        return shape_of(tensors[factor])
    shapes = [shape_of(tensors[name]) for name in (f"{factor}_a", f"{factor}_b") if name in tensors]
    if [len(shape) for shape in shapes] != [2, 2] or shapes[0][1] != shapes[1][0]:
        return None
    return (shapes[0][0], shapes[1][1])


def _balanced(size: int, factor: int) -> tuple[int, int]:
    """Return the pair of divisors of `size` nearest to its square root, the smaller one first.

    The smaller one is at most `factor`, unless that is -1.
    """
    most = int(size**0.5) if factor < 0 else min(factor, int(size**0.5))
    small = next(divisor for divisor in range(most, 0, -1) if size % divisor == 0)
    return small, size // small


LOKR = AdapterType(
    name="lokr",
    tensors=_TENSORS,
    identified_by=frozenset(_TENSORS),
    config=LoKrConfig,
    selects=lambda config: not config.use_dora,
    fit=fit,
    init=init,
    rank=rank,
    geometry=geometry,
    delta_weight=delta_weight,
    delta_output=delta_output,
    as_low_rank=as_low_rank,
    rows=rows,
    masked={"lokr_w1_b": 0, "lokr_w2_b": 0},
)
