"""Compiled models: no graph breaks, and no recompile if only values change."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import diffadapt
from tests.support import loras, models, small_models, spellings
from tests.support.compare import assert_differs, assert_same, assert_unchanged, snapshot
from tests.support.small_models import predict, unet
from tests.support.versions import needs

pytestmark = pytest.mark.slow

Layers = dict[str, loras.Factors]


flux = partial(small_models.flux, blocks=1)


def layers_of(model: nn.Module, rank: int = 4) -> Layers:
    return loras.factors_for(loras.layers_of(model, rf"{loras.ATTENTION}|conv1|proj_mlp"), rank)


def load(model: nn.Module, layers: Layers, name: str, **options: Any) -> None:
    component = "unet" if isinstance(model, UNet2DConditionModel) else "transformer"
    diffadapt.load_adapter(model, spellings.peft_names({component: layers}), name=name, **options)


@torch.no_grad()
def expected(build: Callable[[], nn.Module], *changes: tuple[Layers, float]) -> Tensor:
    model = build()
    for layers, strength in changes:
        for path, part in layers.items():
            weight = model.get_submodule(path).weight
            weight += (strength * part.delta).to(weight)
    return predict(model)


@torch.no_grad()
def test_a_model_with_adapters_is_one_graph_which_other_strengths_keep(counter: CompileCounterWithBackend) -> None:
    model = unet()
    one, two = layers_of(model), layers_of(model, rank=2)
    load(model, one, "one")
    load(model, two, "two", scale=0.5)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    assert_same(predict(compiled), expected(unet, (one, 1.0), (two, 0.5)))
    assert_differs(predict(compiled), expected(unet))
    for strengths in ((0.3, 1.0), (0.0, 0.0), (-1.0, 2.5)):
        diffadapt.adapters(model).activate(dict(zip(("one", "two"), strengths, strict=True)))
        assert_same(predict(compiled), expected(unet, (one, strengths[0]), (two, strengths[1])))
    prefix = next(iter(one)).split(".")[0]
    diffadapt.adapters(model).activate({"one": {prefix: 0.5}, "two": 1.0})
    assert_same(predict(compiled), predict(model))
    assert counter.frame_count == 1


@torch.no_grad()
def test_adapters_of_a_compiled_model_are_loaded_merged_and_cleared(counter: CompileCounterWithBackend) -> None:
    model = flux()
    layers = layers_of(model)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    base = predict(compiled)
    with torch._dynamo.config.patch(error_on_recompile=False):
        load(model, layers, "one")
        adapted = predict(compiled)
        assert_same(adapted, expected(flux, (layers, 1.0)))
        diffadapt.adapters(model).merge("one")
        assert_same(predict(compiled), adapted)
        diffadapt.adapters(model).unmerge()
        assert_same(predict(compiled), adapted)
        diffadapt.adapters(model).clear()
        assert torch.equal(predict(compiled), base)


@torch.no_grad()
def test_a_pipeline_with_a_compiled_component_gets_adapters(counter: CompileCounterWithBackend) -> None:
    pipe = models.flux()
    model = flux()
    pipe.transformer = torch.compile(model, backend=counter, fullgraph=True)
    parts = {"transformer": layers_of(model), "text_encoder": layers_of(pipe.text_encoder)}
    report = pipe.load_adapter(spellings.peft_names(parts), "a")
    assert report.components == {name: len(layers) for name, layers in parts.items()}
    assert_same(predict(pipe.transformer), expected(flux, (parts["transformer"], 1.0)))
    pipe.adapters.activate({"a": {"transformer": 0.5}})
    assert_same(predict(pipe.transformer), expected(flux, (parts["transformer"], 0.5)))
    assert counter.frame_count == 1


@torch.no_grad()
def test_a_model_compiled_in_place_is_not_recompiled(counter: CompileCounterWithBackend) -> None:
    model = flux()
    layers = layers_of(model)
    load(model, layers, "a")
    model.compile(backend=counter, fullgraph=True)
    assert_same(predict(model), expected(flux, (layers, 1.0)))
    diffadapt.adapters(model).activate({"a": 0.2})
    assert_same(predict(model), expected(flux, (layers, 0.2)))
    assert counter.frame_count == 1


@torch.no_grad()
def test_individually_compiled_blocks_follow_a_new_strength(counter: CompileCounterWithBackend) -> None:
    needs("diffusers", "0.35", "compile_repeated_blocks")
    model = small_models.flux()
    load(model, layers_of(model), "a")
    eager = predict(model)
    model.compile_repeated_blocks(backend=counter, fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=False):
        # The first and the later blocks get inputs of different strides, with and without adapters.
        assert_same(predict(model), eager)
    diffadapt.adapters(model).activate({"a": 0.3})
    assert_differs(predict(model), eager, 1e-3)


@torch.no_grad()
def test_a_compiled_model_follows_the_call_scale(counter: CompileCounterWithBackend) -> None:
    model = flux()
    layers = layers_of(model)
    load(model, layers, "a")
    compiled = torch.compile(model, backend=counter)
    with torch._dynamo.config.patch(error_on_recompile=False):
        assert_same(predict(compiled, scale=0.5), expected(flux, (layers, 0.5)))
        assert_same(predict(compiled), expected(flux, (layers, 1.0)))


@torch.no_grad()
def test_the_first_call_scale_on_slots_compiles_nothing(counter: CompileCounterWithBackend) -> None:
    needs("torch", "2.13", "a first call scale without a recompile")
    model = flux()
    layers = layers_of(model)
    diffadapt.adapters(model).prepare_hotswap(spellings.peft_names({"transformer": layers}))
    load(model, layers, "a")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    full = predict(compiled)
    assert_same(full, expected(flux, (layers, 1.0)))
    for scale in (0.5, -0.25):
        assert_same(predict(compiled, scale=scale), expected(flux, (layers, scale)))
    assert torch.equal(predict(compiled), full)
    assert counter.frame_count == 1


def test_a_compiled_model_has_the_same_gradients(counter: CompileCounterWithBackend) -> None:
    gradients: list[list[Tensor]] = []
    for backend in (None, counter):
        model = flux()
        model.requires_grad_(False)
        adapter = diffadapt.add_adapter(model, diffadapt.LoraConfig(rank=2, target_modules=["to_q", "to_v"]))
        for parameter in adapter.parameters():
            parameter.data.fill_(0.1)
        call = model if backend is None else torch.compile(model, backend=backend, fullgraph=True)
        predict(call).square().sum().backward()
        gradients.append([parameter.grad for parameter in adapter.parameters()])
    for eager, compiled in zip(*gradients, strict=True):
        assert eager.abs().max() > 0
        assert_same(compiled, eager)
    assert counter.frame_count == 1


@torch.no_grad()
def test_a_refused_file_leaves_a_compiled_model_alone(counter: CompileCounterWithBackend) -> None:
    model = flux()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    base, before = predict(compiled), snapshot(model)
    tensors = spellings.peft_names({"transformer": layers_of(model)})
    tensors.popitem()
    with pytest.raises(diffadapt.AdapterError):
        diffadapt.load_adapter(compiled, tensors)
    assert_unchanged(model, before)
    assert torch.equal(predict(compiled), base)
    assert counter.frame_count == 1
