"""Stable Diffusion 1.x, 2.x and XL: UNets, with the names of the original latent-diffusion code.

Files of the three differ in the width of the text embeddings that their cross-attention reads: see `recognise`.
"""

from diffadapt.families import ldm
from diffadapt.families.family import Aliases, Family, weighted
from diffadapt.pieces import Piece
from diffadapt.targets import Targets


def _aliases(targets: Targets) -> Aliases:
    if "down_blocks.0" not in targets.modules:
        return {}
    found = ldm.names(targets.modules)
    return {found[path]: (Piece(path),) for path in weighted(targets) if path in found}


SD, SD2, SDXL = (Family(name, ("UNet2DConditionModel",), aliases=_aliases) for name in ("sd", "sd2", "sdxl"))
