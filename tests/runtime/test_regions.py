"""Regions on whole denoisers, in float64, compared with layers whose outputs are blended by position."""

from copy import deepcopy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import diffadapt
from diffadapt import AdapterError
from tests.support.calls import CALLS, output
from tests.support.cases import for_each
from tests.support.compare import assert_differs, assert_same
from tests.support.denoisers import SMALL

ROWS = 2
# The number of tokens of the text, and whether they come before the picture where both are in one sequence.
SEQUENCES: dict[str, tuple[int, bool]] = {
    "sd": (5, True),
    "sd3": (5, True),
    "flux": (5, True),
    "lumina2": (5, True),
    "hunyuan-image": (8, False),
}
SUPPORTED = [*SEQUENCES, "sdxl", "chroma", "flux2", "qwen", "zimage", "pixart", "sana", "auraflow", "cogview4", "wan"]
WITH_SLOTS = ("sdxl", "flux", "zimage")
LINEAR: dict[str, Any] = {"target_modules": "all-linear", "init": False}
CONFIGS: dict[str, diffadapt.AdapterConfig] = {
    "lora": diffadapt.LoraConfig(rank=2, alpha=1, **LINEAR),
    "oft": diffadapt.OFTConfig(block_size=2, **LINEAR),
    "dora": diffadapt.LoraConfig(rank=2, use_dora=True, **LINEAR),
}


def build(name: str) -> nn.Module:
    return SMALL[name].build()[next(iter(SMALL[name].components))].double()


def adapt(model: nn.Module, kind: str, name: str = "a") -> None:
    adapter = diffadapt.add_adapter(model, CONFIGS[kind], name).requires_grad_(False)
    for parameter in adapter.parameters():
        parameter.mul_(0.3)


def random_mask(side: int = 8) -> Tensor:
    """Return a mask of numbers that are exact in half precision, and whose means are, too."""
    return torch.randint(0, 17, (side, side)).double() / 16


def field_of(name: str, vectors: Tensor, mask: Tensor) -> Tensor:
    """Return what the mask is at the positions of an output, told by its number of tokens."""

    def resized(height: int, width: int) -> Tensor:
        return F.interpolate(mask[None, None], (height, width), mode="area")

    text, text_first = SEQUENCES[name]
    if vectors.ndim == 4:
        return resized(*vectors.shape[-2:])
    if vectors.ndim == 3 and vectors.shape[1] not in (3, 5, text):
        tokens = vectors.shape[1]
        side = next(side for side in (2, 4, 8) if tokens in (side**2, side**2 + text))
        picture = resized(side, side).flatten()
        rest = mask.mean().expand(tokens - side**2)
        return torch.cat([rest, picture] if text_first else [picture, rest])[:, None]
    return mask.mean()


@torch.no_grad()
@for_each(name=SEQUENCES, kind=["lora", "oft"])
def test_every_layer_blends_its_outputs_with_and_without_the_adapter(name: str, kind: str) -> None:
    model, base, call = build(name), build(name), CALLS[name](ROWS)
    adapt(model, kind)
    adapters, mask = diffadapt.adapters(model), random_mask()
    full = output(model, call)
    adapters.merge("a")
    changed = deepcopy(model)
    adapters.unmerge()

    def blend(path: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, result: Tensor) -> Tensor:
            other = nn.Module.__call__(changed.get_submodule(path), *args, **kwargs)
            return result + field_of(name, result, mask) * (other - result)

        return hook

    for path in adapters["a"].components[next(iter(adapters["a"].components))].layers:
        base.get_submodule(path).register_forward_hook(blend(path), with_kwargs=True)
    expected = output(base, call)
    with adapters.regions({"a": mask}):
        found = output(model, call)
    # Models compute some steps in float32.
    assert_same(found, expected, 1e-6)
    assert_differs(found, full, 1e-3)


@torch.no_grad()
@for_each(name=SUPPORTED)
def test_identities_hold_with_and_without_slots(name: str) -> None:
    model, call, mask = build(name), CALLS[name](ROWS), random_mask(12)
    base = output(model, call)
    for adapter, kind in {"a": "lora", "b": "lora", "c": "dora", "d": "oft"}.items():
        adapt(model, kind, adapter)
    adapters = diffadapt.adapters(model)
    adapters.activate("a")
    full = output(model, call)
    adapters.activate(["a", "c", "d"])
    three = output(model, call)
    assert_differs(full, base, 1e-3)
    found: dict[bool, list[Tensor]] = {}
    slots = False
    for slots in (False, True) if name in WITH_SLOTS else (False,):
        adapters.activate(["a", "c", "d"])
        if slots:
            adapters.prepare_hotswap([*CONFIGS.values()], slots=3)
            three = output(model, call)
        with adapters.regions(dict.fromkeys("acd", torch.ones(3, 3))):
            assert torch.equal(output(model, call), three)
        with adapters.regions(dict.fromkeys("acd", torch.zeros(3, 3))):
            assert slots or torch.equal(output(model, call), base)
            assert_same(output(model, call), base, 1e-12)
        adapters.activate("a")
        with adapters.regions({"a": mask, "b": 1 - mask}):
            assert_same(output(model, call), full, 1e-6)
        with adapters.regions({"a": mask, "c": mask.T, "d": 1 - mask}):
            found[slots] = [output(model, call)]
        if name == "zimage":
            # It joins the texts of all rows.
            message = r"cap_embedder\.1 gets vectors of shape \(64, \d+\)"
            with adapters.regions({"a": torch.stack([mask, mask.T])}), pytest.raises(AdapterError, match=message):
                output(model, call)
            continue
        with adapters.regions({"a": torch.stack([mask, mask.T])}):
            found[slots].append(output(model, call))
        for row in range(ROWS):
            with adapters.regions({"a": mask.T if row else mask}):
                assert_same(output(model, call)[row], found[slots][1][row], 1e-6)
    for one, two in zip(found[False], found[slots], strict=True):
        assert_same(one, two, 1e-6)
        assert_differs(one, full, 1e-3)


@torch.no_grad()
@for_each(name=["flux", "qwen"])
def test_reference_pictures_after_the_picture_get_the_mean(name: str) -> None:
    model, call = build(name), CALLS[name](1)
    call["hidden_states"] = torch.cat([call["hidden_states"], torch.randn(1, 6, 16, dtype=torch.float64)], 1)
    if name == "flux":
        places = torch.cartesian_prod(torch.ones(1), torch.arange(2.0), torch.arange(3.0)).double()
        call["img_ids"] = torch.cat([call["img_ids"], places])
    else:
        call["img_shapes"] = [[(1, 4, 4), (1, 2, 3)]]
    adapter = diffadapt.add_adapter(model, diffadapt.LoraConfig(rank=1, target_modules="all-linear"), "a")
    mask, fields = random_mask(4), list[Tensor]()
    path = "x_embedder" if name == "flux" else "img_in"
    layer = adapter.layers[path]

    def read(module: nn.Module, args: Any, result: Tensor) -> None:
        assert layer.region is not None
        fields.append(layer.region.field(result, layer.spec).flatten())

    model.get_submodule(path).register_forward_hook(read)
    with diffadapt.adapters(model).regions({"a": mask}):
        output(model, call)
    assert torch.equal(fields[0].double(), torch.cat([mask.flatten(), mask.mean().float().double().expand(6)]))


@torch.no_grad()
def test_tokens_that_are_not_known_are_refused_by_the_name_of_the_layer() -> None:
    model, call = build("flux"), CALLS["flux"](1)
    adapt(model, "lora")
    adapters, mask = diffadapt.adapters(model), random_mask()
    with adapters.regions({"a": mask}):
        expected = output(model, call)
        with pytest.raises(AdapterError, match="img_ids of this FluxTransformer2DModel are not the rows and columns"):
            output(model, {**call, "img_ids": torch.zeros(16, 3)})
        model.transformer_blocks[0].ff.register_forward_pre_hook(lambda module, args: (args[0][:, ::2],))  # type: ignore[union-attr]
        message = r"transformer_blocks\.0\.ff\.net\.0\.proj gets vectors of shape \(1, 8, 128\).*known are .* 16 tokens"
        with pytest.raises(AdapterError, match=message):
            output(model, call)
        model.transformer_blocks[0].ff._forward_pre_hooks.clear()  # type: ignore[union-attr]
        assert torch.equal(output(model, call), expected)
    model.enable_gradient_checkpointing()  # type: ignore[operator]
    with torch.enable_grad(), adapters.regions({"a": mask}), pytest.raises(AdapterError, match="computed again during"):
        model(**call)
