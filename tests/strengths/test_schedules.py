"""A schedule equals a strength set by hand before every step, bit for bit, on any pipeline."""

import copy
import inspect
import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    EulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    IPNDMScheduler,
    KDPM2DiscreteScheduler,
    PNDMScheduler,
    StableDiffusionImg2ImgPipeline,
    UNet2DModel,
)
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import diffadapt
from diffadapt import AdapterError, Cosine, Linear, Piecewise
from diffadapt.strengths.schedules import START, Moment
from tests.support import loras, models, spellings
from tests.support.compare import assert_differs, assert_same, assert_unchanged, snapshot
from tests.support.models import draw

# The warning comes from diffusers' schedulers with numpy 2.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")]

RAMP = Linear(1.0, 0.2)
STEPS = 4
DENOISERS = {"sd15": "unet", "sdxl": "unet", "sd3": "transformer", "flux": "transformer"}


def loaded(build: Callable[[], Any], components: Sequence[str] = ("unet", "text_encoder"), **options: Any) -> Any:
    pipe = build()
    pipe.load_adapter(spellings.peft_names(loras.parts_for(pipe, tuple(components))), "a", **options)
    return pipe


def moment(step: int, steps: int = 5, sigma: float = 0.0) -> Moment:
    return Moment(step, steps, lambda: sigma)


def recorded(pipe: Any, component: str = "unet", name: str = "a") -> list[float]:
    """Return a list that gets the strength at every call of a model, from the tensor that its adapter layers read."""
    seen: list[float] = []
    adapter = pipe.adapters[name].components[component]
    getattr(pipe, component).register_forward_pre_hook(lambda *_: seen.append(float(adapter.gates[0])))
    return seen


def by_hand(pipe: Any, strengths: Sequence[Any], **options: Any) -> Tensor:
    """Draw with the first strength set before the run, and each other one after the preceding step."""

    def ended(_: Any, index: int, timestep: Any, arguments: dict[str, Any]) -> dict[str, Any]:
        pipe.adapters.activate({"a": strengths[min(index + 1, len(strengths) - 1)]})
        return arguments

    pipe.adapters.activate({"a": strengths[0]})
    return draw(pipe, num_inference_steps=len(strengths), callback_on_step_end=ended, **options)


def with_scheduler(pipe: Any, scheduler_class: Any, **options: Any) -> Any:
    pipe.scheduler = scheduler_class.from_config(pipe.scheduler.config, **options)
    return pipe


def image_to_image(pipe: Any) -> Any:
    other = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    return other


def redraw(pipe: Any, steps: int = 8, strength: float = 0.5) -> Tensor:
    image = torch.linspace(0, 1, 3 * 16 * 16).view(1, 3, 16, 16)
    noise = torch.Generator().manual_seed(1)
    return pipe(
        models.PROMPT, image=image, generator=noise, num_inference_steps=steps, strength=strength, output_type="latent"
    ).images


# Values


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (Linear(1.0, 0.0), [1.0, 0.75, 0.5, 0.25, 0.0]),
        (Linear(0.2, 1.0, between=(0.25, 0.75)), [0.2, 0.2, 0.6, 1.0, 1.0]),
        (Linear(0.0, 1.0, between=(1, 3), over="step"), [0.0, 0.0, 0.5, 1.0, 1.0]),
        (Cosine(0.0, 1.0), [0.0, (1 - math.sqrt(0.5)) / 2, 0.5, (1 + math.sqrt(0.5)) / 2, 1.0]),
        (Piecewise([(0, 0.0), (0.5, 1.0), (1, 0.5)]), [0.0, 0.5, 1.0, 0.75, 0.5]),
        (Piecewise([(0, 0.0), (0.5, 1.0), (0.5, 0.4), (1, 0.4)]), [0.0, 0.5, 0.4, 0.4, 0.4]),
        (Piecewise([(0.25, 0.8), (0.75, 0.0)], hold=True), [0.8, 0.8, 0.8, 0.0, 0.0]),
        (Piecewise([(0, 0.0), (2, 0.7)], hold=True, over="step"), [0.0, 0.0, 0.7, 0.7, 0.7]),
    ],
)
def test_schedules_have_these_values_at_the_steps_of_a_run(schedule: diffadapt.Schedule, expected: list[float]) -> None:
    assert [schedule.at(moment(step)) for step in range(5)] == pytest.approx(expected)
    assert schedule.at(START) == schedule.at(moment(0, 1)) == pytest.approx(expected[0])


def test_the_ends_of_a_ramp_are_exact() -> None:
    for ramp in (Linear, Cosine):
        assert [ramp(1.0, 0.2).at(moment(step)) for step in (0, 4)] == [1.0, 0.2]


def test_schedules_can_follow_sigma() -> None:
    ramp = Linear(1.0, 0.2, between=(10.0, 2.0), over="sigma")
    assert [ramp.at(moment(0, sigma=sigma)) for sigma in (14.0, 10.0, 6.0, 2.0, 0.1)] == [1.0, 1.0, 0.6, 0.2, 0.2]
    points = Piecewise([(0.0, 0.0), (1.0, 0.5), (4.0, 1.0)], over="sigma")
    assert [points.at(moment(0, sigma=sigma)) for sigma in (9.0, 2.5, 0.5)] == [1.0, 0.75, 0.25]
    assert (ramp.at(START), points.at(START)) == (1.0, 1.0)


def test_schedules_compare_by_value() -> None:
    assert Piecewise([(0, 1.0)]) == Piecewise(((0, 1.0),))
    assert len({Linear(0, 1), Linear(0, 1), Cosine(0, 1), Piecewise([(0, 1.0)])}) == 3


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Linear(0.0, math.nan), "no finite number"),
        (lambda: Linear(0.0, 1.0, between=(0.5, 0.5)), "two different positions"),
        (lambda: Linear(0.0, 1.0, over="sigma"), "between=.* expected with over='sigma'"),
        (lambda: Linear(0.0, 1.0, over="time"), "over is 'time', expected one of fraction, step, sigma"),
        (lambda: Piecewise([]), "at least one"),
        (lambda: Piecewise([(0.5, 1.0), (0.2, 0.0)]), "ascending"),
    ],
)
def test_invalid_schedules_are_refused(build: Callable[[], object], message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        build()


# Runs


@pytest.mark.parametrize("family", DENOISERS)
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_run_equals_one_with_strengths_set_by_hand(family: str, guidance: float) -> None:
    pipe = loaded(models.FAMILIES[family], [DENOISERS[family]])
    expected = by_hand(pipe, [RAMP.at(moment(step, STEPS)) for step in range(STEPS)], guidance_scale=guidance)
    pipe.adapters.activate({"a": RAMP})
    for _ in range(2):
        assert torch.equal(draw(pipe, num_inference_steps=STEPS, guidance_scale=guidance), expected)
    assert pipe.adapters.active == {"a": RAMP}
    pipe.adapters.activate({"a": 1.0})
    assert_differs(draw(pipe, num_inference_steps=STEPS, guidance_scale=guidance), expected, 1e-3)


def test_text_encoders_have_the_strength_of_the_start() -> None:
    pipe = loaded(models.sd15)
    values = [RAMP.at(moment(step, STEPS)) for step in range(STEPS)]
    expected = by_hand(pipe, [{"unet": value, "text_encoder": values[0]} for value in values])
    pipe.adapters.activate({"a": RAMP})
    for _ in range(2):
        assert torch.equal(draw(pipe, num_inference_steps=STEPS), expected)


def test_schedules_and_numbers_can_be_given_by_prefix() -> None:
    pipe = loaded(models.sd15)
    down, up = Cosine(0.0, 1.0), Piecewise([(0, 0.4), (0.5, 0.0)], hold=True)
    others = {"unet": 0.7, "text_encoder": 0.3}
    moments = [moment(step, STEPS) for step in range(STEPS)]
    expected = by_hand(
        pipe, [{**others, "unet.down_blocks": down.at(now), "unet.up_blocks": up.at(now)} for now in moments]
    )
    pipe.adapters.activate({"a": {**others, "unet.down_blocks": down, "unet.up_blocks": up}})
    assert torch.equal(draw(pipe, num_inference_steps=STEPS), expected)
    with pytest.raises(AdapterError, match=r"no layer under 'unet\.sideways'"):
        pipe.adapters.activate({"a": {"unet.sideways": down}})


@pytest.mark.parametrize("loading", ["load", "hotswap"])
def test_the_scale_of_a_loaded_file_can_be_a_schedule(loading: str) -> None:
    pipe = loaded(models.sd15, ["unet"], scale=RAMP)
    if loading == "hotswap":
        pipe.adapters.hotswap("a", spellings.peft_names(loras.parts_for(pipe, ("unet",), rank=2)))
    seen = recorded(pipe)
    draw(pipe, num_inference_steps=5)
    assert seen == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])
    pipe.adapters.remove("a")
    assert not any(name in vars(pipe.scheduler) for name in ("step", "set_timesteps"))


def test_schedules_work_in_a_modular_pipeline() -> None:
    pipe = loaded(models.sdxl_modular, ["unet"])
    seen = recorded(pipe)
    with pipe.adapters.scheduled({"a": RAMP}):
        draw(pipe, num_inference_steps=5)
    assert sorted(set(seen), reverse=True) == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])
    assert seen == sorted(seen, reverse=True)


def test_schedules_work_in_a_pipeline_without_prompts_and_callbacks() -> None:
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 8),
        down_block_types=("AttnDownBlock2D",) * 2,
        up_block_types=("AttnUpBlock2D",) * 2,
        layers_per_block=1,
        attention_head_dim=4,
        norm_num_groups=4,
    ).eval()
    diffadapt.add_adapter(unet, diffadapt.LoraConfig(rank=2, target_modules=["to_q", "to_v"]), name="a")
    pipe: Any = DDPMPipeline(unet, DDPMScheduler())
    pipe.set_progress_bar_config(disable=True)
    seen = recorded(pipe)
    pipe.adapters.activate({"a": RAMP})
    pipe(num_inference_steps=5)
    assert seen == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])


# Schedulers


@pytest.mark.parametrize(
    ("scheduler_class", "options", "expected"),
    [
        (DDIMScheduler, {}, [1.0, 0.6, 0.2]),
        (EulerDiscreteScheduler, {}, [1.0, 0.6, 0.2]),
        # Two evaluations per step, except for the last one.
        (HeunDiscreteScheduler, {}, [1.0, 1.0, 0.6, 0.6, 0.2]),
        (KDPM2DiscreteScheduler, {}, [1.0, 1.0, 0.6, 0.6, 0.2]),
        # It runs one more step than requested, with one timestep twice.
        (PNDMScheduler, {"skip_prk_steps": True}, [1.0, 0.2 + 1.6 / 3, 0.2 + 0.8 / 3, 0.2]),
    ],
)
def test_every_call_in_a_step_has_the_strength_of_the_step(
    scheduler_class: Any, options: dict[str, Any], expected: list[float]
) -> None:
    pipe = with_scheduler(loaded(models.sd15, ["unet"]), scheduler_class, **options)
    seen = recorded(pipe)
    pipe.adapters.activate({"a": RAMP})
    for _ in range(2):
        draw(pipe, num_inference_steps=3)
    assert seen == pytest.approx([*expected, *expected])


def test_every_call_in_a_step_of_a_second_order_flow_has_the_strength_of_the_step() -> None:
    pipe = with_scheduler(loaded(models.sd3, ["transformer"]), FlowMatchHeunDiscreteScheduler)
    seen = recorded(pipe, "transformer")
    pipe.adapters.activate({"a": RAMP})
    draw(pipe, num_inference_steps=3)
    assert seen == pytest.approx([1.0, 1.0, 0.6, 0.6, 0.2])


@pytest.mark.parametrize("scheduler_class", [DDIMScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler])
@pytest.mark.parametrize("over", ["fraction", "sigma"])
def test_image_to_image_starts_at_the_strength_of_its_first_step(scheduler_class: Any, over: str) -> None:
    pipe = image_to_image(with_scheduler(loaded(models.sd15, ["unet"]), scheduler_class))
    seen = recorded(pipe)
    timesteps: list[float] = []
    pipe.unet.register_forward_pre_hook(lambda _, arguments: timesteps.append(float(arguments[1])))
    sigma = Linear(1.0, 0.0, between=(20.0, 0.0), over="sigma")
    pipe.adapters.activate({"a": RAMP if over == "fraction" else sigma})
    redraw(pipe)
    # The second evaluation of a Heun step is at the timestep of the next one; the last step has none.
    firsts = [0, 0, 2, 2, 4, 4, 6] if scheduler_class is HeunDiscreteScheduler else [0, 1, 2, 3]
    if over == "fraction":
        expected = [RAMP.at(moment(first // pipe.scheduler.order, 4)) for first in firsts]
    else:
        alphas = pipe.scheduler.alphas_cumprod.double()
        sigmas = ((1 - alphas) / alphas).sqrt().numpy()
        expected = [float(np.interp(timesteps[first], range(1000), sigmas)) / 20 for first in firsts]
    assert seen == pytest.approx(expected, rel=1e-3)
    assert seen == sorted(seen, reverse=True)


def test_schedules_can_follow_the_sigma_of_a_flow() -> None:
    pipe = loaded(models.flux, ["transformer"])
    seen = recorded(pipe, "transformer")
    with pipe.adapters.scheduled({"a": Linear(0.0, 1.0, between=(1.0, 0.0), over="sigma")}):
        draw(pipe, num_inference_steps=4)
    assert seen == pytest.approx([1 - float(sigma) for sigma in pipe.scheduler.sigmas[:-1]])
    assert seen[0] < seen[1] < seen[2] < seen[3]


def test_a_scheduler_without_noise_levels_is_refused() -> None:
    pipe = with_scheduler(loaded(models.sd15, ["unet"]), IPNDMScheduler)
    pipe.adapters.activate({"a": Linear(1.0, 0.0, between=(1.0, 0.0), over="sigma")})
    with pytest.raises(AdapterError, match="IPNDMScheduler does not say its noise levels; use"):
        draw(pipe)


def test_a_schedule_follows_a_scheduler_that_was_replaced_after_activation() -> None:
    pipe = loaded(models.sd15, ["unet"])
    seen = recorded(pipe)
    pipe.adapters.activate({"a": RAMP})
    draw(pipe, num_inference_steps=5)
    with_scheduler(pipe, HeunDiscreteScheduler)
    draw(pipe, num_inference_steps=3)
    assert seen == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2, 1.0, 1.0, 0.6, 0.6, 0.2])


def test_two_pipelines_can_share_a_scheduler() -> None:
    pipes = [loaded(models.sd15, ["unet"]) for _ in range(2)]
    pipes[1].scheduler = pipes[0].scheduler
    seen = [recorded(pipe) for pipe in pipes]
    pipes[0].adapters.activate({"a": RAMP})
    pipes[1].adapters.activate({"a": Linear(0.0, 1.0)})
    for pipe in pipes:
        draw(pipe, num_inference_steps=3)
    assert seen == [pytest.approx([1.0, 0.6, 0.2]), pytest.approx([0.0, 0.5, 1.0])]
    pipes[1].adapters.activate({"a": 0.3})
    for pipe in pipes:
        draw(pipe, num_inference_steps=3)
    assert seen == [pytest.approx([1.0, 0.6, 0.2] * 2), pytest.approx([0.0, 0.5, 1.0, 0.3, 0.3, 0.3])]
    pipes[0].adapters.clear()
    assert "step" not in vars(pipes[0].scheduler)


def test_a_copied_pipeline_follows_its_own_runs() -> None:
    pipe = loaded(models.sd15, ["unet"])
    pipe.adapters.activate({"a": RAMP})
    expected = draw(pipe, num_inference_steps=STEPS)
    copied = copy.deepcopy(pipe)
    pipe.adapters.activate({"a": 0.7})
    seen, others = recorded(copied), recorded(pipe)
    assert torch.equal(draw(copied, num_inference_steps=STEPS), expected)
    assert seen == pytest.approx([1.0, 0.7333, 0.4667, 0.2], abs=1e-3)
    assert others == []
    assert float(pipe.adapters["a"].components["unet"].gates[0]) == pytest.approx(0.7)


def test_a_second_pipeline_with_a_scheduler_of_its_own_follows_it_once_its_adapters_were_asked_for() -> None:
    pipe = loaded(models.sd15, ["unet"])
    pipe.adapters.activate({"a": RAMP})
    draw(pipe, num_inference_steps=STEPS)
    scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    second = type(pipe).from_pipe(pipe, scheduler=scheduler)
    second.set_progress_bar_config(disable=True)
    assert second.adapters.active == {"a": RAMP}
    seen = recorded(second)
    draw(second, num_inference_steps=STEPS)
    assert seen == pytest.approx([1.0, 0.7333, 0.4667, 0.2], abs=1e-3)
    second.adapters.clear()
    assert "step" not in vars(scheduler)


def test_the_scheduler_keeps_its_signatures_and_can_be_copied() -> None:
    """Pipelines inspect which parameters a scheduler takes, and step copies of it or of its attributes."""
    pipe = loaded(models.sd15, ["unet"])
    before = {name: inspect.signature(getattr(pipe.scheduler, name)) for name in ("step", "set_timesteps")}
    with pipe.adapters.scheduled({"a": RAMP}):
        scheduler = pipe.scheduler
        assert {name: inspect.signature(getattr(scheduler, name)) for name in before} == before
        scheduler.set_timesteps(3)
        other = copy.deepcopy(scheduler)
        attributes = copy.deepcopy(vars(scheduler))
        other.set_timesteps(7)
        sample = torch.ones(1, 4, 2, 2)
        for timestep in other.timesteps:
            other.step(sample, timestep, sample)
        assert (len(scheduler.timesteps), len(other.timesteps)) == (3, 7)
        gates = pipe.adapters["a"].components["unet"].gates
        assert float(gates[0]) == pytest.approx(0.2)
        vars(scheduler).update(attributes)
        # Several samples may be stepped in turn: the timestep identifies the step.
        for timestep, strength in zip(scheduler.timesteps, (1.0, 0.6, 0.2), strict=True):
            for _ in range(2):
                scheduler.scale_model_input(sample, timestep)
                assert float(gates[0]) == pytest.approx(strength)
                scheduler.step(sample, timestep, sample)
    assert "step" not in vars(scheduler)


# Contexts and failures


def test_the_context_restores_the_active_adapters() -> None:
    pipe = loaded(models.sd15)
    pipe.load_adapter(spellings.peft_names(loras.parts_for(pipe, ("unet",), rank=2)), "b", activate=False)
    pipe.adapters.activate({"a": {"unet.up_blocks": 0.123, "text_encoder": 0.7}})
    active, base = pipe.adapters.active, draw(pipe)
    attributes = set(vars(pipe.scheduler)), set(vars(pipe))
    with pipe.adapters.scheduled({"a": RAMP, "b": Cosine(0.0, 1.0)}):
        outer = draw(pipe, num_inference_steps=3)
        with suppress(RuntimeError), pipe.adapters.scheduled({"b": Linear(0.0, 2.0)}):
            assert_differs(draw(pipe, num_inference_steps=3), outer, 1e-3)
            raise RuntimeError
        assert pipe.adapters.active == {"a": RAMP, "b": Cosine(0.0, 1.0)}
        assert torch.equal(draw(pipe, num_inference_steps=3), outer)
    assert pipe.adapters.active == active
    assert pipe.adapters["b"].strength == 1.0
    assert torch.equal(draw(pipe), base)
    assert (set(vars(pipe.scheduler)), set(vars(pipe))) == attributes
    assert_differs(outer, base, 1e-3)


def test_a_failed_run_does_not_affect_the_next_one() -> None:
    pipe = loaded(models.sd15)
    pipe.adapters.activate({"a": RAMP})
    expected = draw(pipe, num_inference_steps=3)

    def stop(*args: Any) -> None:
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        draw(pipe, num_inference_steps=3, callback_on_step_end=stop)
    assert torch.equal(draw(pipe, num_inference_steps=3), expected)


def test_nothing_is_left_on_a_pipeline() -> None:
    pipe = models.sd15()
    draw(pipe)
    before, attributes = snapshot(pipe), set(vars(pipe.scheduler))
    pipe.load_adapter(spellings.peft_names(loras.parts_for(pipe)), "a")
    pipe.adapters.activate({"a": RAMP})
    draw(pipe)
    pipe.adapters.clear()
    draw(pipe)
    assert_unchanged(pipe, before)
    assert set(vars(pipe.scheduler)) == attributes


def test_a_custom_loop_over_a_single_model_needs_the_scheduler() -> None:
    unet = models.unet_sd15()
    pipe = models.sd15()
    pipe.unet = unet
    parts = loras.parts_for(pipe, ("unet",))
    diffadapt.load_adapter(unet, spellings.peft_names(parts), "a")
    adapters = diffadapt.adapters(unet)

    def loop(set_strength: Callable[[int], None]) -> Tensor:
        scheduler.set_timesteps(3)
        sample = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
        for index, timestep in enumerate(scheduler.timesteps):
            set_strength(index)
            noise = unet(sample, timestep, torch.ones(1, 4, models.WIDTH)).sample
            sample = scheduler.step(noise, timestep, sample).prev_sample
        return sample

    scheduler = pipe.scheduler
    with torch.no_grad():
        values = [RAMP.at(moment(index, 3)) for index in range(3)]
        expected = loop(lambda index: adapters.activate({"a": {"down_blocks": values[index], "up_blocks": 0.5}}))
        with adapters.scheduled({"a": {"down_blocks": RAMP, "up_blocks": 0.5}}, scheduler=scheduler):
            assert torch.equal(loop(lambda index: None), expected)
    assert "step" not in vars(scheduler)
    with pytest.raises(AdapterError, match=r"single model .*scheduler="):
        adapters.activate({"a": RAMP})


def test_merging_and_combining_refuse_schedules() -> None:
    pipe = loaded(models.sd15, ["unet"])
    pipe.adapters.activate({"a": RAMP})
    with pytest.raises(AdapterError, match="merge: the strength of 'a' is a schedule"):
        pipe.adapters.merge("a")
    for derive in (pipe.adapters.to_lora, pipe.adapters.combine):
        with pytest.raises(AdapterError, match="'a' is a schedule"):
            derive({"a": RAMP}, "b")
    assert pipe.adapters.names == ["a"]


# Compiled


@pytest.mark.parametrize(("slots", "in_place"), [(False, True), (True, False)])
def test_a_schedule_does_not_recompile_a_denoiser(
    slots: bool, in_place: bool, counter: CompileCounterWithBackend
) -> None:
    pipe = models.flux()
    torch.manual_seed(0)
    pipe.transformer = models.flux_transformer(blocks=1)
    pipe.load_adapter(spellings.peft_names(loras.parts_for(pipe, ("transformer",))), "a")
    if slots:
        pipe.adapters.prepare_hotswap()
    options = {"num_inference_steps": 3, "guidance_scale": 1.0}
    with pipe.adapters.scheduled({"a": RAMP}):
        expected = draw(pipe, **options)
    if in_place:
        pipe.transformer.compile(backend=counter, fullgraph=True)
    else:
        pipe.transformer = torch.compile(pipe.transformer, backend=counter, fullgraph=True)
    constant = draw(pipe, **options)
    with pipe.adapters.scheduled({"a": RAMP}):
        assert_same(draw(pipe, **options), expected)
    assert_differs(constant, expected, 1e-3)
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Linear(1, 0, between=(0.8, 0.2)), r"between is \(0.8, 0.2\), expected the earlier position first"),
        (lambda: Cosine(0, 1, between=(5, 2), over="step"), "the smaller step"),
        (lambda: Linear(1, 0, between=(0.5, 14.6), over="sigma"), "the larger sigma"),
        (lambda: Linear(1, 0, between=(0.2, 20)), "20 over 'fraction' is in no run, expected 0 to 1"),
        (lambda: Linear(1, 0, between=(-3, 4), over="step"), "-3 over 'step' is in no run, expected at least 0"),
        (lambda: Piecewise([(0, 1.0), (10, 0.0)]), "10 over 'fraction' is in no run, expected 0 to 1"),
    ],
)
def test_positions_that_no_run_has_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        make()
