"""diffusers' own call scale reaches denoiser and text encoders, with and without peft, and ends with the call."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from torch import Tensor, nn

import diffadapt
from tests.support import loras, models, spellings
from tests.support.compare import assert_differs, assert_same, assert_unchanged, snapshot
from tests.support.models import draw
from tests.support.small_models import predict

pytestmark = pytest.mark.slow

KEYWORDS = {
    "sd15": "cross_attention_kwargs",
    "sdxl": "cross_attention_kwargs",
    "sd3": "joint_attention_kwargs",
    "flux": "joint_attention_kwargs",
}
COMPONENTS = {
    "sd15": ("unet", "text_encoder"),
    "sdxl": ("unet", "text_encoder", "text_encoder_2"),
    "sd3": ("transformer", "text_encoder", "text_encoder_2"),
    "flux": ("transformer", "text_encoder"),
}


@pytest.fixture(params=["peft present", "peft hidden"])
def _with_and_without_peft(request: pytest.FixtureRequest) -> None:
    if request.param == "peft hidden":
        request.getfixturevalue("peft_hidden")


def loaded(family: str) -> tuple[DiffusionPipeline, dict[str, dict[str, loras.Factors]]]:
    pipe = models.FAMILIES[family]()
    parts = loras.parts_for(pipe, COMPONENTS[family])
    pipe.load_adapter(spellings.peft_names(parts), "a")
    return pipe, parts


def expected(family: str, parts: loras.Parts, strength: float) -> Tensor:
    return draw(loras.bake(models.FAMILIES[family](), parts, strength))


@pytest.mark.usefixtures("_with_and_without_peft")
@pytest.mark.parametrize("family", KEYWORDS)
def test_a_call_scale_multiplies_the_strength_during_one_call(family: str) -> None:
    pipe, parts = loaded(family)
    full = draw(pipe)
    options = {KEYWORDS[family]: {"scale": 0.5}}
    half = draw(pipe, **options)
    assert options == {KEYWORDS[family]: {"scale": 0.5}}
    assert_same(half, expected(family, parts, 0.5))
    assert_differs(half, full, 1e-3)
    assert torch.equal(draw(pipe), full)
    assert pipe.adapters.active == {"a": 1.0}
    assert_same(draw(pipe, **{KEYWORDS[family]: {"scale": 0.0}}), draw(models.FAMILIES[family]()), 1e-6)
    assert torch.equal(draw(pipe), full)


@pytest.mark.usefixtures("_with_and_without_peft")
def test_the_call_scale_reaches_the_text_encoder() -> None:
    pipe = models.sd15()
    parts = loras.parts_for(pipe, ("text_encoder",))
    pipe.load_adapter(spellings.peft_names(parts))
    halved = draw(pipe, cross_attention_kwargs={"scale": 0.5})
    assert_same(halved, expected("sd15", parts, 0.5))
    assert_differs(halved, draw(pipe), 1e-3)


@pytest.mark.usefixtures("_with_and_without_peft")
@pytest.mark.parametrize("by_position", [False, True])
def test_encode_prompt_takes_a_scale(by_position: bool) -> None:
    pipe, parts = loaded("sd15")
    full, _ = pipe.encode_prompt(models.PROMPT, "cpu", 1, False)
    if by_position:
        half, _ = pipe.encode_prompt(models.PROMPT, "cpu", 1, False, None, None, None, 0.5)
    else:
        half, _ = pipe.encode_prompt(models.PROMPT, "cpu", 1, False, lora_scale=0.5)
    plain = loras.bake(models.sd15(), {"text_encoder": parts["text_encoder"]}, 0.5)
    assert_same(half, plain.encode_prompt(models.PROMPT, "cpu", 1, False)[0])
    assert_differs(half, full, 1e-3)
    assert torch.equal(pipe.encode_prompt(models.PROMPT, "cpu", 1, False)[0], full)


@pytest.mark.usefixtures("_with_and_without_peft")
def test_the_call_scale_multiplies_strengths_by_component_under_guidance() -> None:
    pipe, parts = loaded("sd15")
    pipe.adapters.activate({"a": {"unet": 0.8, "text_encoder": 0.4}})
    picture = draw(pipe, guidance_scale=4.0, cross_attention_kwargs={"scale": 0.5})
    plain = loras.bake(models.sd15(), parts, {"unet": 0.4, "text_encoder": 0.2})
    assert_same(picture, draw(plain, guidance_scale=4.0))


@pytest.mark.usefixtures("_with_and_without_peft")
@pytest.mark.parametrize("pipeline_class", [StableDiffusionPipeline, StableDiffusionImg2ImgPipeline])
def test_the_call_scale_works_in_another_pipeline_with_the_same_models(pipeline_class: type[DiffusionPipeline]) -> None:
    pipe, parts = loaded("sd15")

    def picture(pipe: DiffusionPipeline, **options: Any) -> Tensor:
        other = pipeline_class(**pipe.components, requires_safety_checker=False)
        other.set_progress_bar_config(disable=True)
        assert other.adapters.names == pipe.adapters.names
        if pipeline_class is StableDiffusionPipeline:
            return draw(other, **options)
        image = torch.linspace(0, 1, 3 * 16 * 16).view(1, 3, 16, 16)
        noise = torch.Generator().manual_seed(1)
        options = {"num_inference_steps": 4, "guidance_scale": 1.0, "output_type": "latent", **options}
        with torch.no_grad():
            return other(models.PROMPT, image=image, generator=noise, **options).images

    full = picture(pipe)
    half = picture(pipe, cross_attention_kwargs={"scale": 0.5})
    assert_differs(half, full, 1e-3)
    assert_same(half, picture(loras.bake(models.sd15(), parts, 0.5)))


@pytest.mark.usefixtures("_with_and_without_peft")
def test_the_call_scale_works_in_a_modular_pipeline() -> None:
    pipe = models.sdxl_modular()
    parts = loras.parts_for(pipe, COMPONENTS["sdxl"])
    pipe.load_adapter(spellings.peft_names(parts))
    full = draw(pipe)
    half = draw(pipe, cross_attention_kwargs={"scale": 0.5})
    assert_differs(half, full, 1e-3)
    assert_same(half, draw(loras.bake(models.sdxl_modular(), parts, 0.5)))
    assert torch.equal(draw(pipe), full)


@pytest.mark.usefixtures("_with_and_without_peft")
def test_a_failed_call_leaves_no_scale_behind() -> None:
    pipe, _ = loaded("sd15")
    full = draw(pipe)

    def stop(*args: Any) -> None:
        raise RuntimeError("stop")

    for model in (pipe.unet, pipe.text_encoder):
        handle = next(iter(loras.layers_of(model).values())).register_forward_pre_hook(stop)
        with pytest.raises(RuntimeError, match="stop"):
            draw(pipe, cross_attention_kwargs={"scale": 0.5})
        handle.remove()
        assert torch.equal(draw(pipe), full)


@pytest.mark.usefixtures("_with_and_without_peft")
def test_a_call_scale_that_is_not_finite_is_refused() -> None:
    pipe, _ = loaded("sd15")
    before = draw(pipe)
    for scale in (float("nan"), float("inf"), -float("inf")):
        with pytest.raises(diffadapt.AdapterError, match=f"the scale of a call must be a finite number, not {scale}"):
            draw(pipe, cross_attention_kwargs={"scale": scale})
    assert torch.equal(draw(pipe), before)


def test_calls_with_a_scale_leave_nothing_behind_after_clear() -> None:
    pipe = models.sd15()
    draw(pipe, cross_attention_kwargs={})
    pipe._lora_scale = 0.5  # diffusers itself stores the last scale.
    before = snapshot(pipe)
    pipe.load_adapter(spellings.peft_names(loras.parts_for(pipe)))
    draw(pipe, cross_attention_kwargs={"scale": 0.5})
    pipe.adapters.clear()
    draw(pipe, cross_attention_kwargs={})
    assert_unchanged(pipe, before)


# Gradients


MODELS: dict[str, Callable[[], nn.Module]] = {"unet": models.unet_sd15, "flux": models.flux_transformer}


def trainable(build: Callable[[], nn.Module], checkpointing: bool) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    model = build()
    if checkpointing:
        model.enable_gradient_checkpointing()
    config = diffadapt.LoraConfig(rank=2, alpha=3, target_modules=["to_q", "to_out.0", "to_v"])
    adapter = diffadapt.add_adapter(model, config)
    generator = torch.Generator().manual_seed(4)
    for parameter in adapter.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    return model.train(), adapter


def gradients(name: str, scales: Iterable[float | None], checkpointing: bool) -> list[Tensor]:
    """Return the gradients of one backward pass after a forward pass with each scale."""
    model, adapter = trainable(MODELS[name], checkpointing)
    sum(predict(model, scale).square().sum() for scale in scales).backward()  # type: ignore[union-attr]
    return [parameter.grad for parameter in adapter.parameters() if parameter.grad is not None]


@pytest.mark.usefixtures("_with_and_without_peft")
@pytest.mark.parametrize("scales", [(0.5,), (0.5, 2.0), (None, 0.5), (0.5, None), (2.0, 0.0)], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_gradients_under_checkpointing_are_those_without(name: str, scales: tuple[float | None, ...]) -> None:
    reference = gradients(name, scales, checkpointing=False)
    full = gradients(name, [None] * len(scales), checkpointing=False)
    assert max((left - right).abs().max() for left, right in zip(reference, full, strict=True)) > 1e-2
    for actual, expected in zip(gradients(name, scales, checkpointing=True), reference, strict=True):
        assert_same(actual, expected)


@pytest.mark.parametrize("name", MODELS)
def test_gradients_with_a_call_scale_are_those_of_the_same_strength(name: str) -> None:
    model, adapter = trainable(MODELS[name], checkpointing=False)
    diffadapt.adapters(model).activate({"default": 0.5})
    predict(model).square().sum().backward()
    expected = [parameter.grad for parameter in adapter.parameters()]
    for actual, reference in zip(gradients(name, (0.5,), checkpointing=True), expected, strict=True):
        assert_same(actual, reference)


@pytest.mark.parametrize("name", MODELS)
def test_checkpointing_leaves_nothing_on_the_model(name: str) -> None:
    model, _ = trainable(MODELS[name], checkpointing=True)
    before = snapshot(model)
    predict(model, 0.5).square().sum().backward()
    for parameter in model.parameters():
        parameter.grad = None
    assert_unchanged(model, before)


def test_gradients_reach_every_layer_of_a_frozen_base() -> None:
    model, adapter = trainable(models.unet_sd15, checkpointing=True)
    model.requires_grad_(False)
    adapter.requires_grad_(True)
    predict(model, 0.5).square().sum().backward()
    # The deepest self-attention sees a single position, so its queries have a gradient of zero.
    values = [p for name, p in adapter.named_parameters() if "to_q" not in name]
    assert all(parameter.grad.abs().sum() > 0 for parameter in values)
    assert all(parameter.grad is None for parameter in model.parameters() if not parameter.requires_grad)
