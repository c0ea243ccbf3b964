"""Model families. Adding one is a `Family` in a file beside this one and an entry here.

The order is that of recognising files: a family that another one's signs would find too comes first.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from diffadapt.families.family import Aliases, Family
from diffadapt.families.flux import CHROMA, FLUX
from diffadapt.families.sd import SD, SD2, SDXL
from diffadapt.layer import LayerSpec
from diffadapt.state import Layout
from diffadapt.targets import Targets

FAMILIES: tuple[Family, ...] = (SD, SD2, SDXL, CHROMA, FLUX)

_DENOISERS = ("unet", "transformer", "prior", "decoder")


def of_models(components: Mapping[str, nn.Module]) -> str | None:
    """Family of a pipeline's components, or its denoiser's class in lower case if it is none of ours."""
    for name in (*_DENOISERS, *components):
        model = components.get(name)
        if model is None:
            continue
        kind = type(model).__name__
        if kind == "UNet2DConditionModel":
            return _of_unet(getattr(model, "config", None))
        known = next((family.name for family in FAMILIES if kind in family.models), None)
        if known is not None:
            return known
        if "Transformer" in kind or kind.startswith("UNet"):
            return re.sub(r"Transformer(\w?D)?(\d?D)?(Model)?$", "", kind).lower() or None
    return None


def of_file(shapes: Iterable[tuple[str, tuple[int, ...]]]) -> str | None:
    """Family of a file from `(key, shape)` pairs, or `None` where they do not tell."""
    shapes = tuple(shapes)
    for family in FAMILIES:
        if family.signs is not None:
            signs = re.compile(family.signs)
            if any(signs.search(key) and family.fits(key, shape) for key, shape in shapes):
                return family.name
    return None


def aliases(targets: Targets) -> Aliases:
    """The names that the layers of a model have in the original layout of its family, if it has one."""
    kind = type(targets.model).__name__
    family = next((family for family in FAMILIES if kind in family.models), None)
    return {} if family is None else family.names(targets)


def layout(targets: Targets) -> Layout:
    """The same with the number of outputs of every piece, for writing."""
    sizes = {path: spec.out_features for path, module in targets.modules.items() if (spec := LayerSpec.of(module))}
    return {
        name: tuple((piece, sizes[piece.path]) for piece in pieces)
        for name, pieces in aliases(targets).items()
        if all(piece.path in sizes for piece in pieces)
    }


def _of_unet(config: Any) -> str:
    if getattr(config, "addition_embed_type", None) == "text_time":
        return "sdxl"
    return "sd2" if getattr(config, "cross_attention_dim", None) == 1024 else "sd"
