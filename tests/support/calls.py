"""The arguments of a call of every small denoiser (`denoisers.SMALL`): small latents and a short prompt, in float64.

Row i of every argument is drawn from seed i alone, so that it is the same in batches of any size.
"""

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Generator, Tensor, nn

Draw = Callable[[Generator], Any]

_TOKENS = 5
_SIDE = 4
_SEQUENCE = _SIDE * _SIDE + _TOKENS + 3
# Arguments that are lists of rows.
_LISTS = {"x", "cap_feats", "img_shapes"}


def _normal(*shape: int) -> Draw:
    return lambda generator: torch.randn(shape, generator=generator, dtype=torch.float64)


def _uniform(limit: float, *shape: int) -> Draw:
    return lambda generator: limit * torch.rand(shape, generator=generator, dtype=torch.float64)


def _same(value: Any) -> Draw:
    return lambda _: value


def _together(**draws: Draw) -> Draw:
    """Return one argument that is a dictionary of arguments."""
    return lambda generator: {name: draw(generator) for name, draw in draws.items()}


def _joined(argument: str, rows: list[Any]) -> Any:
    if argument in _LISTS:
        return rows
    if isinstance(rows[0], dict):
        return {name: _joined(name, [row[name] for row in rows]) for name in rows[0]}
    # The features of all layers of a text encoder come in one tensor, whose first dimension is the layer.
    return torch.stack(rows, dim=int(argument == "encoder_hidden_states_llama3"))


def _call(draws: Mapping[str, Draw], **shared: Any) -> Callable[[int], dict[str, Any]]:
    """Return a function of the batch size that returns the arguments: drawn for each row, and shared by all rows."""

    def call(batch: int) -> dict[str, Any]:
        generators = [Generator().manual_seed(row) for row in range(batch)]
        return {name: _joined(name, [draw(g) for g in generators]) for name, draw in draws.items()} | shared

    return call


def _text(*shape: int) -> dict[str, Draw]:
    return {"encoder_hidden_states": _normal(_TOKENS, *shape)}


def _prompt(suffix: str = "", tokens: int = _TOKENS, width: int = 64) -> dict[str, Draw]:
    """Return features of a prompt, and the mask of a prompt without padding."""
    return {
        f"encoder_hidden_states{suffix}": _normal(tokens, width),
        f"encoder_attention_mask{suffix}": _same(torch.ones(tokens, dtype=torch.bool)),
    }


def _pooled(width: int) -> dict[str, Draw]:
    return {"pooled_projections": _normal(width)}


def _packed(channels: int = 16) -> dict[str, Draw]:
    """Return latents in the form of tokens."""
    return {"hidden_states": _normal(_SIDE * _SIDE, channels)}


def _positions(axes: int = 3) -> Tensor:
    """Return the row and column of every token of the picture, on the second and third axis."""
    ids = torch.zeros(_SIDE, _SIDE, axes, dtype=torch.float64)
    ids[..., 1] = torch.arange(_SIDE)[:, None]
    ids[..., 2] = torch.arange(_SIDE)
    return ids.flatten(0, 1)


def _ids(axes: int = 3) -> dict[str, Tensor]:
    return {"img_ids": _positions(axes), "txt_ids": torch.zeros(_TOKENS, axes, dtype=torch.float64)}


def _indicated(text: int = _TOKENS, image: int = _SIDE * _SIDE) -> dict[str, Draw]:
    """Return text and image in one sequence, with the kind of every token."""
    tokens = text + image
    return {
        "hidden_states": _normal(tokens, 16),
        "encoder_hidden_states": _normal(tokens, 64),
        "position_ids": _same(torch.arange(tokens)[:, None].expand(-1, 3)),
        "segment_ids": _same(torch.zeros(tokens, dtype=torch.long)),
        "indicator": lambda _: _kinds_of_tokens(text, image),
    }


def _kinds_of_tokens(text: int, image: int) -> Tensor:
    # diffusers 0.33 has no such module.
    from diffusers.models.transformers.transformer_ideogram4 import LLM_TOKEN_INDICATOR, OUTPUT_IMAGE_INDICATOR

    return torch.tensor([LLM_TOKEN_INDICATOR] * text + [OUTPUT_IMAGE_INDICATOR] * image)


_STEP = {"timestep": _uniform(1000)}
_FLOW = {"timestep": _uniform(1)}
_GUIDANCE = {"guidance": _uniform(5)}
_UNET = {"sample": _normal(4, 8, 8)} | _STEP
_IMAGE = {"hidden_states": _normal(8, 8, 8)}
_VIDEO = {"hidden_states": _normal(8, 2, 8, 8)}
_PATCHES = {"hidden_states": _normal(32, 16)}
_GRID = {"num_frames": 2, "height": 4, "width": 4}
_SHAPES = {"img_shapes": _same([(1, _SIDE, _SIDE)])}

CALLS: dict[str, Callable[[int], dict[str, Any]]] = {
    "sd": _call(_UNET | _text(32)),
    "sd2": _call(_UNET | _text(1024)),
    "sdxl": _call(
        _UNET | _text(64) | {"added_cond_kwargs": _together(text_embeds=_normal(32), time_ids=_uniform(64, 6))}
    ),
    "sd3": _call(_IMAGE | _STEP | _text(64) | _pooled(64)),
    "flux": _call(_packed() | _FLOW | _GUIDANCE | _text(64) | _pooled(48), **_ids()),
    # Half of the channels belong to the control picture.
    "flux control": _call(_packed(32) | _FLOW | _GUIDANCE | _text(64) | _pooled(48), **_ids()),
    "chroma": _call(_packed() | _FLOW | _text(64), **_ids()),
    "flux2": _call(_packed() | _FLOW | _GUIDANCE | _text(64), **_ids(4)),
    "flux3": _call(
        _packed() | _FLOW | _text(64) | {"image_cond_hidden_states": _normal(3, 24)},
        image_cond_ids=torch.ones(3, 4, dtype=torch.float64),
        **_ids(4),
    ),
    # The rows of video, text and sound make one sequence.
    "minimax-h3": _call(
        _packed() | {"audio_hidden_states": _normal(3, 24), "encoder_hidden_states": _normal(_TOKENS, 40)},
        timestep=torch.tensor([0.25, 0.75], dtype=torch.float64),
        timestep_indices=torch.arange(_SEQUENCE) % 2,
        token_tags=torch.tensor([0] * _SIDE * _SIDE + [1] * _TOKENS + [2] * 3),
        position_ids=torch.arange(_SEQUENCE)[:, None].expand(-1, 3),
        video_indices=torch.arange(_SIDE * _SIDE),
        text_indices=torch.arange(_TOKENS) + _SIDE * _SIDE,
        audio_indices=torch.arange(3) + _SIDE * _SIDE + _TOKENS,
    ),
    "ace-step": _call(
        {"hidden_states": _normal(6, 8), "context_latents": _normal(6, 16), "timestep_r": _uniform(1)}
        | _FLOW
        | _text(32)
    ),
    "auraflow": _call(_IMAGE | _FLOW | _text(64)),
    "qwen": _call(_packed() | _FLOW | _text(64) | _SHAPES),
    # The prompt is followed by one position for every 2 x 2 tokens of the picture.
    "qwen21": _call(
        _packed()
        | _FLOW
        | _text(64)
        | _SHAPES
        | {"img_mask": _same(torch.tensor([False] * _TOKENS + [True] * (_SIDE * _SIDE // 4)))}
    ),
    "krea2": _call(_packed() | _FLOW | _text(2, 48), position_ids=torch.cat([torch.zeros(_TOKENS, 3), _positions()])),
    "anima": _call({"hidden_states": _normal(8, 1, 8, 8)} | _FLOW | _text(64)),
    "zimage": _call({"x": _normal(8, 1, 8, 8), "t": _uniform(1), "cap_feats": _normal(_TOKENS, 64)}),
    "lumina2": _call(_IMAGE | _FLOW | _prompt()),
    "sana": _call(_IMAGE | _STEP | _prompt()),
    "pixart": _call(_IMAGE | _STEP | _prompt()),
    "cogview4": _call(
        _IMAGE | _STEP | _text(64) | {name: _uniform(64, 2) for name in ("original_size", "target_size", "crop_coords")}
    ),
    "hidream": _call(
        _IMAGE
        | {
            "timesteps": _uniform(1000),
            "encoder_hidden_states_t5": _normal(_TOKENS, 64),
            "encoder_hidden_states_llama3": _normal(2, _TOKENS, 64),
            "pooled_embeds": _normal(48),
        }
    ),
    "hunyuan-image": _call(_IMAGE | _STEP | _GUIDANCE | _prompt() | _prompt("_2", tokens=3, width=48)),
    "ideogram4": _call(_indicated() | _FLOW),
    "cascade": _call(
        {
            "sample": _normal(8, 8, 8),
            "timestep_ratio": _uniform(1),
            "clip_text_pooled": _normal(1, 64),
            "clip_text": _normal(_TOKENS, 64),
            "clip_img": _normal(1, 48),
        }
    ),
    "wan": _call(
        _VIDEO
        | _STEP
        # The model regards all but the last 512 tokens as those of the image.
        | {"encoder_hidden_states": _normal(512, 64), "encoder_hidden_states_image": _normal(3, 40)}
    ),
    "ltx": _call(_PATCHES | _STEP | _prompt(), **_GRID),
    "ltx2": _call(
        _PATCHES
        | _STEP
        | _prompt()
        | {f"audio_{name}": draw for name, draw in _prompt().items()}
        | {"audio_hidden_states": _normal(3, 24), "audio_timestep": _uniform(1000)},
        audio_num_frames=3,
        **_GRID,
    ),
    "hunyuan-video": _call(_VIDEO | _STEP | _GUIDANCE | _prompt() | {"pooled_projections": _normal(48)}),
    "hunyuan-video15": _call(
        _VIDEO | _STEP | _prompt() | _prompt("_2", tokens=3, width=48) | {"image_embeds": _normal(2, 40)}
    ),
}


def output(model: nn.Module, call: Mapping[str, Any]) -> Tensor:
    """Return everything that the model returns, of shape (rows, values); LTX 2 returns sound as well as pictures."""
    with torch.no_grad(), warnings.catch_warnings():
        # Krea 2's norm computes in float32, whatever the dtype of the model and of the weight.
        warnings.filterwarnings("ignore", "Mismatch dtype between input and weight")
        parts = model(**call, return_dict=False)
    return torch.stack([torch.cat([part.flatten() for part in row]) for row in zip(*parts, strict=True)])
