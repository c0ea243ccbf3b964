"""One adapter in every dialect: each file is recognised by one format, and becomes the same weights."""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, FluxTransformer2DModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

import diffadapt
from diffadapt import AdapterError, families
from diffadapt.families.published import published
from diffadapt.formats import detect, matching
from diffadapt.formats.cloneofsimo import CLONEOFSIMO
from diffadapt.formats.format import Header
from diffadapt.formats.names import Names
from diffadapt.formats.verdicts import Place
from diffadapt.runtime.targets import Targets
from tests.support import files, loras, models, spellings
from tests.support.compare import assert_differs, assert_same
from tests.support.dialects import numbered_layers
from tests.support.effort import assert_linear
from tests.support.full_size import clip_l, sd_unet, sdxl_unet
from tests.support.spellings import DIALECTS, OF_DENOISERS, TEXT_ENCODERS, Tensors, add_layer, text_encoders_of
from tests.support.versions import diffusers

LAYERS = rf"{loras.ATTENTION}|proj_mlp|wi_0|SelfAttention\.[qkvo]"


def parts_of(pipe: DiffusionPipeline, text: bool = True) -> dict[str, dict[str, loras.Factors]]:
    names = tuple(name for name in ("unet", "transformer", *TEXT_ENCODERS) if hasattr(pipe, name))
    return loras.parts_for(pipe, names if text else names[:1], LAYERS, alpha=loras.varied_alpha)


def assert_loads(
    build: Callable[[], DiffusionPipeline], tensors: Tensors, parts: loras.Parts, format: str | None = None
) -> None:
    """Assert that one format recognises the file, every tensor is used, and the merged weights are the baked ones."""
    recognised = [known.name for known in matching(Header(tuple(tensors)))]
    assert recognised == [format or recognised[0]]
    pipe = build()
    report = pipe.load_adapter(tensors, "a")
    assert (report.format, report.used, report.unused) == (recognised[0], len(tensors), [])
    assert set(report.components) == set(parts)
    pipe.adapters.merge("a")
    expected, base = loras.bake(build(), parts), build()
    for component, found in parts.items():
        weights = getattr(pipe, component).state_dict()
        originals = getattr(base, component).state_dict()
        for key, weight in getattr(expected, component).state_dict().items():
            assert_same(weights[key], weight)
            if key.removesuffix(".weight") in found:
                assert not torch.equal(weight, originals[key])


@pytest.mark.slow
@pytest.mark.parametrize("family", models.FAMILIES)
@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_dialect_of_a_pipeline_becomes_the_same_weights(dialect: str, family: str) -> None:
    format, write = DIALECTS[dialect]
    parts = parts_of(models.FAMILIES[family]())
    assert len(parts) == 1 + len(text_encoders_of(family))
    assert_loads(models.FAMILIES[family], write(parts, family), parts, format)


@pytest.mark.slow
@pytest.mark.parametrize("family", models.FAMILIES)
@pytest.mark.parametrize("dialect", OF_DENOISERS)
def test_every_dialect_of_a_denoiser_becomes_the_same_weights(dialect: str, family: str) -> None:
    format, write = OF_DENOISERS[dialect]
    parts = parts_of(models.FAMILIES[family](), text=False)
    assert_loads(models.FAMILIES[family], write(parts, family), parts, format)


NATIVE = {
    r"transformer_blocks\.(\d+)\.attn\.to_([qkv])": r"double_blocks.\1.img_attn.qkv",
    r"transformer_blocks\.(\d+)\.attn\.to_out\.0": r"double_blocks.\1.img_attn.proj",
    r"transformer_blocks\.(\d+)\.attn\.add_([qkv])_proj": r"double_blocks.\1.txt_attn.qkv",
    r"transformer_blocks\.(\d+)\.attn\.to_add_out": r"double_blocks.\1.txt_attn.proj",
    r"single_transformer_blocks\.(\d+)\.attn\.to_([qkv])": r"single_blocks.\1.linear1",
    r"single_transformer_blocks\.(\d+)\.(proj_mlp)": r"single_blocks.\1.linear1",
    r"single_transformer_blocks\.(\d+)\.proj_out": r"single_blocks.\1.linear2",
}
FLUX_LAYERS = r"to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out|proj_mlp|single_transformer_blocks\.\d+\.proj_out"
ORDER = {"q": 0, "k": 1, "v": 2, "proj_mlp": 3}


def native(path: str) -> tuple[str, int | None]:
    """Return the original layer that a layer of Flux is a part of, and its place there; `None` if it is the whole."""
    for pattern, name in NATIVE.items():
        match = re.fullmatch(pattern, path)
        if match:
            return match.expand(name), ORDER[match[2]] if match.re.groups > 1 else None
    raise AssertionError(path)


def fused(parts: loras.Parts, alpha: float | None) -> dict[str, loras.Factors]:
    """Return the factors of the original layers: block-diagonal where layers are fused."""
    grouped: dict[str, dict[int, loras.Factors]] = {}
    for path, factors in parts["transformer"].items():
        name, index = native(path)
        grouped.setdefault(name, {})[index or 0] = factors
    return {
        name: loras.Factors(
            torch.cat([of[index].down for index in sorted(of)]),
            torch.block_diag(*(of[index].up for index in sorted(of))),
            None if alpha is None else alpha * len(of),
        )
        for name, of in grouped.items()
    }


def flux_parts(alpha: float | None, pattern: str = FLUX_LAYERS) -> dict[str, dict[str, loras.Factors]]:
    return loras.parts_for(models.flux(), ("transformer",), pattern, alpha=lambda index: alpha)


@pytest.mark.parametrize(
    ("format", "prefix", "down", "up"),
    [
        ("comfy", "diffusion_model.", "lora_A.weight", "lora_B.weight"),
        ("comfy", "diffusion_model.", "lora_down.weight", "lora_up.weight"),
        ("diffusers", "", "lora_A.weight", "lora_B.weight"),
        ("diffusers", "", "lora_down.weight", "lora_up.weight"),
        ("diffusers", "", "lora_A.default.weight", "lora_B.default.weight"),
        ("diffusers", "transformer.", "lora_down.weight", "lora_up.weight"),
        ("peft", "base_model.model.", "lora_A.weight", "lora_B.weight"),
    ],
)
@pytest.mark.parametrize("alpha", [None, 2.0])
def test_fused_layers_of_flux_are_split(format: str, prefix: str, down: str, up: str, alpha: float | None) -> None:
    parts = flux_parts(alpha)
    tensors: Tensors = {}
    for name, factors in fused(parts, alpha).items():
        add_layer(tensors, f"{prefix}{name}", factors, down, up)
    assert_loads(models.flux, tensors, parts, format)


def test_fused_layers_of_flux_in_kohyas_names_are_split() -> None:
    parts = flux_parts(2.0)
    tensors: Tensors = {}
    for name, factors in fused(parts, 2.0).items():
        add_layer(tensors, f"lora_unet_{name.replace('.', '_')}", factors, "lora_down.weight", "lora_up.weight")
    assert_loads(models.flux, tensors, parts, "kohya")


@pytest.mark.parametrize("prefix", ["", "transformer.", "diffusion_model.", "lora_unet_"])
def test_numbered_parts_of_fused_layers_are_read(prefix: str) -> None:
    parts = flux_parts(2.0)
    tensors: Tensors = {}
    for path, factors in parts["transformer"].items():
        name, index = native(path)
        name = name if index is None else f"{name}.{index}"
        stem = f"{prefix}{name.replace('.', '_')}" if prefix == "lora_unet_" else f"{prefix}{name}"
        add_layer(tensors, stem, factors, "lora_down.weight", "lora_up.weight")
    assert_loads(models.flux, tensors, parts)


def test_processors_of_xlabs_are_read() -> None:
    parts = flux_parts(None, FLUX_LAYERS.replace("|proj_mlp", ""))
    tensors: Tensors = {}
    for name, factors in fused(parts, None).items():
        block, number, layer = re.fullmatch(r"(\w+)\.(\d+)\.(.+)", name).groups()
        stream = {"img": "1", "txt": "2"}.get(layer[:3], "")
        projection = "proj" if layer.endswith(("proj", "linear2")) else "qkv"
        stem = f"{block}.{number}.processor.{projection}_lora{stream}"
        add_layer(tensors, stem, factors, "down.weight", "up.weight")
    assert_loads(models.flux, tensors, parts, "xlabs")


def test_other_types_in_the_original_layout_with_an_adapter_name_are_read() -> None:
    pipe = models.flux()
    path, out, columns = "double_blocks.0.img_attn.qkv", 3 * models.WIDTH, models.WIDTH
    hada = {
        "hada_w1_a": torch.randn(out, 2),
        "hada_w1_b": torch.randn(2, columns),
        "hada_w2_a": torch.randn(out, 2),
        "hada_w2_b": torch.randn(2, columns),
    }
    before = pipe.transformer.transformer_blocks[0].attn.to_k.weight.clone()
    report = pipe.load_adapter({f"base_model.model.{path}.{name}.default": t for name, t in hada.items()}, "a")
    assert (report.format, report.unused) == ("peft", [])
    pipe.adapters.merge("a")
    change = (hada["hada_w1_a"] @ hada["hada_w1_b"]) * (hada["hada_w2_a"] @ hada["hada_w2_b"])
    attention = pipe.transformer.transformer_blocks[0].attn
    assert_same(attention.to_k.weight, before + change[models.WIDTH : 2 * models.WIDTH])


def test_full_changes_next_to_factors_are_read_without_a_prefix() -> None:
    """lightx2v writes factors and full changes of a weight and of a bias, without a prefix."""
    parts = flux_parts(None, r"to_out\.0")
    tensors: Tensors = {}
    for name, factors in fused(parts, None).items():
        add_layer(tensors, name, factors, "lora_down.weight", "lora_up.weight")
    tensors["img_in.diff"] = torch.randn(models.WIDTH, 16)
    tensors["img_in.diff_b"] = torch.randn(models.WIDTH)
    pipe = models.flux()
    base = {name: parameter.clone() for name, parameter in pipe.transformer.x_embedder.named_parameters()}
    report = pipe.load_adapter(tensors, "a")
    assert (report.format, report.types, report.unused) == ("diffusers", {"lora": 2, "full": 1}, [])
    pipe.adapters.merge("a")
    assert_same(pipe.transformer.x_embedder.weight, base["weight"] + tensors["img_in.diff"])
    assert_same(pipe.transformer.x_embedder.bias, base["bias"] + tensors["img_in.diff_b"])


@pytest.mark.parametrize("alpha", [None, 4.0, 1.0])
def test_a_change_of_a_bias_next_to_factors_is_added(alpha: float | None) -> None:
    """In files for ComfyUI and of lightx2v, alpha does not scale the change of a bias."""
    path, stem = "transformer_blocks.1.ff.net.2", "diffusion_model.double_blocks.1.img_mlp.2"
    tensors = {
        f"{stem}.lora_A.weight": torch.randn(4, 4 * models.WIDTH),
        f"{stem}.lora_B.weight": torch.randn(models.WIDTH, 4),
        f"{stem}.diff_b": torch.randn(models.WIDTH),
        **({} if alpha is None else {f"{stem}.alpha": torch.tensor(alpha)}),
    }
    pipe = models.flux()
    layer = pipe.transformer.get_submodule(path)
    weight, bias = layer.weight.clone(), layer.bias.clone()
    report = pipe.load_adapter(tensors, "a")
    assert (report.types, report.unused) == ({"lora": 1}, [])
    pipe.adapters.merge("a")
    product = tensors[f"{stem}.lora_B.weight"] @ tensors[f"{stem}.lora_A.weight"] * (alpha or 4) / 4
    assert_same(layer.weight, weight + product)
    assert_same(layer.bias, bias + tensors[f"{stem}.diff_b"])


def test_two_changes_of_one_bias_are_refused() -> None:
    stem = "diffusion_model.img_in"
    tensors = {f"{stem}.lora_A.weight": torch.zeros(2, 16), f"{stem}.lora_B.weight": torch.zeros(models.WIDTH, 2)}
    biases = {f"{stem}.diff_b": torch.zeros(models.WIDTH), f"{stem}.lora_B.bias": torch.zeros(models.WIDTH)}
    with pytest.raises(AdapterError, match="there twice"):
        models.flux().load_adapter({**tensors, **biases})


NEW_WEIGHTS = {
    "conv_in": "linear map",
    "mid_block.attentions.0.transformer_blocks.0.attn1.to_v": "without a bias",
    "mid_block.resnets.0.norm1": "group norm",
    "mid_block.attentions.0.transformer_blocks.0.norm1": "layer norm",
}


@pytest.mark.slow
@pytest.mark.parametrize("strength", [1.0, 0.5])
@pytest.mark.parametrize("path", NEW_WEIGHTS)
def test_a_new_weight_replaces_the_old_one(path: str, strength: float) -> None:
    """The strength interpolates between the two weights. The bias stays, except for a change of its own."""
    pipe, expected = models.sd15(), models.sd15()
    base = models.draw(pipe)
    layer = expected.unet.get_submodule(path)
    new, stem = torch.randn(layer.weight.shape), f"lora_unet_{path.replace('.', '_')}"
    tensors = {f"{stem}.set_weight": new}
    layer.weight.data.lerp_(new, strength)
    if layer.bias is not None:
        tensors[f"{stem}.diff_b"] = torch.randn(layer.bias.shape)
        layer.bias.data += tensors[f"{stem}.diff_b"] * strength
    pipe.load_adapter(tensors, "a", scale=strength)
    assert_same(models.draw(pipe), models.draw(expected))
    assert_differs(models.draw(pipe), base)
    pipe.adapters.merge("a")
    assert_same(pipe.unet.get_submodule(path).weight, layer.weight, 1e-6)


@pytest.mark.slow
def test_a_new_weight_and_a_change_by_another_adapter_add_up() -> None:
    path, stem = "conv_in", "lora_unet_conv_in"
    pipe = models.sd15()
    shape = pipe.unet.conv_in.weight.shape
    new, diff = torch.randn(shape), torch.randn(shape)
    pipe.load_adapter({f"{stem}.diff": diff}, "diff")
    pipe.load_adapter({f"{stem}.set_weight": new}, "new")
    drawn = models.draw(pipe)
    pipe.adapters.merge("diff", "new")
    assert_same(pipe.unet.get_submodule(path).weight, new + diff)
    assert_same(models.draw(pipe), drawn)
    pipe.adapters.unmerge()
    pipe.adapters.activate("diff")
    pipe.adapters.merge("diff")
    with pytest.raises(AdapterError, match="merged"):
        pipe.load_adapter({f"{stem}.set_weight": new}, "again")


def test_a_new_weight_and_a_change_in_one_layer_exclude_each_other() -> None:
    pipe = models.sd15()
    tensors = {f"lora_unet_conv_in.{name}": torch.zeros(8, 4, 3, 3) for name in ("diff", "set_weight")}
    with pytest.raises(AdapterError, match="one of diff and set_weight"):
        pipe.load_adapter(tensors)


@pytest.mark.parametrize(("shape", "fits"), [((32, 16), True), ((32, 32), False)])
def test_the_new_shape_for_comfyui_has_to_fit(shape: tuple[int, int], fits: bool) -> None:
    stem = "diffusion_model.img_in"
    tensors = {f"{stem}.lora_A.weight": torch.ones(2, 16), f"{stem}.lora_B.weight": torch.ones(models.WIDTH, 2)}
    tensors[f"{stem}.reshape_weight"] = torch.tensor(shape)
    if fits:
        assert models.flux().load_adapter(tensors).unused == []
    else:
        with pytest.raises(AdapterError, match=r"reshape_weight is \[32, 32\], expected \[32, 16\]"):
            models.flux().load_adapter(tensors)


def sparse_file(path: str, out: int, columns: int, alpha: float = 2.0) -> tuple[Tensors, Tensor]:
    """Return a LoRA as LyCORIS extracts it with `use_bias`, and the change of the flat weight that it stands for."""
    stem = f"lora_unet_{path.replace('.', '_')}"
    down, up = torch.randn(4, columns), torch.randn(out, 4)
    rest = torch.randn(out, columns) * (torch.rand(out, columns) < 0.1)
    matrix = rest.to_sparse().coalesce()
    tensors = {
        f"{stem}.lora_down.weight": down.view(4, -1, 3, 3),
        f"{stem}.lora_up.weight": up.view(out, 4, 1, 1),
        f"{stem}.alpha": torch.tensor(alpha),
        f"{stem}.bias_indices": matrix.indices().to(torch.int16),
        f"{stem}.bias_values": matrix.values(),
        f"{stem}.bias_size": torch.tensor(rest.shape).to(torch.int16),
    }
    return tensors, (up @ down + rest) * alpha / 4


def test_the_sparse_rest_of_an_extracted_weight_is_added() -> None:
    pipe = models.sd15()
    path = "mid_block.resnets.0.conv1"
    layer = pipe.unet.get_submodule(path)
    weight = layer.weight.clone()
    tensors, change = sparse_file(path, weight.shape[0], weight[0].numel())
    report = pipe.load_adapter(tensors, "a")
    assert (report.types, report.unused) == ({"full": 1}, [])
    assert diffadapt.inspect(tensors, pipe).types == report.types
    pipe.adapters.merge("a")
    assert_same(layer.weight, weight + change.view(weight.shape))


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("bias_values", None, "needs all of"),
        ("bias_size", torch.tensor([1, 2]), r"bias_size is \[1, 2\], expected"),
        ("bias_indices", torch.full((2, 3), -1), "places in a matrix"),
        ("bias_indices", torch.tensor([[10**6], [0]]), "places in a matrix"),
    ],
)
def test_a_damaged_sparse_rest_is_refused(name: str, value: Tensor | None, reason: str) -> None:
    pipe = models.sd15()
    weight = pipe.unet.mid_block.resnets[0].conv1.weight
    tensors, _ = sparse_file("mid_block.resnets.0.conv1", weight.shape[0], weight[0].numel())
    key = f"lora_unet_mid_block_resnets_0_conv1.{name}"
    if value is None:
        del tensors[key]
    else:
        tensors[key] = value
        if name == "bias_indices":
            tensors[key.replace(name, "bias_values")] = torch.ones(value.shape[1])
    with pytest.raises(AdapterError, match=reason):
        pipe.load_adapter(tensors)


def numbered_unet(unet: nn.Module) -> list[str]:
    return numbered_layers("unet", [path for path, _ in unet.named_modules()])


def numbered_clip(model: nn.Module) -> list[str]:
    return numbered_layers("text_encoder", [path for path, _ in model.named_modules()])


def cloneofsimo(parts: loras.Parts, orders: Mapping[str, list[str]]) -> Tensors:
    return {
        f"{component}:{number}:{side}": tensor
        for component, order in orders.items()
        for number, path in enumerate(order)
        for side, tensor in (("up", parts[component][path].up), ("down", parts[component][path].down))
    }


def test_cloneofsimo_numbers_the_layers() -> None:
    pipe = models.sd15()
    orders = {"unet": numbered_unet(pipe.unet), "text_encoder": numbered_clip(pipe.text_encoder)}
    parts = loras.parts_for(pipe, tuple(orders), rf"{loras.ATTENTION}|ff\.net\.0\.proj")
    assert {name: set(order) for name, order in orders.items()} == {name: set(found) for name, found in parts.items()}
    assert_loads(models.sd15, cloneofsimo(parts, orders), parts, "cloneofsimo")


def test_cloneofsimo_numbers_convolutions_after_the_attention_of_their_block() -> None:
    unet = models.unet_sd15()
    targets = Targets(unet)
    metadata = {"unet": json.dumps(["ResnetBlock2D", "CrossAttention", "Attention", "GEGLU"])}
    blocks = [path for path, module in unet.named_modules() if type(module).__name__ == "ResnetBlock2D"]
    convolutions = [path for path in targets.modules if path.rpartition(".")[0] in blocks and "norm" not in path]
    linear = len(numbered_unet(unet))
    counted = [path for path in convolutions if isinstance(targets.modules[path], (nn.Conv2d, nn.Linear))]
    keys = tuple(f"unet:{n}:{side}" for n in range(linear + len(counted)) for side in ("up", "down"))
    verdicts = CLONEOFSIMO.locate(Header(keys, metadata), Names({"unet": targets})).values()
    assert all(isinstance(verdict, Place) for verdict in verdicts)
    first = CLONEOFSIMO.locate(Header(keys, metadata), Names({"unet": targets}))["unet:9:down"]
    # Attention modules are registered before resnets, so the nine of the first block precede its convolutions.
    assert first.path == "down_blocks.0.resnets.0.conv1"


@pytest.mark.parametrize("recent", [False, True])
def test_the_shapes_tell_the_order_of_cloneofsimo(recent: bool) -> None:
    """Trainers with a newer diffusers have the feed-forward last in a block."""
    unet = models.unet_sd15()
    order = numbered_unet(unet)
    if recent:
        order = [
            path for n in range(0, len(order), 9) for path in (*order[n : n + 4], *order[n + 5 : n + 9], order[n + 4])
        ]
    shapes: dict[str, tuple[int, ...]] = {}
    for number, path in enumerate(order):
        layer = unet.get_submodule(path)
        out, columns = int(layer.out_features), int(layer.in_features)
        shapes |= {f"unet:{number}:up": (out, 4), f"unet:{number}:down": (4, columns)}
    header = Header(tuple(shapes), shapes=shapes)
    verdicts = CLONEOFSIMO.locate(header, Names({"unet": Targets(unet)}))
    assert [verdicts[f"unet:{number}:up"].path for number in range(len(order))] == order
    wrong = Header(tuple(shapes), shapes={**shapes, "unet:7:up": (5, 4)})
    verdicts = CLONEOFSIMO.locate(wrong, Names({"unet": Targets(unet)}))
    assert not any(isinstance(verdict, Place) for verdict in verdicts.values())


def test_cloneofsimo_on_another_model_is_refused() -> None:
    pipe = models.sd15()
    orders = {"unet": numbered_unet(pipe.unet)[:-1]}
    parts = loras.parts_for(pipe, ("unet",), rf"{loras.ATTENTION}|ff\.net\.0\.proj")
    with pytest.raises(AdapterError, match="by number"):
        pipe.load_adapter(cloneofsimo(parts, orders))
    with pytest.raises(AdapterError, match="'unet'"):
        models.flux().load_adapter(cloneofsimo(parts, {"unet": numbered_unet(pipe.unet)}))


@pytest.mark.parametrize("text", ["[", '"CrossAttention"', "[1]"])
def test_damaged_metadata_of_cloneofsimo_is_refused(text: str) -> None:
    header = Header(("unet:0:up", "unet:0:down"), {"unet": text})
    with pytest.raises(AdapterError, match="unet"):
        CLONEOFSIMO.locate(header, Names({"unet": Targets(models.unet_sd15())}))


LISTS = {
    "diffusers_flux": "diffusers",
    "diffusers_flux_no_proj_mlp": "diffusers",
    "diffusers_sd15_processors": "diffusers",
    "diffusers_sd15_unet": "diffusers",
    "bare_qwen": "diffusers",
    "kohya_sd15": "kohya",
    "kohya_sd15_locon": "kohya",
    "kohya_sdxl": "kohya",
    "kohya_sdxl_lokr": "kohya",
    "kohya_flux": "kohya",
    "kohya_qwen_lokr": "kohya",
    "kohya_anima": "kohya",
    "comfy_flux": "comfy",
    "comfy_anima": "comfy",
    "comfy_anima_lokr": "comfy",
    "xlabs_flux": "xlabs",
    "bfl_control_flux": "bfl-control",
    "cloneofsimo_sd15": "cloneofsimo",
}


def tensors_of(name: str) -> Tensors:
    """Return tensors on the meta device, except for alphas, which are read with the names."""
    return {key: tensor if tensor.ndim else torch.tensor(4.0) for key, tensor in files.placeholders(name).items()}


def keys_of(name: str) -> tuple[str, ...]:
    content = files.fixture(f"keys/{name}")
    if "modules" in content:
        return tuple(f"{module}.{tensor}" for module in content["modules"] for tensor in content["tensors"])
    return tuple(files.placeholders(name))


def test_every_list_of_keys_in_the_fixtures_is_tested() -> None:
    assert {file.stem for file in (files.FIXTURES / "keys").glob("*.json")} == set(LISTS)


@pytest.mark.parametrize("name", LISTS)
def test_exactly_one_format_recognises_a_file(name: str) -> None:
    header = Header(keys_of(name))
    assert [format.name for format in matching(header)] == [LISTS[name]]
    # Also by its last names.
    assert detect(Header(header.keys[::-1])).name == LISTS[name]


def flux_transformer(**options: int) -> FluxTransformer2DModel:
    with torch.device("meta"):
        return FluxTransformer2DModel(guidance_embeds=True, **options)


@pytest.mark.parametrize(
    ("name", "used"),
    [
        ("diffusers_flux", 988),
        ("diffusers_flux_no_proj_mlp", 684),
        ("kohya_flux", 912),
        ("comfy_flux", 456),
        ("xlabs_flux", 24),
    ],
)
def test_every_tensor_of_a_flux_file_is_used(name: str, used: int) -> None:
    report = diffadapt.inspect(tensors_of(name), {"transformer": flux_transformer()})
    assert (report.format, report.family, report.used, report.unused) == (LISTS[name], "flux", used, [])


def test_every_tensor_of_a_cloneofsimo_file_is_used() -> None:
    with torch.device("meta"):
        target: dict[str, nn.Module] = {"unet": sd_unet(768), "text_encoder": clip_l()}
    report = diffadapt.inspect(files.placeholders("cloneofsimo_sd15"), target)
    assert (report.used, report.unused, report.components) == (384, [], {"unet": 144, "text_encoder": 48})


def test_every_name_of_an_sdxl_lokr_file_is_found() -> None:
    with torch.device("meta"):
        config = CLIPTextConfig(hidden_size=1280, num_hidden_layers=32, num_attention_heads=20)
        target = {"unet": sdxl_unet(), "text_encoder": clip_l(), "text_encoder_2": CLIPTextModelWithProjection(config)}
    header = Header(keys_of("kohya_sdxl_lokr"))
    names = Names({name: Targets(model) for name, model in target.items()})
    verdicts = detect(header).locate(header, names)
    assert len(verdicts) == 3156
    assert all(isinstance(verdict, Place) for verdict in verdicts.values())


def encoder_with_levels() -> nn.Module:
    """Return a text encoder with levels above its layers that files do not have."""
    layer = nn.ModuleDict({"q_proj": nn.Linear(8, 8)})
    return nn.ModuleDict(
        {"model": nn.ModuleDict({"language_model": nn.ModuleDict({"layers": nn.ModuleList([layer])})})}
    )


@pytest.mark.parametrize(
    "stem",
    [
        "text_encoders.qwen25_7b.transformer.model.layers.0.q_proj",
        "text_encoders.transformer.model.layers.0.q_proj",
        "text_encoders.llama.transformer.layers.0.q_proj",
        "lora_te_layers_0_q_proj",
        "lora_te1_model_layers_0_q_proj",
        "text_encoder.layers.0.q_proj",
    ],
)
def test_missing_levels_of_text_encoders_are_found(stem: str) -> None:
    tensors = {f"{stem}.lora_down.weight": torch.zeros(2, 8), f"{stem}.lora_up.weight": torch.zeros(8, 2)}
    report = diffadapt.inspect(tensors, {"transformer": nn.Linear(8, 8), "text_encoder": encoder_with_levels()})
    assert (report.components, report.unused) == ({"text_encoder": 1}, [])


def block() -> nn.Module:
    return nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(8, 8)])})


@pytest.mark.parametrize(
    ("prefix", "components", "expected"),
    [
        ("diffusion_model.transformer_1.", ("transformer", "transformer_2"), "transformer"),
        ("diffusion_model.transformer_2.", ("transformer", "transformer_2"), "transformer_2"),
        ("transformer_1.", ("transformer", "transformer_2"), "transformer"),
        ("transformer_2.", ("transformer", "transformer_2"), "transformer_2"),
        ("diffusion_model.", ("transformer", "transformer_2"), "transformer"),
        ("diffusion_model.", ("transformer_2",), "transformer_2"),
        ("", ("transformer_2",), "transformer_2"),
        ("lora_unet_", ("transformer_2",), "transformer_2"),
        ("lora_prior_unet_", ("prior", "decoder"), "prior"),
        ("lora_prior_unet_", ("prior_prior", "decoder"), "prior_prior"),
        ("lora_unet_", ("decoder", "prior_prior"), "decoder"),
    ],
)
def test_the_prefix_tells_which_denoiser_a_file_is_for(prefix: str, components: tuple[str, ...], expected: str) -> None:
    path = "layers_0" if prefix.startswith("lora_") else "layers.0"
    tensors = {
        f"{prefix}{path}.lora_down.weight": torch.zeros(2, 8),
        f"{prefix}{path}.lora_up.weight": torch.zeros(8, 2),
    }
    report = diffadapt.inspect(tensors, {component: block() for component in components})
    assert (report.components, report.unused) == ({expected: 1}, [])


@pytest.mark.parametrize("dialect", ["kohya", "comfy", "diffusers with alpha"])
def test_a_text_encoder_that_the_pipeline_does_not_have_is_refused(dialect: str) -> None:
    pipe = models.sd15()
    parts = parts_of(models.sdxl())
    tensors = DIALECTS[dialect][1]({"text_encoder_2": parts["text_encoder_2"]}, "sdxl")
    with pytest.raises(AdapterError, match="no component 'text_encoder_2'"):
        pipe.load_adapter(tensors)


@pytest.mark.parametrize("name", ["kohya_flux", "comfy_flux", "xlabs_flux", "bfl_control_flux"])
def test_a_file_for_another_family_is_refused_by_name(name: str) -> None:
    tensors = {key: torch.zeros(tensor.shape) for key, tensor in list(files.placeholders(name).items())[:20]}
    with pytest.raises(AdapterError, match="looks like a flux adapter; the model is sd"):
        models.sd15().load_adapter(tensors)


def kohya_file() -> tuple[DiffusionPipeline, Tensors]:
    pipe = models.sd15()
    return pipe, spellings.kohya_names(loras.parts_for(pipe, ("unet",), "to_q"))


@pytest.mark.parametrize("key", ["_aux.slider.alpha", "_aux.lora_unet_x.lora_up.weight", "sshs_model_hash"])
def test_tensors_for_bookkeeping_are_ignored(key: str) -> None:
    pipe, tensors = kohya_file()
    report = pipe.load_adapter({**tensors, key: torch.ones(1)})
    assert [unused for unused, _ in report.unused] == [key]
    assert report.used == len(tensors)


def test_a_learned_token_in_a_file_of_cloneofsimo_is_used() -> None:
    pipe = models.sd15()
    orders = {"text_encoder": numbered_clip(pipe.text_encoder)}
    tensors = {**cloneofsimo(loras.parts_for(pipe, ("text_encoder",)), orders), "<s1>": torch.ones(models.WIDTH)}
    report = pipe.load_adapter(tensors)
    assert report.unused == []
    assert report.tokens == {"<s1>": 1}


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        ("lora_unet_conv_in.reshape_weight", "no adapter type"),
        ("lora_unet_conv_in.bias_values", "no adapter type"),
        ("lora_unet_conv_in.oft_R.scaled_oft", "no adapter type"),
        ("lora_unet_conv_in.oft_blocks.1", "parts 1 found, expected 0 to 1"),
        ("oft_unet_conv_in.oft_blocks", "alpha, which is missing"),
        ("conv_nowhere.lora_up.weight", "has no layer"),
    ],
)
def test_a_tensor_that_cannot_be_used_is_reported_by_name(key: str, reason: str) -> None:
    pipe, tensors = kohya_file()
    with pytest.raises(AdapterError, match=f"{re.escape(key)}: .*{reason}"):
        pipe.load_adapter({**tensors, key: torch.ones(2, 4, 4)})


@pytest.mark.parametrize(
    ("keys", "what"),
    [
        (
            ("image_proj.proj.0.weight", "ip_adapter.1.to_k_ip.weight"),
            "IP-A",
        ),
        (("double_blocks.0.processor.ip_adapter_double_stream_k_proj.weight",), "IP-Adapter"),
        (("lora_controlnet", "input_blocks.1.1.transformer_blocks.0.attn1.to_q.down"), "Control-LoRA"),
        (("input_hint_block.0.weight", "input_blocks.0.0.down"), "Control-LoRA"),
        (("lllite_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.down.0.weight",), "ControlNet-LLLite"),
    ],
)
def test_a_file_that_only_looks_like_an_adapter_is_refused_by_name(keys: tuple[str, ...], what: str) -> None:
    assert len(matching(Header(keys))) == 1
    with pytest.raises(AdapterError, match=what):
        models.sd15().load_adapter({key: torch.zeros(4, 4) for key in keys})


def test_dialects_that_exclude_each_other_are_ambiguous() -> None:
    pipe, tensors = kohya_file()
    with pytest.raises(AdapterError, match="kohya and cloneofsimo both"):
        pipe.load_adapter({**tensors, "unet:0:up": torch.zeros(2, 2)})


def rotated_by_sd_scripts(weight: Tensor, blocks: Tensor, alpha: float) -> Tensor:
    """Follow `get_weight` and `merge_to` of `networks/oft.py`, which constrain the norm of all blocks together."""
    skew = blocks - blocks.transpose(1, 2)
    norm, limit = skew.norm(), torch.tensor(alpha * len(weight))
    skew = skew * ((torch.minimum(norm, limit) + 1e-8) / (norm + 1e-8))
    identity = torch.eye(blocks.shape[1])
    rotation = (identity + skew) @ torch.linalg.inv(identity - skew)
    rows = weight.reshape(*blocks.shape[:2], -1)
    return torch.einsum("knm,knp->kmp", rotation, rows).reshape(weight.shape)


@pytest.mark.parametrize("alpha", [0.0, 0.1, 100.0])
def test_an_oft_of_sd_scripts_is_loaded_and_saved(alpha: float, tmp_path: Path) -> None:
    """Its alpha, times the number of outputs, is a constraint on all blocks together; 0 allows no rotation."""
    pipe = models.sd15()
    path = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    weight = pipe.unet.get_submodule(path).weight.detach().clone()
    blocks = torch.randn(2, 4, 4) * 0.5
    assert (blocks - blocks.transpose(1, 2)).norm() > 0.8
    stem = f"oft_unet_{path.replace('.', '_')}"
    tensors = {f"{stem}.oft_blocks": blocks, f"{stem}.alpha": torch.tensor(alpha)}
    report = pipe.load_adapter(tensors, "a")
    assert (report.format, report.types, report.unused) == ("kohya", {"oft": 1}, [])
    saved = load_file(pipe.adapters.save("a", tmp_path / "a.safetensors", "kohya"))
    assert saved.keys() == tensors.keys()
    assert all(torch.equal(saved[key], tensor) for key, tensor in tensors.items())
    pipe.adapters.merge("a")
    expected = rotated_by_sd_scripts(weight, blocks, alpha)
    assert_same(pipe.unet.get_submodule(path).weight, expected, 1e-6)
    if alpha:
        assert_differs(expected, weight)
    else:
        assert_same(expected, weight, 1e-6)


def test_an_alpha_of_zero_is_no_constraint_in_lycoris() -> None:
    pipe = models.sd15()
    weight = pipe.unet.conv_in.weight.detach().clone()
    blocks = torch.randn(2, 4, 4) * 0.5
    pipe.load_adapter({"lora_unet_conv_in.oft_blocks": blocks, "lora_unet_conv_in.alpha": torch.tensor(0.0)}, "a")
    pipe.adapters.merge("a")
    assert_same(pipe.unet.conv_in.weight, rotated_by_sd_scripts(weight, blocks, 1e6))
    assert_differs(pipe.unet.conv_in.weight, weight)


def oft_of_flux(alpha: float) -> tuple[Tensors, dict[str, Tensor]]:
    """Return a file of sd-scripts' `networks/oft_flux.py`, and its blocks by path in the model."""
    layers = {
        "double_blocks_0_img_attn_qkv": [f"transformer_blocks.0.attn.to_{part}" for part in "qkv"],
        "double_blocks_1_txt_mlp_0": ["transformer_blocks.1.ff_context.net.0.proj"],
        "single_blocks_1_linear1": [
            *(f"single_transformer_blocks.1.attn.to_{part}" for part in "qkv"),
            "single_transformer_blocks.1.proj_mlp",
        ],
    }
    tensors: Tensors = {}
    blocks: dict[str, Tensor] = {}
    for name, paths in layers.items():
        tensors[f"oft_unet_{name}.alpha"] = torch.tensor(alpha)
        for number, path in enumerate(paths):
            size = models.WIDTH if "to_" in path else 4 * models.WIDTH
            blocks[path] = tensors[f"oft_unet_{name}.oft_blocks.{number}"] = torch.randn(4, size // 4, size // 4) * 0.3
    return tensors, blocks


@pytest.mark.parametrize("alpha", [0.01, 100.0])
def test_an_oft_of_flux_is_loaded_and_saved(alpha: float, tmp_path: Path) -> None:
    """Every part of a fused projection has its rotation under one alpha, which is times the outputs of the part."""
    pipe = models.flux()
    base = {path: module.weight.detach().clone() for path, module in loras.layers_of(pipe.transformer, ".*").items()}
    tensors, blocks = oft_of_flux(alpha)
    report = pipe.load_adapter(tensors, "a")
    assert (report.types, report.used, report.unused) == ({"oft": 8}, len(tensors), [])
    assert diffadapt.inspect(tensors).types == {"oft": 8}
    saved = load_file(pipe.adapters.save("a", tmp_path / "a.safetensors", "kohya"))
    assert saved.keys() == tensors.keys()
    assert all(torch.equal(saved[key], tensor) for key, tensor in tensors.items())
    pipe.adapters.merge("a")
    for path, own in blocks.items():
        expected = rotated_by_sd_scripts(base[path], own, alpha)
        assert_same(pipe.transformer.get_submodule(path).weight, expected, 1e-6)
        assert_differs(expected, base[path])


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        ("oft_unet_double_blocks_0_img_attn_qkv.oft_blocks.2", "2 parts found, expected 3"),
        ("oft_unet_double_blocks_0_img_attn_qkv.oft_blocks.1", "parts 0, 2 found, expected 0 to 2"),
        ("oft_unet_double_blocks_0_img_attn_qkv.alpha", "alpha, which is missing"),
    ],
)
def test_an_oft_of_flux_without_one_part_is_refused(key: str, reason: str) -> None:
    tensors, _ = oft_of_flux(0.1)
    del tensors[key]
    with pytest.raises(AdapterError, match=reason):
        models.flux().load_adapter(tensors)


OWN_MODELS = {
    "anima": ("blocks.0.mlp.layer1", "llm_adapter.blocks.0.mlp.0", "text_conditioner"),
    "ltx2": (
        "transformer_blocks.0.audio_attn1.to_q",
        "audio_embeddings_connector.transformer_1d_blocks.0.attn1.to_q",
        "connectors",
    ),
}


@pytest.mark.parametrize("family", OWN_MODELS)
@pytest.mark.parametrize("dialect", ["comfy", "kohya", "diffusers"])
def test_layers_of_a_file_that_are_in_a_separate_model_are_found(family: str, dialect: str) -> None:
    prefix = {"comfy": "diffusion_model.", "kohya": "lora_unet_", "diffusers": ""}[dialect]
    *paths, component = OWN_MODELS[family]
    built = next(published(family))
    tensors: Tensors = {}
    for path in paths:
        names = families.aliases(Targets(built["transformer" if path is paths[0] else component]))
        found = built["transformer" if path is paths[0] else component]
        layer = found.get_submodule(names[path][0].path if path in names else path)
        stem = prefix + (path.replace(".", "_") if dialect == "kohya" else path)
        tensors[f"{stem}.lora_down.weight"] = torch.empty(2, layer.in_features, device="meta")
        tensors[f"{stem}.lora_up.weight"] = torch.empty(layer.out_features, 2, device="meta")
    report = diffadapt.inspect(tensors, built)
    assert (report.format, report.family, report.unused) == (dialect, family, [])
    assert report.components == {"transformer": 1, component: 1}
    # Without that model its tensors are reported, and none of them is used elsewhere.
    report = diffadapt.inspect(tensors, {"transformer": built["transformer"]})
    assert (report.components, len(report.unused)) == ({"transformer": 1}, 2)
    if dialect != "diffusers":
        assert component in diffadapt.inspect(tensors).components


def test_a_separate_model_is_found_alone_and_with_the_denoiser() -> None:
    """In ComfyUI's names, LTX-2's projection of text embeddings has no prefix, and Anima's conditioner has one."""

    def conditioner() -> nn.Module:
        torch.manual_seed(0)
        sizes = {"source_dim": 8, "target_dim": 8, "model_dim": 8, "target_vocab_size": 16}
        return diffusers.AnimaTextConditioner(**sizes, num_layers=1, num_attention_heads=2)

    down, up = torch.randn(2, 8), torch.randn(32, 2)
    stem = "diffusion_model.llm_adapter.blocks.0.mlp.0"
    model = conditioner()
    diffadapt.load_adapter(model, {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up})
    diffadapt.adapters(model).merge()
    assert_same(model.blocks[0].mlp[0].weight, conditioner().blocks[0].mlp[0].weight + up @ down)
    built = next(published("ltx2"))
    projection = {
        "text_embedding_projection.aggregate_embed.lora_A.weight": torch.empty(2, 188160, device="meta"),
        "text_embedding_projection.aggregate_embed.lora_B.weight": torch.empty(3840, 2, device="meta"),
    }
    assert diffadapt.inspect(projection, built).components == {"connectors": 1}
    block = "diffusion_model.transformer_blocks.0.attn1.to_q"
    beside = {
        f"{block}.lora_A.weight": torch.empty(2, 4096, device="meta"),
        f"{block}.lora_B.weight": torch.empty(4096, 2, device="meta"),
        **projection,
    }
    report = diffadapt.inspect(beside, built)
    assert (report.components, report.unused) == ({"transformer": 1, "connectors": 1}, [])


PREFIXES = (
    "",
    "lora_unet_",
    "lora_te1_",
    "oft_unet_",
    "diffusion_model.",
    "text_encoders.",
    "base_model.model.",
    "unet:",
)
BODIES = {
    "long": "a" * 900,
    "dots": "a." * 450,
    "only dots": "." * 900,
    "underscores": "_" * 900,
    "levels": "model." * 150,
    "flat levels": "model_" * 150,
    "digits": "9" * 900,
    "brackets": "(" * 300 + "a+" * 300,
    "blocks": "double_blocks.1.processor." * 30,
}
"""Names of the longest allowed length; `test_hostile_input` has longer ones."""


@pytest.mark.parametrize("pattern", ["([a-z_]+)+!", "([a-z]|_)*!", ".*" * 9 + "!", r"\w?" * 30 + "!", "(a?){40}!"])
@pytest.mark.parametrize("option", ["alpha_pattern", "feedforward_modules"])
def test_patterns_that_would_take_forever_are_refused(option: str, pattern: str, tmp_path: Path) -> None:
    pipe = models.flux()
    parts = loras.parts_for(pipe, ("transformer",), "proj_mlp")
    tensors = spellings.peft_names(parts, "base_model.model.")
    if option == "feedforward_modules":
        tensors = {f"base_model.model.{path}.ia3_l": torch.ones(2 * models.WIDTH, 1) for path in parts["transformer"]}
    files.write(tmp_path / "adapter_model.safetensors", tensors)
    chosen = {pattern: 4} if option == "alpha_pattern" else pattern
    peft_type = "LORA" if option == "alpha_pattern" else "IA3"
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": peft_type, "lora_alpha": 4, option: chosen}))
    with pytest.raises(AdapterError, match=f"{option}.*pattern"):
        pipe.load_adapter(tmp_path)


@pytest.fixture(scope="module")
def flux_models() -> dict[str, nn.Module]:
    pipe = models.flux()
    return {name: getattr(pipe, name) for name in ("transformer", "text_encoder", "text_encoder_2")}


@pytest.mark.parametrize("body", BODIES)
def test_hostile_names_are_refused_in_linear_time(
    body: str, flux_models: dict[str, nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(size: int) -> None:
        for prefix in PREFIXES:
            keys = [f"{prefix}{BODIES[body][:size]}.{end}" for end in ("lora_A.weight", "lora_up.weight", "alpha", "x")]
            report = diffadapt.inspect({key: torch.zeros(2, 2) for key in keys}, flux_models)
            assert (report.used, len(report.unused)) == (0, len(keys))

    assert_linear(refuse, 150, monkeypatch)
    refuse(900)
