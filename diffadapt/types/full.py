"""Full difference: the change of a weight as it is, `W' = W + diff`, and of a bias, `b' = b + diff_b`.

No factors, no alpha, scale 1; norm layers too. Files of that kind are what is left of a finetuned model after the base
model is subtracted. Tensor layout: KohakuBlueleaf/LyCORIS f49d30d `lycoris/modules/full.py` and `norms.py`.

Some files have the new weight instead of its change, `W' = V` (ComfyUI `comfy/lora.py`, and the norms of Black Forest
Labs' control LoRAs). It is kept as it is: the layer's own output gives way, `W + m (0 - W) + m V`, so that no base
weight is read and `V` comes out exactly, also of a file that is only written again.

| tensor | shape | in files |
|---|---|---|
| `diff` | as the layer stores its weight | `diff`; of a norm also `w_norm` |
| `set_weight` | as the layer stores its weight | `set_weight`; in place of `diff` |
| `diff_b` | (out) | `diff_b`; of a norm also `b_norm` |

Any may be there alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffadapt.errors import AdapterError
from diffadapt.types.adapter_type import AdapterType, Stage, Tensors
from diffadapt.types.config import AdapterConfig
from diffadapt.types.layer_spec import LayerSpec, layer_of
from diffadapt.types.tensor_ops import pick, scaled, shape_of

_WEIGHTS = frozenset({"diff", "set_weight"})


@dataclass(frozen=True, kw_only=True)
class FullConfig(AdapterConfig):
    """A whole weight's change for new adapters; the only type for norm layers.

    Attributes:
        bias: also train a change of the bias.
    """

    bias: bool = False


def fit(tensors: Tensors, spec: LayerSpec) -> dict[str, Tensor]:
    """Tensors of a file, checked; 2-d and 4-d spellings of a 1 x 1 kernel both occur."""
    fitted: dict[str, Tensor] = {}
    for name in sorted(tensors.keys() & _WEIGHTS):
        shape, expected = shape_of(tensors[name]), _stored_shape(spec)
        same_kernel = shape[2:] == expected[2:] or {1}.issuperset(shape[2:] + expected[2:])
        if shape[:2] != expected[:2] or not same_kernel:
            raise AdapterError(f"{name} has shape {shape}, expected {expected}")
        fitted[name] = tensors[name].reshape(expected)
    if len(fitted) > 1:
        raise AdapterError("a new weight and a change of the weight found, expected one of diff and set_weight")
    if "diff_b" in tensors:
        _refuse_bias(spec)
        if shape_of(tensors["diff_b"]) != (spec.out_features,):
            raise AdapterError(f"diff_b has shape {shape_of(tensors['diff_b'])}, expected ({spec.out_features},)")
        fitted["diff_b"] = tensors["diff_b"]
    return fitted


def geometry(tensors: Tensors) -> LayerSpec:
    """The layer with a weight of the shape of `diff`; with one axis that is a norm."""
    weight = _weight(tensors)
    if weight is not None and weight.ndim > 1:
        return layer_of(weight.shape[0], weight.shape[1], tuple(weight.shape[2:]))
    size = next(iter(tensors.values())).numel()
    return LayerSpec("norm", size, size)


def init(
    spec: LayerSpec, config: FullConfig, *, generator: torch.Generator, weight: Callable[[], Tensor]
) -> dict[str, Tensor]:
    """Zeros."""
    deviation = 0.0 if config.init else 0.1
    tensors = {"diff": torch.randn(_stored_shape(spec), generator=generator) * deviation}
    if config.bias:
        _refuse_bias(spec)
        tensors["diff_b"] = torch.randn(spec.out_features, generator=generator) * deviation
    return tensors


def stages(tensors: Tensors, spec: LayerSpec) -> tuple[Stage, ...]:
    """A new weight takes the place of the old one, which is an output map to nothing."""
    return ("output", "add") if "set_weight" in tensors else ("add",)


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
    """`onto + gate * (0 - 1) vectors`."""
    change = scaled(vectors, -gate)
    return change if onto is None else onto + change


def delta_weight(tensors: Tensors, spec: LayerSpec) -> Tensor:
    """`diff` or `set_weight`, or zeros where only the bias changes."""
    weight = _weight(tensors)
    if weight is None:
        return tensors["diff_b"].new_zeros(()).expand(spec.weight_shape)
    return spec.to_stored(weight)


def delta_bias(tensors: Tensors) -> Tensor | None:
    """`diff_b`, if there is one."""
    return tensors.get("diff_b")


def delta_output(
    tensors: Tensors, spec: LayerSpec, *, input: Tensor, gate: Tensor, onto: Tensor | None = None
) -> Tensor:
    """`onto + gate * op(input, diff)`, and the bias."""
    output = onto
    if output is None or _weight(tensors) is not None:
        output = spec.dense(input, delta_weight(tensors, spec), gate, onto)
    if "diff_b" not in tensors:
        return output
    change = scaled(tensors["diff_b"], gate).to(output.dtype)
    return output + spec.along_channels(change, output.ndim)


def rows(tensors: Tensors, spec: LayerSpec, rows: Sequence[range]) -> dict[str, Tensor]:
    """Rows of `diff`, in the orientation in which the layer stores its weight, and of `diff_b`."""
    cut: dict[str, Tensor] = {}
    for name in tensors.keys() & _WEIGHTS:
        cut[name] = spec.to_stored(pick(spec.to_stored(tensors[name]), rows))
    if "diff_b" in tensors:
        cut["diff_b"] = pick(tensors["diff_b"], rows)
    return cut


def _weight(tensors: Tensors) -> Tensor | None:
    return tensors.get("diff", tensors.get("set_weight"))


def _stored_shape(spec: LayerSpec) -> tuple[int, ...]:
    return spec.weight_shape[::-1] if spec.transposed else spec.weight_shape


def _refuse_bias(spec: LayerSpec) -> None:
    if spec.kind == "embedding":
        raise AdapterError("an embedding has no bias to change")


FULL = AdapterType(
    name="full",
    tensors=("diff", "set_weight", "diff_b"),
    identified_by=frozenset({"diff", "set_weight", "diff_b"}),
    config=FullConfig,
    fit=fit,
    init=init,
    geometry=geometry,
    stages=stages,
    apply_map=apply_map,
    delta_weight=delta_weight,
    delta_bias=delta_bias,
    delta_output=delta_output,
    rows=rows,
    columns={"diff": 1},
    layers=frozenset({"linear", "conv", "embedding", "norm"}),
)
