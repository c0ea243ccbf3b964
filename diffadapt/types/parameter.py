"""A LoRA of a bare parameter, which is the weight of no layer: `P' = P + scale * up @ down`.

Mixtures of experts have the weights of all experts in one parameter `(experts, a, b)`, and blocks of diffusion
transformers have tables `(a, b)` that shift and scale. PEFT names them in `target_parameters` (PEFT 0.21.2
`tuners/lora/layer.py`, `ParamWrapper`). While the module that owns the parameter runs, it sees `P'`.

| tensor | fused experts | table |
|---|---|---|
| `param_down` | (experts, rank, b) | (rank, b) |
| `param_up` | (experts, a, rank) | (a, rank) |

PEFT stores `param_A` (rank * experts, in) and `param_B` (out, rank * experts), where the rows of one are grouped by
expert and the columns of the other are not. `a` is the output, unless the module says `is_transposed`.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from diffadapt.errors import AdapterError
from diffadapt.types.adapter_type import AdapterType, Stage, Tensors
from diffadapt.types.layer_spec import LayerSpec
from diffadapt.types.lora import LoraConfig
from diffadapt.types.tensor_ops import shape_of


def parameter_spec(parameter: Tensor, *, inputs_first: bool = False) -> LayerSpec | None:
    """Return the geometry of a bare parameter, or `None` if it is neither a matrix nor one matrix for each expert.

    Args:
        inputs_first: whether the inputs of an expert come before its outputs.
    """
    if parameter.ndim not in (2, 3):
        return None
    *experts, rows, columns = parameter.shape
    return LayerSpec("parameter", rows, columns, experts=sum(experts), inputs_first=inputs_first)


def fit(tensors: Tensors, spec: LayerSpec) -> dict[str, Tensor]:
    """Check the tensors of a file, in either of the two layouts, and return `param_down` and `param_up`."""
    down, up = tensors.get("param_down"), tensors.get("param_up")
    if "param_A" in tensors and "param_B" in tensors:
        down, up = _of_peft(tensors["param_A"], tensors["param_B"], spec)
    if down is None or up is None:
        raise AdapterError(f"both factors of a parameter's LoRA are needed, found {', '.join(sorted(tensors))}")
    rank, experts = down.shape[-2] if down.ndim > 1 else 0, spec.weight_shape[:-2]
    expected = (*experts, rank, spec.in_features), (*experts, spec.out_features, rank)
    if not rank or (shape_of(down), shape_of(up)) != expected:
        raise AdapterError(
            f"factors have shapes {shape_of(down)} and {shape_of(up)}, expected {expected[0]} and {expected[1]} for a "
            f"parameter of shape {spec.weight_shape}"
        )
    return {"param_down": down, "param_up": up}


def geometry(tensors: Tensors) -> LayerSpec:
    """Return the spec of a parameter that the factors fit. The layout of PEFT needs a model."""
    down, up = tensors.get("param_down"), tensors.get("param_up")
    if down is None or up is None or down.ndim not in (2, 3) or up.ndim != down.ndim:
        raise AdapterError("only a model can tell whether these tensors fit")
    return LayerSpec("parameter", up.shape[-2], down.shape[-1], experts=down.shape[0] if down.ndim > 2 else 0)


def init(
    spec: LayerSpec, config: LoraConfig, *, generator: torch.Generator, weight: Callable[[], Tensor]
) -> dict[str, Tensor]:
    """Return a Kaiming-uniform or normal `param_down` and a zero `param_up`."""
    experts = spec.weight_shape[:-2]
    down = torch.empty(*experts, config.rank, spec.in_features)
    up = torch.zeros(*experts, spec.out_features, config.rank)
    if config.init == "gaussian":
        down.normal_(std=1 / config.rank, generator=generator)
    else:
        bound = 1 / math.sqrt(spec.in_features)
        down.uniform_(-bound, bound, generator=generator)
    if not config.init:
        up.normal_(std=1 / config.rank, generator=generator)
    return {"param_down": down, "param_up": up}


def rank(tensors: Tensors) -> int:
    """Return the rank of one expert's factors."""
    return tensors["param_down"].shape[-2]


def stages(tensors: Tensors, spec: LayerSpec) -> tuple[Stage, ...]:
    """Return "parameter"."""
    return ("parameter",)


def delta_weight(tensors: Tensors, spec: LayerSpec) -> Tensor:
    """Return `up @ down`, for each expert."""
    return tensors["param_up"] @ tensors["param_down"]


def to_peft(tensors: Tensors, *, inputs_first: bool) -> tuple[Tensor, Tensor]:
    """Return `param_A` and `param_B`, as PEFT stores the factors."""
    down, up = tensors["param_down"], tensors["param_up"]
    if down.ndim == 2:
        return down, up
    if inputs_first:
        down, up = up.mT, down.mT
    return down.reshape(-1, down.shape[-1]), up.permute(1, 2, 0).reshape(up.shape[1], -1)


def _of_peft(a: Tensor, b: Tensor, spec: LayerSpec) -> tuple[Tensor, Tensor]:
    """Return `param_down` and `param_up` of factors as PEFT stores them."""
    if not spec.experts:
        return a, b
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or a.shape[0] % spec.experts:
        raise AdapterError(
            f"factors have shapes {shape_of(a)} and {shape_of(b)}, expected (rank x {spec.experts}, in) and (out, rank "
            f"x {spec.experts})"
        )
    down = a.reshape(spec.experts, -1, a.shape[1])
    up = b.reshape(len(b), -1, spec.experts).permute(2, 0, 1)
    return (up.mT.contiguous(), down.mT.contiguous()) if spec.inputs_first else (down, up.contiguous())


PARAMETER = AdapterType(
    name="lora-parameter",
    tensors=("param_down", "param_up", "param_A", "param_B"),
    identified_by=frozenset({"param_down", "param_up", "param_A", "param_B"}),
    config=LoraConfig,
    selects=lambda config: False,
    fit=fit,
    geometry=geometry,
    init=init,
    rank=rank,
    stages=stages,
    delta_weight=delta_weight,
    layers=frozenset({"parameter"}),
)
