"""Families whose files use the layout of diffusers."""

from diffadapt.families.family import Family

QWEN = Family(
    "qwen",
    ("QwenImageTransformer2DModel",),
    signs="transformer_blocks~~(?:(?:img|txt)_mlp~net|(?:img|txt)_mod)",
)

QWEN21 = Family(
    "qwen21",
    ("QwenImage21Transformer2DModel",),
    signs=r"transformer_blocks~~img_mlp~(?:gate|proj\.|out\.)",
    # ComfyUI fuses the two layers.
    also={
        "transformer_blocks.{}.img_mlp.gate_up": (
            "transformer_blocks.{}.img_mlp.gate_layer",
            "transformer_blocks.{}.img_mlp.proj",
        ),
    },
)

COGVIEW4 = Family("cogview4", ("CogView4Transformer2DModel",))

HIDREAM = Family(
    "hidream",
    ("HiDreamImageTransformer2DModel",),
    signs="(?:double|single)_stream_blocks~~block",
)
