"""T-LoRA and DyLoRA against LyCORIS."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import diffadapt
from diffadapt import AdapterError, LoadError
from diffadapt.types.dylora import in_training
from tests.support.cases import for_each
from tests.support.denoisers import SMALL

lycoris = pytest.importorskip("lycoris.modules")
tlora = pytest.importorskip("lycoris.modules.tlora")


@pytest.fixture(autouse=True)
def _without_collection(monkeypatch: pytest.MonkeyPatch) -> None:
    # LyCORIS collects garbage for every layer, which takes a second in a process with many objects.
    monkeypatch.setattr(tlora, "gc", SimpleNamespace(collect=lambda: 0))


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(20, 12), (3, 5, 20)),
    "wide": (lambda: nn.Linear(10, 24, bias=False), (4, 10)),
    "point": (lambda: nn.Conv2d(12, 8, 1), (2, 12, 5, 5)),
}


def built(layer: str) -> tuple[nn.Sequential, Tensor]:
    torch.manual_seed(1)
    make, shape = LAYERS[layer]
    return nn.Sequential(make()), torch.randn(shape)


def of_lycoris(module: nn.Module, **options: Any) -> Any:
    """Return a T-LoRA of LyCORIS that was trained: its tensors are around the start."""
    theirs = lycoris.TLoraModule("lycoris_0", module, lora_dim=4, alpha=3.0, **options)
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return theirs


def stored(theirs: Any) -> dict[str, Tensor]:
    return {f"lycoris_0.{name}": tensor.detach().clone() for name, tensor in theirs.custom_state_dict().items()}


@for_each(layer=list(LAYERS), bypass=[False, True])
def test_a_tlora_of_lycoris_is_equal_and_is_written_back(tmp_path: Path, layer: str, bypass: bool) -> None:
    model, input = built(layer)
    base = model(input).detach()
    theirs = of_lycoris(built(layer)[0][0], bypass_mode=bypass)
    report = diffadapt.load_adapter(model, stored(theirs), "a", component="unet")
    assert report.unused == []
    assert report.types == {"tlora": 1}
    expected = theirs(input)
    change = (expected - base).abs().max()
    assert change > 0.1
    assert (model(input) - expected).abs().max() < 1e-5 * change
    assert_gradients(model, theirs, input)
    manager = diffadapt.adapters(model)
    with torch.no_grad():
        manager.merge()
        assert (model(input) - expected).abs().max() < 1e-5 * change
        manager.unmerge()
        manager.activate({"a": 1.001})
        assert (model(input) - expected).abs().max() > 5e-4 * change
        manager.activate(["a"])
    file = manager.save("a", tmp_path / "a.safetensors", format="kohya")
    again, _ = built(layer)
    assert diffadapt.load_adapter(again, file, component="unet").unused == []
    assert (again(input) - expected).abs().max() < 1e-5 * change
    state = {key.rpartition("unet_0.")[2]: tensor for key, tensor in load_file(file).items()}
    found, parameters = lycoris.get_module({f"x.{name}": tensor for name, tensor in state.items()}, "x")
    assert found is lycoris.TLoraModule
    reread = lycoris.make_module(found, parameters, "x", built(layer)[0][0])
    assert (reread(input) - expected).abs().max() < 1e-5 * change


def assert_gradients(model: nn.Sequential, theirs: Any, input: Tensor) -> None:
    adapter = next(iter(diffadapt.adapters(model)["a"].components.values()))
    names = {"q_layer": theirs.q_layer.weight, "p_layer": theirs.p_layer.weight, "lambda_layer": theirs.lambda_layer}
    ours = [adapter.layers["0"].tensors[name].requires_grad_() for name in names]
    mine = torch.autograd.grad(model(input).pow(3).sum(), ours)
    reference = torch.autograd.grad(theirs(input).pow(3).sum(), list(names.values()))
    for own, other in zip(mine, reference, strict=True):
        assert (own - other.reshape(own.shape)).abs().max() < 1e-4 * other.abs().max()


@for_each(vectors=["principal", "middle", "last"], from_weight=[True, False])
def test_the_start_of_a_tlora_is_that_of_lycoris(vectors: str, from_weight: bool) -> None:
    model, input = built("linear")
    base = model(input).detach()
    config = diffadapt.TLoRAConfig(rank=4, vectors=vectors, from_weight=from_weight, target_modules=["0"])  # type: ignore[arg-type]
    tensors = diffadapt.add_adapter(model, config, "a").layers["0"].tensors
    assert torch.equal(model(input), base)
    for side in (tensors["p_layer"].t(), tensors["q_layer"]):
        torch.testing.assert_close(side @ side.t(), torch.eye(4), atol=1e-5, rtol=0)
    if from_weight:
        theirs = lycoris.TLoraModule("x", built("linear")[0][0], lora_dim=4, alpha=4, sig_type=vectors)
        torch.testing.assert_close(tensors["lambda_layer"], theirs.lambda_layer)
        torch.testing.assert_close(
            tensors["p_layer"] * tensors["lambda_layer"] @ tensors["q_layer"],
            theirs.p_layer.weight * theirs.lambda_layer @ theirs.q_layer.weight,
            atol=1e-5,
            rtol=1e-5,
        )


@for_each(start=["middle", "last"])
def test_a_header_says_what_a_tlora_of_lycoris_started_from(start: str, tmp_path: Path) -> None:
    model, input = built("linear")
    theirs = of_lycoris(built("linear")[0][0], sig_type=start)
    header = {"ss_network_module": "lycoris.kohya", "ss_network_args": json.dumps({"algo": "tlora", "sig_type": start})}
    expected = theirs(input)
    save_file(stored(theirs), tmp_path / "theirs.safetensors", header)
    diffadapt.load_adapter(model, tmp_path / "theirs.safetensors", "a", component="unet")
    torch.testing.assert_close(model(input), expected, atol=1e-5, rtol=1e-5)
    other, _ = built("linear")
    diffadapt.load_adapter(other, stored(theirs), "a", component="unet")
    assert (other(input) - expected).abs().max() > 0.1
    file = diffadapt.adapters(model).save("a", tmp_path / "ours.safetensors", format="kohya")
    again, _ = built("linear")
    diffadapt.load_adapter(again, file, component="unet")
    torch.testing.assert_close(again(input), expected, atol=1e-5, rtol=1e-5)


def test_a_tlora_whose_start_was_random_is_refused(tmp_path: Path) -> None:
    arguments = {"algo": "tlora", "use_data_init": "False"}
    header = {"ss_network_module": "lycoris.kohya", "ss_network_args": json.dumps(arguments)}
    save_file(stored(of_lycoris(built("linear")[0][0])), tmp_path / "a.safetensors", header)
    with pytest.raises(LoadError, match="use_data_init=False"):
        diffadapt.load_adapter(built("linear")[0], tmp_path / "a.safetensors", component="unet")


@for_each(module=["lycoris.kohya", "networks.dylora"])
def test_a_dylora_of_lycoris_is_loaded_as_lycoris_reads_it_with_a_note(module: str, tmp_path: Path) -> None:
    tensors = {"lycoris_0.lora_down.weight": torch.randn(8, 20), "lycoris_0.lora_up.weight": torch.randn(12, 8)}
    header = {"ss_network_module": module, "ss_network_args": json.dumps({"algo": "dylora", "block_size": "2"})}
    save_file({**tensors, "lycoris_0.alpha": torch.tensor(4.0)}, tmp_path / "a.safetensors", header)
    model, input = built("linear")
    base = model(input).detach()
    report = diffadapt.load_adapter(model, tmp_path / "a.safetensors", component="unet")
    down, up = tensors.values()
    torch.testing.assert_close(model(input), base + input @ (up @ down).t() / 2)
    # That of sd-scripts has the same scale in training and in its files.
    assert ("2 times as strong in training" in str(report)) == (module == "lycoris.kohya")


def test_a_tlora_with_the_kernel_of_another_layer_is_refused() -> None:
    model = nn.Sequential(nn.Conv2d(12, 8, 3, padding=1))
    theirs = of_lycoris(model[0])
    with pytest.raises(LoadError, match=r"q_layer has shape \(4, 12, 1, 1\), expected \(4, 12, 3, 3\)"):
        diffadapt.load_adapter(model, stored(theirs), component="unet")


def test_a_layer_that_is_three_in_the_model_has_the_components_of_all_three_weights() -> None:
    torch.manual_seed(4)
    model = SMALL["flux"].build()["transformer"]
    attention: Any = model.transformer_blocks[0].attn
    parts = [attention.to_q, attention.to_k, attention.to_v]
    weight = torch.cat([part.weight for part in parts]).detach().double()
    out, columns = weight.shape
    q, p, values, input = torch.randn(2, columns), torch.randn(out, 2), torch.randn(1, 2), torch.randn(5, columns)
    left, singular, right = torch.linalg.svd(weight, full_matrices=False)
    change = (p * values @ q).double() - left[:, :2] * singular[:2] @ right[:2]
    base = torch.cat([part(input) for part in parts], 1).detach()
    tensors = {"q_layer.weight": q, "p_layer.weight": p, "lambda_layer": values}
    file = {f"lora_unet_double_blocks_0_img_attn_qkv.{name}": tensor for name, tensor in tensors.items()}
    assert diffadapt.load_adapter(model, file, "a", component="transformer").types == {"lora": 3}
    found = torch.cat([part(input) for part in parts], 1).detach() - base
    torch.testing.assert_close(found.double(), input.double() @ change.t(), rtol=1e-5, atol=1e-4)


@for_each(blocks=[1, 2, 3])
def test_a_call_of_a_dylora_in_training_uses_leading_blocks_and_the_last_of_them_learns(blocks: int) -> None:
    torch.manual_seed(3)
    theirs = lycoris.DyLoraModule("x", nn.Linear(20, 12), lora_dim=6, alpha=5.0, block_size=2)
    tensors = {
        "lora_down": torch.cat(list(theirs.down_list)).detach().requires_grad_(),
        "lora_up": torch.randn(12, 6, requires_grad=True),
        "dylora_block": torch.zeros(2, dtype=torch.int64),
    }
    with torch.no_grad():
        for part, own in zip(theirs.up_list, tensors["lora_up"].split(2, 1), strict=True):
            part.copy_(own)
    found = in_training(tensors)
    while found["lora_down"].shape[0] != 2 * blocks:
        found = in_training(tensors)
    change = found["lora_up"] @ found["lora_down"] * 5 / 6
    # LyCORIS divides alpha by the number of blocks in training, and by the rank in its file.
    expected = theirs.get_diff_weight(rank=2 * (blocks - 1))[0] / 2
    torch.testing.assert_close(change, expected)
    change.pow(2).sum().backward()
    for name, axis in (("lora_down", 0), ("lora_up", 1)):
        gradient = tensors[name].grad
        assert gradient is not None
        learns = [bool(part.abs().max() > 0) for part in gradient.split(2, axis)]
        assert learns == [number == blocks - 1 for number in range(3)]


def test_a_dylora_learns_and_is_stored_as_a_lora_that_lycoris_reads(tmp_path: Path) -> None:
    model, input = built("linear")
    target = torch.randn(3, 5, 12)
    config = diffadapt.DyLoRAConfig(rank=6, block_size=2, alpha=6, target_modules=["0"])
    adapter = diffadapt.add_adapter(model, config, "a")
    base = model(input).detach()
    optimizer = torch.optim.Adam([p for p in adapter.parameters() if p.requires_grad], lr=0.05)
    for _ in range(40):
        optimizer.zero_grad()
        (model.train()(input) - target).pow(2).mean().backward()
        optimizer.step()
    trained = model.eval()(input).detach()
    assert (trained - target).pow(2).mean() < 0.9 * (base - target).pow(2).mean()
    file = diffadapt.adapters(model).save("a", tmp_path / "a.safetensors", format="kohya")
    again, _ = built("linear")
    assert diffadapt.load_adapter(again, file, component="unet").types == {"lora": 1}
    torch.testing.assert_close(again(input), trained)
    state = {f"x.{key.rpartition('unet_0.')[2]}": tensor for key, tensor in load_file(file).items()}
    reread = lycoris.make_module(*lycoris.get_module(state, "x"), "x", built("linear")[0][0])
    torch.testing.assert_close(reread(input), trained)


def test_settings_that_mean_nothing_are_refused() -> None:
    with pytest.raises(AdapterError, match="multiple of block_size"):
        diffadapt.DyLoRAConfig(rank=6, block_size=4, target_modules=["0"])
    with pytest.raises(AdapterError, match="expected at most 12, the rank of the weight"):
        diffadapt.add_adapter(built("linear")[0], diffadapt.TLoRAConfig(rank=13, target_modules=["0"]))
    with pytest.raises(AdapterError, match="expected less than 12"):
        diffadapt.add_adapter(built("linear")[0], diffadapt.OSFConfig(kept=12, target_modules=["0"]))
