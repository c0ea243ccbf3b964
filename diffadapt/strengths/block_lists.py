"""Lists of block weights, as people share them, converted to strengths by module path.

The positions in a list are those of hako-mikan/sd-webui-lora-block-weight 04b986c, `scripts/lora_block_weight.py`
(`BLOCKID12`, `17`, `20`, `26`, `BLOCKIDFLUX`). Blocks that a list leaves out have the weight 0; layers outside all
blocks have the weight 1. Lists of 58 values are as in ltdrdata/ComfyUI-Inspire-Pack 25ae8d5,
`inspire/lora_block_weight.py`.

`IN`, `M` and `OUT` number the blocks of the original latent-diffusion UNet. In a diffusers UNet, each resnet together
with the attention after it is one such block. A downsampler is a block of its own; an upsampler belongs to the block
before it.
"""

import math
from collections.abc import Mapping, Sequence

from diffadapt.errors import AdapterError
from diffadapt.strengths.by_prefix import SharedStrengths


def _unet(depth: int) -> dict[str, list[str]]:
    """Return the prefixes of every block of a UNet with `depth` down blocks of two resnets each."""
    blocks = {"BASE": ["text_encoder", "text_encoder_2"], "M00": ["unet.mid_block"], "IN00": ["unet.conv_in"]}
    for index in range(depth):
        down, up = f"unet.down_blocks.{index}", f"unet.up_blocks.{index}"
        for resnet in range(2):
            blocks[f"IN{3 * index + resnet + 1:02}"] = [f"{down}.resnets.{resnet}", f"{down}.attentions.{resnet}"]
        for resnet in range(3):
            blocks[f"OUT{3 * index + resnet:02}"] = [f"{up}.resnets.{resnet}", f"{up}.attentions.{resnet}"]
        if index < depth - 1:
            blocks[f"IN{3 * index + 3:02}"] = [f"{down}.downsamplers"]
            blocks[f"OUT{3 * index + 2:02}"].append(f"{up}.upsamplers")
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

# Family -> length of the list -> the block at each position.
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
# Family -> block -> the prefixes of its layers.
_BLOCKS = {"sd": _unet(4), "sdxl": _unet(3), "flux": _FLUX}


def block_weights(values: str | Sequence[float], family: str | None = None) -> SharedStrengths[float]:
    """Convert a list of block weights to strengths for `pipe.adapters.activate` and `scale=`.

    Args:
        values: the weights, as numbers or as a string of numbers separated by commas. Stable Diffusion 1.x and 2.x have
            lists of 17 (LoRA) or 26 (LyCORIS, LoCon) values, SDXL of 12 or 20. Flux has lists of 61 (CLIP, T5, input
            layers, 19 double blocks, 38 single blocks, output layers), 58 (one value for everything outside the blocks,
            then the blocks) or 57 (only the blocks) values.
        family: "sd", "sd2", "sdxl" or "flux". Defaults to the family that has lists of this length.

    Returns:
        The strengths by prefix. An adapter need not have layers under every prefix.

    Raises:
        AdapterError: a value is not a finite number, the family is unknown, or no list of the family has this length.
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
    """Return the values as numbers. Raise `AdapterError` if one of them is not a finite number."""
    numbers: list[float] = []
    for position, value in enumerate(values.split(",") if isinstance(values, str) else values):
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise AdapterError(f"block weights: value {position + 1} is {value!r}, expected a number")
        numbers.append(number)
    return numbers
