"""Learning rates and gradients for the factors of a LoRA, as the literature has them."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from diffadapt.errors import AdapterError
from diffadapt.runtime.adapter import Adapter
from diffadapt.runtime.adapter_layer import AdapterLayer

_UP, _DOWN = "lora_up", "lora_down"


class _Group(dict[str, Any]):
    """A parameter group whose learning rate is a multiple of the optimiser's, which sets what a group leaves out."""

    ratio = 1.0

    def setdefault(self, key: str, default: Any = None) -> Any:
        """Set a value that is missing."""
        return super().setdefault(key, default * self.ratio if key == "lr" else default)


def lora_plus_groups(adapter: Adapter, ratio: float = 16.0, *, lr: float | None = None) -> list[dict[str, Any]]:
    """Return the parameters of a LoRA in two groups for an optimiser, `lora_up` with a larger learning rate (LoRA+).

    Magnitudes, biases and vectors keep the base rate. Source: Hayou et al., "LoRA+: Efficient Low Rank Adaptation of
    Large Models", arXiv 2402.12354.

    Args:
        adapter: the adapter; other types than LoRA and DoRA have no such factor.
        ratio: the rate of `lora_up` divided by that of the other parameters.
        lr: the base rate; defaults to the `lr` of the optimiser that gets the groups.

    Raises:
        AdapterError: the ratio is not positive, or no parameter that is trained is a `lora_up`.
    """
    if not ratio > 0:
        raise AdapterError(f"ratio is {ratio!r}, expected a positive number")
    groups: dict[bool, list[nn.Parameter]] = {False: [], True: []}
    for name, parameter in adapter.named_parameters():
        if parameter.requires_grad:
            groups[name.rpartition(".")[2] == _UP].append(parameter)
    if not groups[True]:
        types = ", ".join(sorted({layer.adapter_type.name for layer in adapter.layers.values()}))
        raise AdapterError(
            f"lora_plus_groups: none of the trained parameters is a {_UP}; the adapter is of type {types}"
        )
    found: list[dict[str, Any]] = []
    for is_up, parameters in groups.items():
        group = _Group(params=parameters)
        group.ratio = ratio if is_up else 1.0
        if lr is not None:
            group["lr"] = lr * group.ratio
        if parameters:
            found.append(group)
    return found


def lora_fa_(adapter: Adapter) -> Adapter:
    """Train only `lora_up` of a LoRA, along the gradient that the whole weight would have (LoRA-FA).

    `lora_down`, A, is frozen, and the gradient of `lora_up`, G, becomes `G (A A')^-1 / scale^2`: the one with which the
    change of the weight is closest to its full gradient. Source: Zhang et al., "LoRA-FA", arXiv 2308.03303, in the form
    of PEFT 0.21.2 `optimizers/lorafa.py`.

    Args:
        adapter: the adapter, of plain LoRAs that are trained.

    Raises:
        AdapterError: a layer is no LoRA. Nothing has changed then.
    """
    layers = list(_loras(adapter))
    for down, up, layer in layers:
        down.requires_grad_(False)
        up.register_hook(_projection(down, layer.scale))
    return adapter


def _loras(adapter: Adapter) -> Iterator[tuple[nn.Parameter, nn.Parameter, AdapterLayer]]:
    for path, layer in adapter.layers.items():
        down, up = layer._parameters.get(_DOWN), layer._parameters.get(_UP)
        if layer.adapter_type.name != "lora" or down is None or up is None or layer.spec.groups > 1:
            raise AdapterError(
                f"lora_fa_: {path} has a {layer.adapter_type.name}, expected a LoRA on an ungrouped layer"
            )
        if "lora_mid" in layer._parameters:
            raise AdapterError(f"lora_fa_: {path} has a Tucker core, which has no such projection")
        if not up.requires_grad:
            raise AdapterError(f"lora_fa_: {path} is not trained; load it with trainable=True")
        yield down, up, layer


def _projection(down: nn.Parameter, scale: float) -> Any:
    def project(gradient: Tensor) -> Tensor:
        rows = down.detach().flatten(1).double()
        gram = rows @ rows.mT
        # Like PEFT, so that rows that are zero do no harm.
        gram += 1e-8 * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        return (torch.linalg.solve(gram, gradient.double().mT).mT / scale**2).to(gradient.dtype)

    return project
