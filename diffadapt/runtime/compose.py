"""How the adapters on one layer act together: the same formula on its activations and on its weight.

With strength m per adapter, low-rank and dense changes D, input maps R, output maps Q and output scales s:

    W' = [1 + sum m (s - 1)] [I + sum m (Q - I)] (W + sum m W (R - I)) + sum m D

It does not depend on the order of the adapters, and for one adapter of any type it is exactly its merged weight at
m = 1. D sees the input before any R, and the bias is added once, unscaled (but for types that say they scale it).
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diffadapt.runtime.adapter_layer import AdapterLayer, PreparedLayer
from diffadapt.runtime.base_weights import resting_tensor
from diffadapt.types.adapter_type import Tensors
from diffadapt.types.layer_spec import LayerSpec


def run(layers: Sequence[AdapterLayer], host: nn.Module, call: Callable[..., Any], args: Any, kwargs: Any) -> Tensor:
    """Output of `host` with adapter layers.

    Args:
        call: the host's own call, which takes `args` and `kwargs`; the first argument is its input.
    """
    input: Tensor = args[0] if args else next(iter(kwargs.values()))
    if all(layer.is_additive for layer in layers):
        output = _own(host, call(*args, **kwargs))
        return _plus([layer.ready(output.device, len(input)) for layer in layers], output, input)
    spec = layers[0].spec
    ready = [layer.ready(input.device, len(input)) for layer in layers]
    mapped = _mapped(ready, "input", input, spec.channel_axis)
    if mapped is not input:
        args, kwargs = ((mapped, *args[1:]), kwargs) if args else ((), {**kwargs, next(iter(kwargs)): mapped})
    output = _own(host, call(*args, **kwargs))
    output = _plus([r for r in ready if "patch" in r.layer.stages], output, input)
    if any("output" in layer.stages or "gain" in layer.stages for layer in layers):
        output = _after(ready, output, _bias(host, output), spec)
    return _plus([r for r in ready if "add" in r.layer.stages], output, input)


def weight(ready: Sequence[PreparedLayer], base: Tensor, *, overwrite: bool = False) -> Tensor:
    """`W'` from the canonical `base` weight, in its dtype. `ready` are those of `with_weight`.

    Args:
        overwrite: `base` is not needed any more.
    """
    total = base
    for r in ready:
        if "patch" in r.layer.stages:
            total = total + r.mapped(base.flatten(1), 1, transposed=True).view_as(base)
        elif "input" in r.layer.stages:
            total = total + r.mapped(base, 1, transposed=True)
    total = _mapped(ready, "output", total, 0)
    factor = gain(ready)
    if factor is not None:
        total = total * factor.view(-1, *(1,) * (base.ndim - 1))
    for r in ready:
        if "add" in r.layer.stages:
            spec = r.layer.spec
            factors = r.layer.adapter_type.as_low_rank(r.tensors, spec) if spec.groups == 1 else None
            if factors is not None:
                # Without the change as a matrix of its own, which is a pass over memory more.
                down, up = factors
                own = (overwrite or total is not base) and total.is_contiguous()
                matrix = total.flatten(1)
                change = up * r.gate, down.flatten(1)
                total = matrix.addmm_(*change) if own else torch.addmm(matrix, *change)
                total = total.view(spec.weight_shape)
            else:
                total = torch.addcmul(total, r.layer.adapter_type.delta_weight(r.tensors, spec), r.gate)
    return total


def gain(ready: Sequence[PreparedLayer]) -> Tensor | None:
    """What all output scales together multiply the rows with: (out,), `None` if there are none."""
    gains = [r.gain_change() for r in ready if "gain" in r.layer.stages]
    return 1 + torch.stack(gains).sum(0) if gains else None


def nearly_undone(ready: Sequence[PreparedLayer], change: Tensor) -> Tensor:
    """The change of the original weight for which that of `weight` is `change`: exactly for output scales, and for
    rotations with the strength one, else as a first guess.
    """
    factor = gain(ready)
    total = change if factor is None else change / factor.view(-1, *(1,) * (change.ndim - 1))
    for r in ready:
        # The inverse of a rotation is its transpose.
        if not r.layer.adapter_type.orthogonal:
            continue
        if "output" in r.layer.stages:
            total = total + r.mapped(total, 0, transposed=True)
        if "input" in r.layer.stages:
            total = total + r.mapped(total, 1)
        if "patch" in r.layer.stages:
            total = total + r.mapped(total.flatten(1), 1).view_as(total)
    return total


def bias(ready: Sequence[PreparedLayer], base: Tensor) -> Tensor:
    """The bias that belongs to `weight`, from the layer's own."""
    total = base
    for r in ready:
        if r.layer.adapter_type.gains_bias and "gain" in r.layer.stages:
            total = total + base * r.gain_change()
        change = r.layer.adapter_type.delta_bias(r.tensors)
        if change is not None:
            total = total + change * r.gate
    return total


def changes_bias(layers: Iterable[tuple[AdapterLayer, Tensors]], has_bias: bool) -> bool:
    """Whether `bias` is more than the layer's own: a scale needs one to act on, a change does not."""
    return any(
        layer.adapter_type.delta_bias(tensors) is not None
        or (has_bias and layer.adapter_type.gains_bias and "gain" in layer.stages)
        for layer, tensors in layers
    )


def with_weight(layer: AdapterLayer, base: Tensor) -> PreparedLayer:
    """`layer` in the dtype and on the device of a canonical weight, with the strength it has now."""
    tensors = layer.prepared(lambda: base, base.dtype)
    on_device = {name: tensor.to(base.device) for name, tensor in tensors.items()}
    return PreparedLayer(layer, on_device, layer.gate.to(base), base.dtype)


def _own(host: nn.Module, output: Tensor) -> Tensor:
    # Somebody's forward hook may have kept the output; ours is overwritten.
    return output.clone() if host._forward_hooks else output


def _mapped(ready: Sequence[PreparedLayer], stage: str, vectors: Tensor, axis: int) -> Tensor:
    """`vectors` plus the changes of all maps at `stage`, which all see the same `vectors`."""
    total = vectors
    for r in ready:
        if stage in r.layer.stages:
            total = r.mapped(vectors, axis, onto=total)
    return total.to(vectors.dtype)


def _after(ready: Sequence[PreparedLayer], output: Tensor, bias: Tensor | None, spec: LayerSpec) -> Tensor:
    """Output maps and output scales, around the bias."""
    if any("output" in r.layer.stages for r in ready):
        # Maps are linear: of the bias they need only take out again what they made of it.
        mapped = _mapped(ready, "output", output, spec.channel_axis)
        if bias is not None:
            has_samples = any(r.gate.ndim for r in ready if "output" in r.layer.stages)
            each = bias.expand(len(output), -1) if has_samples else bias
            change = spec.along_channels(_mapped(ready, "output", each, -1) - each, output.ndim)
            mapped = mapped - change if torch.is_grad_enabled() else mapped.sub_(change)
        output = mapped
    gains = [(r.gain_change(), r.layer.adapter_type.gains_bias) for r in ready if "gain" in r.layer.stages]
    if not gains:
        return output
    total = _sum([gain for gain, _ in gains])
    unscaled = [gain for gain, gains_bias in gains if not gains_bias]
    back = _sum(unscaled) * -bias if bias is not None and unscaled else torch.zeros_like(total)
    total, back = (spec.along_channels(vector.to(output.dtype), output.ndim) for vector in (total, back))
    if output.dtype in (torch.float32, torch.float64):
        return torch.addcmul(back, output, 1 + total)
    # In half precision small gains would be lost beside the one.
    output = torch.addcmul(output, output, total)
    return output.add_(back) if bias is not None and unscaled else output


def _sum(vectors: Sequence[Tensor]) -> Tensor:
    total = vectors[0]
    for vector in vectors[1:]:
        total = total + vector
    return total


def _plus(ready: Sequence[PreparedLayer], output: Tensor, input: Tensor) -> Tensor:
    """`output` plus all additive changes; those of low rank share one product."""
    if len(ready) > 1 and ready[0].layer.spec.groups == 1:
        factors = [(r, r.as_low_rank() if r.dtype == ready[0].dtype else None) for r in ready]
        shared = [(r, low) for r, low in factors if low is not None]
        if len(shared) > 1:
            downs, ups, gates = zip(*((down, up, r.rank_gates(down.shape[0])) for r, (down, up) in shared), strict=True)
            # Of adapters with and without samples of their own, side by side.
            samples = [len(gate) for gate in gates if gate.ndim > 1]
            if samples:
                gates = tuple(gate.expand(samples[0], -1) for gate in gates)
            output = ready[0].layer.spec.low_rank(
                ready[0].seen_input(input), torch.cat(downs), torch.cat(ups, dim=1), torch.cat(gates, -1), output
            )
            ready = [r for r, low in factors if low is None]
    for r in ready:
        output = r.plus_change(output, input)
    return output


def _bias(host: nn.Module, output: Tensor) -> Tensor | None:
    bias = resting_tensor(host, "bias")
    return None if bias is None else bias.to(output.device, output.dtype, non_blocking=True)
