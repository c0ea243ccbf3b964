"""Stable Diffusion 1.x, 2.x and XL: UNets, and their ControlNets, with the names of the original latent-diffusion code.

Files of the three differ in the size of the text embeddings that their cross-attention reads; see `recognise`.
"""

from diffadapt.families import ldm
from diffadapt.families.family import Aliases, Family, weighted
from diffadapt.families.fused_parts import FusedPart
from diffadapt.runtime.targets import Targets


def _aliases(targets: Targets) -> Aliases:
    if "down_blocks.0" not in targets.modules:
        return {}
    found = ldm.names(targets.modules)
    return {found[path]: (FusedPart(path),) for path in weighted(targets) if path in found}


def _controlnet(targets: Targets) -> Aliases:
    """Return the names of a ControlNet's layers: those of the first half of a UNet, and those it has in addition."""
    hints = [path for path in targets.modules if path.startswith("controlnet_cond_embedding.blocks.")]
    own = {
        "controlnet_mid_block": "middle_block_out.0",
        "controlnet_cond_embedding.conv_in": "input_hint_block.0",
        "controlnet_cond_embedding.conv_out": f"input_hint_block.{2 * len(hints) + 2}",
    }
    for path in targets.modules:
        number = path.rpartition(".")[2]
        if path in hints:
            own[path] = f"input_hint_block.{2 * int(number) + 2}"
        elif path == f"controlnet_down_blocks.{number}":
            own[path] = f"zero_convs.{number}.0"
    return {**_aliases(targets), **{name: (FusedPart(path),) for path, name in own.items() if path in targets.modules}}


CONTROLNET = Family("controlnet", ("ControlNetModel", "ControlNetUnionModel"), aliases=_controlnet)
SD, SD2, SDXL = (
    # AnimateDiff's UNet has motion modules between the layers of an ordinary one.
    Family(name, ("UNet2DConditionModel", "UNetMotionModel"), aliases=_aliases)
    for name in ("sd", "sd2", "sdxl")
)
