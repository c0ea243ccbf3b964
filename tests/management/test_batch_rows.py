"""`per_sample` for prompts that come and go, on one compiled model, and with a schedule for each."""

from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import diffadapt
from tests.support import loras, models, spellings
from tests.support.compare import assert_differs, assert_same
from tests.support.small_models import unet

pytestmark = pytest.mark.slow

PROMPTS = ["a red circle", "a blue hill", "two stars"]
Mix = dict[str, Any]
EXACT = 1e-10


def built(prepared: bool = False) -> DiffusionPipeline:
    """Return a pipeline in float64 with two adapters, one of them on the text encoder, too."""
    pipe = models.sd15()
    pipe.unet = unet()
    pipe.to(torch.float64)
    parts = loras.parts_for(pipe, pattern=r"to_[qv]|q_proj|conv1")
    one, two = spellings.peft_names(parts), spellings.peft_names({"unet": loras.parts_for(pipe, rank=2)["unet"]})
    if prepared:
        pipe.adapters.prepare_hotswap([one, two], slots=2, samples=3)
    pipe.load_adapter(one, "a", activate=False)
    pipe.load_adapter(two, "b", activate=False)
    return pipe


def drawn(pipe: DiffusionPipeline, first: int, count: int, images: int, guidance: float, **options: Any) -> Tensor:
    """Return the latents of `count` prompts from number `first` on; the noise of a picture depends on its number."""
    numbers = range(first * images, (first + count) * images)
    generators = [torch.Generator().manual_seed(number) for number in numbers]
    latents = torch.cat([torch.randn(1, 4, 8, 8, generator=g, dtype=torch.float64) for g in generators])
    with torch.no_grad():
        return pipe(
            prompt=PROMPTS[first : first + count],
            num_images_per_prompt=images,
            latents=latents,
            guidance_scale=guidance,
            output_type="latent",
            height=16,
            width=16,
            **{"num_inference_steps": 1, **options},
        ).images


def test_rows_come_and_go_without_a_recompile(counter: CompileCounterWithBackend) -> None:
    """All calls have twelve rows: other numbers of prompts and of images, with and without guidance."""
    pipe, plain = built(prepared=True), built()
    pipe.unet = torch.compile(pipe.unet, backend=counter, fullgraph=True)
    pipe.adapters.activate({"a": 1.0})
    uniform = drawn(pipe, 0, 3, 2, 4.0)
    a, b, both = {"a": 1.0}, {"b": 0.5}, {"a": {"unet.down_blocks": 0.3}, "b": -1.0}
    calls: list[tuple[list[Mix], int, float]] = [
        ([a, {}, b], 2, 4.0),
        ([both, a], 3, 4.0),
        ([{}, b, a], 4, 1.0),
        ([b], 6, 4.0),
        ([{}, {}], 3, 4.0),
    ]
    for mixes, images, guidance in calls:
        with pipe.adapters.per_sample(mixes):
            together = drawn(pipe, 0, len(mixes), images, guidance)
        for number, mix in enumerate(mixes):
            own = slice(number * images, (number + 1) * images)
            with plain.adapters.activated(mix):
                assert_same(together[own], drawn(plain, number, 1, images, guidance), EXACT)
        if mixes == [a, {}, b]:
            assert torch.equal(together[:2], uniform[:2])
            assert_differs(together[2:4], uniform[2:4], 1e-3)
    # Without mixes all rows are the same again, in any batch.
    assert torch.equal(drawn(pipe, 0, 3, 2, 4.0), uniform)
    halved = drawn(pipe, 0, 3, 2, 4.0, cross_attention_kwargs={"scale": 0.5})
    with plain.adapters.activated({"a": 0.5}):
        assert_same(halved, drawn(plain, 0, 3, 2, 4.0), EXACT)
    assert torch.equal(drawn(pipe, 0, 3, 2, 4.0), uniform)
    assert counter.frame_count == 1
    with pytest.raises(diffadapt.AdapterError, match=r"4 mixes, but the slots of .* are for 3 samples"):
        with pipe.adapters.per_sample([a] * 4):
            pass
    with pytest.raises(diffadapt.AdapterError, match="2 mixes, but the pipeline encodes 3 prompts"):
        with pipe.adapters.per_sample([a, b]):
            drawn(pipe, 0, 3, 2, 4.0)
    assert torch.equal(drawn(pipe, 0, 3, 2, 4.0), uniform)


@pytest.mark.parametrize("prepared", [False, True], ids=["plain", "prepared"])
def test_every_row_follows_its_own_schedule(prepared: bool) -> None:
    pipe = built(prepared)
    late = diffadapt.Piecewise([(0, 0.0), (2, 0.8)], hold=True, over="step")
    mixes: list[Mix] = [{"a": diffadapt.Linear(1.0, 0.0)}, {"b": late, "a": {"unet.down_blocks": late, "": 0.3}}, {}]
    alone: list[Tensor] = []
    for number, mix in enumerate(mixes):
        with pipe.adapters.activated(mix):
            alone.append(drawn(pipe, number, 1, 1, 4.0, num_inference_steps=4))
    # A schedule from before does not come through.
    pipe.adapters.activate({"a": diffadapt.Linear(0.0, 3.0)})
    before = drawn(pipe, 0, 3, 1, 4.0, num_inference_steps=4)
    with pipe.adapters.per_sample(mixes):
        together = drawn(pipe, 0, 3, 1, 4.0, num_inference_steps=4)
        # What is loaded in the meantime keeps the rows of the others.
        pipe.adapters.deactivate("b")
        without = drawn(pipe, 0, 3, 1, 4.0, num_inference_steps=4)
    with pipe.adapters.per_sample([{"a": 1.0}, {}, {}]):
        numbers = drawn(pipe, 0, 3, 1, 4.0, num_inference_steps=4)
    assert_same(together, torch.cat(alone), EXACT)
    assert_same(without[::2], together[::2], EXACT)
    assert_differs(without[1], together[1], 1e-3)
    assert_same(numbers[1:2], drawn_with(pipe, {}, 1), EXACT)
    assert torch.equal(drawn(pipe, 0, 3, 1, 4.0, num_inference_steps=4), before)
    pipe.adapters.deactivate()
    assert "step" not in vars(pipe.scheduler)


def drawn_with(pipe: DiffusionPipeline, mix: Mix, number: int) -> Tensor:
    with pipe.adapters.activated(mix):
        return drawn(pipe, number, 1, 1, 4.0, num_inference_steps=4)


def test_a_schedule_by_steps_must_fit_into_the_run_of_all_rows() -> None:
    pipe = built()
    for schedule in (
        diffadapt.Linear(1.0, 0.0, between=(0, 29), over="step"),
        diffadapt.Piecewise([(0, 1.0), (29, 0.0)], over="step"),
    ):
        with pytest.raises(diffadapt.AdapterError, match=r"mixes\[1\] goes up to step 29, .* has the steps 0 to 3"):
            with pipe.adapters.per_sample([{"a": 1.0}, {"b": {"unet": schedule}}]):
                drawn(pipe, 0, 2, 1, 4.0, num_inference_steps=4)
    assert pipe.adapters.active == {}
    last = diffadapt.Linear(1.0, 0.0, between=(0, 3), over="step")
    with pipe.adapters.per_sample([{"a": 1.0}, {"b": last}]):
        assert drawn(pipe, 0, 2, 1, 4.0, num_inference_steps=4).isfinite().all()


@torch.no_grad()
def test_rows_of_a_loop_of_ones_own_follow_its_scheduler() -> None:
    model = unet()
    diffadapt.load_adapter(model, spellings.peft_names({"unet": loras.factors_for(loras.layers_of(model), 2)}), "a")
    adapters = diffadapt.adapters(model)
    text, ramp = torch.randn(2, 4, models.WIDTH), diffadapt.Linear(1.0, 0.0)
    start = torch.randn(2, 4, 8, 8)

    def run(rows: slice, strengths: list[Mix], scheduler: Any) -> Tensor:
        with adapters.per_sample(strengths, scheduler=scheduler):
            scheduler.set_timesteps(3)
            latents = start[rows]
            for time in scheduler.timesteps:
                noise = model(scheduler.scale_model_input(latents, time), time, text[rows]).sample
                latents = scheduler.step(noise, time, latents).prev_sample
        return latents

    with pytest.raises(diffadapt.AdapterError, match=r"per_sample\(..., scheduler=...\)"):
        with adapters.per_sample([{"a": ramp}, {}]):
            pass
    together = run(slice(2), [{"a": ramp}, {"a": 1.0}], DDIMScheduler())
    alone = [run(slice(0, 1), [{"a": ramp}], DDIMScheduler())]
    alone.append(run(slice(1, 2), [{"a": 1.0}], DDIMScheduler()))
    assert_same(together, torch.cat(alone))
    assert_differs(together[:1], run(slice(0, 1), [{"a": 1.0}], DDIMScheduler()), 1e-3)
