"""Where the tokens of a picture are in the layers of diffusers' models, by class; read from diffusers 0.42.1.

In all of them a picture's tokens follow one another row by row. `tests/families/test_token_layouts.py` changes parts of
the latents and of the text, and compares the tokens that change in every layer.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diffadapt.errors import AdapterError
from diffadapt.runtime.regions.token_layout import Picture, TokenLayout, Tokens

_Call = Mapping[str, Any]
_Grid = tuple[int, int]

_SEQUENCE_MULTIPLE = 32
"""Z-Image pads the tokens of the picture and those of the text to a multiple of this (`SEQ_MULTI_OF`)."""

# Layers of joint attention that see the text alone, and layers that see no tokens at all.
_TEXT = (
    r"(^|\.)(context_embedder|add_[qkv]_proj|to_add_out|norm_added_[qkv]|ff_context|norm1_context|norm2_context"
    r"|txt_\w+|encoder_hid_proj|image_proj\w*|to_[kv]_ip|time_text_embed|time_guidance_embed"
    r"|distilled_guidance_layer|time_step_\w+|\w*_modulation\w*)(\.|$)"
)
_CROSS = (
    r"attn2\.(to_[kv]|add_[kv]_proj|norm_k|norm_added_k|to_[kv]_ip)"
    r"|(^|\.)(caption_projection|caption_norm|adaln_single|time_embed)(\.|$)"
)


def layout_of(model: nn.Module) -> TokenLayout | None:
    """Return where a model's layers have the tokens of a picture; `None` if that is not known."""
    names = (base.__name__ for base in type(model).__mro__)
    return next((LAYOUTS[name] for name in names if name in LAYOUTS), None)


def _unet(model: nn.Module, call: _Call) -> Picture:
    height, width = call["sample"].shape[-2:]
    grids: list[_Grid] = []
    for _ in _config(model).block_out_channels:
        grids.append((int(height), int(width)))
        height, width = (height + 1) // 2, (width + 1) // 2
    grids = list(dict.fromkeys(grids))
    return Picture(tuple(grids), tuple(Tokens("picture", h * w, (h, w)) for h, w in grids))


def _patches(text: Callable[[nn.Module, _Call], int] | None = None, text_first: bool = True) -> Any:
    """Return the function for models that are called with latents and cut them into patches.

    Args:
        text: returns the number of tokens of the text in joint sequences; by default there are none.
        text_first: whether the text comes before the picture there.
    """

    def picture(model: nn.Module, call: _Call) -> Picture:
        frames, grid = _patched(model, call["hidden_states"])
        tokens = frames * grid[0] * grid[1]
        sequences = [Tokens("picture", tokens, grid, frames=frames)]
        if text is not None:
            length = text(model, call)
            start = length if text_first else 0
            sequences.append(Tokens("joint", length + tokens, grid, (start,), frames))
        return Picture((grid,), tuple(sequences))

    return picture


def _patched(model: nn.Module, latents: Tensor) -> tuple[int, _Grid]:
    """Return the number of frames, and the height and width in tokens, of latents (rows, channels, [frames], ...)."""
    config = _config(model)
    size = config.patch_size
    sizes = tuple(size) if isinstance(size, (tuple, list)) else (size, size)
    frames = 1
    if latents.ndim == 5:
        time = sizes[0] if len(sizes) == 3 else getattr(config, "patch_size_t", 1)
        frames = latents.shape[2] // int(time)
    height, width = (int(side) // int(patch) for side, patch in zip(latents.shape[-2:], sizes[-2:], strict=True))
    return frames, (height, width)


def _packed(model: nn.Module, call: _Call) -> Picture:
    """Return the picture of Flux and its relatives, which get the place of every token as `img_ids`."""
    ids: Tensor = call["img_ids"]
    return _placed(model, "img_ids", ids[0] if ids.ndim == 3 else ids, _text_length(model, call))


def _krea2(model: nn.Module, call: _Call) -> Picture:
    """Return the picture of Krea 2, which gets the places of all tokens together, those of the text first."""
    text = _text_length(model, call)
    return _placed(model, "position_ids", call["position_ids"][text:], text)


def _placed(model: nn.Module, name: str, ids: Tensor, text: int) -> Picture:
    """Return a picture that may be preceded or followed by reference pictures, and in joint sequences by the text.

    Args:
        name: the argument that has `ids`, in the message.
        ids: the places of all tokens but those of the text. Reference pictures have another number on the first axis
            than 0, and the second and third are the row and the column.
        text: the number of tokens of the text.
    """
    ids = ids.detach().to("cpu", torch.float64)
    drawn = (ids[:, 0] == 0).nonzero().flatten()
    start, count = (int(drawn[0]), len(drawn)) if len(drawn) else (0, 0)
    places = ids[start : start + count, 1:3]
    height, width = (int(places[:, axis].max() - places[:, axis].min()) + 1 if count else 0 for axis in (0, 1))
    expected = torch.cartesian_prod(torch.arange(height), torch.arange(width)).double().view(-1, 2)
    if not count or len(places) != len(expected) or not torch.equal(places - places[:1], expected):
        raise AdapterError(
            f"regions: the {name} of this {type(model).__name__} are not the rows and columns of one picture, so it "
            "is not known where its tokens are; draw without regions"
        )
    grid = height, width
    tokens = Tokens("picture", len(ids), grid, (start,)), Tokens("joint", text + len(ids), grid, (text + start,))
    return Picture((grid,), tokens)


def _ltx(model: nn.Module, call: _Call) -> Picture:
    """Return the picture of LTX Video, which is told its size in tokens."""
    frames, height, width = (int(call[name] or 0) for name in ("num_frames", "height", "width"))
    return Picture(((height, width),), (Tokens("picture", frames * height * width, (height, width), frames=frames),))


def _qwen(model: nn.Module, call: _Call) -> Picture:
    """Return the picture of Qwen-Image, whose reference pictures follow it."""
    rows: Sequence[Any] = call["img_shapes"] or ()
    drawn = {tuple(map(int, row[0] if isinstance(row[0], (tuple, list)) else row)) for row in rows}
    if len(drawn) != 1 or next(iter(drawn))[0] != 1:
        raise AdapterError(
            f"regions: img_shapes is {rows!r}, expected one picture of the same size for every row; draw layers and "
            "pictures of several sizes without regions"
        )
    ((_, height, width),) = drawn
    length = int(call["hidden_states"].shape[1])
    return Picture(((height, width),), (Tokens("picture", length, (height, width)),))


def _zimage(model: nn.Module, call: _Call) -> Picture:
    """Return the picture of Z-Image, whose joint sequences have the picture first, and padding after both parts."""
    latents: Sequence[Any] = call["x"]
    sizes = {tuple(row.shape[1:]) for row in latents if isinstance(row, Tensor)}
    if len(sizes) != 1 or not all(isinstance(row, Tensor) for row in latents):
        raise AdapterError(
            "regions: Z-Image is called with reference pictures or with pictures of several sizes; draw them without "
            "regions"
        )
    ((frames, height, width),) = sizes
    patch, time = int(call["patch_size"]), int(call["f_patch_size"])
    grid = int(height) // patch, int(width) // patch
    frames = int(frames) // time
    tokens = _padded(frames * grid[0] * grid[1])
    joint = tokens + max(_padded(len(text)) for text in call["cap_feats"])
    return Picture(
        (grid,),
        (
            Tokens("picture", tokens, grid, frames=frames),
            Tokens("picture", tokens, grid, frames=frames, flat=True),
            Tokens("joint", joint, grid, frames=frames),
        ),
    )


def _lumina2(model: nn.Module, call: _Call) -> Picture:
    """Return the picture of Lumina 2, which follows the text of its row without padding between them."""
    _, grid = _patched(model, call["hidden_states"])
    tokens = grid[0] * grid[1]
    lengths = tuple(int(length) for length in call["encoder_attention_mask"].sum(dim=1).tolist())
    starts = lengths[:1] if len(set(lengths)) == 1 else lengths
    return Picture((grid,), (Tokens("picture", tokens, grid), Tokens("joint", max(lengths) + tokens, grid, starts)))


def _cogview4(model: nn.Module, call: _Call) -> Picture:
    """Return the picture of CogView 4, whose feed-forward layers are called with the picture and with the text."""
    _, grid = _patched(model, call["hidden_states"])
    tokens, text = grid[0] * grid[1], _text_length(model, call)
    return Picture(
        (grid,),
        (
            Tokens("picture", tokens, grid),
            Tokens("joint", text + tokens, grid, (text,)),
            Tokens("either", tokens, grid),
            Tokens("either", text, grid, (-1,)),
        ),
    )


def _text_length(model: nn.Module, call: _Call) -> int:
    return int(call["encoder_hidden_states"].shape[1])


def _hunyuan_image_text(model: nn.Module, call: _Call) -> int:
    further = call["encoder_hidden_states_2"] if getattr(model, "context_embedder_2", None) is not None else None
    return _text_length(model, call) + (0 if further is None else int(further.shape[1]))


def _auraflow_text(model: nn.Module, call: _Call) -> int:
    registers: Any = getattr(model, "register_tokens", None)
    return _text_length(model, call) + (0 if registers is None else int(registers.shape[1]))


def _padded(count: int) -> int:
    return count + -count % _SEQUENCE_MULTIPLE


def _config(model: nn.Module) -> Any:
    return getattr(model, "config", None)


_LIKE_FLUX = TokenLayout(_packed, {"none": _TEXT, "joint": r"^single_transformer_blocks\."})

LAYOUTS: dict[str, TokenLayout] = {
    "UNet2DConditionModel": TokenLayout(
        _unet,
        {
            "none": r"(^|\.)(time_embedding|add_embedding|class_embedding|time_emb_proj|encoder_hid_proj"
            r"|add_[kv]_proj|to_[kv]_ip)(\.|$)|attn2\.to_[kv]$"
        },
    ),
    "SD3Transformer2DModel": TokenLayout(_patches(), {"none": _TEXT}),
    "FluxTransformer2DModel": _LIKE_FLUX,
    "ChromaTransformer2DModel": _LIKE_FLUX,
    "Flux2Transformer2DModel": _LIKE_FLUX,
    "Krea2Transformer2DModel": TokenLayout(
        _krea2, {"none": r"^(text_fusion|txt_in|time_embed|time_mod_proj)\.", "joint": r"^transformer_blocks\."}
    ),
    "QwenImageTransformer2DModel": TokenLayout(_qwen, {"none": _TEXT}),
    "ZImageTransformer2DModel": TokenLayout(
        _zimage,
        {
            "none": r"^(cap_embedder|context_refiner|siglip_\w+|t_embedder)\.|adaLN_modulation",
            "joint": r"^(layers|all_final_layer)\.",
        },
    ),
    "Lumina2Transformer2DModel": TokenLayout(
        _lumina2,
        {
            "none": r"^(time_caption_embed|context_refiner)\.|norm1\.linear|norm_out\.linear_1",
            "joint": r"^(layers|norm_out)\.",
        },
    ),
    "PixArtTransformer2DModel": TokenLayout(_patches(), {"none": _CROSS}),
    "SanaTransformer2DModel": TokenLayout(_patches(), {"none": _CROSS}),
    "AuraFlowTransformer2DModel": TokenLayout(
        _patches(_auraflow_text), {"none": _TEXT, "joint": r"^single_transformer_blocks\."}
    ),
    "CogView4Transformer2DModel": TokenLayout(
        _cogview4,
        {
            "none": r"^(patch_embed\.text_proj|time_condition_embed)|\.linear$",
            "joint": r"\.attn1\.",
            "either": r"\.ff\.",
        },
    ),
    "HunyuanImageTransformer2DModel": TokenLayout(
        _patches(_hunyuan_image_text, text_first=False),
        {"none": _TEXT + r"|^context_embedder_2\.", "joint": r"^single_transformer_blocks\."},
    ),
    "HunyuanVideoTransformer3DModel": TokenLayout(
        _patches(_text_length, text_first=False), {"none": _TEXT, "joint": r"^single_transformer_blocks\."}
    ),
    "LTXVideoTransformer3DModel": TokenLayout(_ltx, {"none": _CROSS}),
    "WanTransformer3DModel": TokenLayout(_patches(), {"none": _CROSS + r"|^condition_embedder\."}),
}
"""Class name -> its layout."""
