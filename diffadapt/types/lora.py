"""LoRA and LoCon: `W' = W + scale * up @ down`.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685. Convolutions are as in LoCon (a k x k
`down` and a 1 x 1 `up`), with the optional Tucker core of LyCORIS (Yeh et al., arXiv 2309.14859). The tensor layout is
that in kohya-ss/sd-scripts 48d368f `networks/lora.py` and KohakuBlueleaf/LyCORIS f49d30d `lycoris/modules/locon.py`.

| tensor | linear layer | convolution | convolution with a Tucker core |
|---|---|---|---|
| `lora_down` | (rank, in) | (rank, in / groups, *kernel) | (rank, in, 1...) |
| `lora_mid` | | | (rank, rank, *kernel) |
| `lora_up` | (out, rank) | (out, rank) | (out, rank) |
| `lora_bias` | (out) | (out) | (out) |

In a grouped convolution, either all groups share one `down`, and `up @ down` has the shape of the flattened weight; or
every group has its own rows of `down`, and `up` has only `rank / groups` columns.

PEFT and OneTrainer have a `down` without groups there, (rank, in, *kernel). It reads all inputs, so the change is not
one of the layer's weight and cannot be merged. The groups of PEFT's `up` take `rank / groups` components each.
OneTrainer's has `out / groups` rows: it works on depthwise convolutions only, where its one output is added to all
channels. Sources: PEFT 0.21.2 `tuners/lora/layer.py`, OneTrainer 23df383 `modules/module/LoRAModule.py`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from diffadapt.errors import AdapterError
from diffadapt.types.adapter_type import AdapterType, Tensors
from diffadapt.types.config import RankedConfig
from diffadapt.types.data_starts import FROM_DATA, SUBTRACTED
from diffadapt.types.layer_spec import LayerSpec, plain_spec
from diffadapt.types.starts import STARTS, is_start
from diffadapt.types.tensor_ops import scaled, shape_of, take_rows

_FEW_ROWS = 4


@dataclass(frozen=True, kw_only=True)
class LoraConfig(RankedConfig):
    """Settings of a new LoRA (Hu et al., arXiv 2106.09685).

    Attributes:
        init: the initial distribution of `lora_down`: with `True` Kaiming-uniform, as in the implementation of the
            paper; with "gaussian" normal with a standard deviation of `1 / rank`, as in diffusers' training scripts.
            `lora_up` starts at zero. With "orthogonal" both are random, and their product is zero: the columns of one
            are orthogonal to the rows of the other (an even rank). "pissa" and "olora" start from a part of the base
            weight, which is subtracted, so that the base stays as it is (Meng et al., arXiv 2404.02948; Büyükakyüz,
            arXiv 2406.01775); "pissa_niter_4" computes that part by 4 subspace iterations, which is faster. Such a LoRA
            is saved with twice the rank. "eva", "corda", "corda_kpm", "lora_ga" and "loftq" start from data; see
            `diffadapt.calibrated`. With `False` all is random.
        starts: the starts that `calibrated` has computed: path -> `lora_down` and `lora_up`.
        bias: whether to train a change of the bias in every adapted layer, too.
        use_tucker: whether convolutions get a Tucker core, which saves parameters in their kernels.
    """

    bias: bool = False
    use_tucker: bool = False
    starts: Mapping[str, tuple[Tensor, Tensor]] = field(
        default_factory=dict[str, tuple[Tensor, Tensor]], repr=False, compare=False
    )

    def at(self, path: str) -> "LoraConfig":
        """Return the settings of the layer at `path`, with the rank, the alpha and the start that it has."""
        settings = super().at(path)
        assert isinstance(settings, LoraConfig)
        if self.init not in FROM_DATA:
            return settings
        return replace(settings, starts={path: self.starts[path]} if path in self.starts else {})

    def _inits(self) -> tuple[bool | str, ...]:
        known = (True, "gaussian", "orthogonal", *STARTS, "pissa_niter_4", *FROM_DATA, False)
        return (*known, self.init) if is_start(self.init) else known

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init == "orthogonal" and any(rank % 2 for rank in (self.rank, *self.rank_pattern.values())):
            raise AdapterError(
                "init='orthogonal' needs an even rank, of which either factor gets half of the directions"
            )
        if (is_start(self.init) or self.init in FROM_DATA) and self.use_dora:
            raise AdapterError(f"use_dora has no meaning with init={self.init!r}; use init=True")
        if is_start(self.init) and self.rank_dropout:
            raise AdapterError(
                f"rank_dropout has no meaning with init={self.init!r}, whose start would be left out, too"
            )


def fit(tensors: Tensors, spec: LayerSpec) -> dict[str, Tensor]:
    """Check the tensors of a file and return them in the shapes of the table above.

    Factors without a kernel may be 2-d or, with a 1 x 1 kernel, 4-d.
    """
    for name in ("lora_down", "lora_up"):
        if name not in tensors:
            raise AdapterError(f"{name} is missing, only {', '.join(sorted(tensors))} found")
    down, up = tensors["lora_down"], tensors["lora_up"]
    if down.ndim < 2 or up.ndim < 2 or 0 in down.shape or 0 in up.shape:
        raise AdapterError(f"factors have shapes {shape_of(down)} and {shape_of(up)}, expected at least one rank")
    if spec.kind == "embedding" and (up.shape[0], down.shape[1]) == (spec.in_features, spec.out_features):
        # Some tools ignore the kind of layer and compute `W + up @ down` on stored weights. The stored weight of an
        # embedding has its outputs last.
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
    elif _reads_all_groups(down, spec):
        fitted["lora_down"] = down
        if up.shape[0] == out // spec.groups == 1:
            up = up.expand(out, *up.shape[1:])
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
    """Return the spec of a layer that `up @ down` fits, with the kernel of the Tucker core or of `down`."""
    down, up = tensors.get("lora_down"), tensors.get("lora_up")
    if down is None or up is None or down.ndim < 2 or up.ndim < 2:
        return LayerSpec("linear", 0, 0)
    return plain_spec(up.shape[0], down.shape[1], tuple(tensors.get("lora_mid", down).shape[2:]))


def init(
    spec: LayerSpec, config: LoraConfig, *, generator: torch.Generator, weight: Callable[[], Tensor]
) -> dict[str, Tensor]:
    """Return a Kaiming-uniform or normal `down` (and Tucker core), and a zero `up` (and bias)."""
    if config.bias and spec.kind == "embedding":
        raise AdapterError("an embedding has no bias; set bias=False or exclude it")
    rank, columns = config.rank, spec.in_features // spec.groups
    kernel = (1,) * len(spec.kernel) if config.use_tucker else spec.kernel
    tensors = {"lora_down": torch.empty(rank, columns, *kernel)}
    if kernel != spec.kernel:
        if spec.groups > 1:
            raise AdapterError("a grouped convolution takes no Tucker core; set use_tucker=False or exclude it")
        tensors["lora_mid"] = torch.empty(rank, rank, *spec.kernel)
    if config.init in FROM_DATA:
        return _from_data(spec, config)
    if config.init == "orthogonal":
        return _orthogonal(spec, config, kernel, generator)
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


def start_from_data(config: LoraConfig, spec: LayerSpec) -> tuple[Tensor, Tensor]:
    """Return copies of `lora_down` and `lora_up` that `calibrated` has computed for the layer.

    Raises:
        AdapterError: there are none, or they are for a layer of another size.
    """
    if not config.starts:
        raise AdapterError(
            f"init={config.init!r} starts from data: pass the settings through diffadapt.calibrated(model, config, ...)"
        )
    ((down, up),) = config.starts.values()
    expected = (config.rank, *spec.weight_shape[1:]), (spec.out_features, config.rank)
    if (shape_of(down), shape_of(up)) != expected:
        raise AdapterError(f"the start has shapes {shape_of(down)} and {shape_of(up)}, expected {expected}")
    return down.clone(), up.clone()


def _from_data(spec: LayerSpec, config: LoraConfig) -> dict[str, Tensor]:
    down, up = start_from_data(config, spec)
    tensors = {"lora_down": down, "lora_up": up}
    return {**tensors, "lora_bias": torch.zeros(spec.out_features)} if config.bias else tensors


def _orthogonal(
    spec: LayerSpec, config: LoraConfig, kernel: tuple[int, ...], generator: torch.Generator
) -> dict[str, Tensor]:
    """Return random factors whose product is zero, as PEFT 0.21.2 does: each has half of the directions of the rank."""
    rank, half = config.rank, config.rank // 2
    if kernel != spec.kernel:
        raise AdapterError("init='orthogonal' has no meaning with a Tucker core; set use_tucker=False")
    basis, _ = torch.linalg.qr(torch.randn(rank, rank, generator=generator, dtype=torch.float64))
    down = basis[0::2].mT @ torch.randn(half, spec.fan_in, generator=generator, dtype=torch.float64)
    up = torch.randn(spec.out_features, half, generator=generator, dtype=torch.float64) @ basis[1::2]
    tensors = {
        "lora_down": (down / 10).float().reshape(rank, *spec.weight_shape[1:]),
        "lora_up": (up / 10).float(),
    }
    return {**tensors, "lora_bias": torch.zeros(spec.out_features)} if config.bias else tensors


def rank(tensors: Tensors) -> int:
    """Return the number of rows of `lora_down`."""
    return tensors["lora_down"].shape[0]


def delta_weight(tensors: Tensors, spec: LayerSpec) -> Tensor:
    """Return `up @ down` in the canonical weight shape."""
    if _reads_all_groups(tensors["lora_down"], spec):
        raise AdapterError(
            "its LoRA reads all inputs, but the convolution has groups that read some each, so this is no change of "
            "its weight; keep it unmerged"
        )
    return spec.product(_down(tensors), tensors["lora_up"])


def delta_bias(tensors: Tensors) -> Tensor | None:
    """Return the bias of `up`, or `None`."""
    return tensors.get("lora_bias")


def delta_output(
    tensors: Tensors, spec: LayerSpec, *, input: Tensor, gate: Tensor, onto: Tensor | None = None
) -> Tensor:
    """Return `onto + up(gate * down(input))`, plus the gated bias."""
    down, up = _down(tensors), tensors["lora_up"]
    if _reads_all_groups(down, spec):
        whole = replace(spec, groups=1)
        hidden = scaled(whole.op(input, down), gate)
        output = (whole if up.shape[1] == down.shape[0] else spec).expand(hidden, up, onto)
    else:
        output = spec.low_rank(input, down, up, gate, onto)
    bias = tensors.get("lora_bias")
    if bias is None:
        return output
    return output + spec.along_channels(scaled(bias, gate).to(output.dtype))


def as_low_rank(tensors: Tensors, spec: LayerSpec) -> tuple[Tensor, Tensor] | None:
    """Return `down`, with the Tucker core folded in, and `up`; `None` if they are no change of the weight."""
    return None if _reads_all_groups(tensors["lora_down"], spec) else (_down(tensors), tensors["lora_up"])


def rows(tensors: Tensors, spec: LayerSpec, rows: Sequence[range]) -> dict[str, Tensor] | None:
    """Return the given rows of `up`, without the components of the rank that these rows do not use.

    The `up` of a fused projection may be block-diagonal, so that each block of rows uses only some components.
    """
    if spec.groups > 1:
        return None
    up = take_rows(tensors["lora_up"], rows)
    cut = {**tensors, "lora_up": up}
    if "lora_bias" in tensors:
        cut["lora_bias"] = take_rows(tensors["lora_bias"], rows)
    # A few rows show that all components are used, if they are.
    if up.is_meta or "lora_mid" in tensors or up[:_FEW_ROWS].any(0).all():
        return cut
    used = up.any(0)
    if used.any() and not used.all():
        cut["lora_up"], cut["lora_down"] = up[:, used], tensors["lora_down"][used]
    return cut


def _reads_all_groups(down: Tensor, spec: LayerSpec) -> bool:
    """Return whether the rows of `down` read all inputs of a grouped convolution rather than those of one group."""
    return spec.groups > 1 and tuple(down.shape[1:]) == (spec.in_features, *spec.kernel)


def _down(tensors: Tensors) -> Tensor:
    """Return `down` with the Tucker core folded in: `down'[m, j, *k] = sum_n mid[m, n, *k] down[n, j]`, exactly."""
    down = tensors["lora_down"]
    if "lora_mid" not in tensors:
        return down
    return torch.einsum("mn...,nj->mj...", tensors["lora_mid"], down.flatten(1))


LORA = AdapterType(
    name="lora",
    tensors=("lora_down", "lora_up", "lora_mid", "lora_bias"),
    identified_by=frozenset({"lora_down", "lora_up", "lora_mid"}),
    config=LoraConfig,
    selects=lambda config: not config.use_dora and not is_start(config.init) and config.init not in SUBTRACTED,
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
