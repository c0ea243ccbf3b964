"""Files as they are found: nested prefixes, mixed dialects, layers given twice, unplanned names.

The change of every layer is compared with that of a file in diffusers' names.
"""

import json
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import diffadapt
from diffadapt import AdapterError
from diffadapt.files.read import read
from diffadapt.loading.plan import Plan, plan
from tests.support import models
from tests.support.denoisers import SMALL
from tests.support.formulas import normal
from tests.support.models import clip_text

Tensors = dict[str, Tensor]
Factors = Mapping[str, tuple[Tensor, Tensor]]
ATTENTION = (".to_q", ".to_k", ".to_v", ".to_out.0")


@cache
def small(family: str) -> dict[str, nn.Module]:
    return SMALL[family].build()


def factors(model: nn.Module, *endings: str) -> Factors:
    torch.manual_seed(0)
    layers = {path: module for path, module in model.named_modules() if path.endswith(endings or ATTENTION)}
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for path, layer in layers.items():
        if isinstance(layer, nn.Linear):
            found[path] = normal(2, layer.in_features).float(), normal(layer.out_features, 2).float()
    assert found
    return found


def spelled(
    layers: Factors, name: Callable[[str], str], down: str = "lora_A.weight", up: str = "lora_B.weight"
) -> Tensors:
    pairs = ({f"{name(path)}.{down}": a, f"{name(path)}.{up}": b} for path, (a, b) in layers.items())
    return {key: tensor for pair in pairs for key, tensor in pair.items()}


def flat(prefix: str) -> Callable[[str], str]:
    return lambda path: prefix + path.replace(".", "_")


def planned(models: Mapping[str, nn.Module], tensors: Tensors) -> Plan:
    found = plan(read(tensors), models)
    assert not found.faults, found.faults
    return found


def changes(found: Plan) -> dict[tuple[str, str], Tensor]:
    return {
        (component, path): layer.adapter_type.delta_weight(layer.tensors, layer.spec) * layer.scale
        for component, layers in found.layers.items()
        for path, layer in layers.items()
    }


def assert_alike(models: Mapping[str, nn.Module], tensors: Tensors, component: str, layers: Factors) -> Plan:
    """Assert that the file makes the same changes as one in diffusers' names."""
    found = planned(models, tensors)
    actual = changes(found)
    expected = changes(planned(models, spelled(layers, lambda path: f"{component}.{path}")))
    assert actual.keys() == expected.keys()
    assert all(torch.allclose(actual[at], change, atol=1e-6) for at, change in expected.items())
    return found


# Names

DOTTED = [
    "",
    "base_model.model.",
    "base_model.model.transformer.",
    "base_model.model.diffusion_model.",
    "base_model.model.model.diffusion_model.",
    "conditional_transformer.",
    "diffusion_model.",
    "dit.",
    "model.diffusion_model.",
    "module.",
    "net.",
    "pipe.dit.",
    "transformer.base_model.model.",
    "unet.",
    "unet.base_model.model.",
    "_orig_mod.",
]
FLAT = ["lora_transformer_", "lora_unet_", "lora_unet__", "lora_unet_diffusion_model_", "lycoris_"]
SPELLINGS = [
    ("lora_A", "lora_B"),
    ("lora_a.weight", "lora_b.weight"),
    ("lora_down", "lora_up"),
    ("lora.down.weight", "lora.up.weight"),
    ("lora_down.default.weight", "lora_up.default.weight"),
]


@pytest.mark.parametrize("family", ["flux", "wan", "ideogram4"])
def test_prefixes_of_programs_and_wrappers_are_ignored(family: str) -> None:
    models = small(family)
    layers = factors(models["transformer"])
    for prefix in DOTTED:
        assert_alike(models, spelled(layers, lambda path, prefix=prefix: prefix + path), "transformer", layers)
    for prefix in FLAT:
        assert_alike(models, spelled(layers, flat(prefix), "lora_down.weight", "lora_up.weight"), "transformer", layers)
    for down, up in SPELLINGS:
        assert_alike(models, spelled(layers, lambda path: path, down, up), "transformer", layers)


def test_names_of_individually_compiled_blocks_are_read() -> None:
    models = small("flux")
    layers = factors(models["transformer"])
    file = spelled(layers, lambda path: f"transformer.{path.replace('.attn', '._orig_mod.attn')}")
    assert_alike(models, file, "transformer", layers)


def test_names_from_which_too_much_was_removed_with_a_prefix_are_read() -> None:
    models = small("qwen")
    layers = factors(models["transformer"])
    file = spelled(layers, lambda path: f"diffusion_model.{path.removeprefix('tran')}")
    assert_alike(models, file, "transformer", layers)


TEXT = {
    "text_encoder": ("lora_te1_", "te1.", "clip_l.transformer.", "text_encoders.clip_l.transformer."),
    "text_encoder_2": ("lora_te2_", "te2.", "clip_g.transformer.", "text_encoders.clip_g.transformer."),
    "text_encoder_3": ("lora_te3_", "te3.", "t5xxl.transformer.", "text_encoders.transformer."),
}


@pytest.mark.parametrize("component", TEXT)
def test_prefixes_of_text_encoders_are_read(component: str) -> None:
    models = small("sd3")
    layers = factors(models[component], "q_proj", "fc1", "SelfAttention.q")
    for prefix in TEXT[component]:
        name = flat(prefix) if prefix.endswith("_") else lambda path, prefix=prefix: prefix + path
        assert_alike(models, spelled(layers, name), component, layers)


def test_a_file_may_mix_dialects() -> None:
    models = small("sdxl")
    layers = {c: factors(models[c], *ATTENTION, "q_proj") for c in ("unet", "text_encoder", "text_encoder_2")}
    named = {c: spelled(found, lambda path, c=c: f"{c}.{path}") for c, found in layers.items()}
    expected = changes(planned(models, {**named["unet"], **named["text_encoder"], **named["text_encoder_2"]}))
    others = {
        "kohya": spelled(layers["text_encoder"], flat("lora_te1_text_model_"), "lora_down.weight", "lora_up.weight"),
        "comfy": spelled(layers["text_encoder_2"], lambda path: f"text_encoders.clip_g.transformer.{path}"),
    }
    for unet in (named["unet"], spelled(layers["unet"], lambda path: f"base_model.model.{path}")):
        actual = changes(planned(models, {**unet, **others["kohya"], **others["comfy"]}))
        assert actual.keys() == expected.keys()
        assert all(torch.equal(actual[at], change) for at, change in expected.items())


def test_a_text_projection_that_the_model_does_not_have_is_ignored() -> None:
    models = small("flux")
    layers = factors(models["text_encoder"], "q_proj")
    file = spelled(layers, flat("lora_te1_"), "lora_down.weight", "lora_up.weight")
    more = {"lora_te1_text_projection.lora_down.weight": torch.ones(2, 32)}
    found = planned(models, {**file, **more})
    assert [key for key, _ in found.ignored] == list(more)
    # In a model that has one, it is not.
    assert [key for key, _ in plan(read(more), small("sd3")).faults] == list(more)


@pytest.mark.parametrize("path", ["embeddings.position_embedding", "embeddings.token_embedding"])
def test_a_lora_of_an_embedding_may_have_the_orientation_of_its_weight(path: str, tmp_path: Path) -> None:
    model = SMALL["flux"].build()["text_encoder"]
    layer = model.get_submodule(models.CLIP_ROOT + path)
    assert isinstance(layer, nn.Embedding)
    weight = layer.weight
    up, down = normal(weight.shape[0], 2).float(), normal(2, weight.shape[1]).float()
    stem = f"text_encoders.clip_l.transformer.text_model.{path}"
    ids = torch.arange(8).view(1, 8)
    diffadapt.load_adapter(model, {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}, "a")
    found = model(ids).last_hidden_state
    file = diffadapt.adapters(model).save("a", tmp_path, format="kohya")
    diffadapt.adapters(model).clear()
    base = model(ids).last_hidden_state
    diffadapt.load_adapter(model, file)
    assert torch.equal(model(ids).last_hidden_state, found)
    diffadapt.adapters(model).clear()
    weight.data = weight.data + up @ down
    assert torch.allclose(model(ids).last_hidden_state, found, atol=1e-5)
    assert not torch.allclose(base, found, atol=1e-2)


@pytest.mark.parametrize("end", ["", ".scale", ".weight"])
@pytest.mark.parametrize("name", ["diff", "set_weight"])
def test_norms_may_have_the_name_of_their_parameter(name: str, end: str) -> None:
    stem = "diffusion_model.double_blocks.0.img_attn.norm.query_norm"
    found = planned(small("flux"), {f"{stem}{end}.{name}": torch.ones(16)})
    assert list(found.layers["transformer"]) == ["transformer_blocks.0.attn.norm_q"]


@pytest.mark.parametrize("kind", ["CLIPAttention", "CLIPSdpaAttention", "CLIPFlashAttention2"])
def test_numbered_layers_of_a_text_encoder_may_be_of_any_implementation_of_its_attention(
    kind: str, tmp_path: Path
) -> None:
    encoder = clip_text()
    paths = [f"encoder.layers.{n}.self_attn.{p}" for n in (0, 1) for p in ("k_proj", "v_proj", "q_proj", "out_proj")]
    tensors = {
        f"text_encoder:{n}:{side}": normal(*shape)
        for n in range(8)
        for side, shape in (("up", (32, 2)), ("down", (2, 32)))
    }
    file = tmp_path / "ink.safetensors"
    save_file({key: tensor.float() for key, tensor in tensors.items()}, file, {"text_encoder": json.dumps([kind])})
    found = plan(read(file), {"text_encoder": encoder})
    assert (found.used, found.faults) == (16, [])
    layers = found.layers["text_encoder"]
    by_number = {int(key.split(":")[1]): tensor for key, tensor in tensors.items() if key.endswith("down")}
    for number, path in enumerate(paths):
        (layer,) = (layer for own, layer in layers.items() if own.endswith(path))
        assert torch.equal(layer.tensors["lora_down"], by_number[number].float())


# Layers that were fused for training, and layers that are given twice

QKV = [f"transformer_blocks.0.attn.to_{letter}" for letter in "qkv"]


def joined() -> tuple[tuple[Tensor, Tensor], Factors]:
    """Return a LoRA on fused query, key and value, and its parts."""
    torch.manual_seed(0)
    down, up = normal(2, 32).float(), normal(96, 2).float()
    return (down, up), {path: (down, part) for path, part in zip(QKV, up.split(32), strict=True)}


FUSED = ["lycoris_transformer_blocks_0_attn_to_qkv", "transformer.transformer_blocks.0.attn.to_qkv"]


@pytest.mark.parametrize("stem", FUSED)
def test_projections_that_were_fused_for_training_are_split(stem: str) -> None:
    (down, up), parts = joined()
    file = {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
    assert_alike(small("flux"), file, "transformer", parts)


@pytest.mark.parametrize("first", [True, False])
def test_placeholders_of_zeros_next_to_fused_projections_are_ignored(first: bool) -> None:
    (down, up), parts = joined()
    fused = {f"{FUSED[0]}.lora_down.weight": down, f"{FUSED[0]}.lora_up.weight": up}
    idle = spelled(
        {path: (down, torch.zeros(32, 2)) for path in QKV}, flat("lycoris_"), "lora_down.weight", "lora_up.weight"
    )
    file = {**fused, **idle} if first else {**idle, **fused}
    found = assert_alike(small("flux"), file, "transformer", parts)
    assert {key for key, _ in found.ignored} == set(idle)
    assert found.used == 2


@pytest.mark.parametrize("first", [True, False])
def test_a_fused_projection_that_repeats_its_parts_is_ignored(first: bool) -> None:
    (down, up), parts = joined()
    stem = "lora_unet_double_blocks_0_img_attn_qkv"
    fused = {f"{stem}.lora_down.weight": down * 2, f"{stem}.lora_up.weight": up / 2}
    file = spelled(parts, lambda path: f"transformer.{path}")
    found = assert_alike(small("flux"), {**fused, **file} if first else {**file, **fused}, "transformer", parts)
    assert found.ignored == [(key, "the file has this layer in another way, too, and that is used") for key in fused]
    assert found.used == len(file)
    for other in ({**file, **fused, f"{stem}.lora_up.weight": -up}, {**dict(list(file.items())[:4]), **fused}):
        with pytest.raises(AdapterError, match="has tensors under another name already"):
            plan(read(other), small("flux")).refuse_faults(strict=True)


# What PEFT saves along with its adapters


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.last = nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.first(x)))


OPTIONS: dict[str, dict[str, Any]] = {
    "layers": {"modules_to_save": ["last", "norm"]},
    "biases": {"bias": "lora_only"},
    "all biases": {"bias": "all"},
    "both": {"bias": "all", "modules_to_save": ["last"]},
}


@pytest.mark.parametrize("case", OPTIONS)
def test_layers_and_biases_that_peft_trains_fully_are_loaded(case: str, tmp_path: Path) -> None:
    theirs = peft.get_peft_model(
        Small(), peft.LoraConfig(r=2, target_modules=["first"], init_lora_weights=False, **OPTIONS[case])
    )
    x = torch.randn(3, 8)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.normal_()
        wanted = theirs(x)
    theirs.save_pretrained(tmp_path)
    model = Small()
    base = model(x)
    diffadapt.load_adapter(model, tmp_path)
    assert torch.allclose(model(x), wanted, atol=1e-5)
    assert not torch.allclose(base, wanted, atol=1e-2)
