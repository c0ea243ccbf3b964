"""Where models have the tokens of a picture, compared with what changes in their layers when the input does.

Attention is replaced by a function of the token alone, so that a change of one part of the latents or of the text
reaches its own tokens only.
"""

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import diffadapt
from diffadapt import AdapterError
from diffadapt.families.token_layouts import LAYOUTS
from diffadapt.runtime.adapter_layer import AdapterLayer
from tests.support.calls import CALLS, output
from tests.support.denoisers import SMALL

SIDE = 4
ROW, COLUMN = 2, 1
# Convolutions and the linear attention of Sana mix positions, cross-attention brings the text to all of them.
MIXING = {"sd", "sd2", "sdxl", "sana"}
CROSS = {"pixart", "wan", "ltx"}


def by_token(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
    """Return the value of the token itself; where keys are of other tokens than queries, the query and a constant."""
    value = value.repeat_interleave(query.shape[-3] // value.shape[-3], -3)
    return value if query.shape[-2] == key.shape[-2] else query + value.mean(-2, keepdim=True)


@contextmanager
def recorded(model: nn.Module, layers: Mapping[str, AdapterLayer]) -> Generator[dict[tuple[str, int], Tensor]]:
    """Collect the outputs of all layers, by path and number of the call."""
    found: dict[tuple[str, int], Tensor] = {}

    def hook(path: str) -> Callable[..., None]:
        return lambda *values: found.update({(path, sum(path == key for key, _ in found)): values[-1].detach().clone()})

    handles = [model.get_submodule(path).register_forward_hook(hook(path)) for path in layers]
    yield found
    for handle in handles:
        handle.remove()


def changed(name: str, call: dict[str, Any], part: str) -> dict[str, Any]:
    """Return the arguments with one token of the picture in the first row changed, or all of its text."""
    call = {key: value.clone() if isinstance(value, Tensor) else value for key, value in call.items()}
    if part == "text":
        if name == "zimage":
            call["cap_feats"] = [call["cap_feats"][0] + 1, *call["cap_feats"][1:]]
        else:
            call["encoder_hidden_states"][0] += 1
        return call
    if name == "zimage":
        latents = [row.clone() for row in call["x"]]
        call["x"] = latents
        latents = latents[0]
    else:
        latents = call["hidden_states"][0]
    if latents.ndim == 2:
        # In all frames.
        latents[ROW * SIDE + COLUMN :: SIDE**2] += 1
    else:
        height, width = (size // SIDE for size in latents.shape[-2:])
        latents[..., ROW * height : (ROW + 1) * height, COLUMN * width : (COLUMN + 1) * width] += 1
    return call


def call_of(name: str) -> dict[str, Any]:
    """Return the arguments of a call with two rows, whose texts have different lengths where the model packs them."""
    call = CALLS[name](2)
    if name == "zimage":
        call["cap_feats"] = [call["cap_feats"][0], torch.ones(40, 64, dtype=torch.float64)]
    if name == "lumina2":
        call["encoder_attention_mask"][0, 3:] = False
    return call


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name in CALLS if name not in MIXING])
def test_tokens_that_change_with_a_part_of_the_picture_are_those_in_the_region(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = SMALL[name].build()[next(iter(SMALL[name].components))].double()
    if name == "zimage":
        # The tables of the small model are too short for a text that is padded to 64 tokens.
        model.rope_embedder.axes_lens = [128, 128, 128]  # type: ignore[union-attr]
    config = diffadapt.LoraConfig(rank=1, target_modules="all-linear", init=True)
    adapter = diffadapt.add_adapter(model, config, "a")
    adapters, call = diffadapt.adapters(model), call_of(name)
    mask = torch.zeros(SIDE, SIDE)
    mask[ROW, COLUMN] = 1
    if type(model).__name__ not in LAYOUTS:
        message = rf"is a {type(model).__name__}, and it is not known where .*FluxTransformer2DModel"
        with pytest.raises(AdapterError, match=message), adapters.regions({"a": mask}):
            pass
        return
    monkeypatch.setattr(F, "scaled_dot_product_attention", by_token)
    with adapters.regions({"a": mask}):
        outputs: dict[str, dict[tuple[str, int], Tensor]] = {}
        for part, arguments in {
            "none": call,
            "picture": changed(name, call, "picture"),
            "text": changed(name, call, "text"),
        }.items():
            with recorded(model, adapter.layers) as outputs[part]:
                output(model, arguments)
        fields = dict[tuple[str, int], Tensor]()
        for key, base in outputs["none"].items():
            layer = adapter.layers[key[0]]
            assert layer.region is not None
            fields[key] = layer.region.field(base, layer.spec)
    assert len(fields) > 5
    seen = {"picture": 0, "text": 0}
    for key, field in fields.items():
        base = outputs["none"][key]
        axis = 1 if base.ndim > 3 else -1
        moved = {part: (outputs[part][key] - base).abs().amax(axis) > 1e-9 for part in seen}
        field = field.select(axis, 0).expand(moved["picture"].shape)
        # The other rows have the same region, but have not changed.
        first = torch.zeros_like(field, dtype=torch.bool)
        first[: 1 if base.ndim > 2 else len(base) // 2] = True
        inside = (field == 1) & first
        assert torch.equal(moved["picture"], inside), key
        seen["picture"] += bool(inside.any())
        if name not in CROSS:
            assert torch.all(field[moved["text"]] == 1 / SIDE**2), key
            seen["text"] += bool(moved["text"].any())
    assert seen["picture"] > 5, seen
    assert name in CROSS or seen["text"] > 1, seen
