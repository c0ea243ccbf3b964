"""Every family does what its pipeline does: same predictions, same latents, same noise levels.

The oracle is the pipeline itself (`tests/support/training_oracle.py`). Planted mistakes show that it has teeth.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from diffadapt.training.families import FAMILIES, TrainingFamily, family_of
from diffadapt.training.families.family import Caption, Step
from tests.support import training_oracle as oracle
from tests.support.cases import for_each
from tests.support.tiny_pipelines import TINY, shared

# Distilled to predict mean velocities, whose time `timestep_r` a trainer has to choose differently from a pipeline.
COMPARABLE = tuple(name for name in TINY if name != "hunyuan-image-distilled")


@cache
def traces(name: str) -> tuple[oracle.Trace, ...]:
    """Return traces of a pipeline with the fewest references that it takes and with more."""
    pipe = shared(name)
    family = family_of(pipe)
    fewest, most = family.references
    return tuple(oracle.draw(family, pipe, count) for count in sorted({fewest, min(most, 2)}))


@for_each(name=COMPARABLE)
def test_predictions_latents_and_shift_are_those_of_the_pipeline(name: str) -> None:
    for trace in traces(name):
        family = family_of(trace.pipe)
        assert trace.prediction_error(family) < 1e-5
        assert trace.decoding_error < 2e-3
        assert trace.shift_error(family) < 1e-6


def test_every_family_is_compared_with_a_pipeline() -> None:
    assert {family_of(shared(name)).name for name in COMPARABLE} == {family.name for family in FAMILIES}


# Mistakes


def with_step(family: TrainingFamily, change: Callable[[Step], Step]) -> TrainingFamily:
    return replace(family, inputs=lambda step: family.inputs(change(step)))


def with_inputs(family: TrainingFamily, change: Callable[[dict[str, Any]], dict[str, Any]]) -> TrainingFamily:
    return replace(family, inputs=lambda step: change(family.inputs(step)))


def later(step: Step) -> Step:
    return replace(step, level=step.level + (0.02 if step.level.is_floating_point() else 20))


def transposed(step: Step) -> Step:
    """Exchange rows and columns within every 2 x 2 latent pixels."""
    batch, channels, rows, columns = step.noisy.shape
    squares = step.noisy.view(batch, channels, rows // 2, 2, columns // 2, 2).transpose(3, 5)
    return replace(step, noisy=squares.reshape(step.noisy.shape))


def unmasked(step: Step) -> Step:
    every = {name: torch.ones_like(value) for name, value in step.conditions.items() if name.endswith("_mask")}
    return replace(step, conditions={**step.conditions, **every})


def exchanged_axes(inputs: dict[str, Any]) -> dict[str, Any]:
    changed = dict(inputs)
    for name in {"img_ids", "position_ids"} & set(inputs):
        changed[name] = inputs[name][..., [0, 2, 1, *range(3, inputs[name].shape[-1])]]
    if "img_shapes" in inputs:
        changed["img_shapes"] = [[(1, columns, rows) for _, rows, columns in row] for row in inputs["img_shapes"]]
    if "rope_interpolation_scale" in inputs:
        changed |= {"height": inputs["width"], "width": inputs["height"]}
    return changed


def without_reference_ids(inputs: dict[str, Any]) -> dict[str, Any]:
    ids = inputs["img_ids"].clone()
    ids[..., 0] = 0
    return {**inputs, "img_ids": ids}


def another_caption(family: TrainingFamily) -> TrainingFamily:
    def encode(pipe: Any, caption: Caption) -> dict[str, Tensor]:
        return family.encode(pipe, replace(caption, text=caption.text.replace("dog", "cat")))

    return replace(family, encode=encode)


def mistakes(family: TrainingFamily, trace: oracle.Trace) -> Iterator[tuple[str, TrainingFamily]]:
    """Yield families with one mistake in them: everything a trainer could get wrong that changes the prediction."""
    inputs = _inputs_of(family, trace)
    yield "sign", replace(family, read=lambda step, output: -family.read(step, output))
    yield "told time", with_step(family, later)
    yield "packing", with_step(family, transposed)
    yield "caption", another_caption(family)
    if {"img_ids", "position_ids", "img_shapes", "rope_interpolation_scale"} & set(inputs):
        yield "axes of positions", with_inputs(family, exchanged_axes)
    if inputs.get("guidance") is not None:
        yield "guidance", with_step(family, lambda step: replace(step, guidance=step.guidance + 1))
    if family.tokens and family.mixed_lengths and len(trace.captions) > 1:
        yield "mask", with_step(family, unmasked)
    if family.name in ("sdxl", "cogview4"):
        yield "sizes", with_step(family, lambda step: replace(step, sizes=None))
    if trace.pictures and "img_ids" in inputs and family.name.startswith(("flux-kontext", "flux2")):
        yield "ids of references", with_inputs(family, without_reference_ids)


def _inputs_of(family: TrainingFamily, trace: oracle.Trace) -> dict[str, Any]:
    seen: dict[str, Any] = {}

    def noted(step: Step) -> dict[str, Any]:
        seen.update(family.inputs(step))
        return seen

    trace.prediction_error(replace(family, inputs=noted))
    return seen


@for_each(name=COMPARABLE)
def test_the_oracle_catches_every_mistake_in_a_prediction(name: str) -> None:
    trace = traces(name)[-1]
    family = family_of(trace.pipe)
    errors = {mistake: trace.prediction_error(wrong) for mistake, wrong in mistakes(family, trace)}
    assert {mistake: error for mistake, error in errors.items() if error < 1e-4} == {}
    if family.process(trace.pipe) == "flow" and not family.name.startswith(("flux2", "ideogram4")):
        wrong = replace(family, shift=lambda pipe, x0: 1.1 * family.shift(pipe, x0))
        assert trace.shift_error(wrong) > 0.05


@for_each(name=("sdxl", "flux", "flux2", "qwen-image", "sana", "ideogram4", "ltx"))
def test_the_oracle_catches_a_mistake_in_the_latents(name: str) -> None:
    """One family for every kind of VAE."""
    pipe = shared(name)
    family = family_of(pipe)
    for factor, offset in ((1.02, 0.0), (1.0, 0.05)):

        def wrong(pipe: Any, pixels: Tensor, factor: float = factor, offset: float = offset) -> dict[str, Tensor]:
            return {"mean": family.encode_pictures(pipe, pixels)["mean"] * factor + offset}

        assert oracle.draw(replace(family, encode_pictures=wrong), pipe, family.references[0]).decoding_error > 5e-3
