"""The methods of PEFT that share tensors, draw places from seeds or start with an effect there."""

import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.waveft.wavelet import Wavelet
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import diffadapt
from diffadapt import AdapterError, LoadError
from diffadapt.types.config import AdapterConfig
from diffadapt.types.wavelets import KNOWN, filters

LAYERS: dict[str, Any] = {"target_modules": ["0", "1"]}
SHARING: dict[str, tuple[AdapterConfig, str]] = {
    "vera": (diffadapt.VeRAConfig(rank=4, init=False, **LAYERS), "vera_A"),
    "pvera": (diffadapt.PVeRAConfig(rank=4, init=False, **LAYERS), "pvera_B"),
    "randlora": (diffadapt.RandLoraConfig(rank=4, init=False, **LAYERS), "randlora_B"),
    "vblora": (diffadapt.VBLoRAConfig(rank=2, vectors=8, length=4, init=False, **LAYERS), "vblora_vector_bank"),
    "unilora": (diffadapt.UniLoraConfig(rank=2, length=20, init=False, **LAYERS), "unilora_theta_d"),
    "tinylora": (diffadapt.TinyLoRAConfig(rank=2, length=5, tying=1.0, init=False, **LAYERS), "tinylora_v"),
}


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 12)).eval()


def input() -> Tensor:
    return torch.randn(5, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", SHARING)
def test_shared_tensors_are_one_parameter_of_all_layers_and_once_in_a_peft_folder(name: str, tmp_path: Path) -> None:
    config, shared = SHARING[name]
    root = model()
    adapter = diffadapt.add_adapter(root, config, "a")
    root.eval()
    first, second = (layer._parameters[shared] for layer in adapter.layers.values())
    assert first is second
    output = root(input())
    diffadapt.adapters(root).save("a", tmp_path / "folder", format="peft")
    diffadapt.adapters(root).save("a", tmp_path / "file.safetensors", format="kohya")
    keys = [key for key in load_file(tmp_path / "folder" / "adapter_model.safetensors") if shared in key]
    # PEFT has a RandLora's bases for every layer, too.
    assert len(keys) == (3 if name == "randlora" else 1)
    for source in (tmp_path / "folder", tmp_path / "file.safetensors"):
        again = model()
        options = {} if source.is_dir() else {"component": "unet"}
        diffadapt.load_adapter(again, source, "a", **options)
        loaded = diffadapt.adapters(again)["a"].components[next(iter(diffadapt.adapters(again)["a"].components))]
        first, second = (layer._parameters[shared] for layer in loaded.layers.values())
        assert first is second
        torch.testing.assert_close(again(input()), output)
        assert not torch.allclose(output, model()(input()))


def test_projections_follow_from_the_seed_whatever_else_is_drawn(tmp_path: Path) -> None:
    found: list[Tensor] = []
    for seed in (3, 3, 4):
        torch.randn(5)
        root = model()
        adapter = diffadapt.add_adapter(root, diffadapt.VeRAConfig(rank=4, seed=seed, **LAYERS), "a")
        found.append(adapter.layers["0"].tensors["vera_A"])
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    assert found[0].shape == (4, 16)
    assert not found[0].requires_grad


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (diffadapt.HRAConfig, {"rank": 3}),
        (diffadapt.HRAConfig, {"rank": 2, "gram_schmidt": True}),
        (diffadapt.DEFTConfig, {"rank": 2, "remove_only": True}),
    ],
)
def test_a_start_with_an_effect_has_to_be_asked_for(make: Any, options: dict[str, Any]) -> None:
    with pytest.raises(AdapterError, match="init='peft'"):
        make(**LAYERS, **options)
    root = model()
    diffadapt.add_adapter(root, make(init="peft", **LAYERS, **options), "a")
    assert not torch.allclose(root(input()), model()(input()))


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (diffadapt.C3AConfig, {"block_size": 4}),
        (diffadapt.FourierFTConfig, {"frequencies": 20}),
        (diffadapt.WaveFTConfig, {"frequencies": 20}),
        (diffadapt.VBLoRAConfig, {"rank": 2, "vectors": 8, "length": 4}),
        (diffadapt.UniLoraConfig, {"rank": 2, "length": 20}),
    ],
)
def test_types_with_an_effect_at_the_start_in_peft_start_without_one_and_learn(
    make: Any, options: dict[str, Any]
) -> None:
    root = model()
    peft_start = {"init": "xavier_uniform"} if make is diffadapt.C3AConfig else {"init": "peft"}
    adapter = diffadapt.add_adapter(root, make(**LAYERS, **options), "a")
    assert torch.equal(root(input()), model()(input()))
    target = torch.randn(5, 12, generator=torch.Generator().manual_seed(2))
    optimizer = torch.optim.Adam([p for p in adapter.parameters() if p.requires_grad], lr=0.02)
    losses: list[float] = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = (root(input()) - target).pow(2).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.97 * losses[0]
    other = model()
    diffadapt.add_adapter(other, make(**peft_start, **LAYERS, **options), "a")
    assert not torch.equal(other(input()), model()(input()))


@pytest.mark.parametrize(
    ("peft_type", "reason"),
    [
        ("LILY", "router averages over all tokens of a batch"),
        ("XLORA", "hidden states of a language model"),
        ("POLY", "number of a task"),
        ("PREFIX_TUNING", "attention cache of a language model"),
        ("SOMETHING", "expected one of"),
    ],
)
def test_a_folder_of_a_method_that_is_not_known_is_refused_by_name(peft_type: str, reason: str, tmp_path: Path) -> None:
    save_file({"base_model.model.0.lora_A.weight": torch.zeros(2, 8)}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": peft_type}))
    with pytest.raises(LoadError, match=f"peft_type='{peft_type}'.*{reason}"):
        diffadapt.load_adapter(model(), tmp_path)


def test_layers_of_a_group_share_the_numbers_of_a_tinylora(tmp_path: Path) -> None:
    # The order of the model is not that of the names.
    names = ("up", "down", "mid", "a", "b")

    def root() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(OrderedDict((name, nn.Linear(8, 8)) for name in names))

    trained = root()
    config = diffadapt.TinyLoRAConfig(rank=2, length=3, tying=0.5, init="uniform", target_modules="all-linear")
    adapter = diffadapt.add_adapter(trained, config, "a")
    numbers = [adapter.layers[name]._parameters["tinylora_v"] for name in names]
    assert [number is numbers[0] for number in numbers] == [True, True, False, False, False]
    assert [number is numbers[2] for number in numbers] == [False, False, True, True, True]
    assert len(list(adapter.parameters())) == 2 + 3 * len(names)
    for value, number in enumerate((numbers[0], numbers[2])):
        assert number is not None
        number.data.fill_(1.0 + value)
    expected = trained(input())
    diffadapt.adapters(trained).save("a", tmp_path / "folder", format="peft")
    stored = load_file(tmp_path / "folder" / "adapter_model.safetensors")
    assert torch.equal(stored["base_model.tinylora_v.0"], torch.ones(3))
    assert torch.equal(stored["base_model.tinylora_v.1"], torch.full((3,), 2.0))
    again = root()
    diffadapt.load_adapter(again, tmp_path / "folder")
    torch.testing.assert_close(again(input()), expected)
    assert (expected - root()(input())).abs().max() > 0.01


def test_filters_are_orthonormal_and_have_their_moments_and_are_those_of_peft() -> None:
    for name in KNOWN:
        family, number = name.rstrip("0123456789"), int(name.lstrip("bcdfimosy"))
        low, high = filters(family, number)
        for shift in range(0, len(low), 2):
            own = low[shift:] @ low[: len(low) - shift]
            torch.testing.assert_close(own, torch.tensor(float(shift == 0), dtype=torch.float64), atol=1e-7, rtol=0)
        assert abs(low @ high) < 1e-7
        places = torch.arange(len(low), dtype=torch.float64) / len(low)
        moments = 2 * number if family == "coif" else number
        assert all(abs(high @ places**power) < 1e-6 for power in range(moments))
        theirs = Wavelet(name)
        for own, other in ((low, theirs.rec_lo), (high, theirs.rec_hi)):
            torch.testing.assert_close(own, torch.tensor(other, dtype=torch.float64), atol=1e-10, rtol=0)


@pytest.mark.parametrize(("family", "why"), [("coif4", "is no wavelet"), ("db11", "has no filter for others")])
def test_wavelets_without_filters_are_refused_by_name(family: str, why: str, tmp_path: Path) -> None:
    save_file({"base_model.model.0.waveft_spectrum": torch.ones(5)}, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "WAVEFT", "wavelet_family": family, "n_frequency": 5}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(LoadError, match=f"'{family}'.*{why}"):
        diffadapt.load_adapter(model(), tmp_path)


def test_broken_places_are_refused(tmp_path: Path) -> None:
    root = model()
    diffadapt.add_adapter(root, diffadapt.SHiRAConfig(rank=1, init=False, **LAYERS), "a")
    file = diffadapt.adapters(root).save("a", tmp_path / "a.safetensors", format="kohya")
    tensors = load_file(file)
    (key,) = [key for key in tensors if key.endswith("0.shira_indices") or key.endswith("_0.shira_indices")]
    tensors[key][0, 0] = 99
    with pytest.raises(LoadError, match="shira_indices are not all in a matrix"):
        diffadapt.load_adapter(model(), tensors, component="unet")
