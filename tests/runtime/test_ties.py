"""Layers that share a weight: one adapter on all of them if that is wanted, and never twice on one."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import diffadapt
from diffadapt import AdapterError
from tests.support.cases import for_each
from tests.support.compare import assert_differs, assert_same, assert_unchanged, snapshot
from tests.support.tied import IDS, SeveralTies, hidden, llama, logits, t5
from tests.support.versions import needs

TIED: dict[str, diffadapt.AdapterConfig] = {
    "lora": diffadapt.LoraConfig(rank=2, target_modules=["embed_tokens"], ensure_weight_tying=True),
    "lora by the output layer": diffadapt.LoraConfig(rank=2, target_modules=["lm_head"], ensure_weight_tying=True),
    "lora by both": diffadapt.LoraConfig(rank=2, target_modules=["embed_tokens", "lm_head"], ensure_weight_tying=True),
    "lora by an expression": diffadapt.LoraConfig(rank=2, target_modules="lm_.*", ensure_weight_tying=True),
    "dora": diffadapt.LoraConfig(rank=2, use_dora=True, target_modules=["lm_head"], ensure_weight_tying=True),
    "loha": diffadapt.LoHaConfig(rank=2, target_modules=["embed_tokens"], ensure_weight_tying=True),
    "lokr": diffadapt.LoKrConfig(rank=2, target_modules=["embed_tokens"], ensure_weight_tying=True),
    "oft": diffadapt.OFTConfig(block_size=4, target_modules=["embed_tokens"], ensure_weight_tying=True),
    "ia3": diffadapt.IA3Config(target_modules=["embed_tokens"], ensure_weight_tying=True),
    "full": diffadapt.FullConfig(target_modules=["embed_tokens"], ensure_weight_tying=True),
    "tokens": diffadapt.TokensConfig(target_modules=["lm_head"], token_indices=[3, 9], ensure_weight_tying=True),
}


def trained(model: nn.Module, config: Any, name: str = "a") -> Any:
    """Return a new adapter on the model, with random parameters of the model's dtype."""
    adapter = diffadapt.add_adapter(model, config, name)
    adapter.to(next(iter(model.parameters())).dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator).to(parameter))
    return adapter


def with_weight(model: Any, weight: Tensor) -> Any:
    """Return a copy of a base model with another weight for its embedding and its output layer."""
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed.model.embed_tokens.weight.copy_(weight)
    return changed


@for_each(config=list(TIED.values()))
def test_tied_layers_share_one_set_of_parameters(config: diffadapt.AdapterConfig) -> None:
    model = llama().double()
    base, untouched = logits(model), copy.deepcopy(model)
    before = snapshot(model)
    assert_same(logits(model), base, 0)
    adapter = trained(model, config)
    assert set(adapter.layers) == {"model.embed_tokens", "lm_head"}
    alone = trained(llama().double(), type(config)(**{**vars(config), "ensure_weight_tying": False}))
    assert len(list(adapter.parameters())) <= len(list(alone.parameters()))
    output = logits(model)
    assert_differs(output, base)
    model(IDS).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in adapter.parameters())
    model.zero_grad()
    # The same weight in both layers of a model without adapters.
    adapters = diffadapt.adapters(model)
    adapters.merge("a")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert_same(logits(model), output, 1e-9)
    assert_same(logits(with_weight(untouched, model.lm_head.weight)), output, 1e-9)
    adapters.unmerge()
    assert_same(logits(copy.deepcopy(model)), output, 0)
    assert_same(logits(pickle.loads(pickle.dumps(model))), output, 0)
    adapters.prepare_hotswap(slots=1)
    assert_same(logits(model), output, 1e-9)
    adapters.release_slots()
    adapters.clear()
    assert_unchanged(model, before)


def test_without_the_setting_an_adapter_is_on_one_of_two_tied_layers_and_is_not_merged() -> None:
    model = llama()
    adapter = trained(model, diffadapt.LoraConfig(rank=2, target_modules=["lm_head"]))
    assert list(adapter.layers) == ["lm_head"]
    weight = model.lm_head.weight.detach().clone()
    with pytest.raises(AdapterError, match=r"would change too \(text_encoder\.model\.embed_tokens\)"):
        diffadapt.adapters(model).merge("a")
    assert torch.equal(model.lm_head.weight, weight)


@for_each(config=["lora", "full", "tokens"])
def test_both_names_of_one_embedding_are_one_layer(config: str) -> None:
    """T5 calls the inner embedding; older versions of transformers and files name the outer one."""
    needs("transformers", "5.0", "T5 with a module for each name of its embedding")
    outputs: list[Tensor] = []
    for names in (["shared"], ["encoder.embed_tokens"], ["embed_tokens", "shared"]):
        settings: dict[str, diffadapt.AdapterConfig] = {
            "lora": diffadapt.LoraConfig(rank=2, init=False, target_modules=names),
            "full": diffadapt.FullConfig(target_modules=names),
            "tokens": diffadapt.TokensConfig(token_indices=[3, 5], target_modules=names),
        }
        model = t5()
        base, weight = hidden(model), model.shared.weight.detach().clone()
        adapter = trained(model, settings[config])
        assert len({id(parameter) for parameter in adapter.parameters()}) == len(list(adapter.parameters()))
        outputs.append(hidden(model))
        assert_differs(outputs[-1], base)
        diffadapt.adapters(model).merge("a")
        assert_same(hidden(model), outputs[-1])
        diffadapt.adapters(model).unmerge()
        assert torch.equal(model.shared.weight, weight)
    assert_same(outputs[1], outputs[0], 0)
    assert_same(outputs[2], outputs[0], 0)


@for_each(name=["shared", "encoder.embed_tokens"])
def test_a_file_that_names_either_embedding_acts(name: str) -> None:
    factors = {
        f"text_encoder.{name}.lora_embedding_A": torch.randn(2, 32),
        f"text_encoder.{name}.lora_embedding_B": torch.randn(8, 2),
    }
    model = t5()
    base = hidden(model)
    report = diffadapt.load_adapter(model, factors, "a", component="text_encoder")
    assert (report.used, report.unused, report.components) == (2, [], {"text_encoder": 1})
    with torch.no_grad():
        model.shared.weight.add_((factors[f"text_encoder.{name}.lora_embedding_B"] @ next(iter(factors.values()))).t())
        expected = t5()
        expected.shared.weight.copy_(model.shared.weight)
        model.shared.weight.copy_(t5().shared.weight)
    assert_differs(hidden(expected), base)
    assert_same(hidden(model), hidden(expected))


def test_a_file_with_two_changes_of_one_embedding_is_refused_unless_they_are_equal() -> None:
    needs("transformers", "5.0", "T5 with a module for each name of its embedding")
    factors = {
        f"text_encoder.{name}.lora_embedding_{factor}": torch.ones(shape)
        for name in ("shared", "encoder.embed_tokens")
        for factor, shape in (("A", (2, 32)), ("B", (8, 2)))
    }
    once, twice = t5(), t5()
    diffadapt.load_adapter(twice, factors, "a", component="text_encoder")
    single = {key: tensor for key, tensor in factors.items() if ".shared." in key}
    diffadapt.load_adapter(once, single, "a", component="text_encoder")
    assert_differs(hidden(once), hidden(t5()))
    assert_same(hidden(twice), hidden(once), 0)
    factors["text_encoder.shared.lora_embedding_B"] *= 2
    model = t5()
    with pytest.raises(AdapterError, match="is the same embedding and has other tensors"):
        diffadapt.load_adapter(model, factors, "a", component="text_encoder")
    assert_same(hidden(model), hidden(t5()), 0)


@for_each(format=["kohya", "diffusers", "peft"], config=["lora", "lora by the output layer"])
def test_shared_parameters_are_saved_once_and_loaded_as_shared(format: str, config: str, tmp_path: Path) -> None:
    model, again = llama(), llama()
    trained(model, TIED[config])
    path = diffadapt.adapters(model).save("a", tmp_path / ("a" if format == "peft" else "a.safetensors"), format)
    report = diffadapt.load_adapter(again, path, "b", component="text_encoder", trainable=True)
    assert report.components == {"text_encoder": 1}
    assert_same(logits(again), logits(model))
    parameters = list(diffadapt.adapters(again)["b"].parameters())
    assert len(parameters) == 2
    diffadapt.adapters(again).merge("b")


def test_several_ties_in_one_model_and_none_in_a_layer() -> None:
    torch.manual_seed(0)
    model = SeveralTies().double()
    ids = torch.arange(8).view(2, 4)
    base = model(ids).detach()
    config = diffadapt.LoraConfig(
        rank=2, target_modules=["first", "second_head", "up", "again", "alone"], ensure_weight_tying=True
    )
    adapter = trained(model, config)
    assert len(list(adapter.parameters())) == 2 * 4
    output = model(ids).detach()
    assert_differs(output, base)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    diffadapt.adapters(model).merge("a")
    assert_same(model(ids), output, 1e-9)
    diffadapt.adapters(model).unmerge()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


def test_a_weight_that_two_components_share_is_not_merged_for_one_of_them() -> None:
    from diffadapt.merging.merge import merge_

    torch.manual_seed(0)
    first, second = nn.Sequential(nn.Embedding(6, 4)), nn.Sequential(nn.Embedding(6, 4))
    second[0].weight = first[0].weight
    trained(first, diffadapt.FullConfig(target_modules=["0"], ensure_weight_tying=True))
    with pytest.raises(AdapterError, match=r"would change too \(text_encoder_2\.0\)"):
        merge_({"text_encoder": first, "text_encoder_2": second}, ["a"])


@for_each(prefix=["shared", "encoder.embed_tokens", "encoder"])
def test_a_strength_for_either_name_of_an_embedding_is_one_for_both(prefix: str) -> None:
    needs("transformers", "5.0", "T5 with a module for each name of its embedding")
    model = t5()
    adapter = trained(model, diffadapt.LoraConfig(rank=2, target_modules=["shared"], init=False))
    diffadapt.adapters(model).activate({"a": {prefix: 0.5}})
    assert [float(layer.gate.detach()) for layer in adapter.layers.values()] == [0.5, 0.5]
    diffadapt.adapters(model).merge("a")


def test_tied_layers_of_different_strengths_run_but_are_not_merged() -> None:
    model = llama()
    trained(model, TIED["lora"])
    both = logits(model)
    weight = model.lm_head.weight.detach().clone()
    diffadapt.adapters(model).activate({"a": {"lm_head": 0.0}})
    assert_differs(logits(model), both)
    with pytest.raises(AdapterError, match="have different strengths, of which a merged weight can have only one"):
        diffadapt.adapters(model).merge("a")
    assert torch.equal(model.lm_head.weight, weight)


def test_ties_are_known_while_weights_are_offloaded() -> None:
    from accelerate import cpu_offload

    model = llama()
    adapter_config = diffadapt.LoraConfig(rank=2, target_modules=["lm_head"], ensure_weight_tying=True)
    trained(model, adapter_config)
    expected = logits(model)
    diffadapt.adapters(model).clear()
    cpu_offload(model, execution_device=torch.device("cpu"))
    adapter = trained(model, adapter_config)
    assert set(adapter.layers) == {"model.embed_tokens", "lm_head"}
    assert_same(logits(model), expected)
    diffadapt.adapters(model).clear()
    alone = trained(model, diffadapt.LoraConfig(rank=2, target_modules=["lm_head"]))
    assert list(alone.layers) == ["lm_head"]
    with pytest.raises(AdapterError, match="would change too"):
        diffadapt.adapters(model).merge("a")


def test_settings_that_tied_layers_cannot_share_are_refused() -> None:
    with pytest.raises(AdapterError, match="bias"):
        diffadapt.add_adapter(
            SeveralTies(), diffadapt.FullConfig(target_modules=["up"], bias=True, ensure_weight_tying=True)
        )
    indices = {"embed_tokens": [1, 2], "lm_head": [3]}
    with pytest.raises(AdapterError, match="their settings differ"):
        diffadapt.add_adapter(llama(), diffadapt.TokensConfig(token_indices=indices, ensure_weight_tying=True))
