"""LoHa: `W' = W + scale * (w1_a @ w1_b) * (w2_a @ w2_b)`, the second product element by element.

Hyeon-Woo et al., "FedPara", arXiv 2108.06098; as an adapter in LyCORIS (Yeh et al., arXiv 2309.14859). Tensor layout:
KohakuBlueleaf/LyCORIS f49d30d `lycoris/modules/loha.py`; PEFT has the same.

| tensor | plain | with Tucker cores |
|---|---|---|
| `hada_w1_a`, `hada_w2_a` | (out, rank) | (rank, out) |
| `hada_w1_b`, `hada_w2_b` | (rank, in / groups x kernel) | (rank, in / groups) |
| `hada_t1`, `hada_t2` | | (rank, rank, *kernel) |

The element-wise product of two matrices of rank r is a matrix of rank r^2 whose factors are the row-wise and
column-wise Khatri-Rao products (Khatri and Rao, 1968), so the forward costs that of a LoRA of rank r^2.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffadapt.errors import AdapterError
from diffadapt.types.adapter_type import AdapterType, Tensors
from diffadapt.types.config import RankedConfig
from diffadapt.types.layer_spec import LayerSpec, layer_of
from diffadapt.types.tensor_ops import pick, shape_of

_FACTORS = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
_CORES = ("hada_t1", "hada_t2")


@dataclass(frozen=True, kw_only=True)
class LoHaConfig(RankedConfig):
    """LoHa for new adapters (Hyeon-Woo et al., arXiv 2108.06098).

    Attributes:
        rank: of each of the two products; their element-wise product has up to the rank `rank**2`.
        use_tucker: convolutions get Tucker cores (`use_effective_conv2d` in PEFT).
    """

    use_tucker: bool = False


def fit(tensors: Tensors, spec: LayerSpec) -> dict[str, Tensor]:
    """Tensors of a file in the shapes of the table above; some writers give convolutions 4-d factors."""
    missing = [name for name in _FACTORS if name not in tensors]
    cores = [name for name in _CORES if name in tensors]
    if missing or len(cores) == 1:
        absent = ", ".join(missing or [name for name in _CORES if name not in cores])
        raise AdapterError(f"{absent} missing, only {', '.join(sorted(tensors))} found")
    flat = {name: tensors[name].flatten(1) if tensors[name].ndim > 1 else tensors[name] for name in _FACTORS}
    rank = flat["hada_w1_b"].shape[0]
    rows, columns = spec.out_features, spec.in_features // spec.groups if cores else spec.fan_in
    for name in _FACTORS:
        expected = ((rank, rows) if cores else (rows, rank)) if name.endswith("a") else (rank, columns)
        if shape_of(flat[name]) != expected or not rank:
            raise AdapterError(f"{name} has shape {shape_of(tensors[name])}, expected {expected}")
    for name in cores:
        expected = (rank, rank, *spec.kernel)
        # PEFT has a 2-d core on 1-d convolutions, (rank, rank, kernel, 1).
        if shape_of(tensors[name]) not in (expected, (*expected, 1)):
            raise AdapterError(f"{name} has shape {shape_of(tensors[name])}, expected {expected}")
        flat[name] = tensors[name].reshape(expected)
    return flat


def geometry(tensors: Tensors) -> LayerSpec:
    """The layer that the factors multiply to; without cores a kernel is flattened into them."""
    up, down, core = tensors.get("hada_w1_a"), tensors.get("hada_w1_b"), tensors.get("hada_t1")
    if up is None or down is None or up.ndim < 2 or down.ndim < 2:
        return LayerSpec("linear", 0, 0)
    return layer_of(up.shape[0 if core is None else 1], down[0].numel(), () if core is None else tuple(core.shape[2:]))


def init(
    spec: LayerSpec, config: LoHaConfig, *, generator: torch.Generator, weight: Callable[[], Tensor]
) -> dict[str, Tensor]:
    """Normal factors with the reference's deviations, and a zero `w2_a`."""
    rank, rows = config.rank, spec.out_features
    deviations = {"hada_w1_a": 0.1, "hada_w1_b": 1.0, "hada_w2_a": 0.0 if config.init else 0.1, "hada_w2_b": 1.0}
    if not (config.use_tucker and any(size > 1 for size in spec.kernel)):
        shapes = {name: (rows, rank) if name.endswith("a") else (rank, spec.fan_in) for name in _FACTORS}
        return {name: torch.randn(shapes[name], generator=generator) * deviations[name] for name in _FACTORS}
    columns = spec.in_features // spec.groups
    shapes = {name: (rank, rows if name.endswith("a") else columns) for name in _FACTORS}
    tensors = {name: torch.randn(shapes[name], generator=generator) * deviations[name] for name in _FACTORS}
    for name in _CORES:
        tensors[name] = torch.randn(rank, rank, *spec.kernel, generator=generator) * 0.1
    return tensors


def rank(tensors: Tensors) -> int:
    """Rank of each of the two products."""
    return tensors["hada_w1_b"].shape[0]


def delta_weight(tensors: Tensors, spec: LayerSpec) -> Tensor:
    """The element-wise product, in the canonical weight shape."""
    parts: list[Tensor] = []
    for number in "12":
        down, up = _part(tensors, spec, number)
        parts.append(up @ down.flatten(1))
    return (parts[0] * parts[1]).view(spec.weight_shape)


def delta_output(
    tensors: Tensors, spec: LayerSpec, *, input: Tensor, gate: Tensor, onto: Tensor | None = None
) -> Tensor:
    """As a LoRA of rank r^2, or with the matrix itself where that has fewer elements than the factors."""
    factors = as_low_rank(tensors, spec)
    if factors is None:
        return spec.dense(input, delta_weight(tensors, spec), gate, onto)
    return spec.low_rank(input, *factors, gate, onto)


def as_low_rank(tensors: Tensors, spec: LayerSpec) -> tuple[Tensor, Tensor] | None:
    """`down` (rank^2, in / groups, *kernel) and `up` (out, rank^2) of the LoRA that is this LoHa."""
    if rank(tensors) ** 2 * (spec.out_features + spec.fan_in) > spec.out_features * spec.fan_in:
        return None
    (down_1, up_1), (down_2, up_2) = (_part(tensors, spec, number) for number in "12")
    up = (up_1.unsqueeze(2) * up_2.unsqueeze(1)).flatten(1)
    down = (down_1.unsqueeze(1) * down_2.unsqueeze(0)).flatten(0, 1)
    return down, up


def rows(tensors: Tensors, spec: LayerSpec, rows: Sequence[range]) -> dict[str, Tensor] | None:
    """Rows of both `a` factors, which are columns beside Tucker cores."""
    if spec.groups > 1:
        return None
    cut = dict(tensors)
    for name in ("hada_w1_a", "hada_w2_a"):
        up = tensors[name]
        cut[name] = pick(up.t(), rows).t() if "hada_t1" in tensors else pick(up, rows)
    return cut


def _part(tensors: Tensors, spec: LayerSpec, number: str) -> tuple[Tensor, Tensor]:
    """`down` (rank, in / groups, *kernel) and `up` (out, rank) of one of the two products, Tucker core folded in."""
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
