"""One adapter in every dialect: each is recognised by one format, and comes out as the same weights."""

import json
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, FluxTransformer2DModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

import diffadapt
from diffadapt import AdapterError
from diffadapt.formats import FORMATS, detect
from diffadapt.formats.cloneofsimo import CLONEOFSIMO
from diffadapt.formats.format import Header, Names, Place
from diffadapt.targets import Targets
from tests import files, models
from tests.compare import assert_same
from tests.test_loading import clip_l, sd_unet, sdxl_unet

Tensors = dict[str, Tensor]
Writer = Callable[[files.Parts, str], Tensors]

TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
KOHYA = {
    "sd15": ("lora_te",),
    "sdxl": ("lora_te1", "lora_te2"),
    "sd3": ("lora_te1", "lora_te2", "lora_te3"),
    "flux": ("lora_te1", "lora_te3"),
}
COMFY = {
    "sd15": ("clip_l",),
    "sdxl": ("clip_l", "clip_g"),
    "sd3": ("clip_l", "clip_g", "t5xxl"),
    "flux": ("clip_l", "t5xxl"),
}
LAYERS = rf"{files.ATTENTION}|proj_mlp|wi_0|SelfAttention\.[qkvo]"


def varied(index: int) -> float:
    return (1.0, 2.0, 8.0, 3.0)[index % 4]


# Writers


def layers(tensors: Tensors, stem: str, factors: files.Factors, down: str, up: str, alpha: bool = True) -> None:
    tensors[f"{stem}.{down}"] = factors.down
    tensors[f"{stem}.{up}"] = factors.up.view(*factors.up.shape, *(1,) * (factors.down.ndim - 2))
    if alpha and factors.alpha is not None:
        tensors[f"{stem}.alpha"] = torch.tensor(factors.alpha)


def spelled(
    parts: files.Parts,
    prefixes: Mapping[str, str],
    *,
    flat: bool = False,
    down: str = "lora_A.weight",
    up: str = "lora_B.weight",
    after: str = "",
) -> Tensors:
    """`<prefix><path><after>.<tensor>` for every layer, CLIP's with the level that files have."""
    tensors: Tensors = {}
    for component, found in parts.items():
        for path, factors in found.items():
            is_clip = component.startswith("text_encoder") and path.startswith("encoder.layers.")
            name = f"text_model.{path}" if is_clip else path
            name = name.replace(".", "_") if flat else name
            layers(tensors, f"{prefixes[component]}{name}{after}", factors, down, up)
    return tensors


def denoiser_prefix(parts: files.Parts, prefix: str) -> dict[str, str]:
    return {component: prefix for component in parts if not component.startswith("text_encoder")}


def kohya(parts: files.Parts, family: str, denoiser: str = "lora_unet_", after: str = "") -> Tensors:
    numbered = dict(zip(TEXT_ENCODERS, (f"{prefix}_" for prefix in KOHYA[family]), strict=False))
    prefixes = {**denoiser_prefix(parts, denoiser), **numbered}
    return spelled(parts, prefixes, flat=True, down="lora_down.weight", up="lora_up.weight", after=after)


def onetrainer(parts: files.Parts, family: str) -> Tensors:
    """Numbers text encoders as the pipeline does."""
    tensors = kohya(parts, family, "lora_transformer_")
    return {key.replace("lora_te3_", "lora_te2_") if family == "flux" else key: t for key, t in tensors.items()}


def comfy(parts: files.Parts, family: str, down: str = "lora_A.weight", up: str = "lora_B.weight") -> Tensors:
    encoders = (f"text_encoders.{name}.transformer." for name in COMFY[family])
    prefixes = {**denoiser_prefix(parts, "diffusion_model."), **dict(zip(TEXT_ENCODERS, encoders, strict=False))}
    return spelled(parts, prefixes, down=down, up=up)


def diffusers_with_alpha(parts: files.Parts, family: str) -> Tensors:
    return spelled(parts, {component: f"{component}." for component in parts})


DIALECTS: dict[str, tuple[str, Writer]] = {
    "kohya": ("kohya", kohya),
    "double underscore": ("kohya", lambda parts, family: kohya(parts, family, "lora_unet__")),
    "underscore at the end": ("kohya", lambda parts, family: kohya(parts, family, after="_")),
    "onetrainer": ("kohya", onetrainer),
    "comfy": ("comfy", comfy),
    "comfy down and up": ("comfy", lambda parts, family: comfy(parts, family, "lora_down.weight", "lora_up.weight")),
    "diffusers with alpha": ("diffusers", diffusers_with_alpha),
}


def bare(prefix: str = "", infix: str = "") -> Writer:
    def write(parts: files.Parts, family: str) -> Tensors:
        down, up = f"lora_A{infix}.weight", f"lora_B{infix}.weight"
        return spelled(parts, denoiser_prefix(parts, prefix), down=down, up=up)

    return write


OF_DENOISERS: dict[str, tuple[str, Writer]] = {
    "lycoris": ("kohya", lambda parts, family: kohya(parts, family, "lycoris_")),
    "peft": ("peft", bare("base_model.model.")),
    "peft in memory": ("peft", bare("base_model.model.", ".default")),
    "diffsynth": ("diffusers", bare("", ".default")),
    "an adapter called pixel": ("diffusers", bare("", ".pixel")),
    "bare": ("diffusers", bare()),
    "original level": ("diffusers", bare("net.")),
}


def parts_of(pipe: DiffusionPipeline, text: bool = True) -> dict[str, dict[str, files.Factors]]:
    names = tuple(name for name in ("unet", "transformer", *TEXT_ENCODERS) if hasattr(pipe, name))
    return files.parts_for(pipe, names if text else names[:1], LAYERS, alpha=varied)


def assert_loads(
    build: Callable[[], DiffusionPipeline], tensors: Tensors, parts: files.Parts, format: str | None = None
) -> None:
    """Recognised by one format only, every tensor used, and merged the weights are those made by hand."""
    matching = [known.name for known in FORMATS if known.matches(Header(tuple(tensors)))]
    assert matching == [format or matching[0]]
    pipe = build()
    report = pipe.load_adapter(tensors, "a")
    assert (report.format, report.used, report.unused) == (matching[0], len(tensors), [])
    assert set(report.components) == set(parts)
    pipe.adapters.merge("a")
    expected, base = files.bake(build(), parts), build()
    for component, found in parts.items():
        weights = getattr(pipe, component).state_dict()
        originals = getattr(base, component).state_dict()
        for key, weight in getattr(expected, component).state_dict().items():
            assert_same(weights[key], weight)
            if key.removesuffix(".weight") in found:
                assert not torch.equal(weight, originals[key])


@pytest.mark.parametrize("family", models.FAMILIES)
@pytest.mark.parametrize("dialect", DIALECTS)
def test_pipeline_in_every_dialect(dialect: str, family: str) -> None:
    format, write = DIALECTS[dialect]
    parts = parts_of(models.FAMILIES[family]())
    assert len(parts) == 1 + len(KOHYA[family])
    assert_loads(models.FAMILIES[family], write(parts, family), parts, format)


@pytest.mark.parametrize("family", models.FAMILIES)
@pytest.mark.parametrize("dialect", OF_DENOISERS)
def test_denoiser_in_every_dialect(dialect: str, family: str) -> None:
    format, write = OF_DENOISERS[dialect]
    parts = parts_of(models.FAMILIES[family](), text=False)
    assert_loads(models.FAMILIES[family], write(parts, family), parts, format)


# Flux.1 in the layout of its authors

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
    """The original layer that a layer of Flux is in, and its place there, `None` where it is all of it."""
    for pattern, name in NATIVE.items():
        match = re.fullmatch(pattern, path)
        if match:
            return match.expand(name), ORDER[match[2]] if match.re.groups > 1 else None
    raise AssertionError(path)


def fused(parts: files.Parts, alpha: float | None) -> dict[str, files.Factors]:
    """Factors of the original layers: block-diagonal where several layers are one."""
    grouped: dict[str, dict[int, files.Factors]] = {}
    for path, factors in parts["transformer"].items():
        name, index = native(path)
        grouped.setdefault(name, {})[index or 0] = factors
    return {
        name: files.Factors(
            torch.cat([of[index].down for index in sorted(of)]),
            torch.block_diag(*(of[index].up for index in sorted(of))),
            None if alpha is None else alpha * len(of),
        )
        for name, of in grouped.items()
    }


def flux_parts(alpha: float | None, pattern: str = FLUX_LAYERS) -> dict[str, dict[str, files.Factors]]:
    return files.parts_for(models.flux(), ("transformer",), pattern, alpha=lambda index: alpha)


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
def test_fused_layers_of_flux(format: str, prefix: str, down: str, up: str, alpha: float | None) -> None:
    parts = flux_parts(alpha)
    tensors: Tensors = {}
    for name, factors in fused(parts, alpha).items():
        layers(tensors, f"{prefix}{name}", factors, down, up)
    assert_loads(models.flux, tensors, parts, format)


def test_fused_layers_of_flux_in_kohya() -> None:
    parts = flux_parts(2.0)
    tensors: Tensors = {}
    for name, factors in fused(parts, 2.0).items():
        layers(tensors, f"lora_unet_{name.replace('.', '_')}", factors, "lora_down.weight", "lora_up.weight")
    assert_loads(models.flux, tensors, parts, "kohya")


@pytest.mark.parametrize("prefix", ["", "transformer.", "diffusion_model.", "lora_unet_"])
def test_numbered_parts_of_fused_layers(prefix: str) -> None:
    parts = flux_parts(2.0)
    tensors: Tensors = {}
    for path, factors in parts["transformer"].items():
        name, index = native(path)
        name = name if index is None else f"{name}.{index}"
        stem = f"{prefix}{name.replace('.', '_')}" if prefix == "lora_unet_" else f"{prefix}{name}"
        layers(tensors, stem, factors, "lora_down.weight", "lora_up.weight")
    assert_loads(models.flux, tensors, parts)


def test_xlabs_processors() -> None:
    parts = flux_parts(None, FLUX_LAYERS.replace("|proj_mlp", ""))
    tensors: Tensors = {}
    for name, factors in fused(parts, None).items():
        block, number, layer = re.fullmatch(r"(\w+)\.(\d+)\.(.+)", name).groups()
        stream = {"img": "1", "txt": "2"}.get(layer[:3], "")
        kind = "proj" if layer.endswith(("proj", "linear2")) else "qkv"
        stem = f"{block}.{number}.processor.{kind}_lora{stream}"
        layers(tensors, stem, factors, "down.weight", "up.weight")
    assert_loads(models.flux, tensors, parts, "xlabs")


def test_other_types_in_the_original_layout_with_an_adapter_name() -> None:
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


def test_bare_changes_beside_factors() -> None:
    """As lightx2v writes them: factors, whole changes of a weight and of a bias, nothing in front."""
    parts = flux_parts(None, r"to_out\.0")
    tensors: Tensors = {}
    for name, factors in fused(parts, None).items():
        layers(tensors, name, factors, "lora_down.weight", "lora_up.weight")
    tensors["img_in.diff"] = torch.randn(models.WIDTH, 16)
    tensors["img_in.diff_b"] = torch.randn(models.WIDTH)
    pipe = models.flux()
    base = {name: parameter.clone() for name, parameter in pipe.transformer.x_embedder.named_parameters()}
    report = pipe.load_adapter(tensors, "a")
    assert (report.format, report.types, report.unused) == ("diffusers", {"lora": 2, "full": 1}, [])
    pipe.adapters.merge("a")
    assert_same(pipe.transformer.x_embedder.weight, base["weight"] + tensors["img_in.diff"])
    assert_same(pipe.transformer.x_embedder.bias, base["bias"] + tensors["img_in.diff_b"])


# cloneofsimo


def numbered_unet(unet: nn.Module) -> list[str]:
    """The order of diffusers 0.11: down, up, middle; in a block attention, feed-forward, cross-attention."""
    prefixes = [path.removesuffix(".attn1") for path, _ in unet.named_modules() if path.endswith(".attn1")]
    blocks = [path for start in ("down", "up", "mid") for path in prefixes if path.startswith(start)]
    attention = ("to_q", "to_k", "to_v", "to_out.0")
    inside = (*(f"attn1.{name}" for name in attention), "ff.net.0.proj", *(f"attn2.{name}" for name in attention))
    return [f"{block}.{layer}" for block in blocks for layer in inside]


def numbered_clip(model: nn.Module) -> list[str]:
    blocks = [path.removesuffix(".k_proj") for path, _ in model.named_modules() if path.endswith("k_proj")]
    return [f"{block}.{layer}_proj" for block in blocks for layer in ("k", "v", "q", "out")]


def cloneofsimo(parts: files.Parts, orders: Mapping[str, list[str]]) -> Tensors:
    return {
        f"{component}:{number}:{side}": tensor
        for component, order in orders.items()
        for number, path in enumerate(order)
        for side, tensor in (("up", parts[component][path].up), ("down", parts[component][path].down))
    }


def test_cloneofsimo_layers_by_number() -> None:
    pipe = models.sd15()
    orders = {"unet": numbered_unet(pipe.unet), "text_encoder": numbered_clip(pipe.text_encoder)}
    parts = files.parts_for(pipe, tuple(orders), rf"{files.ATTENTION}|ff\.net\.0\.proj")
    assert {name: set(order) for name, order in orders.items()} == {name: set(found) for name, found in parts.items()}
    assert_loads(models.sd15, cloneofsimo(parts, orders), parts, "cloneofsimo")


def test_cloneofsimo_with_convolutions() -> None:
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
    # Attentions are registered before resnets, so the first block's nine come first, then its convolutions.
    assert first.path == "down_blocks.0.resnets.0.conv1"


@pytest.mark.parametrize("recent", [False, True])
def test_cloneofsimo_order_by_shapes(recent: bool) -> None:
    """Trainers with a newer diffusers have the feed-forward last in a block; the shapes tell."""
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
    parts = files.parts_for(pipe, ("unet",), rf"{files.ATTENTION}|ff\.net\.0\.proj")
    with pytest.raises(AdapterError, match="by number"):
        pipe.load_adapter(cloneofsimo(parts, orders))
    with pytest.raises(AdapterError, match="'unet'"):
        models.flux().load_adapter(cloneofsimo(parts, {"unet": numbered_unet(pipe.unet)}))


@pytest.mark.parametrize("text", ["[", '"CrossAttention"', "[1]"])
def test_cloneofsimo_with_damaged_metadata(text: str) -> None:
    header = Header(("unet:0:up", "unet:0:down"), {"unet": text})
    with pytest.raises(AdapterError, match="unet"):
        CLONEOFSIMO.locate(header, Names({"unet": Targets(models.unet_sd15())}))


# Real files

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
    """On the meta device, but for alphas, which are read with the names."""
    return {key: tensor if tensor.ndim else torch.tensor(4.0) for key, tensor in files.placeholders(name).items()}


def keys_of(name: str) -> tuple[str, ...]:
    content = files.fixture(f"keys/{name}")
    if "modules" in content:
        return tuple(f"{module}.{tensor}" for module in content["modules"] for tensor in content["tensors"])
    return tuple(files.placeholders(name))


def test_every_list_of_keys_is_tested() -> None:
    assert {file.stem for file in (files.FIXTURES / "keys").glob("*.json")} == set(LISTS)


@pytest.mark.parametrize("name", LISTS)
def test_exactly_one_format_recognises_a_file(name: str) -> None:
    header = Header(keys_of(name))
    assert [format.name for format in FORMATS if format.matches(header)] == [LISTS[name]]
    # Not by its first names only.
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


def test_every_name_of_an_sdxl_lokr_file_resolves() -> None:
    with torch.device("meta"):
        config = CLIPTextConfig(hidden_size=1280, num_hidden_layers=32, num_attention_heads=20)
        target = {"unet": sdxl_unet(), "text_encoder": clip_l(), "text_encoder_2": CLIPTextModelWithProjection(config)}
    header = Header(keys_of("kohya_sdxl_lokr"))
    names = Names({name: Targets(model) for name, model in target.items()})
    verdicts = detect(header).locate(header, names)
    assert len(verdicts) == 3156
    assert all(isinstance(verdict, Place) for verdict in verdicts.values())


def test_control_lora_of_flux_is_loaded_but_for_what_no_adapter_can_be() -> None:
    tensors = files.placeholders("bfl_control_flux")
    report = diffadapt.inspect(tensors, {"transformer": flux_transformer()})
    left = dict(report.unused)
    inputs = [key for key in tensors if key.startswith("img_in.")]
    norms = [key for key in tensors if key.endswith("_norm.scale")]
    assert (len(inputs), len(norms)) == (3, 152)
    assert set(left) == {*inputs, *norms}
    assert all("FluxControlPipeline" in reason for reason in left.values())
    widened = diffadapt.inspect(tensors, {"transformer": flux_transformer(in_channels=128, out_channels=64)})
    assert {key for key, _ in widened.unused} == set(norms)


# Which component


def encoder_with_levels() -> nn.Module:
    """A text encoder with levels above its layers that files do not have."""
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
def test_levels_of_text_encoders(stem: str) -> None:
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
def test_which_denoiser(prefix: str, components: tuple[str, ...], expected: str) -> None:
    path = "layers_0" if prefix.startswith("lora_") else "layers.0"
    tensors = {
        f"{prefix}{path}.lora_down.weight": torch.zeros(2, 8),
        f"{prefix}{path}.lora_up.weight": torch.zeros(8, 2),
    }
    report = diffadapt.inspect(tensors, {component: block() for component in components})
    assert (report.components, report.unused) == ({expected: 1}, [])


@pytest.mark.parametrize("dialect", ["kohya", "comfy", "diffusers with alpha"])
def test_text_encoder_that_the_pipeline_does_not_have(dialect: str) -> None:
    pipe = models.sd15()
    parts = parts_of(models.sdxl())
    tensors = DIALECTS[dialect][1]({"text_encoder_2": parts["text_encoder_2"]}, "sdxl")
    with pytest.raises(AdapterError, match="no component 'text_encoder_2'"):
        pipe.load_adapter(tensors)


@pytest.mark.parametrize("name", ["kohya_flux", "comfy_flux", "xlabs_flux", "bfl_control_flux"])
def test_wrong_family_is_named(name: str) -> None:
    tensors = {key: torch.zeros(tensor.shape) for key, tensor in list(files.placeholders(name).items())[:20]}
    with pytest.raises(AdapterError, match="looks like a flux adapter; the model is sd"):
        models.sd15().load_adapter(tensors)


# What is beside the layers


def kohya_file() -> tuple[DiffusionPipeline, Tensors]:
    pipe = models.sd15()
    return pipe, files.kohya_names(files.parts_for(pipe, ("unet",), "to_q"))


@pytest.mark.parametrize("key", ["_aux.slider.alpha", "_aux.lora_unet_x.lora_up.weight", "sshs_model_hash"])
def test_bookkeeping_is_harmless(key: str) -> None:
    pipe, tensors = kohya_file()
    report = pipe.load_adapter({**tensors, key: torch.ones(1)})
    assert [unused for unused, _ in report.unused] == [key]
    assert report.used == len(tensors)


def test_embedded_textual_inversion_of_cloneofsimo() -> None:
    pipe = models.sd15()
    orders = {"text_encoder": numbered_clip(pipe.text_encoder)}
    tensors = {**cloneofsimo(files.parts_for(pipe, ("text_encoder",)), orders), "<s1>": torch.ones(models.WIDTH)}
    report = pipe.load_adapter(tensors)
    assert report.unused == []
    assert report.tokens == {"<s1>": 1}


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        ("lora_unet_conv_in.set_weight", "new weight"),
        ("lora_unet_conv_in.reshape_weight", "another shape"),
        ("lora_unet_conv_in.bias_values", "sparse"),
        ("lora_unet_conv_in.oft_R.scaled_oft", "scaled OFT"),
        ("lora_unet_conv_in.oft_blocks.0", "share an alpha"),
        ("oft_unet_conv_in.oft_blocks", "alpha, which is missing"),
        ("conv_in.lora_up.weight", "without the prefix"),
    ],
)
def test_tensor_that_cannot_be_loaded_is_named(key: str, reason: str) -> None:
    pipe, tensors = kohya_file()
    with pytest.raises(AdapterError, match=f"{re.escape(key)}: .*{reason}"):
        pipe.load_adapter({**tensors, key: torch.ones(2, 4, 4)})


@pytest.mark.parametrize(
    ("keys", "what"),
    [
        (
            ("image_proj.proj.0.weight", "ip_adapter.1.to_q_lora.down.weight", "ip_adapter.1.to_q_lora.up.weight"),
            "IP-A",
        ),
        (("double_blocks.0.processor.ip_adapter_double_stream_k_proj.weight",), "IP-Adapter"),
        (("lora_controlnet", "input_blocks.1.1.transformer_blocks.0.attn1.to_q.down"), "Control-LoRA"),
        (("input_hint_block.0.weight", "input_blocks.0.0.up"), "Control-LoRA"),
        (("lllite_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.down.0.weight",), "ControlNet-LLLite"),
    ],
)
def test_what_only_looks_like_an_adapter_is_refused_by_name(keys: tuple[str, ...], what: str) -> None:
    assert len([format for format in FORMATS if format.matches(Header(keys))]) == 1
    with pytest.raises(AdapterError, match=what):
        models.sd15().load_adapter({key: torch.zeros(4, 4) for key in keys})


def test_two_dialects_in_one_file_are_ambiguous() -> None:
    pipe, tensors = kohya_file()
    with pytest.raises(AdapterError, match="kohya and comfy both"):
        pipe.load_adapter({**tensors, "diffusion_model.conv_in.lora_A.weight": torch.zeros(2, 2)})


def test_oft_of_sd_scripts() -> None:
    """Its alpha is a limit, in parts of the number of outputs, of all blocks together."""
    pipe = models.sd15()
    path = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    weight = pipe.unet.get_submodule(path).weight.detach().clone()
    blocks = torch.randn(2, 4, 4) * 0.5
    stem = f"oft_unet_{path.replace('.', '_')}"
    report = pipe.load_adapter({f"{stem}.oft_blocks": blocks, f"{stem}.alpha": torch.tensor(0.1)}, "a")
    assert (report.format, report.types, report.unused) == ("kohya", {"oft": 1}, [])
    pipe.adapters.merge("a")
    skew = blocks - blocks.transpose(1, 2)
    assert skew.norm() > 0.8
    skew = skew * 0.8 / skew.norm()
    rotation = (torch.eye(4) + skew) @ torch.linalg.inv(torch.eye(4) - skew)
    expected = torch.einsum("knm,knp->kmp", rotation, weight.view(2, 4, -1)).reshape(weight.shape)
    assert_same(pipe.unet.get_submodule(path).weight, expected)


# Hostile names


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
    "long": "a" * 300_000,
    "dots": "a." * 150_000,
    "only dots": "." * 300_000,
    "underscores": "_" * 300_000,
    "levels": "model." * 50_000,
    "flat levels": "model_" * 50_000,
    "digits": "9" * 300_000,
    "brackets": "(" * 100_000 + "a+" * 100_000,
    "blocks": "double_blocks.1.processor." * 10_000,
}


@pytest.mark.parametrize("pattern", ["([a-z_]+)+!", "([a-z]|_)*!", ".*" * 9 + "!", r"\w?" * 30 + "!", "(a?){40}!"])
@pytest.mark.parametrize("option", ["alpha_pattern", "feedforward_modules"])
def test_patterns_that_take_forever_are_refused(option: str, pattern: str, tmp_path: Path) -> None:
    pipe = models.flux()
    parts = files.parts_for(pipe, ("transformer",), "proj_mlp")
    tensors = files.peft_names(parts, "base_model.model.")
    if option == "feedforward_modules":
        tensors = {f"base_model.model.{path}.ia3_l": torch.ones(2 * models.WIDTH, 1) for path in parts["transformer"]}
    files.write(tmp_path / "adapter_model.safetensors", tensors)
    chosen = {pattern: 4} if option == "alpha_pattern" else pattern
    kind = "LORA" if option == "alpha_pattern" else "IA3"
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": kind, "lora_alpha": 4, option: chosen}))
    started = time.perf_counter()
    with pytest.raises(AdapterError, match=f"{option}.*pattern"):
        pipe.load_adapter(tmp_path)
    assert time.perf_counter() - started < 5


@pytest.fixture(scope="module")
def flux_models() -> dict[str, nn.Module]:
    pipe = models.flux()
    return {name: getattr(pipe, name) for name in ("transformer", "text_encoder", "text_encoder_2")}


@pytest.mark.parametrize("body", BODIES)
def test_hostile_names_are_refused_at_once(body: str, flux_models: dict[str, nn.Module]) -> None:
    started = time.perf_counter()
    for prefix in PREFIXES:
        keys = [f"{prefix}{BODIES[body]}.{end}" for end in ("lora_A.weight", "lora_up.weight", "alpha", "x")]
        report = diffadapt.inspect({key: torch.zeros(2, 2) for key in keys}, flux_models)
        assert (report.used, len(report.unused)) == (0, len(keys))
    assert time.perf_counter() - started < 5
