"""PEFT folders beyond plain adapters: retrained tokens, tied layers, whole modules, bare parameters, mutating starts.

PEFT makes every folder here, and the expected output is that of PEFT after reloading it.
"""

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import diffadapt
from diffadapt import AdapterError
from tests.support.cases import for_each
from tests.support.compare import assert_differs, assert_same, assert_unchanged, snapshot
from tests.support.silence import ignored
from tests.support.tied import llama, logits


class Mixed(nn.Module):
    """A container, batch norms, an embedding, and a module that owns bare parameters."""

    def __init__(self, transposed: bool = False) -> None:
        super().__init__()
        self.emb, self.body = nn.Embedding(6, 4), nn.Linear(4, 4)
        self.tail = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.LayerNorm(4), nn.Linear(4, 4))
        self.bn, self.conv, self.bn2 = nn.BatchNorm1d(4), nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3)
        self.experts = Experts(transposed)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.bn(self.tail(self.body(self.emb(ids))))
        return self.experts(hidden).sum() + hidden + self.bn2(self.conv(hidden[None, None])).mean()


class Experts(nn.Module):
    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.weights, self.table = nn.Parameter(torch.randn(3, 4, 5)), nn.Parameter(torch.randn(2, 4))
        if transposed:
            self.is_transposed = True

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bi,eij->bj", x * self.table[0] + self.table[1], self.weights)


def mixed(transposed: bool = False) -> Mixed:
    torch.manual_seed(0)
    model = Mixed(transposed)
    with torch.no_grad():
        for norm in (model.bn, model.bn2):
            for tensor in (norm.running_mean, norm.weight, norm.bias):
                tensor.normal_()
            norm.running_var.uniform_(0.5, 2)
    return model.eval()


def of_mixed(model: Any) -> Tensor:
    with torch.no_grad():
        return model(torch.arange(6))


@dataclass(frozen=True)
class Training:
    """A training with PEFT.

    Attributes:
        config: its settings.
        types: the adapter layers that the folder has, by type.
        build: the model.
        call: its output.
        writes: whether the folder can be written again, for PEFT, too.
    """

    config: Any
    types: dict[str, int]
    build: Callable[[], Any] = llama
    call: Callable[[Any], Tensor] = logits
    writes: bool = True
    component: str = field(default="text_encoder")


def _lora(**options: Any) -> peft.LoraConfig:
    return peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], **options})


def _on_mixed(types: dict[str, int], writes: bool = True, transposed: bool = False, **options: Any) -> Training:
    config = _lora(**{"target_modules": ["body"], **options})
    return Training(config, types, lambda: mixed(transposed), of_mixed, writes, "model")


TOKENS = {"embed_tokens": [1, 3]}
TRAININGS: dict[str, Training] = {
    "tokens, tied": Training(
        peft.TrainableTokensConfig(token_indices=[1, 3], target_modules=["embed_tokens"]), {"tokens": 1}
    ),
    "tokens, untied": Training(
        peft.TrainableTokensConfig(token_indices=[1, 3], target_modules=["embed_tokens"]),
        {"tokens": 1},
        lambda: llama(tied=False),
    ),
    "tokens beside a lora, tied": Training(_lora(trainable_token_indices=TOKENS), {"tokens": 1, "lora": 2}),
    "tokens as a list": Training(_lora(trainable_token_indices=[1, 3]), {"tokens": 1, "lora": 2}),
    "other tokens in the output layer": Training(
        _lora(trainable_token_indices={**TOKENS, "lm_head": [2]}),
        {"tokens": 2, "lora": 2},
        lambda: llama(tied=False),
    ),
    "lora on tied layers": Training(_lora(target_modules=["embed_tokens"], ensure_weight_tying=True), {"lora": 1}),
    "lora on the tied output layer": Training(_lora(target_modules=["lm_head"], ensure_weight_tying=True), {"lora": 1}),
    "whole tied layers": Training(
        _lora(modules_to_save=["embed_tokens"], ensure_weight_tying=True), {"lora": 2, "full": 1}, writes=False
    ),
    "pissa": Training(_lora(init_lora_weights="pissa"), {"lora": 2}),
    "pissa with a larger rank than the layer": Training(_lora(init_lora_weights="pissa", r=32), {"lora": 2}),
    "pissa, rank-stabilised dora": Training(
        _lora(init_lora_weights="pissa", use_dora=True, use_rslora=True), {"dora": 2}
    ),
    "olora": Training(_lora(init_lora_weights="olora"), {"lora": 2}),
    "a whole container": _on_mixed({"lora": 1, "full": 3}, writes=False, modules_to_save=["tail"]),
    "batch norms": _on_mixed({"lora": 1, "batch-norm": 2}, writes=False, modules_to_save=["bn", "bn2"]),
    "tokens of any embedding": _on_mixed({"lora": 1, "tokens": 1}, trainable_token_indices={"emb": [1, 3]}),
    "bare parameters": _on_mixed(
        {"lora": 1, "lora-parameter": 2}, target_parameters=["experts.weights", "experts.table"]
    ),
    "a bare parameter, transposed": _on_mixed(
        {"lora-parameter": 1}, transposed=True, target_modules=[], target_parameters=["weights"]
    ),
}


def train(training: Training, folder: Path) -> tuple[Any, Tensor]:
    """Write a folder with PEFT and return the untouched base model, and the output after PEFT has reloaded it."""
    base = training.build()
    with ignored():
        model: Any = peft.get_peft_model(copy.deepcopy(base), copy.deepcopy(training.config))
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in filter(lambda parameter: parameter.requires_grad, model.parameters()):
                parameter.add_(0.2 * torch.randn_like(parameter))
            for name, buffer in model.named_buffers():
                if "modules_to_save.default.running" in name:
                    buffer.add_(torch.rand_like(buffer))
        model.eval().save_pretrained(folder)
        return base, reloaded(training, folder)


def reloaded(training: Training, folder: Path) -> Tensor:
    """Return the output of PEFT with the adapter in a folder."""
    with ignored():
        return training.call(peft.PeftModel.from_pretrained(training.build(), str(folder)).eval())


@pytest.mark.slow
@for_each(name=list(TRAININGS))
def test_a_folder_of_peft_means_what_peft_makes_of_it(name: str, tmp_path: Path) -> None:
    training = TRAININGS[name]
    model, expected = train(training, tmp_path / "peft")
    base, before = training.call(model), snapshot(model)
    assert_differs(expected, base, 0.05)
    report = diffadapt.load_adapter(model, tmp_path / "peft", "a", component=training.component)
    assert report.types == training.types
    assert report.notes == []
    assert_same(training.call(model), expected)
    adapters = diffadapt.adapters(model)
    with adapters.disabled():
        assert_same(training.call(model), base, 0)
    if training.writes:
        written = adapters.save("a", tmp_path / "ours", "peft").parent
        assert_same(reloaded(training, written), expected)
    if not {"batch-norm"} & set(report.types):
        adapters.merge("a")
        assert_same(training.call(model), expected)
        adapters.unmerge()
    adapters.clear()
    assert_unchanged(model, before)


@pytest.mark.slow
def test_the_header_of_a_diffusers_file_names_a_start_too(tmp_path: Path) -> None:
    model, expected = train(TRAININGS["pissa"], tmp_path / "peft")
    tensors = {
        key.replace("base_model.model.", "text_encoder."): tensor
        for key, tensor in load_file(tmp_path / "peft" / "adapter_model.safetensors").items()
    }
    options = {"r": 4, "lora_alpha": 8, "init_lora_weights": "pissa"}
    header = json.dumps({f"text_encoder.{name}": value for name, value in options.items()})
    save_file(tensors, tmp_path / "a.safetensors", {"lora_adapter_metadata": header})
    diffadapt.load_adapter(model, tmp_path / "a.safetensors", "a", component="text_encoder")
    assert_same(logits(model), expected)


def changed(folder: Path, tmp_path: Path, **options: Any) -> Path:
    """Return a copy of a PEFT folder with other options in its config."""
    target = tmp_path / "changed"
    target.mkdir()
    config = json.loads((folder / "adapter_config.json").read_text())
    (target / "adapter_config.json").write_text(json.dumps({**config, **options}))
    (target / "adapter_model.safetensors").write_bytes((folder / "adapter_model.safetensors").read_bytes())
    return target


REFUSED: dict[str, dict[str, Any]] = {
    "pissa_niter_4.*path_initial_model_for_weight_conversion": {"init_lora_weights": "pissa_niter_4"},
    "corda.*path_initial_model": {"init_lora_weights": "corda"},
    "loftq.*quantised one": {"init_lora_weights": "loftq"},
    "lora_ga.*gradients": {"init_lora_weights": "lora_ga"},
    "alora_invocation_tokens in the file's metadata": {"alora_invocation_tokens": [3]},
    "layer_replication in the file's metadata": {"layer_replication": [[0, 1], [0, 1]]},
    "use_qalora": {"use_qalora": True},
    "kasa_config": {"kasa_config": {"beta": 1}},
}


@pytest.mark.slow
def test_options_that_change_the_result_are_refused_and_unknown_ones_reported(tmp_path: Path) -> None:
    model, _ = train(Training(_lora(), {}), tmp_path / "peft")
    before = snapshot(model)
    for number, (message, options) in enumerate(REFUSED.items()):
        (tmp_path / str(number)).mkdir()
        folder = changed(tmp_path / "peft", tmp_path / str(number), **options)
        with pytest.raises(AdapterError, match=message):
            diffadapt.load_adapter(model, folder, "a", component="text_encoder")
        assert_unchanged(model, before)
    folder = changed(tmp_path / "peft", tmp_path, of_the_future={"beta": 2}, unset=None, gaussian=False)
    report = diffadapt.load_adapter(model, folder, "a", component="text_encoder")
    assert [note.key for note in report.notes] == ["adapter_config.json"]
    assert "of_the_future={'beta': 2}" in report.notes[0].reason
    assert "of_the_future" in str(report)


@pytest.mark.slow
def test_a_start_is_refused_on_weights_that_are_not_those_of_the_training(tmp_path: Path) -> None:
    model, _ = train(TRAININGS["pissa"], tmp_path / "peft")
    diffadapt.load_adapter(model, tmp_path / "peft", "a", component="text_encoder")
    diffadapt.adapters(model).merge("a")
    with pytest.raises(AdapterError, match="cannot be computed while a is merged"):
        diffadapt.load_adapter(model, tmp_path / "peft", "b", component="text_encoder")
    rounded = llama()
    for layer in rounded.model.layers:
        layer.self_attn.to(torch.float8_e4m3fn)
    with pytest.raises(AdapterError, match="load it on unquantised weights"):
        diffadapt.load_adapter(rounded, tmp_path / "peft", "a", component="text_encoder", dtype=torch.float32)


def test_rows_of_tokens_need_their_ids_and_suit_the_embedding() -> None:
    key = "base_model.model.model.embed_tokens.trainable_tokens_delta"
    with pytest.raises(AdapterError, match=r"token_ids is missing: the ids of retrained tokens are in adapter_config"):
        diffadapt.load_adapter(llama(), {key: torch.ones(2, 16)}, "a", component="text_encoder")
