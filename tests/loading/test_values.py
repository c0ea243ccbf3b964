"""The values of a file are checked and copied many tensors at a time, and every adapter parameter is one by itself."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import diffadapt
from diffadapt import LoadError
from diffadapt.loading.values import read_values

LAYERS = 4


def net(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict({"net": nn.Sequential(*(nn.Linear(6, 6) for _ in range(LAYERS)))}).to(dtype)


def content(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    torch.manual_seed(1)
    shapes = {"A": (2, 6), "B": (6, 2)}
    return {
        f"net.{n}.lora_{side}.weight": torch.randn(shape).to(dtype)
        for n in range(LAYERS)
        for side, shape in shapes.items()
    }


def parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    (adapter,) = diffadapt.adapters(model)["a"].components.values()
    sides = {"lora_down": "A", "lora_up": "B"}
    return {
        f"{path}.lora_{sides[name]}.weight": parameter
        for path, layer in adapter.layers.items()
        for name, parameter in layer.named_parameters()
    }


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16])
def test_parameters_have_the_values_of_the_file(stored: torch.dtype, wanted: torch.dtype, tmp_path: Path) -> None:
    model, tensors, file = net(wanted), content(stored), tmp_path / "a.safetensors"
    save_file(tensors, file)
    diffadapt.load_adapter(model, file, "a", component="unet")
    # What is in memory does not follow the file.
    file.write_bytes(bytes(file.stat().st_size))
    found = parameters(model)
    assert found.keys() == tensors.keys()
    for key, parameter in found.items():
        assert (parameter.dtype, parameter.is_contiguous(), parameter.requires_grad) == (wanted, True, False)
        assert torch.equal(parameter, tensors[key].to(wanted))


def test_writing_one_parameter_leaves_the_others_alone(tmp_path: Path) -> None:
    model, tensors = net(), content()
    save_file(tensors, tmp_path / "a.safetensors")
    diffadapt.load_adapter(model, tmp_path / "a.safetensors", "a", component="unet")
    found = parameters(model)
    first, *others = found
    versions = {key: found[key]._version for key in others}
    with torch.no_grad():
        found[first].zero_()
    assert {key: found[key]._version for key in others} == versions
    assert all(torch.equal(found[key], tensors[key]) for key in others)


def test_memory_between_tensors_and_offsets_of_bytes_do_no_harm(tmp_path: Path) -> None:
    """A tensor that is no part of the adapter may stand between two that are, and elements may not be aligned."""
    model, tensors = net(torch.bfloat16), content(torch.bfloat16)
    file = tmp_path / "a.safetensors"
    save_file({**tensors, "net.1.alpha": torch.tensor(torch.inf, dtype=torch.bfloat16)}, file)
    with pytest.raises(LoadError, match=r"net\.1.*alpha is inf"):
        diffadapt.load_adapter(model, file, "a", component="unet")
    save_file({**tensors, "net.1.alpha": torch.tensor(2.0)}, file)
    raw = file.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    for padding in range(4):
        header = raw[8 : 8 + size] + b" " * padding
        file.write_bytes(len(header).to_bytes(8, "little") + header + raw[8 + size :])
        assert json.loads(header)
        diffadapt.load_adapter(model, file, "a", component="unet")
        assert all(torch.equal(parameter, tensors[key]) for key, parameter in parameters(model).items())
        diffadapt.adapters(model).clear()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_exactly_the_broken_tensors_are_named(value: float, tmp_path: Path) -> None:
    tensors = content(torch.float16)
    # The sum of these overflows, although each of them is finite.
    tensors["net.0.lora_A.weight"].fill_(60000)
    for key in ("net.1.lora_B.weight", "net.3.lora_A.weight"):
        tensors[key][1, 1] = value
    save_file(tensors, tmp_path / "a.safetensors")
    for source in (tensors, tmp_path / "a.safetensors"):
        with pytest.raises(LoadError) as caught:
            diffadapt.load_adapter(net(torch.float16), source, "a", component="unet")
        reasons = {reason for _, reason in caught.value.faults}
        assert reasons == {
            "unet.net.1: net.1.lora_B.weight holds NaN or infinite values",
            "unet.net.3: net.3.lora_A.weight holds NaN or infinite values",
        }


def test_tensors_that_are_no_neighbours_are_read_one_by_one() -> None:
    memory = torch.randn(100)
    values = {
        "overlapping": memory[:10],
        "the same": memory[:10],
        "far away": memory[60:70],
        "columns": memory.view(10, 10)[:, 1],
        "single": torch.randn(()),
        "float8": torch.randn(4).to(torch.float8_e4m3fn),
        "integers": torch.arange(3),
        "meta": torch.empty(3, device="meta"),
        "empty": memory[:0],
    }
    broken, copies = read_values(values.items(), lambda tensor: tensor.clone().contiguous())
    assert broken == set()
    left_out = {"integers", "meta", "empty"}
    assert copies.keys() == {id(tensor) for name, tensor in values.items() if name not in left_out}
    for name in values.keys() - left_out:
        copy = copies[id(values[name])]
        assert torch.equal(copy.float(), values[name].float())
        assert copy.data_ptr() != values[name].data_ptr()
