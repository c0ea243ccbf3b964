"""Model families. A new one is a `Family` in a file of this folder and an entry here.

Files are recognised in the order of the entries, so a family comes before any other whose signs also match its files.
"""

import re
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

from torch import nn

from diffadapt.families.ace_step import ACE_STEP
from diffadapt.families.auraflow import AURAFLOW
from diffadapt.families.cascade import CASCADE
from diffadapt.families.cosmos import ANIMA, ANIMA_CONDITIONER
from diffadapt.families.family import Aliases, Family, Layout
from diffadapt.families.flux import CHROMA, FLUX, FLUX2, FLUX3
from diffadapt.families.fused_parts import FusedPart
from diffadapt.families.hunyuan import HUNYUAN_IMAGE, HUNYUAN_VIDEO, HUNYUAN_VIDEO_15
from diffadapt.families.krea2 import KREA2
from diffadapt.families.ltx import LTX, LTX2
from diffadapt.families.lumina import IDEOGRAM4, LUMINA2, ZIMAGE
from diffadapt.families.minimax_h3 import MINIMAX_H3
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
    MINIMAX_H3,
    ACE_STEP,
    FLUX3,
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
_BY_STEM = {model.partition("Transformer")[0]: family for model, family in _BY_MODEL.items() if "Transformer" in model}
_VARIANT = re.compile(
    r"(.+?)(?:(?:Multi)?ControlNet|(?:Control|Edit(?:Plus)?|Fill|Inpaint(?:ing)?|Kontext|VACE|Animate2)Transformer\d)"
)
"""Names of ControlNets and of variants of a model, which begin like the name of the model."""

_SIGNS = [(family.name, pattern(family.signs)) for family in FAMILIES if family.signs]
# The first projection that is fused, the fused one, and all projections in it.
_FUSED = (
    (".to_q", ".to_qkv", (".to_q", ".to_k", ".to_v")),
    (".to_k", ".to_kv", (".to_k", ".to_v")),
    (".add_q_proj", ".to_added_qkv", (".add_q_proj", ".add_k_proj", ".add_v_proj")),
)
DENOISERS = ("unet", "transformer", "prior", "decoder")
"""Names of pipeline components that are denoisers; the first one that exists is the main one."""


def of_models(components: Mapping[str, nn.Module]) -> str | None:
    """Return the family of a pipeline by its components, `None` if no component is a known or likely denoiser.

    A family that is not in `FAMILIES` is named after the class of the denoiser, in lower case.
    """
    for name in (*DENOISERS, *components):
        model = components.get(name)
        if model is None:
            continue
        class_name = type(model).__name__
        family = _of_class(type(model))
        if family in (SD, SD2, SDXL):
            return _of_unet(getattr(model, "config", None))
        if family is not None:
            return family.name
        if "Transformer" in class_name or class_name.startswith("UNet"):
            return re.sub(r"Transformer(\w?D)?(\d?D)?(Model)?$", "", class_name).lower() or None
    return None


def of_file(shapes: Iterable[tuple[str, tuple[int, ...]]]) -> str | None:
    """Return the family of a file by its `(key, shape)` pairs, or `None` if they do not identify one."""
    return recognise(shapes, _SIGNS)


def differ(file: str | None, models: str | None) -> bool:
    """Return whether a file is certainly for other models.

    That requires that both families are known, and that their files can be told apart.
    """
    known = {family.name for family in FAMILIES}
    return file != models and file in known and models in known and (file, models) != ("flux", "chroma")


def aliases(targets: Targets) -> Aliases:
    """Return all names that a model's layers have in files besides those of diffusers; {} for unknown families."""
    family = _of_class(type(targets.model))
    return {} if family is None else family.names(targets)


def parameters(targets: Targets) -> Aliases:
    """Return the names that bare parameters of a model have in files besides those of diffusers."""
    family = _of_class(type(targets.model))
    return {} if family is None else family.parameters(targets)


def written_layout(targets: Targets) -> Layout:
    """Return `layout`, with bare parameters, which count as parts without outputs."""
    tables = {name: tuple((part, 0) for part in parts) for name, parts in parameters(targets).items()}
    return {**layout(targets), **tables}


def fused_layout(targets: Targets) -> Layout:
    """Return all fused layers that files may have, also under names that are read but never written."""
    layers = {**fused(targets), **aliases(targets)}
    specs = {path: spec for path, module in targets.modules.items() if (spec := LayerSpec.of(module))}
    return {
        name: tuple((part, specs[part.path].out_features) for part in parts)
        for name, parts in layers.items()
        if len(parts) > 1 and all(part.path in specs for part in parts)
    }


def stored_by_head(targets: Targets) -> Aliases:
    """Return the fused layers that some programs write head by head; {} for most families. See `Family.by_head`."""
    family = _of_class(type(targets.model))
    return {} if family is None else family.stored_by_head(targets)


def left_out(targets: Targets, path: str) -> str | None:
    """Return what messages call the optional part of a family that the layer at `path` of a file belongs to.

    The result is `None` if there is no such part, or if the model has some layer of it.
    """
    family, flat = _of_class(type(targets.model)), path.replace(".", "_")
    for part, names in family.optional.items() if family is not None else ():
        if re.search(names, flat):
            return None if any(re.search(names, f"{own}.".replace(".", "_")) for own in targets.modules) else part
    return None


def fused(targets: Targets) -> Aliases:
    """Return the names of the projections that diffusers' `fuse_projections()` creates, and that trainers may use."""
    found: dict[str, tuple[FusedPart, ...]] = {}
    for path in targets.modules:
        for first, name, projections in _FUSED:
            if path.endswith(first):
                stem = path.removesuffix(first)
                parts = tuple(FusedPart(stem + projection) for projection in projections)
                if all(part.path in targets.modules for part in parts):
                    found[stem + name] = parts
    return found


def layout(targets: Targets) -> Layout:
    """Return the original layout of a model: its layers with other names, and the parts and outputs of each."""
    family = _of_class(type(targets.model))
    names = {} if family is None else family.original(targets)
    sizes = {path: spec.out_features for path, module in targets.modules.items() if (spec := LayerSpec.of(module))}
    return {
        name: tuple((part, sizes[part.path]) for part in parts)
        for name, parts in names.items()
        if all(part.path in sizes for part in parts)
    }


@cache
def _of_class(model: type[nn.Module]) -> Family | None:
    """Return the family of a class of models: by its name, or by the name of a class that it derives from."""
    names = [base.__name__ for base in model.__mro__]
    known = next((_BY_MODEL[name] for name in names if name in _BY_MODEL), None)
    variants = (_BY_STEM.get(variant[1]) for name in names if (variant := _VARIANT.match(name)))
    return known or next(filter(None, variants), None)


def _of_unet(config: Any) -> str:
    if getattr(config, "addition_embed_type", None) == "text_time":
        return "sdxl"
    return "sd2" if getattr(config, "cross_attention_dim", None) == 1024 else "sd"
