"""`begin`: an adapter is read in the background and acts from one step of the coming run on."""

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from safetensors.torch import save_file
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import diffadapt
from diffadapt.management import sources
from tests.support import loras, models, spellings
from tests.support.compare import assert_differs, assert_unchanged, snapshot
from tests.support.models import draw
from tests.support.small_models import unet

pytestmark = pytest.mark.slow

STEPS = 4
State = dict[str, Tensor]


def built(slots: int = 0) -> tuple[DiffusionPipeline, State, State]:
    """Return a pipeline, an adapter of the UNet and the text encoder, and one of the UNet alone."""
    pipe = models.sd15()
    pipe.unet = unet()
    both = spellings.peft_names(loras.parts_for(pipe, pattern=r"to_[qv]|q_proj|conv1"))
    one = spellings.peft_names({"unet": loras.parts_for(pipe, rank=2)["unet"]})
    if slots:
        pipe.adapters.prepare_hotswap([both, one], slots=slots)
    return pipe, both, one


def run(pipe: DiffusionPipeline, **options: Any) -> Tensor:
    return draw(pipe, num_inference_steps=STEPS, **options)


def from_step(step: int, scale: float) -> diffadapt.Schedule:
    if step == 0:
        return diffadapt.Piecewise([(0, scale)], hold=True, over="step")
    return diffadapt.Piecewise([(0, 0.0), (step, scale)], hold=True, over="step")


@pytest.mark.parametrize("slots", [0, 2], ids=["plain", "slots"])
def test_it_equals_a_schedule_that_is_zero_before_the_step(slots: int, tmp_path: Path) -> None:
    pipe, both, one = built(slots)
    file = tmp_path / "both.safetensors"
    save_file(both, file)
    if slots:
        pipe.load_adapter(one, "one", scale=0.5)
    base = run(pipe)
    for step in (1, STEPS - 1):
        pipe.load_adapter(file, "both", scale=from_step(step, 0.7))
        expected = run(pipe)
        pipe.adapters.remove("both")
        upcoming = pipe.adapters.begin(file, at_step=step, scale=0.7)
        assert "both" not in pipe.adapters
        found = run(pipe)
        assert torch.equal(found, expected)
        assert_differs(found, base, 1e-4)
        assert (upcoming.name, upcoming.state) == ("both", "active")
        # It stays loaded, and the next prompt is encoded with it.
        assert pipe.adapters.active["both"] == 0.7
        pipe.adapters.activate({**({"one": 0.5} if slots else {}), "both": 0.7})
        always = run(pipe)
        assert_differs(always, found, 1e-4)
        pipe.adapters.remove("both")
        assert torch.equal(run(pipe), base)
    assert "step" not in vars(pipe.scheduler)


def test_the_report_is_there_before_the_step_and_names_parts_that_come_late() -> None:
    pipe, both, one = built()
    upcoming = pipe.adapters.begin(both, "x", at_step=2)
    report = upcoming.wait(60)
    assert upcoming.report == report
    assert report.components.keys() == {"unet", "text_encoder"}
    assert [(note.key, "next prompt" in note.reason) for note in report.notes] == [("text_encoder", True)]
    assert upcoming.state == "ready"
    alone = pipe.adapters.begin(one, "y", at_step=2).wait(60)
    assert not alone.notes
    text = {name: tensor for name, tensor in both.items() if name.startswith("text_encoder")}
    with pytest.raises(diffadapt.AdapterError, match="changes text encoders only"):
        pipe.adapters.begin(text, "z", at_step=2, components=["text_encoder"]).wait(60)
    pipe.adapters.clear()
    assert upcoming.state == "cancelled"
    assert "step" not in vars(pipe.scheduler)


def test_several_begin_in_one_run_without_a_recompile(counter: CompileCounterWithBackend) -> None:
    pipe, both, one = built(slots=2)
    pipe.unet = torch.compile(pipe.unet, backend=counter, fullgraph=True)
    before = run(pipe)
    pipe.load_adapter(both, "both", scale=from_step(1, 1.0))
    pipe.load_adapter(one, "one", scale=from_step(2, 0.5))
    expected = run(pipe)
    pipe.adapters.clear()
    pipe.adapters.begin(one, "one", at_step=2, scale=0.5)
    pipe.adapters.begin(pipe.adapters.prefetch(both), "both", at_step=1)
    assert torch.equal(run(pipe), expected)
    assert_differs(expected, before, 1e-4)
    assert counter.frame_count == 1


def test_what_fails_is_raised_and_leaves_the_adapters_of_before(tmp_path: Path) -> None:
    pipe, both, one = built()
    pipe.load_adapter(one, "one", scale=0.5)
    expected, before = run(pipe), snapshot(pipe)
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"\xff" * 40)
    for source, at_step, message in (
        (broken, 2, "broken.safetensors"),
        (tmp_path / "none.safetensors", 1, "no such file"),
        ({**both, "unet.nowhere.lora_A.weight": torch.zeros(2, 2)}, 3, "cannot be used"),
        (both, STEPS, rf"act from step {STEPS} on, but this run has {STEPS} steps, 0 to {STEPS - 1}"),
    ):
        first = pipe.adapters.begin(both, "first", at_step=1)
        first.wait(60)
        upcoming = pipe.adapters.begin(source, "x", at_step=at_step)
        if at_step < STEPS:
            with pytest.raises(diffadapt.AdapterError, match=message):
                upcoming.wait(60)
        with pytest.raises(diffadapt.AdapterError, match=message):
            run(pipe)
        with pytest.raises(diffadapt.AdapterError, match=message):
            upcoming.wait(60)
        assert (first.state, upcoming.state) == ("ready", "failed")
        assert pipe.adapters.active == {"one": 0.5}
        assert first.cancel()
        assert not upcoming.cancel()
        assert torch.equal(run(pipe), expected)
    assert_unchanged(pipe, before)
    # What is known only at the step: the name was taken in the meantime.
    begun, late = pipe.adapters.begin(both, "a", at_step=1), pipe.adapters.begin(both, "b", at_step=2)
    pipe.load_adapter(one, "b", activate=False)
    with pytest.raises(diffadapt.AdapterError, match="adapter 'b' exists already"):
        run(pipe)
    assert (begun.state, late.state, pipe.adapters.names) == ("ready", "failed", ["one", "b"])
    run(pipe)
    assert set(pipe.adapters.names) == {"one", "b", "a"}


def test_wrong_requests_are_refused_at_once() -> None:
    pipe, both, _ = built()
    for options in ({}, {"at_step": 1, "by_step": 2}, {"at_step": -1}, {"at_step": 1.5}, {"by_step": True}):
        with pytest.raises(diffadapt.AdapterError, match="expected one step, from 0"):
            pipe.adapters.begin(both, "x", **options)
    with pytest.raises(diffadapt.AdapterError, match="expected a finite number"):
        pipe.adapters.begin(both, "x", at_step=1, scale=float("nan"))
    pipe.load_adapter(both, "x")
    with pytest.raises(diffadapt.AdapterError, match="adapter 'x' exists already"):
        pipe.adapters.begin(both, "x", at_step=1)
    pipe.adapters.begin(both, "y", at_step=1)
    with pytest.raises(diffadapt.AdapterError, match="'y' is on its way already"):
        pipe.adapters.begin(both, "y", at_step=1)
    with pytest.raises(diffadapt.AdapterError, match=r"begin\(..., scheduler=...\)"):
        diffadapt.adapters(pipe.unet).begin(both, "z", at_step=1)


def test_the_run_waits_for_a_slow_file_at_its_step_and_no_earlier(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, both, _ = built()
    pipe.load_adapter(both, "x", scale=from_step(2, 1.0))
    expected = run(pipe)
    pipe.adapters.clear()
    may_read, plan_source = threading.Event(), sources.plan_source

    def slow(*args: Any, **options: Any) -> Any:
        assert may_read.wait(60)
        return plan_source(*args, **options)

    monkeypatch.setattr(sources, "plan_source", slow)
    for options in ({"at_step": 2}, {"by_step": 3}):
        may_read.clear()
        upcoming = pipe.adapters.begin(both, "x", **options)
        with pytest.raises(TimeoutError, match="has not been read"):
            upcoming.wait(0.01)

        def after_step(pipe: Any, step: int, *_: Any, options: Any = options, upcoming: Any = upcoming) -> Any:
            if step == 0:
                assert (upcoming.state, "x" in pipe.adapters) == ("reading", False)
                if "at_step" in options:
                    # While the run waits for it at step 2.
                    threading.Timer(0.2, may_read.set).start()
                else:
                    may_read.set()
                    upcoming.wait(60)
            return {}

        assert torch.equal(run(pipe, callback_on_step_end=after_step), expected)
        assert upcoming.state == "active"
        pipe.adapters.clear()
    pipe.adapters.begin(both, "x", by_step=3).wait(60)
    early = run(pipe)
    pipe.adapters.clear()
    pipe.adapters.begin(both, "x", at_step=0)
    assert torch.equal(run(pipe), early)
    assert_differs(early, expected, 1e-4)


def test_a_cancelled_adapter_never_acts_and_other_runs_do_not_wait() -> None:
    pipe, both, one = built()
    base = run(pipe)
    upcoming = pipe.adapters.begin(both, "x", at_step=1)
    assert upcoming.cancel()
    assert torch.equal(run(pipe), base)
    assert upcoming.state == "cancelled"
    with pytest.raises(diffadapt.AdapterError, match="x was cancelled"):
        upcoming.wait(60)
    # An adapter that begins during a run is for the next one.
    later: list[Any] = []

    def at_step(pipe: Any, step: int, *_: Any) -> dict[str, Any]:
        if step == 0:
            later.append(pipe.adapters.begin(one, "y", at_step=1))
            later[0].wait(60)
        return {}

    assert torch.equal(run(pipe, callback_on_step_end=at_step), base)
    assert later[0].state == "ready"
    assert_differs(run(pipe), base, 1e-4)
    assert not later[0].cancel()
    assert pipe.adapters.names == ["y"]


@torch.no_grad()
def test_a_loop_of_ones_own_passes_its_scheduler() -> None:
    model, scheduler = unet(), DDIMScheduler()
    source = spellings.peft_names({"unet": loras.factors_for(loras.layers_of(model), 2)})
    adapters, text, start = diffadapt.adapters(model), torch.randn(1, 4, models.WIDTH), torch.randn(1, 4, 8, 8)

    def loop() -> Tensor:
        latents = start
        scheduler.set_timesteps(STEPS)
        for time in scheduler.timesteps:
            latents = scheduler.step(model(latents, time, text).sample, time, latents).prev_sample
        return latents

    base = loop()
    adapters.load(source, "x", activate=False)
    with adapters.scheduled({"x": from_step(2, 1.0)}, scheduler):
        expected = loop()
    adapters.clear()
    adapters.begin(source, "x", at_step=2, scheduler=scheduler)
    assert torch.equal(loop(), expected)
    assert_differs(expected, base, 1e-4)
    assert "step" not in vars(scheduler)
