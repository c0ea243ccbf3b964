"""What is saved in diffusers' format means the same in programs that read its tensors and not its header."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

import diffadapt
from diffadapt import families
from diffadapt.files.read import read
from diffadapt.files.write import write
from diffadapt.formats import writer
from diffadapt.formats.document import AdapterState
from diffadapt.loading.plan import plan
from diffadapt.runtime.targets import Targets
from diffadapt.types.layer_state import LayerState
from tests.support.compare import assert_same
from tests.support.denoisers import SMALL
from tests.support.files import write as write_file
from tests.support.formulas import normal
from tests.support.versions import diffusers, needs

PATH = "to_q"


def layer(
    scale: float, rank: int = 4, dtype: torch.dtype = torch.float32, size: float = 1.0, **more: Tensor
) -> LayerState:
    torch.manual_seed(rank)
    down, up = (normal(rank, 24) * size).to(dtype), (normal(16, rank) * size).to(dtype)
    return LayerState("lora", {"lora_down": down, "lora_up": up, **more}, alpha=scale * rank, rank=rank)


def saved(folder: Path, layers: dict[str, LayerState], **metadata: str) -> Path:
    dump = writer("diffusers").dump
    assert dump is not None
    return write(folder / "a.safetensors", dump(AdapterState({"transformer": layers}, metadata)))


def content(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(file, "pt") as opened:
        return {key: opened.get_tensor(key) for key in opened.keys()}, opened.metadata()


def product(tensors: dict[str, Tensor], path: str = PATH) -> Tensor:
    """Return the change of a program that reads no header."""
    stem = f"transformer.{path}.lora_"
    return tensors[f"{stem}B.weight"].double() @ tensors[f"{stem}A.weight"].double()


def change(state: LayerState) -> Tensor:
    return state.scale * state.tensors["lora_up"].double() @ state.tensors["lora_down"].double()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q = nn.Linear(24, 16)
        self.to_k = nn.Linear(24, 16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [0.5, 2.0, 1 / 16, -0.25, 1.0, 32.0])
def test_a_power_of_two_is_multiplied_into_the_factors_exactly(
    scale: float, dtype: torch.dtype, tmp_path: Path
) -> None:
    state = layer(scale, dtype=dtype)
    tensors, metadata = content(saved(tmp_path, {PATH: state}))
    assert torch.equal(product(tensors), change(state))
    assert {tensor.dtype for tensor in tensors.values()} == {dtype}
    options = json.loads(metadata["lora_adapter_metadata"])
    assert (options["transformer.r"], options["transformer.lora_alpha"]) == (4, 4)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-7), (torch.bfloat16, 4e-3), (torch.float16, 5e-4)])
@pytest.mark.parametrize("scale", [1 / 3, 0.7, -1.9, 24.0])
def test_any_other_scale_is_rounded_once(scale: float, dtype: torch.dtype, tolerance: float, tmp_path: Path) -> None:
    state = layer(scale, dtype=dtype)
    tensors, _ = content(saved(tmp_path, {PATH: state}))
    up = tensors[f"transformer.{PATH}.lora_B.weight"].double()
    down = tensors[f"transformer.{PATH}.lora_A.weight"]
    share = float(down.double().sum() / state.tensors["lora_down"].double().sum())
    assert torch.equal(down.double(), state.tensors["lora_down"].double() * share)
    expected = state.tensors["lora_up"].double() * scale / share
    assert ((up - expected).abs() <= tolerance * expected.abs()).all()


@pytest.mark.parametrize("size", [2.0**-12, 2.0**7])
@pytest.mark.parametrize("scale", [2.0**-14, 2.0**8])
def test_half_precision_neither_underflows_nor_overflows(scale: float, size: float, tmp_path: Path) -> None:
    state = layer(scale, dtype=torch.float16, size=size)
    tensors, _ = content(saved(tmp_path, {PATH: state}))
    assert_same(product(tensors) / change(state).abs().max(), change(state) / change(state).abs().max(), 1e-3)


def test_every_layer_has_its_own_scale_and_the_header_agrees(tmp_path: Path) -> None:
    layers = {"to_q": layer(0.5, 4), "to_k": layer(2.0, 8, lora_bias=torch.ones(16))}
    file = saved(tmp_path, layers, alpha="99", rank="1", lora_alpha="7", title="kept")
    tensors, metadata = content(file)
    for path, state in layers.items():
        assert torch.equal(product(tensors, path), change(state))
    assert torch.equal(tensors["transformer.to_k.lora_B.bias"], torch.full((16,), 2.0))
    assert metadata["title"] == "kept"
    assert metadata.keys().isdisjoint(("alpha", "rank", "lora_alpha"))
    model = Net()
    report = diffadapt.load_adapter(model, file, "a", component="transformer")
    assert (report.unused, report.notes) == ([], [])
    assert (report.scales["lora"].least, report.scales["lora"].most) == (1.0, 1.0)
    before = model.to_q.weight.double().clone()
    diffadapt.adapters(model).merge()
    assert_same(model.to_q.weight - before, change(layers["to_q"]))


def test_the_length_of_a_dora_is_as_before(tmp_path: Path) -> None:
    state = layer(0.25)
    magnitude = torch.arange(1.0, 17).view(16, 1)
    dora = LayerState("dora", {**state.tensors, "dora_scale": magnitude}, state.alpha, state.rank)
    tensors, _ = content(saved(tmp_path, {PATH: dora}))
    assert torch.equal(product(tensors), change(state))
    assert torch.equal(tensors[f"transformer.{PATH}.lora_magnitude_vector"], magnitude.flatten())


STEMS = {
    "diffusers": "transformer.blocks.0.attn1.to_q",
    "comfy": "diffusion_model.blocks.0.self_attn.q",
    "kohya": "lora_unet_blocks_0_self_attn_q",
    "onetrainer": "lora_transformer_blocks_0_attn1_to_q",
    "peft": "base_model.model.blocks.0.attn1.to_q",
}


@pytest.mark.parametrize("format", STEMS)
def test_an_adapter_for_the_second_transformer_has_the_names_of_the_first(format: str, tmp_path: Path) -> None:
    first, second = SMALL["wan"].build()["transformer"], SMALL["wan"].build()["transformer"]
    models = {"transformer": first, "transformer_2": second}
    path = "blocks.0.attn1.to_q"
    out, columns = first.get_parameter(f"{path}.weight").shape
    tensors = {"lora_down": normal(4, columns).float(), "lora_up": normal(out, 4).float()}
    state = LayerState("lora", tensors, alpha=2.0, rank=4)
    layouts = {name: families.layout(Targets(model)) for name, model in models.items()}
    dump = writer(format).dump
    assert dump is not None
    adapter = AdapterState({"transformer_2": {path: state}}, {}, "wan", layouts)
    file = write(tmp_path / ("a" if format == "peft" else "a.safetensors"), dump(adapter))
    stored = file / "adapter_model.safetensors" if file.is_dir() else file
    assert all(key.startswith(f"{STEMS[format]}.") for key in content(stored)[0])
    file = stored.parent if format == "peft" else file
    found = plan(read(file), models)
    assert found.faults == []
    assert {name: list(layers) for name, layers in found.layers.items()} == {"transformer_2": [path]}
    assert_same(change(found.layers["transformer_2"][path].state), change(state))
    assert list(plan(read(file), {"transformer": first}).layers) == ["transformer"]


def test_an_adapter_for_both_transformers_names_both(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    models = {name: SMALL["wan"].build()["transformer"] for name in ("transformer", "transformer_2")}
    path = "blocks.0.attn1.to_q"
    out, columns = models["transformer"].get_parameter(f"{path}.weight").shape

    def state() -> LayerState:
        return LayerState("lora", {"lora_down": torch.ones(4, columns), "lora_up": torch.ones(out, 4)}, None, 4)

    dump = writer("diffusers").dump
    assert dump is not None
    # The entry of a file for the second alone.
    both = AdapterState({name: {path: state()} for name in models}, {"diffadapt_component": "transformer_2"})
    again = plan(read(write(tmp_path / "both.safetensors", dump(both))), models)
    assert "diffusers reads the layers of transformer and never those of transformer_2" in caplog.text
    assert {name: list(layers) for name, layers in again.layers.items()} == {name: [path] for name in models}


def test_a_component_that_nobody_has_is_not_taken_from_the_header(tmp_path: Path) -> None:
    tensors = {"transformer.to_q.lora_A.weight": torch.ones(2, 24), "transformer.to_q.lora_B.weight": torch.ones(16, 2)}
    file = write_file(tmp_path / "a.safetensors", tensors, {"diffadapt_component": "text_encoder"})
    assert list(plan(read(file), {"transformer": Net(), "text_encoder": Net()}).layers) == ["transformer"]


def test_plain_diffusers_loads_a_file_for_the_second_transformer(tmp_path: Path) -> None:
    needs("diffusers", "0.35", "the second transformer of Wan")
    models = {name: SMALL["wan"].build()["transformer"] for name in ("transformer", "transformer_2")}
    nothing = dict.fromkeys(("tokenizer", "text_encoder", "vae"))
    pipe = diffusers.WanPipeline(**nothing, **models, scheduler=diffusers.UniPCMultistepScheduler())
    path = "blocks.0.attn1.to_q"
    out, columns = models["transformer"].get_parameter(f"{path}.weight").shape
    down, up = normal(4, columns).float(), normal(out, 4).float()
    stem = f"transformer_2.{path}"
    tensors = {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up, f"{stem}.alpha": torch.tensor(1.0)}
    pipe.load_adapter(tensors, "a")
    file = pipe.adapters.save("a", tmp_path / "a.safetensors")
    pipe.adapters.clear()
    pipe.load_lora_weights(file, load_into_transformer_2=True)
    layer = pipe.transformer_2.get_submodule(path)
    assert_same(layer.get_delta_weight(layer.active_adapters[0]), up @ down / 4)


def test_a_dictionary_of_new_norms_alone_is_read() -> None:
    new = torch.randn(16)
    models = {"transformer": SMALL["flux"].build()["transformer"]}
    found = plan(read({"transformer.transformer_blocks.0.attn.norm_q.weight": new}), models)
    assert found.faults == []
    assert torch.equal(found.layers["transformer"]["transformer_blocks.0.attn.norm_q"].tensors["set_weight"], new)
