"""LoRA and LoCon: `W' = W + scale * up @ down`.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685. Convolutions as in LoCon
(a k x k `down`, a 1 x 1 `up`) with the optional Tucker core of LyCORIS (Yeh et al., arXiv 2309.14859). Tensor layout:
kohya-ss/sd-scripts 48d368f `networks/lora.py`, KohakuBlueleaf/LyCORIS f49d30d `lycoris/modules/locon.py`.

| tensor | Linear | Convolution | with a Tucker core |
|---|---|---|---|
| `lora_down` | (rank, in) | (rank, in / groups, *kernel) | (rank, in, 1...) |
| `lora_mid` | | | (rank, rank, *kernel) |
| `lora_up` | (out, rank) | (out, rank) | (out, rank) |
| `lora_bias` | (out) | (out) | (out) |

A grouped convolution has either one `down` that every group shares (the flat product `up @ down` has the shape of the
weight), or one per group, told by an `up` of `rank / groups` columns (the layout of PEFT).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffadapt.errors import AdapterError
from diffadapt.types.adapter_type import AdapterType, Tensors
from diffadapt.types.config import RankedConfig
from diffadapt.types.layer_spec import LayerSpec, layer_of
from diffadapt.types.tensor_ops import pick, scaled, shape_of


@dataclass(frozen=True, kw_only=True)
class LoraConfig(RankedConfig):
    """LoRA for new adapters (Hu et al., arXiv 2106.09685).

    Attributes:
        init: `True` draws `lora_down` Kaiming-uniform, as the paper's implementation does; "gaussian" with the standard
            deviation `1 / rank`, as diffusers' scripts do; `lora_up` is zero. `False` draws both.
        bias: also train a bias change in every adapted layer.
        use_tucker: convolutions get a Tucker core, which saves parameters at the kernel.
    """

    bias: bool = False
    use_tucker: bool = False

    def _inits(self) -> tuple[bool | str, ...]:
        return (True, "gaussian", False)


def fit(tensors: Tensors, spec: LayerSpec) -> dict[str, Tensor]:
    """Tensors of a file in the shapes of the table above; 2-d and 4-d spellings of a 1 x 1 kernel both occur."""
    for name in ("lora_down", "lora_up"):
        if name not in tensors:
            raise AdapterError(f"{name} is missing, only {', '.join(sorted(tensors))} found")
    down, up = tensors["lora_down"], tensors["lora_up"]
    if down.ndim < 2 or up.ndim < 2 or 0 in down.shape or 0 in up.shape:
        raise AdapterError(f"factors have shapes {shape_of(down)} and {shape_of(up)}, expected at least one rank")
    if spec.kind == "embedding" and (up.shape[0], down.shape[1]) == (spec.in_features, spec.out_features):
        # Tools that know weights and not layers have `W + up down`, and an embedding's weight has its outputs last.
        down, up = up.mT, down.mT
    rank, out = down.shape[0], spec.out_features
    fitted: dict[str, Tensor] = {}
    if "lora_mid" in tensors:
        mid = tensors["lora_mid"]
        expected = (rank, rank, *spec.kernel)
        if spec.groups != 1 or tuple(mid.shape) != expected:
            raise AdapterError(f"lora_mid has shape {shape_of(mid)}, expected {expected} on an ungrouped convolution")
        if math.prod(down.shape[1:]) != spec.in_features:
            raise AdapterError(f"lora_down has shape {shape_of(down)}, expected ({rank}, {spec.in_features})")
        fitted["lora_mid"] = mid
        fitted["lora_down"] = down.reshape(rank, spec.in_features, *(1,) * len(spec.kernel))
    else:
        expected = (rank, *spec.weight_shape[1:])
        kernel = tuple(down.shape[2:])
        if math.prod(down.shape[1:]) != spec.fan_in or (kernel and set(kernel) != {1} and kernel != spec.kernel):
            raise AdapterError(f"lora_down has shape {shape_of(down)}, expected {expected}")
        fitted["lora_down"] = down if down.shape == expected else down.reshape(expected)
    columns = math.prod(up.shape[1:])
    if up.shape[0] != out or columns not in (rank, rank / spec.groups):
        raise AdapterError(f"lora_up has shape {shape_of(up)}, expected ({out}, {rank}): lora_down has rank {rank}")
    fitted["lora_up"] = up if up.ndim == 2 else up.reshape(out, columns)
    if "lora_bias" in tensors:
        bias = tensors["lora_bias"]
        if bias.numel() != out or spec.kind == "embedding":
            raise AdapterError(f"lora_bias has shape {shape_of(bias)}, expected ({out},) on a layer with a bias")
        fitted["lora_bias"] = bias.reshape(out)
    return fitted


def geometry(tensors: Tensors) -> LayerSpec:
    """The layer that the factors multiply to, with the kernel of the core or of `down`."""
    down, up = tensors.get("lora_down"), tensors.get("lora_up")
    if down is None or up is None or down.ndim < 2 or up.ndim < 2:
        return LayerSpec("linear", 0, 0)
    return layer_of(up.shape[0], down.shape[1], tuple(tensors.get("lora_mid", down).shape[2:]))


def init(
    spec: LayerSpec, config: LoraConfig, *, generator: torch.Generator, weight: Callable[[], Tensor]
) -> dict[str, Tensor]:
    """Kaiming-uniform or normal `down` and zero `up`."""
    if config.bias and spec.kind == "embedding":
        raise AdapterError("an embedding has no bias; set bias=False or exclude it")
    rank, columns = config.rank, spec.in_features // spec.groups
    kernel = (1,) * len(spec.kernel) if config.use_tucker else spec.kernel
    tensors = {"lora_down": torch.empty(rank, columns, *kernel)}
    if kernel != spec.kernel:
        if spec.groups > 1:
            raise AdapterError("a grouped convolution takes no Tucker core; set use_tucker=False or exclude it")
        tensors["lora_mid"] = torch.empty(rank, rank, *spec.kernel)
    for tensor in tensors.values():
        if config.init == "gaussian":
            tensor.normal_(std=1 / rank, generator=generator)
        else:
            bound = 1 / math.sqrt(tensor[0].numel())
            tensor.uniform_(-bound, bound, generator=generator)
    tensors["lora_up"] = torch.zeros(spec.out_features, rank)
    if config.bias:
        tensors["lora_bias"] = torch.zeros(spec.out_features)
    if not config.init:
        for name in sorted(tensors.keys() & {"lora_up", "lora_bias"}):
            tensors[name].normal_(std=1 / rank, generator=generator)
    return tensors


def rank(tensors: Tensors) -> int:
    """Rows of `lora_down`."""
    return tensors["lora_down"].shape[0]


def delta_weight(tensors: Tensors, spec: LayerSpec) -> Tensor:
    """`up @ down` in the canonical weight shape."""
    return spec.product(_down(tensors), tensors["lora_up"])


def delta_bias(tensors: Tensors) -> Tensor | None:
    """The bias of `up`, if the file has one."""
    return tensors.get("lora_bias")


def delta_output(
    tensors: Tensors, spec: LayerSpec, *, input: Tensor, gate: Tensor, onto: Tensor | None = None
) -> Tensor:
    """`onto + up(gate * down(input))`, and the bias."""
    output = spec.low_rank(input, _down(tensors), tensors["lora_up"], gate, onto)
    bias = tensors.get("lora_bias")
    if bias is None:
        return output
    return output + spec.along_channels(scaled(bias, gate).to(output.dtype))


def as_low_rank(tensors: Tensors, spec: LayerSpec) -> tuple[Tensor, Tensor]:
    """The factors, Tucker core folded in."""
    return _down(tensors), tensors["lora_up"]


def rows(tensors: Tensors, spec: LayerSpec, rows: Sequence[range]) -> dict[str, Tensor] | None:
    """Rows of `up`, and of its ranks those that these rows use: fused projections may be block-diagonal."""
    if spec.groups > 1:
        return None
    up = pick(tensors["lora_up"], rows)
    cut = {**tensors, "lora_up": up}
    if "lora_bias" in tensors:
        cut["lora_bias"] = pick(tensors["lora_bias"], rows)
    used = None if up.is_meta or "lora_mid" in tensors else up.any(0)
    if used is not None and used.any() and not used.all():
        cut["lora_up"], cut["lora_down"] = up[:, used], tensors["lora_down"][used]
    return cut


def _down(tensors: Tensors) -> Tensor:
    """`down` with the Tucker core folded in: down'[m, j, *k] = sum_n mid[m, n, *k] down[n, j], exactly."""
    down = tensors["lora_down"]
    if "lora_mid" not in tensors:
        return down
    return torch.einsum("mn...,nj->mj...", tensors["lora_mid"], down.flatten(1))


LORA = AdapterType(
    name="lora",
    tensors=("lora_down", "lora_up", "lora_mid", "lora_bias"),
    identified_by=frozenset({"lora_down", "lora_up", "lora_mid"}),
    config=LoraConfig,
    selects=lambda config: not config.use_dora,
    fit=fit,
    init=init,
    rank=rank,
    geometry=geometry,
    delta_weight=delta_weight,
    delta_bias=delta_bias,
    delta_output=delta_output,
    as_low_rank=as_low_rank,
    rows=rows,
    columns={"lora_down": 1},
    masked={"lora_up": 1},
)
