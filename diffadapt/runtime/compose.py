"""How the adapter layers on one host act together: one formula, for the host's output and for its weight.

With a strength m per adapter, additive changes D, input maps R, output maps Q and output scales s, the weight W becomes

    W' = [1 + sum m (s - 1)] [I + sum m (Q - I)] (W + sum m W (R - I)) + sum m D

This does not depend on the order of the adapters. For one adapter of any type at m = 1 it is exactly the merged weight
of that adapter. D applies to the input before any R. The bias is added once and is neither mapped nor scaled, except by
types with `gains_bias`.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diffadapt.errors import AdapterError
from diffadapt.runtime.adapter_layer import BANK, AdapterLayer, TermOf
from diffadapt.runtime.call_state import scale_of_call
from diffadapt.runtime.changed_weight import in_weight, output_by_position, output_by_weight
from diffadapt.runtime.foreign_hooks import input_device
from diffadapt.runtime.prepared_layer import PreparedLayer, prepared_for_call
from diffadapt.runtime.regions.blending import advanced
from diffadapt.runtime.row_factors import RowFactors, row_factors
from diffadapt.types.adapter_type import Tensors, refuse_weightless
from diffadapt.types.layer_spec import LayerSpec
from diffadapt.types.tensor_ops import FLOAT8
from diffadapt.weights.resting import resting_tensor


def run(layers: Sequence[AdapterLayer], host: nn.Module, call: Callable[..., Any], args: Any, kwargs: Any) -> Tensor:
    """Return the output of `host` with adapter layers.

    Args:
        layers: the adapter layers that act on `host`, at least one.
        call: the host's own call, which takes `args` and `kwargs`.
        args: positional arguments of the call. The first argument of the call is the input of the host.
        kwargs: keyword arguments of the call.
    """
    input: Tensor = args[0] if args else next(iter(kwargs.values()))
    device = input_device(host) if hasattr(host, "_hf_hook") else None
    if device is not None and device != input.device:
        input = input.to(device)
        args, kwargs = _with_input(input, args, kwargs)
    in_regions = layers[0].call.regions is not None
    picked = None if in_regions else row_factors(tuple(layers), input.device)
    if picked is not None:
        return _run_picked(picked, host, call, args, kwargs, input)
    if all(layer.is_additive for layer in layers):
        chosen = in_weight(layers, host, args, kwargs, input)
        if not chosen:
            output = _overwritable(host, call(*args, **kwargs))
        elif in_regions:
            output = output_by_position(chosen, host, call(*args, **kwargs), input)
        else:
            output = output_by_weight(chosen, host, input)
        rest = [layer for layer in layers if layer not in chosen] if chosen else layers
        prepared = [prepared_for_call(layer, output.device, len(input)) for layer in rest]
        return _add_changes([p.at(output) for p in prepared] if in_regions else prepared, output, input)
    if any("parameter" in layer.stages for layer in layers):
        return _with_parameters(layers, host, call, args, kwargs, input)
    spec = layers[0].spec
    prepared = [prepared_for_call(layer, input.device, len(input)) for layer in layers]
    if in_regions and (spec.kind != "linear" or not input.is_contiguous()):
        output, prepared = _map_by_output(prepared, host, call, args, kwargs, input)
    else:
        prepared = [p.at(input) for p in prepared] if in_regions else prepared
        mapped = _apply_maps(prepared, "input", input, spec.channel_axis)
        if mapped is not input:
            args, kwargs = _with_input(mapped, args, kwargs)
        output = _overwritable(host, call(*args, **kwargs))
    output = _add_changes([p for p in prepared if "patch" in p.layer.stages], output, input)
    if any("output" in layer.stages or "gain" in layer.stages for layer in layers):
        output = _map_and_scale(prepared, output, _bias_of(host, output), spec)
    return _add_changes([p for p in prepared if "add" in p.layer.stages], output, input)


def _run_picked(
    picked: RowFactors, host: nn.Module, call: Callable[..., Any], args: Any, kwargs: Any, input: Tensor
) -> Tensor:
    """Return the output of `host` with adapter layers from which every row picks what its own adapters have."""
    prepared = [prepared_for_call(layer, input.device, len(input)) for layer in picked.others]
    mapped = _apply_maps(prepared, "input", input, picked.spec.channel_axis)
    if mapped is not input:
        args, kwargs = _with_input(mapped, args, kwargs)
    output = _overwritable(host, call(*args, **kwargs))
    output = _add_changes([p for p in prepared if "patch" in p.layer.stages], output, input)
    if picked.scaling:
        output = _scaled(output, *picked.gains(len(input), output.ndim, lambda: _bias_of(host, output)))
    elif any("output" in p.layer.stages or "gain" in p.layer.stages for p in prepared):
        output = _map_and_scale(prepared, output, _bias_of(host, output), picked.spec)
    if picked.adding:
        output = picked.add(input, output)
    adding = [p for p in prepared if "add" in p.layer.stages and p.layer not in picked.adding]
    return _add_changes(adding, output, input)


def _map_by_output(
    prepared: list[PreparedLayer], host: nn.Module, call: Callable[..., Any], args: Any, kwargs: Any, input: Tensor
) -> tuple[Tensor, list[PreparedLayer]]:
    """Return the output of `host` with its input maps, and `prepared` for the positions of that output.

    A position of the output of a convolution depends on several of its input, so the outputs with and without each map
    are blended. Blended inputs would do for a linear layer, but the layout of its input decides how it rounds. Only
    calls with regions need this.
    """
    output = before = call(*args, **kwargs)
    prepared = [p.at(output) for p in prepared]
    mapped = input
    for p in prepared:
        if "input" in p.layer.stages:
            mapped = p.everywhere().apply_map(input, p.layer.spec.channel_axis, onto=mapped)
            args, kwargs = _with_input(mapped.to(input.dtype), args, kwargs)
            after = call(*args, **kwargs)
            output, before = advanced(output, before, after, p.field), after
    return _overwritable(host, output), prepared


def _with_parameters(
    layers: Sequence[AdapterLayer],
    host: nn.Module,
    call: Callable[..., Any],
    args: Any,
    kwargs: Any,
    input: Any,
) -> Any:
    """Return the output of `host` with changed parameters, which it sees in the place of its own during the call."""
    changed: dict[str, Tensor] = {}
    others = tuple(layer for layer in layers if "parameter" not in layer.stages)
    scale = scale_of_call(kwargs) if BANK in host._modules else None
    if scale is not None:
        # The model itself reads the scale of its call only later.
        layers[0].call.value = torch.as_tensor(scale, dtype=torch.float32)
    for layer in layers:
        if layer in others:
            continue
        own = changed.get(layer.parameter)
        if own is None:
            own = resting_tensor(host, layer.parameter)
            assert own is not None
            own = own.to(input.device) if isinstance(input, Tensor) else own
        if layer.gate.ndim:
            raise AdapterError(
                f"per_sample: {layer.parameter} of a {type(host).__name__} is one parameter for the whole batch; run "
                "the samples one by one"
            )
        prepared = prepared_for_call(layer, own.device, 1)
        gate = prepared.gate if layer.region is None else prepared.gate * layer.region.uniform().to(own.device)
        change = layer.adapter_type.delta_weight(prepared.tensors, layer.spec) * gate.to(prepared.dtype)
        dtype = prepared.dtype if own.dtype in FLOAT8 else own.dtype
        changed[layer.parameter] = (own.to(torch.promote_types(dtype, change.dtype)) + change).to(dtype)
    host.__dict__.update(changed)
    try:
        return run(others, host, call, args, kwargs) if others else call(*args, **kwargs)
    finally:
        for name in changed:
            host.__dict__.pop(name, None)


def prepare_for_weight(layer: AdapterLayer, base: Tensor, term_of: TermOf | None = None) -> PreparedLayer:
    """Return `layer` prepared for a canonical weight `base`: in its dtype, on its device, at the current strength.

    Args:
        term_of: see `AdapterLayer.prepare`.
    """
    refuse_weightless(layer.adapter_type, layer.tensors)
    tensors = layer.prepare(lambda: base, base.dtype, term_of=term_of)
    on_device = {name: tensor.to(base.device) for name, tensor in tensors.items()}
    return PreparedLayer(layer, on_device, layer.gate.to(base), base.dtype)


def weight(prepared: Sequence[PreparedLayer], base: Tensor, *, overwrite: bool = False) -> Tensor:
    """Return `W'` for the canonical weight `base`, in the dtype of `base`.

    Args:
        prepared: all adapter layers, prepared for this weight; see `prepare_for_weight`.
        overwrite: whether `base` may be overwritten.
    """
    total = base
    for p in prepared:
        if "patch" in p.layer.stages:
            total = total + p.apply_map(base.flatten(1), 1, transposed=True).view_as(base)
        elif "input" in p.layer.stages:
            total = total + p.apply_map(base, 1, transposed=True)
    total = _apply_maps(prepared, "output", total, 0)
    factor = gain(prepared)
    if factor is not None:
        total = total * factor.view(-1, *(1,) * (base.ndim - 1))
    for p in prepared:
        if "add" in p.layer.stages or "parameter" in p.layer.stages:
            spec = p.layer.spec
            factors = p.layer.adapter_type.as_low_rank(p.tensors, spec) if spec.groups == 1 else None
            if factors is not None:
                # One pass over memory less than building the change as a matrix of its own.
                down, up = factors
                in_place = (overwrite or total is not base) and total.is_contiguous()
                matrix = total.flatten(1)
                change = up * p.gate, down.flatten(1)
                total = matrix.addmm_(*change) if in_place else torch.addmm(matrix, *change)
                total = total.view(spec.weight_shape)
            else:
                total = torch.addcmul(total, p.layer.adapter_type.delta_weight(p.tensors, spec), p.gate)
    return total


def gain(prepared: Sequence[PreparedLayer]) -> Tensor | None:
    """Return the factor of each row of the weight, `1 + sum m (s - 1)` of shape (out,), or `None` without scales."""
    gains = [p.gated_gain() for p in prepared if "gain" in p.layer.stages]
    return 1 + torch.stack(gains).sum(0) if gains else None


def base_change(prepared: Sequence[PreparedLayer], change: Tensor) -> Tensor:
    """Return the change of the base weight that changes `W'` by `change`.

    The result is exact for output scales and for rotations at strength 1, and a first approximation otherwise.
    """
    factor = gain(prepared)
    total = change if factor is None else change / factor.view(-1, *(1,) * (change.ndim - 1))
    for p in prepared:
        # The inverse of a rotation is its transpose.
        if not p.layer.adapter_type.orthogonal:
            continue
        if "output" in p.layer.stages:
            total = total + p.apply_map(total, 0, transposed=True)
        if "input" in p.layer.stages:
            total = total + p.apply_map(total, 1)
        if "patch" in p.layer.stages:
            total = total + p.apply_map(total.flatten(1), 1).view_as(total)
    return total


def bias(prepared: Sequence[PreparedLayer], base: Tensor) -> Tensor:
    """Return the bias that goes with `weight`, for the host's own bias `base`."""
    total = mapped = _mapped_bias(prepared, base, 1)
    for p in prepared:
        if p.layer.adapter_type.gains_bias and "gain" in p.layer.stages:
            total = total + mapped * p.gated_gain()
        change = p.layer.adapter_type.delta_bias(p.tensors)
        if change is not None:
            total = total + change * p.gate
    return total


def _mapped_bias(prepared: Sequence[PreparedLayer], bias: Tensor, rows: int) -> Tensor:
    """Return the bias after the output maps that apply to it: (out,), or (rows, out) if rows have their own gates."""
    maps = [p for p in prepared if p.layer.adapter_type.gains_bias and "output" in p.layer.stages]
    has_row_gates = any(p.gate.ndim for p in maps)
    return _apply_maps(maps, "output", bias.expand(rows, -1) if has_row_gates else bias, -1)


def changes_bias(layers: Iterable[tuple[AdapterLayer, Tensors]], has_bias: bool) -> bool:
    """Return whether `bias` would differ from the host's own bias.

    Args:
        layers: each adapter layer with its tensors.
        has_bias: whether the host has a bias. A scale needs one to act on; a change of the bias does not, but one of
            zeros changes nothing. Formats that know only "all layers have a bias" store it.
    """
    return any(
        _adds_bias(layer.adapter_type.delta_bias(tensors), has_bias)
        or (has_bias and layer.adapter_type.gains_bias and not layer.is_additive)
        for layer, tensors in layers
    )


def _adds_bias(change: Tensor | None, has_bias: bool) -> bool:
    return change is not None and (has_bias or bool(change.any()))


def _with_input(input: Tensor, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """Return the arguments of a call with another input."""
    return ((input, *args[1:]), kwargs) if args else ((), {**kwargs, next(iter(kwargs)): input})


def _overwritable(host: nn.Module, output: Tensor) -> Tensor:
    # A forward hook may have stored the output, which is written to from here on.
    return output.clone() if host._forward_hooks else output


def _apply_maps(prepared: Sequence[PreparedLayer], stage: str, vectors: Tensor, axis: int) -> Tensor:
    """Return `vectors` plus the changes by all maps at `stage`; each map applies to the same `vectors`."""
    total = vectors
    for p in prepared:
        if stage in p.layer.stages:
            total = p.apply_map(vectors, axis, onto=total)
    return total.to(vectors.dtype)


def _map_and_scale(
    prepared: Sequence[PreparedLayer], output: Tensor, host_bias: Tensor | None, spec: LayerSpec
) -> Tensor:
    """Apply output maps and output scales to `output`, which contains `host_bias`; the bias is not mapped."""
    if any("output" in p.layer.stages for p in prepared):
        # The maps are linear and have acted on the bias too: subtract what they changed of it.
        mapped = _apply_maps(prepared, "output", output, spec.channel_axis)
        unmapped = [p for p in prepared if not p.layer.adapter_type.gains_bias]
        if host_bias is not None and any("output" in p.layer.stages for p in unmapped):
            change = _aligned_bias(unmapped, host_bias, output, spec) - spec.along_channels(host_bias, output.ndim)
            mapped = mapped - change if torch.is_grad_enabled() else mapped.sub_(change)
        output = mapped
    gains = [(_aligned_gain(p, output), p.layer.adapter_type.gains_bias) for p in prepared if "gain" in p.layer.stages]
    if not gains:
        return output
    total = _sum([values for values, _ in gains])
    unscaled = [values for values, gains_bias in gains if not gains_bias]
    if host_bias is not None and unscaled:
        maps = [p for p in prepared if p.layer.adapter_type.gains_bias]
        return _scaled(output, total, _sum(unscaled) * -_aligned_bias(maps, host_bias, output, spec))
    return _scaled(output, total, None)


def _scaled(output: Tensor, gain: Tensor, back: Tensor | None) -> Tensor:
    """Return `output * (1 + gain) + back`. `output` may be overwritten."""
    gain = gain.to(output.dtype)
    back = None if back is None else back.to(output.dtype)
    may_overwrite = not torch.is_grad_enabled() and not torch.compiler.is_compiling() and output.is_contiguous()
    if output.dtype in (torch.float32, torch.float64):
        factor = 1 + gain
        if back is None:
            return output.mul_(factor) if may_overwrite else output * factor
        return torch.addcmul(back, output, factor, out=output if may_overwrite else None)
    # In half precision, `1 + gain` would round small gains away.
    output = torch.addcmul(output, output, gain, out=output if may_overwrite else None)
    return output if back is None else output.add_(back)


def _aligned_gain(prepared: PreparedLayer, output: Tensor) -> Tensor:
    """Return `gate * (s - 1)` in a shape that broadcasts over `output`."""
    gain = prepared.layer.spec.along_channels(prepared.gated_gain(), output.ndim)
    return gain if prepared.field is None else gain * prepared.field


def _aligned_bias(prepared: Sequence[PreparedLayer], bias: Tensor, output: Tensor, spec: LayerSpec) -> Tensor:
    """Return the bias after the output maps of `prepared`, in a shape that broadcasts over `output`."""
    maps = [p for p in prepared if "output" in p.layer.stages]
    rows = len(output) if any(p.gate.ndim for p in maps) else 0
    biases = bias.expand(rows, -1) if rows else bias
    if all(p.field is None for p in maps):
        return spec.along_channels(_apply_maps(maps, "output", biases, -1), output.ndim)
    before = biases
    total = aligned = spec.along_channels(biases, output.ndim)
    for p in maps:
        before = p.everywhere().apply_map(biases, -1, onto=before)
        after = spec.along_channels(before, output.ndim)
        total, aligned = advanced(total, aligned, after, p.field), after
    return total.to(bias.dtype)


def _sum(vectors: Sequence[Tensor]) -> Tensor:
    total = vectors[0]
    for vector in vectors[1:]:
        total = total + vector
    return total


def _add_changes(prepared: Sequence[PreparedLayer], output: Tensor, input: Tensor) -> Tensor:
    """Return `output` plus all additive changes. Low-rank changes share one product. `output` may be overwritten."""
    if len(prepared) > 1 and prepared[0].layer.spec.groups == 1:
        factors = [(p, p.as_low_rank() if p.dtype == prepared[0].dtype else None) for p in prepared]
        shared = [(p, low) for p, low in factors if low is not None]
        if len(shared) > 1:
            downs, ups, gates = zip(*((down, up, p.rank_gates(down.shape[0])) for p, (down, up) in shared), strict=True)
            first = prepared[0]
            if any(p.field is not None for p, _ in shared):
                gate = _gates_by_position([p for p, _ in shared], gates, output)
            else:
                # Some gates may be per row of the input, others the same for all rows.
                rows = [len(gate) for gate in gates if gate.ndim > 1]
                gate = torch.cat([gate.expand(rows[0], -1) for gate in gates] if rows else gates, -1)
            output = first.layer.spec.low_rank(
                first.adapter_input(input), torch.cat(downs), torch.cat(ups, dim=1), gate, output
            )
            prepared = [p for p, low in factors if low is None]
    for p in prepared:
        output = p.add_change(output, input)
    return output


def _gates_by_position(prepared: Sequence[PreparedLayer], gates: Sequence[Tensor], output: Tensor) -> Tensor:
    """Return the gates of all ranks at every position, in a shape that broadcasts over activations in rank space."""
    aligned: list[Tensor] = []
    for p, gate in zip(prepared, gates, strict=True):
        gate = p.layer.spec.along_channels(gate, output.ndim)
        gate = gate if p.field is None else gate * p.field
        aligned.append(gate.view(*(1,) * (output.ndim - gate.ndim), *gate.shape))
    axis = prepared[0].layer.spec.channel_axis % output.ndim
    shape = torch.broadcast_shapes(*(gate.select(axis, 0).shape for gate in aligned))
    expanded = [gate.expand(*shape[:axis], gate.shape[axis], *shape[axis:]) for gate in aligned]
    return torch.cat(expanded, axis)


def _bias_of(host: nn.Module, output: Tensor) -> Tensor | None:
    """Return the host's bias with the device and dtype of `output`, or `None` if it has none."""
    bias = resting_tensor(host, "bias")
    return None if bias is None else bias.to(output.device, output.dtype, non_blocking=True)
