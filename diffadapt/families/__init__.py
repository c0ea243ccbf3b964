"""Model families. Adding one is a `Family` in a file beside this one and an entry here.

The order is that of recognising files: a family that another one's signs would find too comes first.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from diffadapt.families.auraflow import AURAFLOW
from diffadapt.families.cascade import CASCADE
from diffadapt.families.cosmos import ANIMA, ANIMA_CONDITIONER
from diffadapt.families.family import Aliases, Family, Layout
from diffadapt.families.flux import CHROMA, FLUX, FLUX2
from diffadapt.families.fused_parts import FusedPart
from diffadapt.families.hunyuan import HUNYUAN_IMAGE, HUNYUAN_VIDEO, HUNYUAN_VIDEO_15
from diffadapt.families.krea2 import KREA2
from diffadapt.families.ltx import LTX, LTX2
from diffadapt.families.lumina import IDEOGRAM4, LUMINA2, ZIMAGE
from diffadapt.families.pixart import PIXART, SANA
from diffadapt.families.plain import COGVIEW4, HIDREAM, QWEN, QWEN21
from diffadapt.families.recognise import pattern, recognise
from diffadapt.families.sd import CONTROLNET, SD, SD2, SDXL
from diffadapt.families.sd3 import SD3
from diffadapt.families.wan import WAN
from diffadapt.runtime.targets import Targets
from diffadapt.types.layer_spec import LayerSpec

FAMILIES: tuple[Family, ...] = (
    SD,
    SD2,
    SDXL,
    CONTROLNET,
    CASCADE,
    SD3,
    CHROMA,
    FLUX2,
    FLUX,
    AURAFLOW,
    QWEN21,
    QWEN,
    KREA2,
    ANIMA,
    ANIMA_CONDITIONER,
    LTX2,
    WAN,
    LTX,
    HUNYUAN_VIDEO_15,
    HUNYUAN_IMAGE,
    HUNYUAN_VIDEO,
    LUMINA2,
    IDEOGRAM4,
    ZIMAGE,
    SANA,
    PIXART,
    COGVIEW4,
    HIDREAM,
)

_BY_MODEL = {model: family for family in reversed(FAMILIES) for model in family.models}
_SIGNS = [(family.name, pattern(family.signs)) for family in FAMILIES if family.signs]
_FUSED = (
    (".to_q", ".to_qkv", (".to_q", ".to_k", ".to_v")),
    (".to_k", ".to_kv", (".to_k", ".to_v")),
    (".add_q_proj", ".to_added_qkv", (".add_q_proj", ".add_k_proj", ".add_v_proj")),
)
_DENOISERS = ("unet", "transformer", "prior", "decoder")


def of_models(components: Mapping[str, nn.Module]) -> str | None:
    """Family of a pipeline's components, or its denoiser's class in lower case if it is none of ours."""
    for name in (*_DENOISERS, *components):
        model = components.get(name)
        if model is None:
            continue
        class_name = type(model).__name__
        if class_name == "UNet2DConditionModel":
            return _of_unet(getattr(model, "config", None))
        if class_name in _BY_MODEL:
            return _BY_MODEL[class_name].name
        if "Transformer" in class_name or class_name.startswith("UNet"):
            return re.sub(r"Transformer(\w?D)?(\d?D)?(Model)?$", "", class_name).lower() or None
    return None


def of_file(shapes: Iterable[tuple[str, tuple[int, ...]]]) -> str | None:
    """Family of a file from `(key, shape)` pairs, or `None` where they do not tell."""
    return recognise(shapes, _SIGNS)


def differ(file: str | None, models: str | None) -> bool:
    """Whether a file is surely for other models: both families are known, and their names can be told apart."""
    known = {family.name for family in FAMILIES}
    return file != models and file in known and models in known and (file, models) != ("flux", "chroma")


def aliases(targets: Targets) -> Aliases:
    """The names that the layers of a model have in files in the original layout of its family, if it has one."""
    family = _BY_MODEL.get(type(targets.model).__name__)
    return {} if family is None else family.names(targets)


def fused(targets: Targets) -> Aliases:
    """The names of the projections that diffusers' `fuse_projections()` makes one, which trainers may have found so."""
    found: dict[str, tuple[FusedPart, ...]] = {}
    for path in targets.modules:
        for last, name, parts in _FUSED:
            if path.endswith(last):
                parts = [path.removesuffix(last) + part for part in parts]
                if all(part in targets.modules for part in parts):
                    found[path.removesuffix(last) + name] = tuple(FusedPart(part) for part in parts)
    return found


def layout(targets: Targets) -> Layout:
    """The name to write for every layer that has another one in the original layout, with the outputs of its pieces."""
    family = _BY_MODEL.get(type(targets.model).__name__)
    names = {} if family is None else family.original(targets)
    sizes = {path: spec.out_features for path, module in targets.modules.items() if (spec := LayerSpec.of(module))}
    return {
        name: tuple((part, sizes[part.path]) for part in parts)
        for name, parts in names.items()
        if all(part.path in sizes for part in parts)
    }


def _of_unet(config: Any) -> str:
    if getattr(config, "addition_embed_type", None) == "text_time":
        return "sdxl"
    return "sd2" if getattr(config, "cross_attention_dim", None) == 1024 else "sd"
