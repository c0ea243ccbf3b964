"""DoRA: a trained magnitude for every row (or column) of the weight, next to an additive change of its direction.

`W' = magnitude * (W + scale * delta) / norm(W + scale * delta)`, Liu et al., "DoRA", arXiv 2402.09353. The function
`dora` takes an additive adapter type and returns the same type with one more tensor, `dora_scale`.

| axis | `dora_scale` | norm of | as in |
|---|---|---|---|
| output | (out, 1) | each row | the paper; PEFT 0.21 `lora_magnitude_vector`; LyCORIS since 3.2 |
| input | (1, in / groups) | each column, over outputs and kernel | LyCORIS before 3.2; OneTrainer |

Autograd treats the norm as a constant (section 4.3 of the paper). With strength m, the weight is `W + m (W' - W)`, so
the norm does not depend on the strength.

A file may have several layers of the model as one (query, key and value). The norm of a column then runs over the rows
of all of them, so each part contributes the squares of its own rows (`AdapterType.joint_term`).
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from diffadapt.errors import AdapterError
from diffadapt.types.adapter_type import AdapterType, Stage, Surroundings, Tensors
from diffadapt.types.layer_spec import LayerSpec
from diffadapt.types.loha import LOHA
from diffadapt.types.lokr import LOKR
from diffadapt.types.lora import LORA
from diffadapt.types.tensor_ops import add, scaled, shape_of, take_rows

_NAME, _PEFT_NAME, _FACTOR, _GAIN = "dora_scale", "lora_magnitude_vector", "dora_factor", "dora_gain"


def dora(base: AdapterType) -> AdapterType:
    """Return the additive adapter type `base` with a trained magnitude."""

    def fit(tensors: Tensors, spec: LayerSpec) -> dict[str, Tensor]:
        rest = {name: tensor for name, tensor in tensors.items() if name not in (_NAME, _PEFT_NAME)}
        fitted = base.fit(rest, spec)
        if spec.groups > 1:
            # Refuse factors that are no change of the weight.
            base.delta_weight({name: tensor.to("meta") for name, tensor in fitted.items()}, spec)
        return {**fitted, _NAME: _fit_magnitude(tensors, spec)}

    def init(
        spec: LayerSpec, config: Any, *, generator: torch.Generator, weight: Callable[[], Tensor]
    ) -> dict[str, Tensor]:
        axis = 0 if config.dora_axis == "output" else 1
        if axis and spec.kind == "embedding":
            raise AdapterError("an embedding has no input to scale; use dora_axis='output' or exclude it")
        magnitude = _norm(weight(), axis)
        if not config.init:
            magnitude = magnitude * (1 + 0.1 * torch.randn(magnitude.shape, generator=generator).to(magnitude))
        return {**base.init(spec, config, generator=generator, weight=weight), _NAME: magnitude}

    def direction(tensors: Tensors, spec: LayerSpec, surroundings: Surroundings) -> Tensor:
        weight = surroundings.weight().to(tensors[_NAME].device)
        converted = {name: tensor.to(weight.dtype) for name, tensor in tensors.items()}
        return weight + surroundings.scale * base.delta_weight(converted, spec)

    def joint_term(tensors: Tensors, spec: LayerSpec, surroundings: Surroundings) -> Tensor:
        with torch.no_grad():
            return _norm(direction(tensors, spec, surroundings), 1).square()

    def prepare(tensors: Tensors, spec: LayerSpec, surroundings: Surroundings) -> Tensors:
        magnitude = tensors[_NAME]
        with torch.no_grad():
            norm = _norm(direction(tensors, spec, surroundings), _axis(magnitude, spec))
            if surroundings.others is not None:
                norm = (norm.square() + surroundings.others().to(norm)).sqrt()
        factor = magnitude.to(norm.dtype) / norm.clamp_min(torch.finfo(norm.dtype).tiny)
        # The gate includes `alpha / rank`, which must not apply to the change of W itself.
        return {**tensors, _FACTOR: factor, _GAIN: (factor - 1) / surroundings.scale}

    def delta_weight(tensors: Tensors, spec: LayerSpec) -> Tensor:
        return base.delta_weight(tensors, spec) * _expanded(tensors[_FACTOR], len(spec.weight_shape))

    def delta_output(
        tensors: Tensors, spec: LayerSpec, *, input: Tensor, gate: Tensor, onto: Tensor | None = None
    ) -> Tensor:
        factors = as_low_rank(tensors, spec)
        if factors is not None:
            output = spec.low_rank(input, *factors, gate, onto)
            bias = base.delta_bias(tensors)
            return output if bias is None else output + spec.along_channels(scaled(bias, gate).to(output.dtype))
        factor = tensors[_FACTOR]
        if _axis(factor, spec):
            return base.delta_output(tensors, spec, input=_scaled_input(input, factor, spec), gate=gate, onto=onto)
        change = base.delta_output(tensors, spec, input=input, gate=gate)
        change = change * spec.along_channels(factor.view(-1).to(change.dtype))
        return change if onto is None else add(change, onto)

    def as_low_rank(tensors: Tensors, spec: LayerSpec) -> tuple[Tensor, Tensor] | None:
        factors = base.as_low_rank(tensors, spec)
        if factors is None:
            return None
        (down, up), factor = factors, tensors[_FACTOR]
        if _axis(factor, spec):
            return (down * _expanded(factor, down.ndim)).to(down.dtype), up
        return down, (up * factor).to(up.dtype)

    def rows(tensors: Tensors, spec: LayerSpec, rows: Sequence[range]) -> dict[str, Tensor] | None:
        cut = base.rows(tensors, spec, rows)
        if cut is None or _axis(tensors[_NAME], spec):
            return cut
        return {**cut, _NAME: take_rows(tensors[_NAME], rows)}

    return replace(
        base,
        name="dora" if base is LORA else f"dora-{base.name}",
        tensors=(*base.tensors, _NAME, _PEFT_NAME),
        additive=base,
        claims=lambda tensors: _NAME in tensors or _PEFT_NAME in tensors,
        selects=lambda config: config.use_dora,
        fit=fit,
        init=init,
        geometry=lambda tensors: base.geometry({name: tensors[name] for name in tensors if name in base.tensors}),
        stages=_stages,
        prepare=prepare,
        reads_weight=lambda tensors: True,
        joint=lambda tensors: shape_of(tensors[_NAME])[0] == 1,
        joint_term=joint_term,
        delta_weight=delta_weight,
        delta_output=delta_output,
        as_low_rank=as_low_rank,
        rows=rows,
        apply_map=_apply_map,
        gain=_gain,
    )


def _stages(tensors: Tensors, spec: LayerSpec) -> tuple[Stage, ...]:
    return ("input" if _axis(tensors[_NAME], spec) else "gain", "add")


def _apply_map(
    tensors: Tensors,
    spec: LayerSpec,
    *,
    vectors: Tensor,
    axis: int,
    gate: Tensor,
    transposed: bool = False,
    onto: Tensor | None = None,
) -> Tensor:
    """Return `onto` plus the change that the factors, as a diagonal map of the input's channels, make to `vectors`."""
    change = tensors[_GAIN].view(-1) * gate
    change = change.repeat(vectors.shape[axis] // change.numel())
    shape = [1] * vectors.ndim
    shape[axis] = -1
    change = change.to(vectors.dtype).view(shape)
    return vectors * change if onto is None else torch.addcmul(onto, vectors, change)


def _gain(tensors: Tensors) -> Tensor:
    return tensors[_GAIN].view(-1)


def _scaled_input(input: Tensor, factor: Tensor, spec: LayerSpec) -> Tensor:
    repeats = spec.in_features // factor.numel()
    return input * spec.along_channels(factor.view(-1).repeat(repeats).to(input.dtype))


def _fit_magnitude(tensors: Tensors, spec: LayerSpec) -> Tensor:
    """Return the magnitude as (out, 1) or (1, in / groups).

    PEFT stores one number per output, in various shapes. In LyCORIS files, the shape shows the axis.
    """
    rows, columns = spec.weight_shape[:2]
    name = _NAME if _NAME in tensors else _PEFT_NAME
    magnitude = tensors[name]
    shape = shape_of(magnitude)
    sizes = [size for size in shape if size != 1]
    per_output = name == _PEFT_NAME or len(shape) == 1 or shape[0] == rows
    if magnitude.numel() == rows and per_output and len(sizes) <= 1:
        return magnitude.reshape(rows, 1)
    if magnitude.numel() == columns and len(shape) > 1 and shape[:2] == (1, columns) and spec.kind != "embedding":
        return magnitude.reshape(1, columns)
    raise AdapterError(f"{name} has shape {shape}, expected ({rows}, 1) per output or (1, {columns}) per input")


def _axis(magnitude: Tensor, spec: LayerSpec) -> int:
    """Return 0 if there is one magnitude per output, 1 if there is one per input."""
    return 0 if shape_of(magnitude) == (spec.out_features, 1) else 1


def _norm(weight: Tensor, axis: int) -> Tensor:
    """Return the norms of the slices of a canonical weight along an axis, in two dimensions."""
    others = [dimension for dimension in range(weight.ndim) if dimension != axis]
    return torch.linalg.vector_norm(weight, dim=others).unsqueeze(1 - axis)


def _expanded(factor: Tensor, dimensions: int) -> Tensor:
    """Append axes of size 1 to a tensor of shape (out, 1) or (1, in) until it has `dimensions` axes."""
    return factor.view(*factor.shape, *(1,) * (dimensions - 2))


DORA: tuple[AdapterType, ...] = tuple(dora(base) for base in (LORA, LOHA, LOKR))
