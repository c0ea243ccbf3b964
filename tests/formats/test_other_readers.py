"""What other programs read of the files that are written here: their names of the layers, and the change of each.

`fixtures/readers.json` states for every program and version which names it has for which layers, and how it computes
the change. So these tests read a file as the program would, without the library.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from diffadapt import AdapterError, families
from diffadapt.formats import writer
from diffadapt.formats.document import AdapterState
from diffadapt.runtime.targets import Targets
from diffadapt.types.layer_state import LayerState
from tests.support import files
from tests.support.compare import assert_same
from tests.support.denoisers import SMALL
from tests.support.versions import needs

SUFFIXES = {
    "lora_A.weight": "down",
    "lora_down.weight": "down",
    "lora_B.weight": "up",
    "lora_up.weight": "up",
    "alpha": "alpha",
}
_PROGRAMS: Any = files.fixture("readers")
READERS: dict[str, dict[str, Any]] = {
    f"{reader['program'].partition(' ')[0]}: {file['format']} for {file['family']}": file
    for reader in _PROGRAMS
    for file in reader["files"]
}


def lora(out: int, columns: int) -> LayerState:
    """Return a LoRA whose alpha is not its rank, in numbers that powers of two and sums keep exact."""
    down, up = torch.randn(2, columns).bfloat16().float(), torch.randn(out, 2).bfloat16().float()
    return LayerState("lora", {"lora_down": down, "lora_up": up}, alpha=1.0, rank=2, inputs=columns)


def change_as_read(tensors: dict[str, Tensor]) -> Tensor:
    """Return the change of a layer as all of these programs compute it."""
    down, up = tensors["down"], tensors["up"]
    return up @ down * (float(tensors["alpha"]) / len(down) if "alpha" in tensors else 1.0)


@pytest.mark.parametrize("name", READERS)
def test_a_program_reads_the_same_change_for_every_layer(name: str) -> None:
    case = READERS[name]
    models = SMALL[case["family"]].build()
    layouts = {component: families.layout(Targets(model)) for component, model in models.items()}
    layers: dict[str, dict[str, LayerState]] = {}
    for parts in case["layers"].values():
        columns = None
        for component, _, path in (part.partition(".") for part in parts):
            if path.startswith("encoder.layers."):
                needs("transformers", "5.0", "CLIP without the level text_model")
            known = models.get(component)
            shape = (12, 8) if known is None else known.get_parameter(f"{path}.weight").shape
            columns = columns or shape[1]
            layers.setdefault(component, {})[path] = lora(shape[0], columns)
    dump = writer(case["format"]).dump
    assert dump is not None
    (document,) = dump(AdapterState(layers, {}, case["family"], layouts)).values()
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in document.tensors.items():
        suffix = next(suffix for suffix in SUFFIXES if key.endswith(f".{suffix}"))
        found.setdefault(key.removesuffix(f".{suffix}"), {})[SUFFIXES[suffix]] = tensor
    assert set(found) == set(case["layers"])
    for written, parts in case["layers"].items():
        states = [layers[component][path] for component, _, path in (part.partition(".") for part in parts)]
        expected = torch.cat([state.tensors["lora_up"] @ state.tensors["lora_down"] / 2 for state in states])
        assert_same(change_as_read(found[written]), expected)


def test_onetrainer_has_factors_of_a_loha_in_the_shape_of_convolutions() -> None:
    shapes = {"hada_w1_a": (8, 2), "hada_w1_b": (2, 54), "hada_w2_a": (8, 2), "hada_w2_b": (2, 54)}
    tensors = {name: torch.randn(shape) for name, shape in shapes.items()}
    state = LayerState("loha", tensors, alpha=1.0, rank=2, kernel=(3, 3), inputs=54)
    dump = writer("onetrainer").dump
    assert dump is not None
    (document,) = dump(AdapterState({"unet": {"conv_in": state}}, {}, "sd")).values()
    found = {key.rpartition(".")[2]: tuple(tensor.shape) for key, tensor in document.tensors.items() if "hada" in key}
    ups, downs = (8, 2, 1, 1), (2, 6, 3, 3)
    assert found == {"hada_w1_a": ups, "hada_w1_b": downs, "hada_w2_a": ups, "hada_w2_b": downs}


@pytest.mark.parametrize(
    ("family", "component", "path", "prefix"),
    [
        (None, "text_encoder", "encoder.layers.0.mlp.fc1", "lora_te_text_model_encoder"),
        (None, "text_encoder_2", "encoder.layers.0.mlp.fc1", "lora_te2_text_model_encoder"),
        (None, "text_encoder_3", "encoder.block.0.layer.0.SelfAttention.q", "lora_te3_encoder"),
        ("sdxl", "text_encoder_2", "encoder.layers.0.mlp.fc1", "lora_te2_text_model_encoder"),
        ("flux", "text_encoder_2", "encoder.block.0.layer.0.SelfAttention.q", "lora_te3_encoder"),
    ],
)
def test_a_text_encoder_alone_has_its_number(family: str | None, component: str, path: str, prefix: str) -> None:
    dump = writer("kohya").dump
    assert dump is not None
    (document,) = dump(AdapterState({component: {path: lora(8, 8)}}, {}, family)).values()
    assert {key.partition("_layers")[0].partition("_block")[0] for key in document.tensors} == {prefix}


def test_a_t5_whose_number_depends_on_an_unknown_family_is_refused() -> None:
    dump = writer("kohya").dump
    assert dump is not None
    layers = {"text_encoder_2": {"encoder.block.0.layer.0.SelfAttention.q": lora(8, 8)}}
    with pytest.raises(AdapterError, match=r"depends on the family.*convert with family=.*; save with format='onetr"):
        dump(AdapterState(layers, {}, None))


def test_the_text_encoder_of_flux_2_is_known_by_its_width() -> None:
    dump = writer("comfy").dump
    assert dump is not None
    for width, name in ((5120, "mistral3_24b"), (2560, "qwen3_4b"), (4096, "qwen3_8b")):
        state = AdapterState({"text_encoder": {"model.layers.0.self_attn.q_proj": lora(8, width)}}, {}, "flux2")
        (document,) = dump(state).values()
        assert {key.split(".")[1] for key in document.tensors} == {name}
