"""(IA)^3: one factor per output or per input of a layer, `W' = diag(s) W` or `W' = W diag(s)`.

Liu et al., "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning", arXiv 2205.05638.
There are two implementations, which treat the bias differently: huggingface/peft 0.21.2 `tuners/ia3/layer.py` scales
the output of the layer, including the bias; KohakuBlueleaf/LyCORIS f49d30d `lycoris/modules/ia3.py` scales only the
weight.

| type | tensor | shape | in files | s | new bias |
|---|---|---|---|---|---|
| ia3 | `ia3_l` | (out, 1) or (1, in) | the same; for a convolution (1, channels, 1...) | l | s b |
| ia3-lycoris | `ia3_w` | (out, 1) or (1, in) | `weight`, (channels) or as above, and `on_input` | 1 + w | b |

PEFT calls a layer with scaled inputs a feed-forward layer. For a convolution only PEFT's config shows which one it is.
A reader that has the config therefore renames the tensor of such a layer to `ia3_l_feedforward`. Without a config, a
tensor with as many numbers as the layer has outputs is taken to scale the outputs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from diffadapt.errors import AdapterError
from diffadapt.types.adapter_type import AdapterType, Stage, Tensors
from diffadapt.types.config import AdapterConfig
from diffadapt.types.layer_spec import LayerSpec, plain_spec
from diffadapt.types.tensor_ops import promoted, shape_of, take_rows

FEEDFORWARD = "ia3_l_feedforward"
"""The name that readers give to `ia3_l` in a layer that PEFT's config lists as a feed-forward layer."""


@dataclass(frozen=True, kw_only=True)
class IA3Config(AdapterConfig):
    """Settings of a new (IA)^3 (Liu et al., arXiv 2205.05638).

    Attributes:
        side: "output" for one factor per output, "input" for one per input (as in PEFT's feed-forward layers).
        scale_bias: whether the factors apply to the bias, too, as in PEFT. If not, they apply only to the weight, as in
            LyCORIS. For the output side only.
    """

    side: Literal["output", "input"] = "output"
    scale_bias: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.side not in ("output", "input"):
            raise AdapterError(f"side is {self.side!r}, expected 'output' or 'input'")
        if self.scale_bias and self.side == "input":
            raise AdapterError("scale_bias has no effect with side='input'")
        if self.dropout:
            raise AdapterError("dropout has no effect on (IA)^3, which has no input of its own; use module_dropout")


def _ia3(name: str, tensor: str, identity: float, scales_bias: bool, file_names: tuple[str, ...]) -> AdapterType:
    """Return one of the two adapter types.

    Args:
        name: the name of the type.
        tensor: the name of the tensor with the factors.
        identity: the value in `tensor` that stands for a factor of 1.
        scales_bias: whether the factors apply to the bias, too.
        file_names: other names of tensors in files of this type.
    """

    def fit(tensors: Tensors, spec: LayerSpec) -> dict[str, Tensor]:
        found = tensors.get(tensor, tensors.get(FEEDFORWARD))
        if found is None or (tensor in tensors and FEEDFORWARD in tensors):
            raise AdapterError(f"{tensor} expected, {', '.join(sorted(tensors))} found")
        shape, count = shape_of(found), found.numel()
        rows, columns = spec.out_features, spec.in_features
        if "on_input" in tensors:
            on_input = _flag(tensors["on_input"])
        elif FEEDFORWARD in tensors:
            on_input = True
        elif len(shape) == 2:
            on_input = shape != (rows, 1)
        elif tensor == "ia3_w":
            raise AdapterError(f"on_input is missing beside a weight of shape {shape}")
        else:
            on_input = count != rows
        if count != (columns if on_input else rows) or sum(size != 1 for size in shape) > 1:
            expected = f"{columns} numbers, one per input" if on_input else f"{rows} numbers, one per output"
            raise AdapterError(f"the factors have shape {shape}, expected {expected}")
        _refuse_embedding(on_input, spec)
        return {tensor: found.reshape((1, columns) if on_input else (rows, 1))}

    def geometry(tensors: Tensors) -> LayerSpec:
        found = tensors.get(tensor, tensors.get(FEEDFORWARD))
        size = 0 if found is None else found.numel()
        return plain_spec(size, size)

    def init(
        spec: LayerSpec, config: IA3Config, *, generator: torch.Generator, weight: Callable[[], Tensor]
    ) -> dict[str, Tensor]:
        on_input = config.side == "input"
        _refuse_embedding(on_input, spec)
        shape = (1, spec.in_features) if on_input else (spec.out_features, 1)
        return {tensor: identity + torch.randn(shape, generator=generator) * (0.0 if config.init else 0.1)}

    def stages(tensors: Tensors, spec: LayerSpec) -> tuple[Stage, ...]:
        return ("gain",) if shape_of(tensors[tensor]) == (spec.out_features, 1) else ("input",)

    def rows(tensors: Tensors, spec: LayerSpec, rows: Sequence[range]) -> dict[str, Tensor] | None:
        if spec.groups > 1:
            return None
        return {tensor: take_rows(tensors[tensor], rows)} if stages(tensors, spec) == ("gain",) else dict(tensors)

    def gain(tensors: Tensors) -> Tensor:
        return promoted(tensors[tensor].view(-1)) - identity

    def apply_map(
        tensors: Tensors,
        spec: LayerSpec,
        *,
        vectors: Tensor,
        axis: int,
        gate: Tensor,
        transposed: bool = False,
        onto: Tensor | None = None,
    ) -> Tensor:
        change = gain(tensors) * gate
        axis %= vectors.ndim
        if vectors.shape[axis] != change.numel():
            # `vectors` is the weight of a grouped convolution, in which every group of rows has its own columns.
            change = change.view(spec.groups, 1, -1).expand(-1, spec.out_features // spec.groups, -1).flatten(0, 1)
        change = change.view(*change.shape, *(1,) * (vectors.ndim - axis - 1)).to(vectors.dtype)
        return vectors * change if onto is None else torch.addcmul(onto, vectors, change)

    return AdapterType(
        name=name,
        tensors=(tensor, *file_names),
        identified_by=frozenset({tensor, *file_names} - {"on_input"}),
        config=IA3Config,
        selects=lambda config: config.scale_bias == scales_bias,
        fit=fit,
        init=init,
        geometry=geometry,
        stages=stages,
        rows=rows,
        apply_map=apply_map,
        gain=gain,
        gains_bias=scales_bias,
    )


def _flag(tensor: Tensor) -> bool:
    if tensor.numel() != 1 or tensor.device.type == "meta":
        raise AdapterError(f"on_input has shape {shape_of(tensor)}, expected a single number")
    return bool(tensor)


def _refuse_embedding(on_input: bool, spec: LayerSpec) -> None:
    if on_input and spec.kind == "embedding":
        raise AdapterError("an embedding has no input to scale; scale its output or exclude it")


IA3: tuple[AdapterType, ...] = (
    _ia3("ia3", "ia3_l", 1.0, True, (FEEDFORWARD,)),
    _ia3("ia3-lycoris", "ia3_w", 0.0, False, ("on_input",)),
)
