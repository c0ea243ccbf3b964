"""Full difference: the whole change of a weight, `W' = W + diff`, and of a bias, `b' = b + diff_b`.

There are no factors and no alpha, and the scale is 1. Norm layers are supported, too. Such files contain the difference
between a finetuned model and its base model. The tensor layout is that in KohakuBlueleaf/LyCORIS f49d30d
`lycoris/modules/full.py` and `norms.py`.

Some files contain the new weight instead of its change, `W' = V` (ComfyUI `comfy/lora.py`, and the norms of Black
Forest Labs' control LoRAs). `V` is kept unchanged, and the layer's own output is scaled down: `W + m (0 - W) + m V`. So
no base weight is read, and `V` is exact, also if the file is only converted.

| tensor | shape | name in files |
|---|---|---|
| `diff` | the shape of the stored weight | `diff`; for norms also `w_norm` |
| `set_weight` | the shape of the stored weight | `set_weight`, instead of `diff` |
| `diff_b` | (out) | `diff_b`; for norms also `b_norm` |

Each of them may be the only tensor.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffadapt.errors import AdapterError
from diffadapt.types.adapter_type import AdapterType, Stage, Tensors
from diffadapt.types.config import AdapterConfig
from diffadapt.types.layer_spec import LayerSpec, plain_spec
from diffadapt.types.tensor_ops import scaled, shape_of, take_rows

_WEIGHTS = frozenset({"diff", "set_weight"})


@dataclass(frozen=True, kw_only=True)
class FullConfig(AdapterConfig):
    """Settings of a new full difference, the only adapter type for norm layers.

    Attributes:
        bias: whether to train a change of the bias, too.
    """

    bias: bool = False


def fit(tensors: Tensors, spec: LayerSpec) -> dict[str, Tensor]:
    """Check the tensors of a file and return them in the shapes of the table above.

    A weight without a kernel may be 2-d or, with a 1 x 1 kernel, 4-d.
    """
    fitted: dict[str, Tensor] = {}
    if spec.kind == "parameter" and set(tensors) != {"diff"}:
        raise AdapterError(f"{', '.join(sorted(tensors))} found, expected diff alone for a bare parameter")
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
        # PEFT's BEFT has it as a row.
        if shape_of(tensors["diff_b"]) not in ((spec.out_features,), (1, spec.out_features)):
            raise AdapterError(f"diff_b has shape {shape_of(tensors['diff_b'])}, expected ({spec.out_features},)")
        fitted["diff_b"] = tensors["diff_b"].reshape(spec.out_features)
    return fitted


def geometry(tensors: Tensors) -> LayerSpec:
    """Return the spec of a layer whose weight has the shape of the tensors; a weight with one axis is a norm's."""
    weight = _weight(tensors)
    if weight is not None and weight.ndim > 1:
        return plain_spec(weight.shape[0], weight.shape[1], tuple(weight.shape[2:]))
    size = next(iter(tensors.values())).numel()
    return LayerSpec("norm", size, size)


def init(
    spec: LayerSpec, config: FullConfig, *, generator: torch.Generator, weight: Callable[[], Tensor]
) -> dict[str, Tensor]:
    """Return a zero `diff` and, if the settings ask for it, a zero `diff_b`."""
    deviation = 0.0 if config.init else 0.1
    tensors = {"diff": torch.randn(_stored_shape(spec), generator=generator) * deviation}
    if config.bias:
        _refuse_bias(spec)
        tensors["diff_b"] = torch.randn(spec.out_features, generator=generator) * deviation
    return tensors


def stages(tensors: Tensors, spec: LayerSpec) -> tuple[Stage, ...]:
    """Return "add" and, for a new weight, "output": replacing a weight takes an output map to zero.

    A bare parameter has a stage of its own.
    """
    if spec.kind == "parameter":
        return ("parameter",)
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
    """Return `onto + gate * (0 - 1) vectors`."""
    change = scaled(vectors, -gate)
    return change if onto is None else onto + change


def delta_weight(tensors: Tensors, spec: LayerSpec) -> Tensor:
    """Return `diff` or `set_weight` in the canonical shape, or zeros if only the bias changes."""
    weight = _weight(tensors)
    if weight is None:
        return tensors["diff_b"].new_zeros(()).expand(spec.weight_shape)
    return spec.to_stored(weight)


def delta_bias(tensors: Tensors) -> Tensor | None:
    """Return `diff_b`, or `None`."""
    return tensors.get("diff_b")


def delta_output(
    tensors: Tensors, spec: LayerSpec, *, input: Tensor, gate: Tensor, onto: Tensor | None = None
) -> Tensor:
    """Return `onto + gate * op(input, diff)`, plus the gated change of the bias."""
    output = onto
    if output is None or _weight(tensors) is not None:
        output = spec.dense(input, delta_weight(tensors, spec), gate, onto)
    if "diff_b" not in tensors:
        return output
    change = scaled(tensors["diff_b"], gate).to(output.dtype)
    return output + spec.along_channels(change, output.ndim)


def rows(tensors: Tensors, spec: LayerSpec, rows: Sequence[range]) -> dict[str, Tensor]:
    """Return the given rows of the canonical weight, in the orientation that the layer stores, and of `diff_b`."""
    cut: dict[str, Tensor] = {}
    for name in tensors.keys() & _WEIGHTS:
        cut[name] = spec.to_stored(take_rows(spec.to_stored(tensors[name]), rows))
    if "diff_b" in tensors:
        cut["diff_b"] = take_rows(tensors["diff_b"], rows)
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
    is_stored=True,
    delta_weight=delta_weight,
    delta_bias=delta_bias,
    delta_output=delta_output,
    in_weight=lambda tensors, spec: "diff" in tensors,
    rows=rows,
    columns={"diff": 1},
    layers=frozenset({"linear", "conv", "embedding", "norm", "parameter"}),
)
