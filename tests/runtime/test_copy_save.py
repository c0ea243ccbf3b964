"""Copies of a model are independent, and saving a model saves the base model."""

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextModel

import diffadapt
from tests.support import loras, models, small_models, spellings
from tests.support.compare import assert_differs, assert_same, assert_unchanged, snapshot
from tests.support.models import draw


@pytest.fixture
def pipe() -> DiffusionPipeline:
    pipe = models.sd15()
    pipe.load_adapter(spellings.peft_names(loras.parts_for(pipe)), "a", scale=0.7)
    pipe.load_adapter(spellings.kohya_names(loras.parts_for(pipe, ("unet",), "conv1", rank=2)), "b", activate=False)
    return pipe


predict = torch.no_grad()(small_models.predict)


def assert_same_weights(model: nn.Module, base: nn.Module) -> None:
    state, reference = model.state_dict(), base.state_dict()
    assert state.keys() == reference.keys()
    assert all(torch.equal(state[key], reference[key]) for key in reference)


def test_a_deepcopy_of_a_model_is_independent(pipe: DiffusionPipeline) -> None:
    picture = predict(pipe.unet)
    twin = copy.deepcopy(pipe.unet)
    assert torch.equal(predict(twin), picture)
    assert diffadapt.adapters(twin).active == {"a": 0.7}
    for parameter in twin.parameters():
        parameter.data.mul_(1.5)
    diffadapt.adapters(twin).activate({"b": 3.0})
    assert torch.equal(predict(pipe.unet), picture)
    assert diffadapt.adapters(pipe.unet).active == {"a": 0.7}


def test_a_deepcopy_has_its_own_strengths(pipe: DiffusionPipeline) -> None:
    twin = copy.deepcopy(pipe.unet)
    picture = predict(twin)
    diffadapt.adapters(pipe.unet).activate({"a": 0.1, "b": 1.0})
    assert torch.equal(predict(twin), picture)
    diffadapt.adapters(twin).activate({"a": 0.1, "b": 1.0})
    assert torch.equal(predict(twin), predict(pipe.unet))
    assert_differs(predict(twin), picture, 1e-3)
    diffadapt.adapters(pipe.unet).clear()
    assert torch.equal(predict(twin), predict(copy.deepcopy(twin)))


def test_the_call_scale_of_a_copy_does_not_reach_the_original(pipe: DiffusionPipeline) -> None:
    twin = copy.deepcopy(pipe.unet)
    original = pipe.unet
    full = predict(original)

    class Interleaved(nn.Module):
        """A hook that calls the original during a call of its copy."""

        def forward(self, *args: Any) -> None:
            assert torch.equal(predict(original), full)

    twin.conv_out.register_forward_pre_hook(Interleaved())
    options = {"cross_attention_kwargs": {"scale": 0.0}}
    with torch.no_grad():
        twin(torch.zeros(1, 4, 8, 8), 7, torch.zeros(1, 4, models.WIDTH), **options)


def test_clearing_a_copy_restores_its_base(pipe: DiffusionPipeline) -> None:
    twin = copy.deepcopy(pipe.unet)
    diffadapt.adapters(twin).clear()
    assert torch.equal(predict(twin), predict(models.sd15().unet))
    assert_differs(predict(pipe.unet), predict(twin))


def test_a_deepcopy_of_a_merged_model_is_unmerged_separately(pipe: DiffusionPipeline) -> None:
    picture = predict(pipe.unet)
    pipe.adapters.merge("a")
    twin = copy.deepcopy(pipe.unet)
    diffadapt.adapters(twin).unmerge()
    assert torch.equal(predict(twin), picture)
    diffadapt.adapters(twin).clear()
    assert torch.equal(predict(twin), predict(models.sd15().unet))
    pipe.adapters.clear()
    assert torch.equal(predict(pipe.unet), predict(models.sd15().unet))


def test_a_model_saved_by_torch_keeps_its_adapters(pipe: DiffusionPipeline) -> None:
    picture = predict(pipe.unet)
    buffer = io.BytesIO()
    torch.save(pipe.unet, buffer)
    buffer.seek(0)
    again = torch.load(buffer, weights_only=False)
    assert torch.equal(predict(again), picture)
    assert diffadapt.adapters(again).active == {"a": 0.7}
    diffadapt.adapters(again).activate({"b": 1.0})
    pipe.adapters.activate({"b": 1.0})
    assert torch.equal(predict(again), predict(pipe.unet))
    diffadapt.adapters(again).clear()
    assert torch.equal(predict(again), predict(models.sd15().unet))


def test_the_state_dict_is_that_of_the_base(pipe: DiffusionPipeline) -> None:
    plain = models.sd15()
    for name in ("unet", "text_encoder"):
        model, base = getattr(pipe, name), getattr(plain, name)
        assert_same_weights(model, base)
        keys = model.load_state_dict(base.state_dict())
        assert (keys.missing_keys, keys.unexpected_keys) == ([], [])


def test_load_state_dict_replaces_the_base_and_keeps_the_adapter(pipe: DiffusionPipeline) -> None:
    other = models.sd15()
    for parameter in other.unet.parameters():
        parameter.data.mul_(1.1)
    parts = loras.parts_for(other, ("unet",))
    pipe.unet.load_state_dict(other.unet.state_dict())
    assert_same(predict(pipe.unet), predict(loras.bake(other, parts, 0.7).unet))


def test_a_saved_model_is_the_base_model(pipe: DiffusionPipeline, tmp_path: Path) -> None:
    plain = models.sd15()
    classes: dict[str, Any] = {"unet": UNet2DConditionModel, "text_encoder": CLIPTextModel}
    for name, model_class in classes.items():
        getattr(pipe, name).save_pretrained(tmp_path / name)
        model, info = model_class.from_pretrained(tmp_path / name, output_loading_info=True)
        assert not any(info.values())
        assert_same_weights(model, getattr(plain, name))
    assert not list(tmp_path.rglob("adapter_config.json"))


@pytest.mark.slow
def test_a_saved_pipeline_has_the_base_models(pipe: DiffusionPipeline, tmp_path: Path) -> None:
    picture = draw(pipe)
    pipe.save_pretrained(tmp_path)
    again, plain = type(pipe).from_pretrained(tmp_path), models.sd15()
    again.set_progress_bar_config(disable=True)
    assert len(again.adapters) == 0
    assert_same_weights(again.unet, plain.unet)
    # Weights at another alignment in memory round differently.
    assert_same(draw(again), draw(plain), 1e-6)
    again.load_adapter(spellings.peft_names(loras.parts_for(again)), "a", scale=0.7)
    assert_same(draw(again), picture, 1e-6)


@pytest.mark.slow
def test_saving_changes_nothing(pipe: DiffusionPipeline, tmp_path: Path) -> None:
    picture, before = draw(pipe), snapshot(pipe)
    pipe.save_pretrained(tmp_path)
    assert_unchanged(pipe, before)
    assert torch.equal(draw(pipe), picture)


def test_attributes_that_diffusers_and_transformers_react_to_are_not_set(pipe: DiffusionPipeline) -> None:
    for model in (pipe.unet, pipe.text_encoder):
        assert not hasattr(model, "peft_config")
        assert not getattr(model, "_hf_peft_config_loaded", False)
        assert isinstance(next(iter(loras.layers_of(model).values())), nn.Linear)


@pytest.mark.slow
def test_adapters_move_with_their_pipeline(pipe: DiffusionPipeline) -> None:
    pipe.to(torch.float64)
    assert {p.dtype for p in pipe.adapters["a"].components["unet"].parameters()} == {torch.float64}
    plain = models.sd15().to(torch.float64)
    assert_same(draw(pipe), draw(loras.bake(plain, loras.parts_for(plain), 0.7)), 1e-6)


@pytest.mark.slow
def test_clearing_restores_classes_attributes_and_keys() -> None:
    pipe = models.flux()
    base, before = draw(pipe), snapshot(pipe)
    parts = loras.parts_for(pipe, ("transformer", "text_encoder", "text_encoder_2"), f"{loras.ATTENTION}|[qkvo]")
    pipe.load_adapter(spellings.peft_names(parts), "a")
    assert_differs(draw(pipe), base)
    pipe.adapters.clear()
    assert_unchanged(pipe, before)
    assert torch.equal(draw(pipe), base)
