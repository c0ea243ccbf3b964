"""Names in files for ComfyUI, which looks a change up by the name of a parameter without `.weight` at its end."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from diffadapt import families
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
