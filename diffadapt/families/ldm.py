"""Names of the original latent-diffusion UNet (SD, SDXL) for the layers of a diffusers UNet.

They are derived from the blocks that the model has, so any number of layers per block works. They are checked against
the 391 names of SD 1.5 and the 1050 names of SDXL. Source: diffusers 0.42.1 `loaders/single_file_utils.py`.
"""

import re
from collections.abc import Collection

_TOP = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}

_LAYER = re.compile(r"((?:down_blocks|up_blocks)\.\d+|mid_block)\.(resnets|attentions|(?:down|up)samplers)\.(\d+)\.?")


def names(paths: Collection[str]) -> dict[str, str]:
    """Return the original path of every diffusers path in `paths` that has one."""
    blocks = _blocks(paths)
    found: dict[str, str] = {}
    for path in paths:
        if path in _TOP:
            found[path] = _TOP[path]
            continue
        match = _LAYER.match(path)
        block = blocks.get(path[: match.end()].rstrip(".")) if match else None
        if match and block:
            leaf = path[match.end() :]
            if match[2] == "resnets":
                leaf = _RESNET.get(leaf, leaf)
            elif match[2] == "downsamplers":
                leaf = leaf.replace("conv", "op")
            found[path] = f"{block}.{leaf}" if leaf else block
    return found


def _blocks(paths: Collection[str]) -> dict[str, str]:
    """Return the original name of every block by its diffusers name: `down_blocks.1.resnets.0` -> `input_blocks.4.0`.

    Blocks are numbered by counting those of the model.
    """
    present = set(paths)
    blocks = {
        "mid_block.resnets.0": "middle_block.0",
        "mid_block.attentions.0": "middle_block.1",
        "mid_block.resnets.1": "middle_block.2",
    }
    for side, original, index in (("down_blocks", "input_blocks", 1), ("up_blocks", "output_blocks", 0)):
        block = 0
        while f"{side}.{block}" in present:
            prefix = f"{side}.{block}"
            layer, position = 0, 1
            while f"{prefix}.resnets.{layer}" in present:
                blocks[f"{prefix}.resnets.{layer}"] = f"{original}.{index}.0"
                if f"{prefix}.attentions.{layer}" in present:
                    blocks[f"{prefix}.attentions.{layer}"] = f"{original}.{index}.1"
                    position = 2
                layer, index = layer + 1, index + 1
            if f"{prefix}.downsamplers.0" in present:
                blocks[f"{prefix}.downsamplers.0"] = f"{original}.{index}.0"
                index += 1
            if f"{prefix}.upsamplers.0" in present:
                # An upsampler is in the same original block as the last resnet, after its attention if it has one.
                blocks[f"{prefix}.upsamplers.0"] = f"{original}.{index - 1}.{position}"
            block += 1
    return blocks
