"""Full difference: the change of a weight as it is, `W' = W + diff`, and of a bias, `b' = b + diff_b`.

No factors, no alpha, scale 1; norm layers too. Files of that kind are what is left of a finetuned model after the base
model is subtracted. Tensor layout: KohakuBlueleaf/LyCORIS f49d30d `lycoris/modules/full.py` and `norms.py`.

| tensor | shape | in files |
|---|---|---|
| `diff` | as the layer stores its weight | `diff`; of a norm also `w_norm` |
| `diff_b` | (out) | `diff_b`; of a norm also `b_norm` |

Either may be there alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffadapt.config import AdapterConfig
from diffadapt.errors import AdapterError
from diffadapt.kind import AdapterType, Tensors
from diffadapt.layer import LayerSpec, layer_of, pick, scaled, shape_of


@dataclass(frozen=True, kw_only=True)
class FullConfig(AdapterConfig):
    """A whole weight's change for new adapters; the only type for norm layers.

    Attributes:
        bias: also train a change of the bias.
    """

    bias: bool = False


def fit(tensors: Tensors, layer: LayerSpec) -> dict[str, Tensor]:
    """Tensors of a file, checked; 2-d and 4-d spellings of a 1 x 1 kernel both occur."""
    fitted: dict[str, Tensor] = {}
    if "diff" in tensors:
        shape, expected = shape_of(tensors["diff"]), _stored_shape(layer)
        same_kernel = shape[2:] == expected[2:] or {1}.issuperset(shape[2:] + expected[2:])
        if shape[:2] != expected[:2] or not same_kernel:
            raise AdapterError(f"diff has shape {shape}, expected {expected}")
        fitted["diff"] = tensors["diff"].reshape(expected)
    if "diff_b" in tensors:
        _refuse_bias(layer)
        if shape_of(tensors["diff_b"]) != (layer.out_features,):
            raise AdapterError(f"diff_b has shape {shape_of(tensors['diff_b'])}, expected ({layer.out_features},)")
        fitted["diff_b"] = tensors["diff_b"]
    return fitted


def geometry(tensors: Tensors) -> LayerSpec:
    """The layer with a weight of the shape of `diff`; with one axis that is a norm."""
    diff = tensors.get("diff")
    if diff is not None and diff.ndim > 1:
        return layer_of(diff.shape[0], diff.shape[1], tuple(diff.shape[2:]))
    size = next(iter(tensors.values())).numel()
    return LayerSpec("norm", size, size)


def init(
    layer: LayerSpec, config: FullConfig, generator: torch.Generator, weight: Callable[[], Tensor]
) -> dict[str, Tensor]:
    """Zeros."""
    deviation = 0.0 if config.init else 0.1
    tensors = {"diff": torch.randn(_stored_shape(layer), generator=generator) * deviation}
    if config.bias:
        _refuse_bias(layer)
        tensors["diff_b"] = torch.randn(layer.out_features, generator=generator) * deviation
    return tensors


def delta_weight(tensors: Tensors, layer: LayerSpec) -> Tensor:
    """`diff`, or zeros where only the bias changes."""
    if "diff" not in tensors:
        return tensors["diff_b"].new_zeros(()).expand(layer.weight_shape)
    return layer.to_stored(tensors["diff"])


def delta_bias(tensors: Tensors) -> Tensor | None:
    """`diff_b`, if there is one."""
    return tensors.get("diff_b")


def delta_output(tensors: Tensors, layer: LayerSpec, input: Tensor, gate: Tensor, onto: Tensor | None = None) -> Tensor:
    """`onto + gate * op(input, diff)`, and the bias."""
    output = onto
    if output is None or "diff" in tensors:
        output = layer.dense(input, delta_weight(tensors, layer), gate, onto)
    if "diff_b" not in tensors:
        return output
    change = scaled(tensors["diff_b"], gate).to(output.dtype)
    # Channels are the second axis of what a group norm gives, and the last one of what other norms give.
    spread = output.ndim - 2 if layer.norm_groups > 0 else len(layer.kernel)
    return output + change.view(-1, *(1,) * spread)


def rows(tensors: Tensors, layer: LayerSpec, rows: Sequence[range]) -> dict[str, Tensor]:
    """Rows of `diff`, in the orientation in which the layer stores its weight, and of `diff_b`."""
    cut: dict[str, Tensor] = {}
    if "diff" in tensors:
        cut["diff"] = layer.to_stored(pick(layer.to_stored(tensors["diff"]), rows))
    if "diff_b" in tensors:
        cut["diff_b"] = pick(tensors["diff_b"], rows)
    return cut


def _stored_shape(layer: LayerSpec) -> tuple[int, ...]:
    return layer.weight_shape[::-1] if layer.transposed else layer.weight_shape


def _refuse_bias(layer: LayerSpec) -> None:
    if layer.kind == "embedding":
        raise AdapterError("an embedding has no bias to change")


FULL = AdapterType(
    name="full",
    tensors=("diff", "diff_b"),
    identified_by=frozenset({"diff", "diff_b"}),
    config=FullConfig,
    fit=fit,
    init=init,
    geometry=geometry,
    delta_weight=delta_weight,
    delta_bias=delta_bias,
    delta_output=delta_output,
    rows=rows,
    layers=frozenset({"linear", "conv", "embedding", "norm"}),
)
