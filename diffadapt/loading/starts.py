"""LoRAs that were trained from a start taken out of the base weights: their tensors are not the change.

PEFT computes the start again from the base weight when it loads such a file, and so does this module. On the untouched
base, the change is the difference of the trained factors and the start: a LoRA of twice the rank.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from diffadapt.errors import AdapterError
from diffadapt.formats.header_options import options_for, start_of
from diffadapt.loading.content import Content
from diffadapt.loading.fit import Fitted
from diffadapt.runtime.bank import bank_of
from diffadapt.runtime.targets import Targets
from diffadapt.types.starts import STARTS
from diffadapt.weights import codec_of, decoded
from diffadapt.weights.plain import PLAIN
from diffadapt.weights.resting import resting_tensor

_TYPES = ("lora", "dora")


def with_starts(
    fitted: Fitted, targets: Mapping[str, Targets] | None, options: Mapping[str, Mapping[str, Any]]
) -> Fitted:
    """Return the layers of a file, those with a start marked by its name; see `Content.start`.

    Args:
        targets: the models' paths, by component; `None` if there is no model.
        options: component -> options of PEFT's config in the header of the file.
    """
    if not any(isinstance(own.get("init_lora_weights"), str) for own in options.values()):
        return fitted
    layers: list[Any] = []
    for group, contents in fitted.layers:
        try:
            start = start_of(options_for(options, group.component))
            marked = contents if start is None else [_marked(content, start, targets) for content in contents]
        except AdapterError as error:
            fitted.faults.extend(group.faults(error))
            continue
        layers.append((group, marked))
    return replace(fitted, layers=layers)


def without_start(content: Content, model: nn.Module, host: nn.Module) -> Content:
    """Return a LoRA or DoRA with the start of its factors subtracted, for the untouched weight of `host`."""
    down, up, rank = content.tensors["lora_down"], content.tensors["lora_up"], content.tensors["lora_down"].shape[0]
    if down.is_meta:
        first, second = torch.empty_like(down), torch.empty_like(up)
    else:
        bank = bank_of(model)
        if bank is not None and bank.merged:
            raise AdapterError(f"its start cannot be computed while {', '.join(bank.merged)} is merged; unmerge first")
        weight = content.spec.to_stored(decoded(host, "weight"))
        assert content.start is not None
        first, second = (part.to(down.device) for part in STARTS[content.start](weight, rank, content.scale))
    tensors = {
        **content.tensors,
        "lora_down": torch.cat([down.to(first.dtype), first]),
        "lora_up": torch.cat([up.to(second.dtype), -second], 1),
    }
    return replace(content, tensors=tensors, alpha=content.scale * 2 * rank, start=None)


def _marked(content: Content, start: str, targets: Mapping[str, Targets] | None) -> Content:
    """Return the content of a layer, marked if it has a start. Raise `AdapterError` if it cannot be computed."""
    if content.adapter_type.name not in _TYPES or content.spec.kind == "embedding":
        # PEFT starts other layers as usual.
        return content
    what = f"it started from init_lora_weights={start!r}, which PEFT takes out of the base weights"
    if targets is None:
        raise AdapterError(f"{what}; load the file into the pipeline that it is for, and save it there")
    if content.spec.kind != "linear" or content.parts:
        raise AdapterError(f"{what}; that cannot be computed for this kind of layer; merge it with PEFT")
    host = targets[content.component].modules[content.path]
    weight = resting_tensor(host, "weight")
    is_rounded = weight is None or codec_of(host, "weight") is not PLAIN or weight.element_size() < 2
    if is_rounded and not (weight is not None and weight.is_meta):
        raise AdapterError(f"{what}; load it on unquantised weights, and save it as a plain LoRA there")
    return replace(content, start=start)
