"""LoHa: `W' = W + scale * (w1_a @ w1_b) * (w2_a @ w2_b)`, where the product of the two matrices is element-wise.

Hyeon-Woo et al., "FedPara", arXiv 2108.06098; introduced as an adapter by LyCORIS (Yeh et al., arXiv 2309.14859). The
tensor layout is that in KohakuBlueleaf/LyCORIS f49d30d `lycoris/modules/loha.py`, which PEFT shares.

| tensor | without Tucker cores | with Tucker cores |
|---|---|---|
| `hada_w1_a`, `hada_w2_a` | (out, rank) | (rank, out) |
| `hada_w1_b`, `hada_w2_b` | (rank, in / groups x kernel) | (rank, in / groups) |
| `hada_t1`, `hada_t2` | | (rank, rank, *kernel) |

In a grouped convolution, OneTrainer (23df383 `modules/module/LoRAModule.py`) has (out / groups, rank) and
(rank, in x kernel) instead. The products have as many elements as the weight, and take its shape row by row.

The element-wise product of two matrices of rank r is a matrix of rank at most r^2, whose factors are the row-wise and
column-wise Khatri-Rao products (Khatri and Rao, 1968). So a forward pass costs as much as with a LoRA of rank r^2.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffadapt.errors import AdapterError
from diffadapt.types.adapter_type import AdapterType, Tensors
from diffadapt.types.config import RankedConfig
from diffadapt.types.layer_spec import LayerSpec, plain_spec
from diffadapt.types.tensor_ops import shape_of, take_rows

_FACTORS = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
_CORES = ("hada_t1", "hada_t2")


@dataclass(frozen=True, kw_only=True)
class LoHaConfig(RankedConfig):
    """Settings of a new LoHa (Hyeon-Woo et al., arXiv 2108.06098).

    Attributes:
        rank: the rank of each of the two products, at least 1; the rank of their element-wise product is at most
            `rank**2`.
        use_tucker: whether convolutions get Tucker cores (`use_effective_conv2d` in PEFT).
    """

    use_tucker: bool = False


def fit(tensors: Tensors, spec: LayerSpec) -> dict[str, Tensor]:
    """Check the tensors of a file and return them in the shapes of the table above.

    Some programs write 4-d factors for convolutions.
    """
    missing = [name for name in _FACTORS if name not in tensors]
    cores = [name for name in _CORES if name in tensors]
    if missing or len(cores) == 1:
        absent = ", ".join(missing or [name for name in _CORES if name not in cores])
        raise AdapterError(f"{absent} missing, only {', '.join(sorted(tensors))} found")
    flat = {name: tensors[name].flatten(1) if tensors[name].ndim > 1 else tensors[name] for name in _FACTORS}
    rank = flat["hada_w1_b"].shape[0]
    rows, columns = spec.out_features, spec.in_features // spec.groups if cores else spec.fan_in
    if spec.groups > 1 and not cores and flat["hada_w1_a"].shape[0] != rows:
        if all(shape_of(flat[f"hada_w{number}_a"]) == (rows // spec.groups, rank) for number in "12"):
            rows, columns = rows // spec.groups, columns * spec.groups
    for name in _FACTORS:
        expected = ((rank, rows) if cores else (rows, rank)) if name.endswith("a") else (rank, columns)
        if shape_of(flat[name]) != expected or not rank:
            raise AdapterError(f"{name} has shape {shape_of(tensors[name])}, expected {expected}")
    for name in cores:
        expected = (rank, rank, *spec.kernel)
        # For 1-d convolutions PEFT writes a core with a 2-d kernel, (rank, rank, kernel, 1).
        if shape_of(tensors[name]) not in (expected, (*expected, 1)):
            raise AdapterError(f"{name} has shape {shape_of(tensors[name])}, expected {expected}")
        flat[name] = tensors[name].reshape(expected)
    return flat


def geometry(tensors: Tensors) -> LayerSpec:
    """Return the spec of a layer that the product fits. Without cores, a kernel is counted among the columns."""
    up, down, core = tensors.get("hada_w1_a"), tensors.get("hada_w1_b"), tensors.get("hada_t1")
    if up is None or down is None or up.ndim < 2 or down.ndim < 2:
        return LayerSpec("linear", 0, 0)
    kernel = () if core is None else tuple(core.shape[2:])
    return plain_spec(up.shape[0 if core is None else 1], down[0].numel(), kernel)


def init(
    spec: LayerSpec, config: LoHaConfig, *, generator: torch.Generator, weight: Callable[[], Tensor]
) -> dict[str, Tensor]:
    """Return normal factors with the standard deviations that LyCORIS uses, and a zero `w2_a`."""
    rank, rows = config.rank, spec.out_features
    deviations = {"hada_w1_a": 0.1, "hada_w1_b": 1.0, "hada_w2_a": 0.0 if config.init else 0.1, "hada_w2_b": 1.0}
    if not (config.use_tucker and spec.has_kernel):
        shapes = {name: (rows, rank) if name.endswith("a") else (rank, spec.fan_in) for name in _FACTORS}
        return {name: torch.randn(shapes[name], generator=generator) * deviations[name] for name in _FACTORS}
    columns = spec.in_features // spec.groups
    shapes = {name: (rank, rows if name.endswith("a") else columns) for name in _FACTORS}
    tensors = {name: torch.randn(shapes[name], generator=generator) * deviations[name] for name in _FACTORS}
    for name in _CORES:
        tensors[name] = torch.randn(rank, rank, *spec.kernel, generator=generator) * 0.1
    return tensors


def rank(tensors: Tensors) -> int:
    """Return the rank of each of the two products."""
    return tensors["hada_w1_b"].shape[0]


def delta_weight(tensors: Tensors, spec: LayerSpec) -> Tensor:
    """Return the element-wise product in the canonical weight shape."""
    products: list[Tensor] = []
    for number in "12":
        if _is_of_onetrainer(tensors, spec):
            products.append(tensors[f"hada_w{number}_a"] @ tensors[f"hada_w{number}_b"])
            continue
        down, up = _product_factors(tensors, spec, number)
        products.append(up @ down.flatten(1))
    return (products[0] * products[1]).view(spec.weight_shape)


def delta_output(
    tensors: Tensors, spec: LayerSpec, *, input: Tensor, gate: Tensor, onto: Tensor | None = None
) -> Tensor:
    """Return `onto` plus the gated change, computed as a LoRA of rank r^2, or as one matrix if that is smaller."""
    factors = as_low_rank(tensors, spec)
    if factors is None:
        return spec.dense(input, delta_weight(tensors, spec), gate, onto)
    return spec.low_rank(input, *factors, gate, onto)


def as_low_rank(tensors: Tensors, spec: LayerSpec) -> tuple[Tensor, Tensor] | None:
    """Return `down` (rank^2, in / groups, *kernel) and `up` (out, rank^2) of the equivalent LoRA.

    Return `None` if these have more elements than the change of the weight.
    """
    if _is_of_onetrainer(tensors, spec):
        return None
    if rank(tensors) ** 2 * (spec.out_features + spec.fan_in) > spec.out_features * spec.fan_in:
        return None
    (down_1, up_1), (down_2, up_2) = (_product_factors(tensors, spec, number) for number in "12")
    up = (up_1.unsqueeze(2) * up_2.unsqueeze(1)).flatten(1)
    down = (down_1.unsqueeze(1) * down_2.unsqueeze(0)).flatten(0, 1)
    return down, up


def rows(tensors: Tensors, spec: LayerSpec, rows: Sequence[range]) -> dict[str, Tensor] | None:
    """Return the given rows of both `a` factors. Next to Tucker cores, the `a` factors are transposed."""
    if spec.groups > 1:
        return None
    cut = dict(tensors)
    for name in ("hada_w1_a", "hada_w2_a"):
        up = tensors[name]
        cut[name] = take_rows(up.t(), rows).t() if "hada_t1" in tensors else take_rows(up, rows)
    return cut


def _is_of_onetrainer(tensors: Tensors, spec: LayerSpec) -> bool:
    """Return whether the products do not have the rows of the weight; see the module."""
    return spec.groups > 1 and "hada_t1" not in tensors and tensors["hada_w1_a"].shape[0] != spec.out_features


def _product_factors(tensors: Tensors, spec: LayerSpec, number: str) -> tuple[Tensor, Tensor]:
    """Return `down` (rank, in / groups, *kernel), Tucker core folded in, and `up` (out, rank) of product "1" or "2"."""
    up, down = tensors[f"hada_w{number}_a"], tensors[f"hada_w{number}_b"]
    core = tensors.get(f"hada_t{number}")
    if core is None:
        return down.view(-1, *spec.weight_shape[1:]), up
    return torch.einsum("ij...,jc->ic...", core, down), up.t()


LOHA = AdapterType(
    name="loha",
    tensors=(*_FACTORS, *_CORES),
    identified_by=frozenset({*_FACTORS, *_CORES}),
    config=LoHaConfig,
    selects=lambda config: not config.use_dora,
    fit=fit,
    init=init,
    rank=rank,
    geometry=geometry,
    delta_weight=delta_weight,
    delta_output=delta_output,
    as_low_rank=as_low_rank,
    rows=rows,
    columns={"hada_w1_b": 1, "hada_w2_b": 1},
    masked={"hada_w1_b": 0},
)
