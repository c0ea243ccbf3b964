"""Names in files for ComfyUI, which looks a change up by the name of a parameter without `.weight` at its end."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import diffadapt
from diffadapt import AdapterError, families
from diffadapt.files.read import read
from diffadapt.files.write import write
from diffadapt.formats import writer
from diffadapt.formats.document import AdapterState
from diffadapt.loading.plan import plan
from diffadapt.runtime.targets import Targets
from diffadapt.types.layer_state import LayerState
from tests.support.denoisers import SMALL

NORMS = {
    "flux": {
        "transformer_blocks.0.attn.norm_k": "double_blocks.0.img_attn.norm.key_norm.scale",
        "transformer_blocks.0.attn.norm_added_q": "double_blocks.0.txt_attn.norm.query_norm.scale",
        "single_transformer_blocks.0.attn.norm_q": "single_blocks.0.norm.query_norm.scale",
    },
    "flux2": {"transformer_blocks.0.attn.norm_k": "double_blocks.0.img_attn.norm.key_norm.scale"},
    "chroma": {"transformer_blocks.0.attn.norm_q": "double_blocks.0.img_attn.norm.query_norm.scale"},
    "hunyuan-video": {
        "transformer_blocks.0.attn.norm_q": "double_blocks.0.img_attn.norm.query_norm.scale",
        "transformer_blocks.0.attn.norm_added_k": "double_blocks.0.txt_attn.norm.key_norm.scale",
        "single_transformer_blocks.0.attn.norm_k": "single_blocks.0.norm.key_norm.scale",
    },
    "wan": {"blocks.0.attn1.norm_q": "blocks.0.self_attn.norm_q"},
}


@pytest.mark.parametrize("name", ["diff", "set_weight"])
@pytest.mark.parametrize("family", NORMS)
def test_changes_of_norms_have_the_names_of_their_parameters(family: str, name: str, tmp_path: Path) -> None:
    models = SMALL[family].build()
    norms = {path: torch.randn_like(models["transformer"].get_submodule(path).weight) for path in NORMS[family]}
    layers = {path: LayerState("full", {name: tensor}, None, None) for path, tensor in norms.items()}
    layouts = {"transformer": families.layout(Targets(models["transformer"]))}
    dump = writer("comfy").dump
    assert dump is not None
    file = write(tmp_path / "a.safetensors", dump(AdapterState({"transformer": layers}, {}, family, layouts)))
    stored = load_file(file)
    for path, key in NORMS[family].items():
        spelling = "w_norm" if name == "diff" and family == "wan" else name
        assert torch.equal(stored.pop(f"diffusion_model.{key}.{spelling}"), norms[path])
    assert stored == {}
    found = plan(read(file), models)
    assert found.faults == []
    again = found.layers["transformer"]
    assert {path: list(layer.tensors) for path, layer in again.items()} == {path: [name] for path in norms}
    assert all(torch.equal(layer.tensors[name], norms[path]) for path, layer in again.items())


@pytest.mark.parametrize("axis", [0, 1])
def test_an_ia3_is_refused_with_a_format_that_works(axis: int, tmp_path: Path) -> None:
    """ComfyUI has no reader for `weight` and `on_input`, and skips them."""
    unet = SMALL["sdxl"].build()["unet"]
    path = next(path for path in dict(unet.named_modules()) if path.endswith("attn1.to_k"))
    size = unet.get_submodule(path).weight.shape[axis]
    flat = f"lora_unet_{path.replace('.', '_')}"
    file = {f"{flat}.weight": torch.rand(size), f"{flat}.on_input": torch.tensor(axis)}
    diffadapt.load_adapter(unet, file, name="a")
    adapters = diffadapt.adapters(unet)
    with pytest.raises(AdapterError, match=r"type ia3-lycoris, which ComfyUI cannot read; save with format=.*'kohya'"):
        adapters.save("a", tmp_path / "a.safetensors", "comfy")
    saved = load_file(adapters.save("a", tmp_path / "a.safetensors", "kohya"))
    assert torch.equal(saved[f"{flat}.weight"], file[f"{flat}.weight"])
