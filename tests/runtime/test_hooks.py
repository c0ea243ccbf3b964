"""Layerwise casting and offloading do not change what an adapter does, whether installed before or after loading."""

from collections.abc import Callable
from typing import Any

import accelerate
import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.hooks import apply_layerwise_casting
from torch import Tensor

from tests.support import loras, models, spellings
from tests.support.compare import assert_differs, assert_same
from tests.support.models import draw
from tests.support.versions import needs

pytestmark = pytest.mark.slow

FP8 = torch.float8_e4m3fn
CPU = torch.device("cpu")
ORDERS = ["hook first", "adapter first", "hook between two adapters"]


def first(pipe: DiffusionPipeline) -> dict[str, dict[str, loras.Factors]]:
    return loras.parts_for(pipe, tuple(name for name in ("unet", "transformer", "text_encoder") if hasattr(pipe, name)))


def second(pipe: DiffusionPipeline) -> dict[str, dict[str, loras.Factors]]:
    name = "unet" if hasattr(pipe, "unet") else "transformer"
    return loras.parts_for(pipe, (name,), "to_q|conv1|proj_mlp", rank=2)


def prepared(
    order: str, hook: Callable[[DiffusionPipeline], Any], build: Callable[[], DiffusionPipeline] = models.sd15
) -> DiffusionPipeline:
    """Return a pipeline with both adapters and the hook, installed in this order."""
    plain, pipe = build(), build()
    loads = [
        lambda: pipe.load_adapter(spellings.peft_names(first(plain)), "first"),
        lambda: pipe.load_adapter(spellings.peft_names(second(plain)), "second", scale=0.5),
    ]
    position = {"hook first": 0, "hook between two adapters": 1, "adapter first": 2}[order]
    for step in (*loads[:position], lambda: hook(pipe), *loads[position:]):
        step()
    return pipe


def expected(build: Callable[[], DiffusionPipeline] = models.sd15) -> Tensor:
    """Return what a pipeline with both adapters draws without hooks."""
    plain = build()
    base = draw(plain)
    loras.bake(loras.bake(plain, first(plain)), second(plain), 0.5)
    picture = draw(plain)
    assert_differs(picture, base)
    return picture


def accelerate_layers(pipe: DiffusionPipeline) -> None:
    """Do what `enable_sequential_cpu_offload` does, which itself does not accept the CPU as the accelerator."""
    for model in (pipe.unet, pipe.text_encoder, pipe.vae):
        accelerate.cpu_offload(model, execution_device=CPU)


def offload_pipeline(pipe: DiffusionPipeline) -> None:
    needs("diffusers", "0.36", "enable_group_offload of a pipeline")
    pipe.enable_group_offload(CPU, offload_type="leaf_level")


OFFLOADS: dict[str, Callable[[DiffusionPipeline], Any]] = {
    "sequential cpu offload": accelerate_layers,
    "model cpu offload": lambda pipe: pipe.enable_model_cpu_offload(device="cpu"),
    "group offload, leaves": lambda pipe: pipe.unet.enable_group_offload(CPU, offload_type="leaf_level"),
    "group offload, blocks": lambda pipe: pipe.unet.enable_group_offload(
        CPU, offload_type="block_level", num_blocks_per_group=1
    ),
    "group offload, pipeline": offload_pipeline,
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("offload", OFFLOADS)
def test_offloading_may_be_installed_at_any_time(offload: str, order: str) -> None:
    pipe = prepared(order, OFFLOADS[offload])
    picture = draw(pipe)
    assert_same(picture, expected())
    assert torch.equal(draw(pipe), picture)


@pytest.mark.parametrize("offload", OFFLOADS)
def test_adapters_are_managed_under_offloading(offload: str) -> None:
    pipe = prepared("hook first", OFFLOADS[offload])
    pipe.adapters.activate({"first": 0.5})
    plain = models.sd15()
    assert_same(draw(pipe), draw(loras.bake(plain, first(plain), 0.5)))
    with pipe.adapters.disabled():
        assert_same(draw(pipe), draw(models.sd15()), 1e-7)
    pipe.adapters.clear()
    assert_same(draw(pipe), draw(models.sd15()), 1e-7)


@pytest.mark.parametrize("offload", ["sequential cpu offload", "model cpu offload"])
def test_hooks_can_be_removed_with_adapters_loaded(offload: str) -> None:
    pipe = prepared("adapter first", OFFLOADS[offload])
    draw(pipe)
    for model in (pipe.unet, pipe.text_encoder, pipe.vae):
        accelerate.hooks.remove_hook_from_module(model, recurse=True)
    assert_same(draw(pipe), expected())


@pytest.mark.parametrize("offload", OFFLOADS)
def test_adapters_are_merged_under_offloading(offload: str) -> None:
    pipe = prepared("hook first", OFFLOADS[offload])
    picture = draw(pipe)
    pipe.adapters.merge("first", "second")
    assert_same(draw(pipe), picture)
    pipe.adapters.unmerge()
    assert torch.equal(draw(pipe), picture)
    pipe.adapters.clear()
    assert_same(draw(pipe), draw(models.sd15()), 1e-7)


def cast(pipe: DiffusionPipeline) -> None:
    denoiser = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    denoiser.enable_layerwise_casting(storage_dtype=FP8, compute_dtype=torch.float32)


def rounded(build: Callable[[], DiffusionPipeline]) -> DiffusionPipeline:
    """Return a pipeline without hooks whose weights are rounded to float8 where layerwise casting rounds them."""
    pipe, hooked = build(), build()
    cast(hooked)
    name = "unet" if hasattr(pipe, "unet") else "transformer"
    stored = {path: p.dtype for path, p in getattr(hooked, name).named_parameters()}
    assert FP8 in stored.values()
    for path, parameter in getattr(pipe, name).named_parameters():
        parameter.data = parameter.data.to(stored[path]).float()
    return pipe


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("build", [models.sd15, models.flux])
def test_layerwise_casting_may_be_installed_at_any_time(build: Callable[[], DiffusionPipeline], order: str) -> None:
    pipe = prepared(order, cast, build)
    assert_same(draw(pipe), expected(lambda: rounded(build)))


@pytest.mark.parametrize("order", ORDERS)
def test_layerwise_casting_of_all_layers_leaves_adapters_in_their_dtype(order: str) -> None:
    def everything(pipe: DiffusionPipeline) -> None:
        apply_layerwise_casting(
            pipe.unet, storage_dtype=FP8, compute_dtype=torch.float32, skip_modules_pattern=("norm",)
        )

    pipe = prepared(order, everything)
    loaded = [pipe.adapters[name].components["unet"] for name in ("first", "second")]
    before = [parameter.clone() for adapter in loaded for parameter in adapter.parameters()]
    assert {parameter.dtype for parameter in before} == {torch.float32}
    picture = draw(pipe)
    after = [parameter for adapter in loaded for parameter in adapter.parameters()]
    assert all(torch.equal(left, right) for left, right in zip(before, after, strict=True))
    pipe.adapters.activate({})
    assert_differs(picture, draw(pipe))


def test_an_adapter_gets_the_compute_dtype_and_not_the_stored_one() -> None:
    pipe = models.sd15()
    pipe.unet.enable_layerwise_casting(storage_dtype=FP8, compute_dtype=torch.bfloat16)
    pipe.load_adapter(spellings.peft_names(second(pipe)), "a")
    assert {p.dtype for p in pipe.adapters["a"].components["unet"].parameters()} == {torch.bfloat16}


def test_adapters_are_merged_under_layerwise_casting() -> None:
    pipe = prepared("hook first", cast)
    weights = {name: p.clone() for name, p in pipe.unet.named_parameters()}
    picture = draw(pipe)
    pipe.adapters.merge("first", "second")
    # The merged weight is rounded to float8 again, so the outputs differ by its error.
    assert_same(draw(pipe), picture, 0.2)
    pipe.adapters.unmerge()
    assert torch.equal(draw(pipe), picture)
    changed = [name for name, p in pipe.unet.named_parameters() if not torch.equal(p.float(), weights[name].float())]
    assert changed == []


def test_clearing_under_layerwise_casting_is_bit_exact() -> None:
    hooked = models.sd15()
    cast(hooked)
    pipe = prepared("hook first", cast)
    pipe.adapters.clear()
    assert torch.equal(draw(pipe), draw(hooked))


def test_an_output_that_a_users_hook_has_kept_does_not_change() -> None:
    """The adapter must not add to it in place."""
    pipe = models.sd15()
    path, layer = next(iter(loras.layers_of(pipe.unet, "to_q").items()))
    kept: list[tuple[Tensor, Tensor]] = []
    layer.register_forward_hook(lambda module, args, output: kept.append((output, output.clone())))
    pipe.load_adapter(spellings.peft_names(loras.parts_for(pipe, ("unet",), "to_q")))
    draw(pipe)
    assert kept
    assert all(torch.equal(output, copy) for output, copy in kept), path
