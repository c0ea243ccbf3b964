"""OFT on convolutions, which PEFT and OneTrainer rotate in opposite directions, and variants of OneTrainer's forks."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import diffadapt
from diffadapt import AdapterError, formats
from diffadapt.files.read import read
from diffadapt.files.write import write as write_documents
from diffadapt.formats.document import AdapterState
from diffadapt.loading.plan import plan
from tests.support.compare import assert_same
from tests.support.files import write
from tests.support.formulas import normal, triangles

LAYERS = {"conv 1": nn.Conv2d(8, 6, 1), "conv 3": nn.Conv2d(8, 6, 3, padding=1), "linear": nn.Linear(8, 6)}
INPUTS = {"conv 1": (2, 8, 5, 5), "conv 3": (2, 8, 5, 5), "linear": (3, 8)}
SIZE = 4
CONFIG = {"peft_type": "OFT", "peft_version": "0.21.2", "use_cayley_neumann": True, "oft_block_size": SIZE, "r": 0}


def model(layer: str) -> nn.Sequential:
    torch.manual_seed(0)
    host = LAYERS[layer]
    made = type(host)(8, 6) if layer == "linear" else nn.Conv2d(8, 6, host.kernel_size, padding=host.padding)
    return nn.Sequential(made).double()


def triangle(layer: str) -> Tensor:
    torch.manual_seed(1)
    return normal(LAYERS[layer].weight[0].numel() // SIZE, SIZE * (SIZE - 1) // 2) / 3


def rotated(layer: str, triangle: Tensor, by_onetrainer: bool) -> Tensor:
    """Return `W R` for a convolution of OneTrainer, and `W R'` for everything else."""
    q, identity = triangles(triangle, SIZE), torch.eye(SIZE, dtype=torch.float64)
    rotation = torch.block_diag(*(identity + 2 * q + 2 * q @ q + 2 * q @ q @ q + q @ q @ q @ q))
    weight = model(layer)[0].weight.detach()
    turns = rotation if by_onetrainer and layer != "linear" else rotation.T
    return (weight.flatten(1) @ turns).view_as(weight)


def source(writer: str, layer: str, folder: Path) -> Path:
    """Write a file of the given program and return its path."""
    names = {"PEFT": "base_model.model.0.oft_R.weight", "PEFT, bare": "base_model.model.0.oft_R.weight"}
    names |= {"PEFT in memory": "0.oft_R.default.weight", "header": "0.oft_R.weight"}
    metadata = {"lora_adapter_metadata": json.dumps(CONFIG)} if writer == "header" else None
    key = names.get(writer, {"flat": "lora_unet_0.oft_R.weight", "comfy": "diffusion_model.0.oft_R.weight"}.get(writer))
    file = write(folder / "adapter_model.safetensors", {key or "0.oft_R.weight": triangle(layer)}, metadata)
    if writer == "PEFT":
        (folder / "adapter_config.json").write_text(json.dumps(CONFIG))
        return folder
    return file


PEFT = ("PEFT", "PEFT, bare", "PEFT in memory", "header")
OTHERS = ("bare", "flat", "comfy")


def merged(net: nn.Sequential) -> Tensor:
    diffadapt.adapters(net).merge()
    return net.get_parameter("0.weight")


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("writer", [*PEFT, *OTHERS])
def test_the_program_that_wrote_a_file_decides_the_direction(writer: str, layer: str, tmp_path: Path) -> None:
    net, input = model(layer), torch.randn(INPUTS[layer], dtype=torch.float64)
    report = diffadapt.load_adapter(net, source(writer, layer, tmp_path), "a", component="unet")
    assert report.unused == []
    expected = model(layer)
    expected[0].weight.data = rotated(layer, triangle(layer), writer in OTHERS)
    assert_same(net(input), expected(input), 1e-12)
    assert_same(merged(net), expected[0].weight, 1e-12)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("target", ["peft", "onetrainer", "comfy", "kohya"])
@pytest.mark.parametrize("writer", ["PEFT", "flat"])
def test_a_saved_file_has_the_direction_of_the_program_it_is_for(
    writer: str, target: str, layer: str, tmp_path: Path
) -> None:
    found = plan(read(source(writer, layer, tmp_path / "from")), {"unet": model(layer)})
    states = {path: part.state for path, part in found.layers["unet"].items()}
    dump = formats.writer(target).dump
    assert dump is not None
    saved = write_documents(
        tmp_path / ("to" if target == "peft" else "to.safetensors"), dump(AdapterState({"unet": states}))
    )
    file = saved / "adapter_model.safetensors" if saved.is_dir() else saved
    (stored,) = (tensor for key, tensor in load_file(file).items() if "oft_R" in key)
    is_kept = layer == "linear" or (writer == "PEFT") == (target == "peft")
    assert torch.equal(stored, triangle(layer) if is_kept else -triangle(layer))
    again = model(layer)
    diffadapt.load_adapter(
        again, saved.parent if target == "peft" and saved.is_file() else saved, "a", component="unet"
    )
    assert_same(merged(again), rotated(layer, triangle(layer), writer != "PEFT"), 1e-12)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("markers", [("cans_oft",), ("clipped_oft",), ("cans_oft", "clipped_oft", "scaled_oft")])
def test_unknown_variants_are_refused_by_name(markers: tuple[str, ...], strict: bool) -> None:
    tensors = {"0.oft_R.weight": triangle("linear")}
    tensors |= {f"0.oft_R.{marker}": torch.tensor(0.95) for marker in markers}
    with pytest.raises(AdapterError, match=f"{markers[0]} marks a variant of OFT") as raised:
        diffadapt.load_adapter(model("linear"), tensors, "a", strict=strict, component="unet")
    assert "the same tensor as" not in str(raised.value)
