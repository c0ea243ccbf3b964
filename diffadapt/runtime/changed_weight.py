"""Changes of full rank, computed as part of a copy of the weight: one product for the layer and all such changes.

As a product of its own, a change without a cheap form costs as much as the layer. With many tokens, one pass over the
weight is far less. The sum loses nothing beyond rounding in float32 and wider. Layers in half precision, whose weight
would swallow small changes, have the second product. So have layers that do more than multiply by their weight
(quantised and offloaded ones, and those with hooks), and calls in which rows have strengths of their own.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from diffadapt.runtime.adapter_layer import AdapterLayer
from diffadapt.runtime.class_mixing import own_class
from diffadapt.runtime.prepared_layer import gate_for_call
from diffadapt.runtime.regions.blending import advanced
from diffadapt.types.adapter_type import Tensors

_FEWEST_TOKENS = 32
"""Tokens for which the product with a weight takes longer than passes over it."""

_FORWARDS = tuple(cls.forward for cls in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d))
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

Changed: TypeAlias = Callable[[Tensor, Tensor | None, Sequence[Tensor]], tuple[Tensor, Tensor | None]]
"""`(weight, bias, what is trained) -> (changed weight, changed bias)`, as new tensors."""


def in_weight(
    layers: Sequence[AdapterLayer], host: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], input: Tensor
) -> list[AdapterLayer]:
    """Return the adapter layers whose changes are cheapest as part of the weight of `host`; none if it forbids that.

    Args:
        layers: the adapter layers that act on `host`; all of them are additive.
        host: the layer of the model.
        args, kwargs: the arguments of its call.
        input: the first of them.
    """
    chosen = [layer for layer in layers if _belongs_in_weight(layer)]
    if not chosen or torch.compiler.is_compiling() or len(args) + len(kwargs) != 1 or not _is_plain(host, input):
        return []
    return chosen


def output_by_weight(chosen: Sequence[AdapterLayer], host: nn.Module, input: Tensor) -> Tensor:
    """Return the output of `host` with the changes of `chosen`, which `in_weight` returned, everywhere."""
    weight, bias, spec = host._parameters["weight"], host._parameters["bias"], chosen[0].spec
    assert weight is not None
    learning = {layer: layer.tensors for layer in chosen if _learns(layer)}
    changed = _changed_by(chosen, learning, input)
    leaves = [tensor for tensors in learning.values() for tensor in tensors.values()]
    if spec.kind == "linear" and torch.is_grad_enabled():
        return cast(Tensor, _Product.apply(input, weight, bias, changed, *leaves))
    weight, bias = changed(weight, bias, leaves)
    if spec.kind == "linear":
        return F.linear(input, weight, bias)
    # The convolution of the layer itself, since one that adds the bias afterwards rounds differently.
    return host._conv_forward(input, weight, bias)  # type: ignore[operator]


def output_by_position(chosen: Sequence[AdapterLayer], host: nn.Module, output: Tensor, input: Tensor) -> Tensor:
    """Return the `output` of `host` with the changes of `chosen` at the positions where they act.

    The changes join the weight one after the other, so that masks of ones give the bits of a call without masks.
    """
    total = before = output
    for number, layer in enumerate(chosen, start=1):
        after = output_by_weight(chosen[:number], host, input)
        field = None if layer.region is None else layer.region.field(after, layer.spec)
        total, before = advanced(total, before, after, field), after
    return total


def _belongs_in_weight(layer: AdapterLayer) -> bool:
    """Return whether the change of a layer is cheapest as part of the weight, and has one strength for the call."""
    return (
        layer.adapter_type.in_weight(layer.tensors, layer.spec)
        and not layer.gate.ndim
        and not (layer.training and layer.dropout.acts)
    )


def _learns(layer: AdapterLayer) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in layer.tensors.values())


def _is_plain(host: nn.Module, input: Tensor) -> bool:
    """Return whether `host` multiplies many tokens by a weight in float32 or float64, and does nothing else."""
    weight, state = host._parameters.get("weight"), host.__dict__
    return (
        own_class(host).forward in _FORWARDS
        and "forward" not in state
        and type(weight) is nn.Parameter
        and weight.dtype in (torch.float32, torch.float64)
        and (weight.dtype, weight.device) == (input.dtype, input.device)
        and input.numel() >= _FEWEST_TOKENS * input.shape[-1 if weight.ndim == 2 else 1 - weight.ndim]
        and not any(state.get(hooks) for hooks in _HOOKS)
        and not torch.is_autocast_enabled(input.device.type)
    )


def _changed_by(chosen: Sequence[AdapterLayer], learning: Mapping[AdapterLayer, Tensors], input: Tensor) -> Changed:
    """Return the function that computes the changed weight and bias.

    What the tensors of `learning` imply is prepared in every call of that function, which then gets them as `leaves`.
    """
    gates = [gate_for_call(layer, input.device, len(input)).to(input.dtype) for layer in chosen]
    prepared = {layer: layer.prepared_tensors() for layer in chosen if layer not in learning}

    def changed(weight: Tensor, bias: Tensor | None, leaves: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
        rest = iter(leaves)
        for layer, gate in zip(chosen, gates, strict=True):
            adapter_type, spec = layer.adapter_type, layer.spec
            if layer in learning:
                tensors = {name: next(rest) for name in learning[layer]}
                tensors = adapter_type.prepare(tensors, spec, layer.surroundings(layer.base_weight))
            else:
                tensors = prepared[layer]
            weight = adapter_type.onto_weight(adapter_type, tensors, spec, weight, gate)
            change = adapter_type.delta_bias(tensors)
            if change is not None:
                change = change.to(weight) * gate
                bias = change if bias is None else bias + change
        return weight, bias

    return changed


class _Product(torch.autograd.Function):
    """A linear layer with a changed weight, which is not kept for the backward pass but computed again."""

    @staticmethod
    def forward(input: Tensor, weight: Tensor, bias: Tensor | None, changed: Changed, *leaves: Tensor) -> Tensor:
        """Return the output of the layer."""
        return F.linear(input, *changed(weight, bias, leaves))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Save the input, the original weight and bias, and what is trained for `backward`."""
        input, weight, bias, ctx.changed, *leaves = inputs
        ctx.save_for_backward(input, weight, bias, *leaves)

    @staticmethod
    @once_differentiable
    def backward(  # type: ignore[override]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        """Return the gradients of the input, of the original weight and bias, and of what is trained."""
        input, *originals = ctx.saved_tensors
        needs_input, needs_weight, needs_bias, _, *needed = ctx.needs_input_grad
        weight, bias, *leaves = (
            tensor if tensor is None else tensor.detach().requires_grad_(needs)
            for tensor, needs in zip(originals, (needs_weight, needs_bias, *needed), strict=True)
        )
        with torch.enable_grad():
            total, total_bias = ctx.changed(weight, bias, leaves)
        grad = grad_outputs[0].reshape(-1, len(total))
        input_grad = (grad @ total.detach()).view(input.shape) if needs_input else None
        changes: list[tuple[Tensor, Tensor]] = []
        if total.requires_grad:
            changes.append((total, grad.t() @ input.reshape(-1, input.shape[-1])))
        if total_bias is not None and total_bias.requires_grad:
            changes.append((total_bias, grad.sum(0)))
        del total, total_bias
        wanted = [tensor for tensor in (weight, bias, *leaves) if tensor is not None and tensor.requires_grad]
        outputs, grads = zip(*changes, strict=True) if changes else ((), ())
        found = iter(torch.autograd.grad(outputs, wanted, grads, allow_unused=True) if wanted else ())
        own = [next(found) if needs else None for needs in (needs_weight, needs_bias, *needed)]
        return input_grad, own[0], own[1], None, *own[2:]
