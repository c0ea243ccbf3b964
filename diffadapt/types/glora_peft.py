"""PEFT's form of GLoRA: changes of the weight by element and by sum, and of the bias.

Chavan et al., "One-for-All: Generalized LoRA for Parameter-Efficient Fine-tuning", arXiv 2306.07967, as in PEFT 0.21.2
`tuners/glora/layer.py`, where `*` is element by element:

    W' = W + W * A + B
    b' = b + b * D + E + W C

A and B are a product of factors, a number for every output or one number. C is a product of factors or a number for
every input. D and E are a number for every output or one number. Any of them may be missing. LyCORIS' GLoRA has another
formula (`glora.py`). There is no alpha.

| tensor | factors | vector | constant |
|---|---|---|---|
| `glora_A_*`, `glora_B_*` | `Xd` (out, rank), `Xu` (rank, in) | `X` (out, 1) | `X` (1) |
| `glora_C_*` | `Xd` (in, rank), `Xu` (rank, 1) | `X` (in, 1) | |
| `glora_D_*`, `glora_E_*` | | `X` (out) | `X` (1) |

A file has zeros for the missing ones.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from diffadapt.errors import AdapterError
from diffadapt.types.adapter_type import AdapterType, Surroundings, Tensors
from diffadapt.types.config import SizedConfig
from diffadapt.types.formulas import uniform
from diffadapt.types.layer_spec import LayerSpec
from diffadapt.types.tensor_ops import scaled, shape_of

_ON_BIAS = ("glora_C", "glora_D", "glora_E")
PATHS = ("A", "B", "C", "D", "E")
_DELTA, _BIAS = "glora_delta", "glora_bias"
_TENSORS = tuple(f"glora_{path}_{part}" for path in PATHS for part in ("Xd", "Xu", "X", "zeros"))


@dataclass(frozen=True, kw_only=True)
class GLoRAPEFTConfig(SizedConfig):
    """Settings of a new GLoRA of PEFT (Chavan et al., arXiv 2306.07967).

    Attributes:
        weight: what A and B are (`config_A_B` in PEFT).
        bias_by_input: what C is (`config_C` in PEFT). It changes the bias, which the layers must have then.
        bias_by_output: what D and E are (`config_D_E` in PEFT). They change the bias, which the layers must have then.
    """

    rank: int = 8
    weight: Literal["lora", "vector", "constant", "none"] = "lora"
    bias_by_input: Literal["lora", "vector", "none"] = "none"
    bias_by_output: Literal["vector", "constant", "none"] = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        known = {
            "weight": ("lora", "vector", "constant", "none"),
            "bias_by_input": ("lora", "vector", "none"),
            "bias_by_output": ("vector", "constant", "none"),
        }
        for name, values in known.items():
            if getattr(self, name) not in values:
                raise AdapterError(f"{name} is {getattr(self, name)!r}, expected one of {', '.join(values)}")
        if {self.weight, self.bias_by_input, self.bias_by_output} == {"none"}:
            raise AdapterError("all parts are 'none', which leaves nothing to train")


def fit(tensors: Tensors, spec: LayerSpec) -> dict[str, Tensor]:
    """Check the tensors of a file and return them in the shapes of the table above, without zeros."""
    out, columns = spec.out_features, spec.fan_in
    rows = {"A": out, "B": out, "C": columns, "D": out, "E": out}
    found: dict[str, Tensor] = {}
    for path in PATHS:
        xd, xu, x = (tensors.get(f"glora_{path}_{part}") for part in ("Xd", "Xu", "X"))
        width = 1 if path == "C" else columns
        if xd is not None or xu is not None:
            if xd is None or xu is None or path in "DE" or shape_of(xd) != (rows[path], xu.shape[0]):
                raise AdapterError(f"glora_{path}: factors Xd ({rows[path]}, rank) and Xu (rank, {width}) expected")
            if shape_of(xu)[1:] != (width,):
                raise AdapterError(f"glora_{path}_Xu has shape {shape_of(xu)}, expected (rank, {width})")
            found |= {f"glora_{path}_Xd": xd, f"glora_{path}_Xu": xu}
        elif x is not None:
            if x.numel() not in (1, rows[path]):
                raise AdapterError(f"glora_{path}_X has shape {shape_of(x)}, expected 1 or {rows[path]} numbers")
            found[f"glora_{path}_X"] = x
    if not found:
        raise AdapterError("all parts are zeros, so that the adapter has no effect on this layer")
    return found


def init(
    spec: LayerSpec, config: GLoRAPEFTConfig, *, generator: torch.Generator, weight: Callable[[], Tensor]
) -> dict[str, Tensor]:
    """Return zeros, and a Kaiming-uniform second factor."""
    by_output = config.bias_by_output
    kinds = dict(zip(PATHS, (config.weight, config.weight, config.bias_by_input, by_output, by_output), strict=True))
    out, columns, tensors = spec.out_features, spec.fan_in, dict[str, Tensor]()
    for path, kind in kinds.items():
        rows, width = (columns, 1) if path == "C" else (out, columns)
        if kind == "lora":
            xd = rows, config.rank
            tensors[f"glora_{path}_Xd"] = torch.zeros(xd) if config.init else uniform(xd, generator)
            tensors[f"glora_{path}_Xu"] = uniform((config.rank, width), generator)
        elif kind != "none":
            shape = (1,) if kind == "constant" else (rows,) if path in "DE" else (rows, 1)
            tensors[f"glora_{path}_X"] = torch.randn(shape, generator=generator) * (0.0 if config.init else 0.1)
    return tensors


def prepare(tensors: Tensors, spec: LayerSpec, surroundings: Surroundings) -> Tensors:
    """Return the change of the weight and, if there is one, that of the bias."""
    like = next(iter(tensors.values()))
    weight = surroundings.weight().to(like)
    a, b, c, d, e = (_value(tensors, path) for path in PATHS)
    delta = torch.zeros_like(weight) if a is None else weight * a
    prepared = {_DELTA: delta if b is None else delta + b}
    if c is None and d is None and e is None:
        return prepared
    change = like.new_zeros(spec.out_features) if c is None else (weight @ c).view(-1)
    own = surroundings.bias() if d is not None else None
    if d is not None and own is not None:
        change = change + own.to(like) * d.view(-1)
    prepared[_BIAS] = change if e is None else change + e.view(-1)
    return prepared


def delta_output(
    tensors: Tensors, spec: LayerSpec, *, input: Tensor, gate: Tensor, onto: Tensor | None = None
) -> Tensor:
    """Return `onto` plus the gated changes of the weight and of the bias."""
    output = spec.dense(input, tensors[_DELTA], gate, onto)
    return output if _BIAS not in tensors else output + scaled(tensors[_BIAS], gate).to(output.dtype)


def delta_bias(tensors: Tensors) -> Tensor | None:
    """Return the prepared change of the bias; of unprepared tensors, any that changes it. `None` if there is none."""
    return next((tensor for name, tensor in tensors.items() if name == _BIAS or name[:7] in _ON_BIAS), None)


def _value(tensors: Tensors, path: str) -> Tensor | None:
    """Return one of the five parts, or `None` if it is missing."""
    if f"glora_{path}_Xd" in tensors:
        return tensors[f"glora_{path}_Xd"] @ tensors[f"glora_{path}_Xu"]
    return tensors.get(f"glora_{path}_X")


GLORA_PEFT = AdapterType(
    name="glora-peft",
    tensors=_TENSORS,
    identified_by=frozenset(_TENSORS),
    config=GLoRAPEFTConfig,
    layers=frozenset({"linear"}),
    fit=fit,
    init=init,
    prepare=prepare,
    reads_weight=lambda tensors: True,
    delta_weight=lambda tensors, spec: tensors[_DELTA],
    delta_output=delta_output,
    in_weight=lambda tensors, spec: True,
    delta_bias=delta_bias,
)
