"""Files of a LoRA in memory: how each program spells the names of a denoiser, of text encoders and of the factors.

`dialects` does the same for every adapter type and every model family, from the names of their original layouts.
"""

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from tests.support.dialects import COMFY_TEXT, KOHYA_TEXT
from tests.support.loras import Factors, Parts

Tensors = dict[str, Tensor]
Writer = Callable[[Parts, str], Tensors]
"""`(parts, family) -> tensors`."""

TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
SD_PREFIXES = {"unet": "lora_unet_", "text_encoder": "lora_te_"}
SDXL_PREFIXES = {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}


def add_layer(tensors: Tensors, stem: str, factors: Factors, down: str, up: str, alpha: bool = True) -> None:
    """Add the tensors of one layer, `<stem>.<down>`, `<stem>.<up>` and, if there is one, `<stem>.alpha`."""
    tensors[f"{stem}.{down}"] = factors.down
    tensors[f"{stem}.{up}"] = factors.up.view(*factors.up.shape, *(1,) * (factors.down.ndim - 2))
    if alpha and factors.alpha is not None:
        tensors[f"{stem}.alpha"] = torch.tensor(factors.alpha)


def spelled(
    parts: Parts,
    prefixes: Mapping[str, str],
    *,
    flat: bool = False,
    down: str = "lora_A.weight",
    up: str = "lora_B.weight",
    after: str = "",
    alpha: bool = True,
    text_model: bool = True,
) -> Tensors:
    """Return `<prefix><path><after>.<tensor>` for every layer.

    Args:
        prefixes: Component -> prefix.
        flat: Underscores instead of dots in the path.
        alpha: Write alpha tensors.
        text_model: CLIP's paths have the `text_model` level, as in files from before transformers 5.
    """
    tensors: Tensors = {}
    for component, found in parts.items():
        for path, factors in found.items():
            is_clip = component.startswith("text_encoder") and path.startswith("encoder.layers.")
            name = f"text_model.{path}" if is_clip and text_model else path
            name = name.replace(".", "_") if flat else name
            add_layer(tensors, f"{prefixes[component]}{name}{after}", factors, down, up, alpha)
    return tensors


def peft_names(parts: Parts, prefix: str = "{component}.") -> Tensors:
    """Return `unet.<path>.lora_A.weight`: diffusers since 0.20, without alpha."""
    prefixes = {component: prefix.format(component=component) for component in parts}
    return spelled(parts, prefixes, alpha=False, text_model=False)


def old_names(parts: Parts) -> Tensors:
    """Return `unet.<path>.lora.down.weight`, and `lora_linear_layer` in text encoders: diffusers 0.17 to 0.20."""
    tensors: Tensors = {}
    for component, layers in parts.items():
        infix = "lora_linear_layer" if component.startswith("text_encoder") else "lora"
        names = {"down": f"{infix}.down.weight", "up": f"{infix}.up.weight"}
        tensors |= spelled({component: layers}, {component: f"{component}."}, alpha=False, **names)
    return tensors


def processor_names(layers: Mapping[str, Factors], prefix: str = "") -> Tensors:
    """Return `<attention>.processor.to_q_lora.down.weight`: diffusers before 0.17, attention only."""
    tensors: Tensors = {}
    for path, factors in layers.items():
        attention, name = re.fullmatch(r"(.*)\.(to_[qkv]|to_out)(?:\.0)?", path).groups()
        stem = f"{prefix}{attention}.processor.{name}_lora"
        add_layer(tensors, stem, factors, "down.weight", "up.weight", alpha=False)
    return tensors


def kohya_names(
    parts: Parts,
    prefixes: Mapping[str, str] = SD_PREFIXES,
    renamed: Mapping[str, str] | None = None,
    after: str = "",
) -> Tensors:
    """Return `lora_unet_<flat path>.lora_down.weight`, with an alpha tensor for every layer that has one.

    Args:
        renamed: Other dotted names of the UNet's layers, those of the original latent-diffusion UNet.
    """
    if renamed is not None:
        unet = {renamed.get(path, path): factors for path, factors in parts["unet"].items()}
        parts = {component: unet if component == "unet" else layers for component, layers in parts.items()}
    return spelled(parts, prefixes, flat=True, down="lora_down.weight", up="lora_up.weight", after=after)


def alpha_metadata(parts: Parts) -> dict[str, str]:
    """Return the metadata in which diffusers stores alpha, with a pattern for every layer unlike the first."""
    config: dict[str, Any] = {}
    for component, layers in parts.items():
        first = next(iter(layers.values()))
        config[f"{component}.r"] = first.down.shape[0]
        config[f"{component}.lora_alpha"] = first.alpha
        config[f"{component}.rank_pattern"] = {}
        config[f"{component}.alpha_pattern"] = {
            f"^{path}": factors.alpha for path, factors in layers.items() if factors.alpha != first.alpha
        }
        config[f"{component}.target_modules"] = list(layers)
    return {"format": "pt", "lora_adapter_metadata": json.dumps(config)}


# Dialects


def text_encoders_of(family: str) -> tuple[str, ...]:
    """Return the prefixes that sd-scripts gives the text encoders of a family, in the order of the pipeline."""
    return tuple(KOHYA_TEXT["sd" if family == "sd15" else family])


def denoiser_prefix(parts: Parts, prefix: str) -> dict[str, str]:
    return {component: prefix for component in parts if not component.startswith("text_encoder")}


def kohya(parts: Parts, family: str, denoiser: str = "lora_unet_", after: str = "") -> Tensors:
    numbered = dict(zip(TEXT_ENCODERS, text_encoders_of(family), strict=False))
    return kohya_names(parts, {**denoiser_prefix(parts, denoiser), **numbered}, after=after)


def onetrainer(parts: Parts, family: str) -> Tensors:
    """Return kohya's names with the text encoders numbered as in the pipeline."""
    tensors = kohya(parts, family, "lora_transformer_")
    return {key.replace("lora_te3_", "lora_te2_") if family == "flux" else key: t for key, t in tensors.items()}


def comfy(parts: Parts, family: str, down: str = "lora_A.weight", up: str = "lora_B.weight") -> Tensors:
    encoders = (f"text_encoders.{name}.transformer." for name in COMFY_TEXT["sd" if family == "sd15" else family])
    prefixes = {**denoiser_prefix(parts, "diffusion_model."), **dict(zip(TEXT_ENCODERS, encoders, strict=False))}
    return spelled(parts, prefixes, down=down, up=up)


def diffusers_with_alpha(parts: Parts, family: str) -> Tensors:
    return spelled(parts, {component: f"{component}." for component in parts})


DIALECTS: dict[str, tuple[str, Writer]] = {
    "kohya": ("kohya", kohya),
    "double underscore": ("kohya", lambda parts, family: kohya(parts, family, "lora_unet__")),
    "underscore at the end": ("kohya", lambda parts, family: kohya(parts, family, after="_")),
    "onetrainer": ("kohya", onetrainer),
    "comfy": ("comfy", comfy),
    "comfy down and up": ("comfy", lambda parts, family: comfy(parts, family, "lora_down.weight", "lora_up.weight")),
    "diffusers with alpha": ("diffusers", diffusers_with_alpha),
}
"""Name -> the format that it is recognised as, and the writer."""


def bare(prefix: str = "", infix: str = "") -> Writer:
    def write(parts: Parts, family: str) -> Tensors:
        down, up = f"lora_A{infix}.weight", f"lora_B{infix}.weight"
        return spelled(parts, denoiser_prefix(parts, prefix), down=down, up=up)

    return write


OF_DENOISERS: dict[str, tuple[str, Writer]] = {
    "lycoris": ("kohya", lambda parts, family: kohya(parts, family, "lycoris_")),
    "peft": ("peft", bare("base_model.model.")),
    "peft in memory": ("peft", bare("base_model.model.", ".default")),
    "diffsynth": ("diffusers", bare("", ".default")),
    "an adapter called pixel": ("diffusers", bare("", ".pixel")),
    "bare": ("diffusers", bare()),
    "original level": ("diffusers", bare("net.")),
}
"""The same for dialects that have no names for text encoders."""
