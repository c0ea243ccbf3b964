"""Stable Diffusion 1.x, 2.x and XL: UNets, with the names of the original latent-diffusion code."""

import re

from diffadapt.families import ldm
from diffadapt.families.family import Aliases, Family
from diffadapt.pieces import Piece
from diffadapt.targets import Targets

_TEXT = r"attn2[._](processor[._])?to_[kv]"


def _aliases(targets: Targets) -> Aliases:
    if "down_blocks.0" not in targets.modules:
        return {}
    return {original: (Piece(path),) for path, original in ldm.names(targets.modules).items()}


def _reads(width: int, name: str) -> Family:
    """A UNet whose cross-attention reads text embeddings of this width."""

    def fits(key: str, shape: tuple[int, ...]) -> bool:
        return re.search("down|lora_A|w1_b|w2_b|diff", key) is not None and len(shape) > 1 and shape[1] == width

    return Family(name, ("UNet2DConditionModel",), signs=_TEXT, aliases=_aliases, fits=fits)


SD, SD2, SDXL = _reads(768, "sd"), _reads(1024, "sd2"), _reads(2048, "sdxl")
