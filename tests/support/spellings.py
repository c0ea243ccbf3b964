"""How programs spell the names of a UNet, a transformer and text encoders."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from tests.support import files

Tensors = dict[str, Tensor]
Writer = Callable[[files.Parts, str], Tensors]

TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
KOHYA = {
    "sd15": ("lora_te",),
    "sdxl": ("lora_te1", "lora_te2"),
    "sd3": ("lora_te1", "lora_te2", "lora_te3"),
    "flux": ("lora_te1", "lora_te3"),
}
COMFY = {
    "sd15": ("clip_l",),
    "sdxl": ("clip_l", "clip_g"),
    "sd3": ("clip_l", "clip_g", "t5xxl"),
    "flux": ("clip_l", "t5xxl"),
}


def layers(tensors: Tensors, stem: str, factors: files.Factors, down: str, up: str, alpha: bool = True) -> None:
    tensors[f"{stem}.{down}"] = factors.down
    tensors[f"{stem}.{up}"] = factors.up.view(*factors.up.shape, *(1,) * (factors.down.ndim - 2))
    if alpha and factors.alpha is not None:
        tensors[f"{stem}.alpha"] = torch.tensor(factors.alpha)


def spelled(
    parts: files.Parts,
    prefixes: Mapping[str, str],
    *,
    flat: bool = False,
    down: str = "lora_A.weight",
    up: str = "lora_B.weight",
    after: str = "",
) -> Tensors:
    """`<prefix><path><after>.<tensor>` for every layer, CLIP's with the level that files have."""
    tensors: Tensors = {}
    for component, found in parts.items():
        for path, factors in found.items():
            is_clip = component.startswith("text_encoder") and path.startswith("encoder.layers.")
            name = f"text_model.{path}" if is_clip else path
            name = name.replace(".", "_") if flat else name
            layers(tensors, f"{prefixes[component]}{name}{after}", factors, down, up)
    return tensors


def denoiser_prefix(parts: files.Parts, prefix: str) -> dict[str, str]:
    return {component: prefix for component in parts if not component.startswith("text_encoder")}


def kohya(parts: files.Parts, family: str, denoiser: str = "lora_unet_", after: str = "") -> Tensors:
    numbered = dict(zip(TEXT_ENCODERS, (f"{prefix}_" for prefix in KOHYA[family]), strict=False))
    prefixes = {**denoiser_prefix(parts, denoiser), **numbered}
    return spelled(parts, prefixes, flat=True, down="lora_down.weight", up="lora_up.weight", after=after)


def onetrainer(parts: files.Parts, family: str) -> Tensors:
    """Numbers text encoders as the pipeline does."""
    tensors = kohya(parts, family, "lora_transformer_")
    return {key.replace("lora_te3_", "lora_te2_") if family == "flux" else key: t for key, t in tensors.items()}


def comfy(parts: files.Parts, family: str, down: str = "lora_A.weight", up: str = "lora_B.weight") -> Tensors:
    encoders = (f"text_encoders.{name}.transformer." for name in COMFY[family])
    prefixes = {**denoiser_prefix(parts, "diffusion_model."), **dict(zip(TEXT_ENCODERS, encoders, strict=False))}
    return spelled(parts, prefixes, down=down, up=up)


def diffusers_with_alpha(parts: files.Parts, family: str) -> Tensors:
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


def bare(prefix: str = "", infix: str = "") -> Writer:
    def write(parts: files.Parts, family: str) -> Tensors:
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
