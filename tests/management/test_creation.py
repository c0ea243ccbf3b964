"""New adapters of several types, adapters that are trained on, and adapters with another name."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import diffadapt
from diffadapt import AdapterError
from tests.support import small_models
from tests.support.cases import for_each
from tests.support.compare import assert_differs, assert_same, assert_unchanged, snapshot
from tests.support.tied import IDS, llama, logits

SEVERAL: dict[str, list[diffadapt.AdapterConfig]] = {
    "lora and tokens": [
        diffadapt.LoraConfig(rank=2, target_modules=["q_proj"]),
        diffadapt.TokensConfig(target_modules=["embed_tokens"], token_indices=[1, 3], ensure_weight_tying=True),
    ],
    "lora and whole norms": [
        diffadapt.LoraConfig(rank=2, target_modules=["q_proj", "v_proj"]),
        diffadapt.FullConfig(target_modules=["input_layernorm", "norm"]),
    ],
    "lora and lokr": [
        diffadapt.LoraConfig(rank=2, target_modules=["q_proj", "k_proj"]),
        diffadapt.LoKrConfig(rank=2, target_modules="all-linear", exclude_modules=["q_proj", "k_proj"]),
    ],
    "lora, tokens and whole norms": [
        diffadapt.LoraConfig(rank=2, target_modules=["q_proj"]),
        diffadapt.TokensConfig(token_indices={"embed_tokens": [5]}),
        diffadapt.FullConfig(target_modules=["norm"]),
    ],
}


def randomised(adapter: Any) -> Any:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return adapter


@for_each(name=list(SEVERAL))
def test_several_settings_make_one_adapter_in_one_file(name: str, tmp_path: Path) -> None:
    model, again = llama(), llama()
    before, base = snapshot(model), logits(model)
    adapter = diffadapt.add_adapter(model, SEVERAL[name], "a")
    assert_same(logits(model), base, 0)
    randomised(adapter)
    model(IDS).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in adapter.parameters())
    model.zero_grad()
    adapters = diffadapt.adapters(model)
    assert adapters.names == ["a"]
    assert_differs(logits(model), base)
    path = adapters.save("a", tmp_path / "a.safetensors", "kohya")
    report = diffadapt.load_adapter(again, path, "b", component="text_encoder")
    assert report.unused == []
    assert len(report.types) == len(SEVERAL[name])
    assert_same(logits(again), logits(model))
    if "tokens" in name and "norms" not in name:
        for format in ("diffusers", "peft"):
            one = llama()
            target = tmp_path / format if format == "peft" else tmp_path / f"{format}.safetensors"
            diffadapt.load_adapter(one, adapters.save("a", target, format), "b", component="text_encoder")
            assert_same(logits(one), logits(model))
    adapters.clear()
    assert_unchanged(model, before)


def test_settings_that_name_a_layer_twice_are_refused_and_nothing_is_added() -> None:
    model = llama()
    before = snapshot(model)
    lora = diffadapt.LoraConfig(rank=2, target_modules=["q_proj"])
    for configs, message in (
        (
            [lora, diffadapt.LoKrConfig(rank=2, target_modules="all-linear")],
            r"q_proj is named by two .*\(lora and lokr\)",
        ),
        ([lora, "q_proj"], "the settings are a str"),
        ([], "the settings are a list"),
    ):
        with pytest.raises(AdapterError, match=message):
            diffadapt.add_adapter(model, configs)
        assert_unchanged(model, before)


def saved(tmp_path: Path, **metadata: Any) -> tuple[Path, Tensor]:
    """Return the file of a LoRA in half precision, and the output of the model with it."""
    model = small_models.unet()
    config = diffadapt.LoraConfig(rank=2, alpha=1, target_modules=["to_q", "to_v"], init=False)
    diffadapt.add_adapter(model, config, "a")
    path = diffadapt.adapters(model).save("a", tmp_path / "a.safetensors")
    tensors = {key: tensor.half() for key, tensor in load_file(path).items()}
    save_file(tensors, path, metadata)
    again = small_models.unet()
    diffadapt.load_adapter(again, path, "a")
    return path, small_models.predict(again)


@for_each(how=["on load", "of the adapter", "of the collection"])
def test_training_goes_on_from_a_file_exactly_where_it_ended(how: str, tmp_path: Path) -> None:
    path, expected = saved(tmp_path, lora_adapter_metadata='{"unet.lora_dropout": 0.25}')
    model = small_models.unet()
    tensors = load_file(path)
    kept = {key: tensor.clone() for key, tensor in tensors.items()}
    diffadapt.load_adapter(model, tensors, "a", trainable=how == "on load")
    adapters = diffadapt.adapters(model)
    if how == "of the adapter":
        assert adapters["a"].components["unet"].train_() is adapters["a"].components["unet"]
    elif how == "of the collection":
        adapters["a"].train_()
    parameters = list(adapters["a"].parameters())
    assert {(parameter.dtype, parameter.requires_grad) for parameter in parameters} == {(torch.float32, True)}
    assert_same(small_models.predict(model), expected, 1e-6)
    optimizer = torch.optim.SGD(parameters, lr=1.0)
    with torch.enable_grad():
        small_models.predict(model)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert_differs(small_models.predict(model), expected)
    # The tensors that the caller gave are theirs.
    assert all(torch.equal(tensor, kept[key]) for key, tensor in tensors.items())


def test_the_dropout_of_a_training_goes_on_with_it(tmp_path: Path) -> None:
    path, _ = saved(tmp_path, lora_adapter_metadata='{"unet.lora_dropout": 0.25}')
    model = small_models.unet()
    diffadapt.load_adapter(model, path, "trained", trainable=True)
    diffadapt.load_adapter(model, path, "used")
    dropouts = {
        name: {layer.dropout.input for layer in loaded.components["unet"].layers.values()}
        for name in ("trained", "used")
        for loaded in [diffadapt.adapters(model)[name]]
    }
    assert dropouts == {"trained": {0.25}, "used": {0.0}}


def test_an_adapter_leaves_its_slots_to_be_trained_and_a_merged_one_is_not(tmp_path: Path) -> None:
    path, expected = saved(tmp_path)
    model = small_models.unet()
    diffadapt.load_adapter(model, path, "a")
    adapters = diffadapt.adapters(model)
    adapters.prepare_hotswap(slots=1)
    with pytest.raises(AdapterError, match=r"runs in slots or is merged.*call train_\(\) of pipe.adapters\[name\]"):
        adapters["a"].components["unet"].train_()
    adapters["a"].train_()
    with torch.no_grad():
        for parameter in adapters["a"].parameters():
            parameter.mul_(2)
    assert_differs(small_models.predict(model), expected)
    diffadapt.load_adapter(model, path, "b", activate=False)
    adapters.release_slots()
    adapters.activate("b")
    adapters.merge("b")
    with pytest.raises(AdapterError, match=r"is merged into the weights; call unmerge\(\) before training"):
        adapters["b"].train_()


def test_an_adapter_keeps_everything_but_its_name(tmp_path: Path) -> None:
    path, _ = saved(tmp_path)
    model = small_models.unet()
    for name in ("a", "b", "c"):
        diffadapt.load_adapter(model, path, name, scale=0.5)
    adapters = diffadapt.adapters(model)
    expected = small_models.predict(model)
    adapters.prepare_hotswap(slots=3)
    adapters.rename("b", "style.v2")
    assert adapters.names == ["a", "style.v2", "c"]
    assert adapters.active == {"a": 0.5, "style.v2": 0.5, "c": 0.5}
    assert_same(small_models.predict(model), expected)
    adapters.release_slots()
    adapters.merge("style.v2")
    adapters.rename("style.v2", "b")
    assert adapters.merged == ["b"]
    adapters.unmerge()
    assert_same(small_models.predict(model), expected)
    for old, new, message in (("b", "a", "exists already"), ("x", "y", "no adapter 'x'"), ("b", "x/y", "no name")):
        with pytest.raises(AdapterError, match=message):
            adapters.rename(old, new)
    assert adapters.names == ["a", "b", "c"]
