"""Lists of block weights, as people share them, as strengths by module path.

The positions are those of hako-mikan/sd-webui-lora-block-weight 04b986c, `scripts/lora_block_weight.py` (`BLOCKID12`,
`17`, `20`, `26`, `BLOCKIDFLUX`; blocks that a list leaves out have the weight 0, layers in no block the weight 1); of
58 values, of ltdrdata/ComfyUI-Inspire-Pack 25ae8d5, `inspire/lora_block_weight.py`. `IN`, `M` and `OUT` count the
blocks of the original latent-diffusion UNet: each level of a diffusers UNet has a block per resnet, with the attention
after it, and one for the downsampler; an upsampler is in the block before it.
"""

import math
from collections.abc import Mapping, Sequence

from diffadapt.errors import AdapterError
from diffadapt.strengths.by_prefix import SharedStrengths


def _unet(levels: int) -> dict[str, list[str]]:
    """Prefixes by block, for two layers in every level."""
    blocks = {"BASE": ["text_encoder", "text_encoder_2"], "M00": ["unet.mid_block"], "IN00": ["unet.conv_in"]}
    for level in range(levels):
        down, up = f"unet.down_blocks.{level}", f"unet.up_blocks.{level}"
        for layer in range(2):
            blocks[f"IN{3 * level + layer + 1:02}"] = [f"{down}.resnets.{layer}", f"{down}.attentions.{layer}"]
        for layer in range(3):
            blocks[f"OUT{3 * level + layer:02}"] = [f"{up}.resnets.{layer}", f"{up}.attentions.{layer}"]
        if level < levels - 1:
            blocks[f"IN{3 * level + 3:02}"] = [f"{down}.downsamplers"]
            blocks[f"OUT{3 * level + 2:02}"].append(f"{up}.upsamplers")
    return blocks


def _numbered(name: str, numbers: Sequence[int]) -> list[str]:
    return [f"{name}{number:02}" for number in numbers]


_DOUBLE, _SINGLE = _numbered("D", range(19)), _numbered("S", range(38))
_FLUX_ENDS = {
    "CLIP": ["text_encoder"],
    "T5": ["text_encoder_2"],
    "IN": ["transformer.x_embedder", "transformer.context_embedder", "transformer.time_text_embed"],
    "OUT": ["transformer.norm_out", "transformer.proj_out"],
}
_FLUX = {
    **_FLUX_ENDS,
    "BASE": [prefix for prefixes in _FLUX_ENDS.values() for prefix in prefixes],
    **{name: [f"transformer.transformer_blocks.{index}"] for index, name in enumerate(_DOUBLE)},
    **{name: [f"transformer.single_transformer_blocks.{index}"] for index, name in enumerate(_SINGLE)},
}
_SD, _SDXL = _unet(4), _unet(3)

# Family -> length of the list -> its positions.
_POSITIONS: Mapping[str, Mapping[int, list[str]]] = {
    "sd": {
        17: ["BASE", *_numbered("IN", [1, 2, 4, 5, 7, 8]), "M00", *_numbered("OUT", range(3, 12))],
        26: ["BASE", *_numbered("IN", range(12)), "M00", *_numbered("OUT", range(12))],
    },
    "sdxl": {
        12: ["BASE", *_numbered("IN", [4, 5, 7, 8]), "M00", *_numbered("OUT", range(6))],
        20: ["BASE", *_numbered("IN", range(9)), "M00", *_numbered("OUT", range(9))],
    },
    "flux": {
        57: [*_DOUBLE, *_SINGLE],
        58: ["BASE", *_DOUBLE, *_SINGLE],
        61: ["CLIP", "T5", "IN", *_DOUBLE, *_SINGLE, "OUT"],
    },
}
_BLOCKS = {"sd": _SD, "sdxl": _SDXL, "flux": _FLUX}


def block_weights(values: str | Sequence[float], family: str | None = None) -> SharedStrengths[float]:
    """Strengths for `pipe.adapters.activate` and `scale=` from a list of block weights.

    Args:
        values: numbers, or a string of them with commas. For Stable Diffusion 1.x and 2.x 17 (LoRA) or 26 (LyCORIS,
            LoCon), for SDXL 12 or 20, for Flux 61 (CLIP, T5, in, 19 double blocks, 38 single blocks, out), 58 (what is
            in no block, blocks) or 57 (blocks).
        family: "sd", "sd2", "sdxl" or "flux"; the number of values tells it too.

    Returns:
        Strength by prefix. Prefixes under which an adapter has no layer are no error.

    Raises:
        AdapterError: it is no such list, or one of another family.
    """
    numbers = _numbers(values)
    by_length = {length: name for name, lists in _POSITIONS.items() for length in lists}
    expected = "sd" if family == "sd2" else family or by_length.get(len(numbers))
    if family is not None and expected not in _POSITIONS:
        raise AdapterError(f"family is {family!r}, expected one of {', '.join(_POSITIONS)}")
    lengths = by_length if expected is None else _POSITIONS[expected]
    if expected is None or len(numbers) not in lengths:
        raise AdapterError(
            f"block weights: {len(numbers)} values, expected {' or '.join(map(str, sorted(lengths)))}"
            f"{f' for {family}' if family else ''}"
        )
    blocks = _BLOCKS[expected]
    weights = dict(zip(_POSITIONS[expected][len(numbers)], numbers, strict=True))
    names = blocks if expected != "flux" else weights
    return SharedStrengths({prefix: weights.get(name, 0.0) for name in names for prefix in blocks[name]})


def _numbers(values: str | Sequence[float]) -> list[float]:
    found: list[float] = []
    for position, value in enumerate(values.split(",") if isinstance(values, str) else values):
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise AdapterError(f"block weights: value {position + 1} is {value!r}, expected a number")
        found.append(number)
    return found
