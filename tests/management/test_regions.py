"""`pipe.adapters.regions`: adapters act in parts of the picture only."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import diffadapt
from diffadapt import AdapterError
from diffadapt.runtime.bank import bank_of
from tests.support import loras, models, spellings
from tests.support.cases import for_each
from tests.support.compare import assert_differs, assert_same, assert_unchanged, snapshot
from tests.support.small_models import unet

pytestmark = pytest.mark.slow

PROMPTS = ["a red circle", "a blue square on a hill"]
LEFT = torch.zeros(8, 8)
LEFT[:, :4] = 1
SOFT = torch.linspace(0, 1, 16).expand(12, 16)
FAMILIES = {"sd15": "unet", "flux": "transformer"}


def loaded(family: str = "sd15") -> DiffusionPipeline:
    """Return a pipeline with the adapter "a" on the denoiser and the text encoder, "b" equal to it, and an OFT "c"."""
    pipe = models.FAMILIES[family]()
    parts = loras.parts_for(pipe, (FAMILIES[family], "text_encoder"), r"to_[qkv]|[qkv]_proj|conv1|ff.net.2|proj_mlp")
    for name in ("a", "b"):
        pipe.load_adapter(spellings.peft_names(parts), name, activate=False)
    layers = ["to_q", "to_v", "proj_out", *(["conv2"] if family == "sd15" else [])]
    config = diffadapt.OFTConfig(block_size=2, target_modules=layers, init=False)
    diffadapt.add_adapter(getattr(pipe, FAMILIES[family]), config, "c").requires_grad_(False)
    pipe.adapters.activate("a")
    return pipe


def draw(
    pipe: DiffusionPipeline, prompts: list[str] | None = None, images: int = 1, first: int = 0, **options: Any
) -> Tensor:
    """Return latents; the noise of a picture depends on its number alone."""
    prompts = PROMPTS[:1] if prompts is None else prompts
    generators = [torch.Generator().manual_seed(first + number) for number in range(len(prompts) * images)]
    options = {"guidance_scale": 4.0, "num_inference_steps": 2, "height": 32, "width": 16, **options}
    with torch.no_grad():
        return pipe(
            prompt=prompts, num_images_per_prompt=images, generator=generators, output_type="latent", **options
        ).images


@for_each(family=FAMILIES)
def test_ones_are_no_mask_zeros_the_base_and_complements_the_adapter(family: str) -> None:
    pipe = loaded(family)
    full = draw(pipe)
    pipe.adapters.activate(["a", "c"])
    both = draw(pipe)
    pipe.adapters.activate("a")
    pristine = snapshot(pipe)
    with pipe.adapters.disabled():
        base = draw(pipe)
    assert_differs(full, base, 1e-2)
    with pipe.adapters.regions({"a": torch.ones(5, 7)}):
        assert torch.equal(draw(pipe), full)
    with pipe.adapters.regions({"a": np.zeros((5, 7), dtype=bool)}):
        assert torch.equal(draw(pipe), base)
    drawn: list[Tensor] = []
    for mask in (LEFT, SOFT, 1 - LEFT):
        with pipe.adapters.regions({"a": mask, "b": 1 - mask}):
            # "b" is activated with its strength.
            assert pipe.adapters.active == {"a": 1.0, "b": 1.0}
            assert_same(draw(pipe), full, 2e-5)
        with pipe.adapters.regions({"a": mask}):
            drawn.append(draw(pipe))
        for other in (full, base, *drawn[:-1]):
            assert_differs(drawn[-1], other, 1e-3)
    with pipe.adapters.regions({"a": torch.ones(2, 2), "c": torch.ones(2, 2)}):
        assert torch.equal(draw(pipe), both)
    assert_unchanged(pipe, pristine)
    assert torch.equal(draw(pipe), full)


@for_each(options=[{}, {"cross_attention_kwargs": {"scale": 0.5}, "guidance_scale": 1.0}])
def test_a_mask_of_one_number_is_a_factor_of_every_kind_of_strength(options: dict[str, Any]) -> None:
    pipe = loaded()
    mask = torch.full((4, 4), 0.25)
    strengths: list[tuple[Any, Any]] = [
        (0.8, 0.2),
        ({"unet": 0.8, "unet.up_blocks": 0.4, "": 1.2}, {"unet": 0.2, "unet.up_blocks": 0.1, "": 0.3}),
        (diffadapt.Linear(2.0, 0.4), diffadapt.Linear(0.5, 0.1)),
    ]
    for whole, quarter in strengths:
        with pipe.adapters.activated({"a": quarter}):
            expected = draw(pipe, **options)
        with pipe.adapters.activated({"a": whole}):
            full = draw(pipe, **options)
            with pipe.adapters.regions({"a": mask}):
                assert_same(draw(pipe, **options), expected, 2e-5)
            assert torch.equal(draw(pipe, **options), full)
        assert_differs(full, expected, 1e-3)


@for_each(guidance=[4.0, 1.0])
def test_prompts_of_a_batch_have_masks_and_mixes_of_their_own(guidance: float) -> None:
    pipe = loaded()
    masks = torch.stack([LEFT, torch.flip(LEFT, [1])])
    mixes: list[dict[str, float]] = [{"a": 1.0}, {"a": 0.5, "c": 1.0}]
    options: dict[str, Any] = {"guidance_scale": guidance, "images": 2}
    alone: dict[str, list[Tensor]] = {"masks": [], "mixes": [], "both": []}
    for number, (mask, mix) in enumerate(zip(masks, mixes, strict=True)):
        own = {"prompts": PROMPTS[number : number + 1], "first": 2 * number, **options}
        with pipe.adapters.regions({"a": mask}):
            alone["masks"].append(draw(pipe, **own))
        with pipe.adapters.activated(mix):
            with pipe.adapters.regions({"a": SOFT}):
                alone["mixes"].append(draw(pipe, **own))
            with pipe.adapters.regions({"a": mask}):
                alone["both"].append(draw(pipe, **own))
    together: dict[str, Tensor] = {}
    with pipe.adapters.regions({"a": masks}):
        together["masks"] = draw(pipe, PROMPTS, **options)
        with pipe.adapters.per_sample(mixes):
            together["both"] = draw(pipe, PROMPTS, **options)
        with pytest.raises(AdapterError, match="masks for 2 prompts, but the pipeline encodes 1 prompts"):
            draw(pipe, PROMPTS[:1], **options)
    with pipe.adapters.per_sample(mixes):
        with pipe.adapters.regions({"a": SOFT}):
            together["mixes"] = draw(pipe, PROMPTS, **options)
        for count, message in ((3, "masks for 3 prompts, but per_sample has mixes for 2"), (1, "in none of the mixes")):
            with pytest.raises(AdapterError, match=message):
                with pipe.adapters.regions({"a" if count > 1 else "b": torch.ones(count, 2, 2)}):
                    pass
    for name, drawn in together.items():
        assert_same(drawn, torch.cat(alone[name]), 2e-5)
        assert_differs(alone[name][0], alone[name][1], 1e-2)


def test_masks_have_many_forms() -> None:
    pipe = loaded()
    pixels = (SOFT * 255).round().to(torch.uint8)
    soft, hard = pixels.double() / 255, pixels > 100
    image = Image.fromarray(pixels.numpy())
    forms: list[list[Any]] = [
        [soft, soft[None], soft[None, None], soft.float(), soft.numpy(), soft.tolist(), image, image.convert("RGB")],
        [hard, hard.numpy(), hard.long(), Image.fromarray(hard.numpy()), hard.repeat_interleave(3, 0)],
    ]
    for group in forms:
        drawn: list[Tensor] = []
        for mask in group:
            with pipe.adapters.regions({"a": mask}):
                drawn.append(draw(pipe))
        for other in drawn[1:]:
            assert_same(other, drawn[0], 1e-5)


INVALID: list[tuple[Any, str]] = [
    ({"z": LEFT}, "no adapter 'z'; loaded are a, b, c"),
    ({}, "expected a mapping from adapter names to masks"),
    (LEFT, "expected a mapping from adapter names to masks"),
    ({"a": LEFT * float("nan")}, r"the mask of 'a' has values that are not numbers \(NaN\), expected 0 to 1"),
    ({"a": LEFT * 2 - 1}, "values from -1 to 1, expected 0 to 1"),
    ({"a": LEFT * 255}, "values from 0 to 255, expected 0 to 1; divide it by 255"),
    ({"a": torch.zeros(4)}, r"has the shape \(4,\), expected \(height, width\)"),
    ({"a": torch.zeros(2, 3, 4, 4)}, r"has the shape \(2, 3, 4, 4\)"),
    ({"a": torch.zeros(0, 4)}, r"has the shape \(0, 4\)"),
    ({"a": "left"}, "is a str that is no mask"),
    ({"a": None}, "is a NoneType that is no mask"),
    ({"a": LEFT + 0j}, "has no real numbers"),
    ({"a": Image.new("RGBA", (4, 4))}, r"image of mode 'RGBA', expected a grey one; call convert\('L'\)"),
    ({"a": Image.new("RGB", (4, 4), "red")}, "image with colours"),
    ({"a": torch.zeros(2, 4, 4), "b": torch.zeros(3, 4, 4)}, "masks for 2 and for 3 prompts"),
    ({"a": LEFT, "b": torch.ones(2, 2) * 3}, "values from 3 to 3"),
]


def test_what_is_no_mask_is_refused_and_nothing_changes() -> None:
    pipe = loaded()
    with pipe.adapters.activated("c"):
        draw(pipe)
    drawn, before = draw(pipe), snapshot(pipe)
    for masks, message in INVALID:
        with pytest.raises(AdapterError, match=message), pipe.adapters.regions(masks):
            pass
    diffadapt.add_tokens(pipe, {"<toy>": 1}, "toy")
    with pytest.raises(AdapterError, match="'toy' has learned tokens only"), pipe.adapters.regions({"toy": LEFT}):
        pass
    pipe.adapters.remove("toy")
    pipe.adapters.merge("a")
    with pytest.raises(AdapterError, match=r"'a' is merged into the weights.*call unmerge\(\) first"):
        with pipe.adapters.regions({"a": LEFT}):
            pass
    with pipe.adapters.regions({"c": LEFT}):
        assert_differs(draw(pipe), drawn, 1e-3)
    pipe.adapters.unmerge()
    assert pipe.adapters.active == {"a": 1.0}
    assert_unchanged(pipe, before)
    assert torch.equal(draw(pipe), drawn)


def test_blocks_nest_and_end_with_an_exception() -> None:
    pipe = loaded()
    full = draw(pipe)
    with pipe.adapters.regions({"a": LEFT, "c": 1 - LEFT}):
        outer = draw(pipe)
        with pipe.adapters.regions({"a": 1 - LEFT}):
            inner = draw(pipe)
        with pytest.raises(ValueError, match="own"), pipe.adapters.regions({"a": SOFT}):
            raise ValueError("own")
        assert torch.equal(draw(pipe), outer)
        with pipe.adapters.activated("a"):
            only = draw(pipe)
        with pipe.adapters.disabled():
            base = draw(pipe)
        with pytest.raises(AdapterError, match="a merged adapter acts everywhere"):
            pipe.adapters.merge("a")
        # Whatever has the name has the mask.
        pipe.adapters.hotswap("a", spellings.peft_names(loras.parts_for(pipe, ("unet",), "to_q")))
        with pipe.adapters.activated("a"):
            swapped = draw(pipe)
        with ThreadPoolExecutor(1) as other, pytest.raises(AdapterError, match="another thread has activated adapters"):
            other.submit(draw, pipe).result()
    assert bank_of(pipe.unet).call.regions is None
    assert pipe.adapters.active == {"a": 1.0}
    assert_differs(draw(pipe), swapped, 1e-3)
    pipe.adapters.hotswap("a", spellings.peft_names(_parts(pipe)))
    assert torch.equal(draw(pipe), full)
    with pipe.adapters.regions({"a": LEFT}):
        assert torch.equal(draw(pipe), only)
    for one, two in ((outer, inner), (outer, only), (only, base), (base, full), (swapped, base)):
        assert_differs(one, two, 1e-3)


def _parts(pipe: DiffusionPipeline) -> Any:
    return loras.parts_for(pipe, ("unet", "text_encoder"), r"to_[qkv]|[qkv]_proj|conv1|ff.net.2|proj_mlp")


@for_each(
    enable=[
        lambda pipe: pipe.unet.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level"),
        lambda pipe: pipe.unet.enable_layerwise_casting(storage_dtype=torch.float16, compute_dtype=torch.float32),
    ]
)
def test_regions_under_the_hooks_of_diffusers(enable: Callable[[DiffusionPipeline], None]) -> None:
    pipe, plain = loaded(), loaded()
    plain.unet.half().float()
    enable(pipe)
    with pipe.adapters.regions({"a": LEFT, "c": SOFT}), plain.adapters.regions({"a": LEFT, "c": SOFT}):
        assert_same(draw(pipe), draw(plain), 5e-3)
        assert_differs(draw(pipe), draw(pipe, prompts=PROMPTS[1:]), 1e-2)


def test_other_masks_do_not_recompile_a_prepared_denoiser(counter: CompileCounterWithBackend) -> None:
    pipe, plain = models.sd15(), models.sd15()
    config = diffadapt.OFTConfig(block_size=2, target_modules=["to_k", "conv1"])
    for owner in (pipe, plain):
        owner.unet = unet()
        lora = spellings.peft_names(loras.parts_for(owner, ("unet",), pattern=r"to_[qv]"))
        if owner is pipe:
            owner.adapters.prepare_hotswap([lora, config], slots=2, samples=2, regions=True)
        for name in ("a", "b"):
            owner.load_adapter(lora, name)
    pipe.unet.compile(backend=counter, fullgraph=True)
    drawn = [draw(pipe, PROMPTS)]
    assert_same(drawn[0], draw(plain, PROMPTS), 2e-5)
    chosen: list[dict[str, Any]] = [
        {"a": LEFT, "b": 1 - LEFT},
        {"b": SOFT},
        {"a": torch.ones(2, 2), "b": torch.zeros(3, 3)},
        {"a": torch.stack([LEFT, SOFT.T[:8, :8]])},
    ]
    for masks in chosen:
        with pipe.adapters.regions(masks):
            drawn.append(draw(pipe, PROMPTS))
        with plain.adapters.regions(masks):
            assert_same(drawn[-1], draw(plain, PROMPTS), 2e-5)
        assert_differs(drawn[-1], drawn[0], 1e-3)
    assert torch.equal(draw(pipe, PROMPTS), drawn[0])
    assert counter.frame_count == 1
    pipe.adapters.release_slots()
    assert bank_of(pipe.unet).call.regions is None
