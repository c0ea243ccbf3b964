"""The tables of the model families against diffusers' own models at their real widths, and the recognition of files."""

import json
import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders import single_file_utils
from torch import nn

from diffadapt import families
from diffadapt.families import FAMILIES
from diffadapt.families.family import Aliases, Layout
from diffadapt.families.recognise import pattern
from diffadapt.runtime.targets import Targets
from diffadapt.types.layer_spec import LayerSpec
from tests.support.cases import for_each
from tests.support.effort import assert_linear, effort
from tests.support.full_size import sd_unet, sdxl_unet
from tests.support.silence import ignored
from tests.support.versions import diffusers, needs

Shapes = dict[str, tuple[int, ...]]

_SDXL_BLOCKS: dict[str, Any] = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 3),
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
_TWO: dict[str, Any] = {"num_layers": 2}
_TWO_OF_BOTH: dict[str, Any] = {"num_layers": 2, "num_single_layers": 2}
# Published models with few blocks. Their other options are chosen to have as many kinds of layers as possible.
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "sd": ("sd", "UNet2DConditionModel", {"cross_attention_dim": 768, "layers_per_block": 1}),
    "sd2": ("sd2", "UNet2DConditionModel", {"cross_attention_dim": 1024, "layers_per_block": 1}),
    "sdxl": (
        "sdxl",
        "UNet2DConditionModel",
        {"cross_attention_dim": 2048, "layers_per_block": 1, "use_linear_projection": True, **_SDXL_BLOCKS},
    ),
    "cascade prior": (
        "cascade",
        "StableCascadeUNet",
        {
            "down_num_layers_per_block": (1, 2),
            "up_num_layers_per_block": (2, 1),
            "clip_text_in_channels": 1280,
            "clip_image_in_channels": 768,
        },
    ),
    "sd3": (
        "sd3",
        "SD3Transformer2DModel",
        {"num_layers": 3, "num_attention_heads": 24, "caption_projection_dim": 1536},
    ),
    "sd3.5": (
        "sd3",
        "SD3Transformer2DModel",
        {
            "num_layers": 3,
            "num_attention_heads": 24,
            "caption_projection_dim": 1536,
            "dual_attention_layers": (0, 1),
            "qk_norm": "rms_norm",
        },
    ),
    "flux": ("flux", "FluxTransformer2DModel", {**_TWO_OF_BOTH, "guidance_embeds": True}),
    "chroma": ("chroma", "ChromaTransformer2DModel", _TWO_OF_BOTH),
    "flux2": ("flux2", "Flux2Transformer2DModel", _TWO_OF_BOTH),
    "flux2 klein": ("flux2", "Flux2Transformer2DModel", {**_TWO_OF_BOTH, "num_attention_heads": 32}),
    "flux3": ("flux3", "Flux3Transformer2DModel", _TWO_OF_BOTH),
    "auraflow": ("auraflow", "AuraFlowTransformer2DModel", {"num_mmdit_layers": 2, "num_single_dit_layers": 2}),
    "qwen": ("qwen", "QwenImageTransformer2DModel", _TWO),
    "qwen21": ("qwen21", "QwenImage21Transformer2DModel", _TWO),
    "krea2": ("krea2", "Krea2Transformer2DModel", _TWO),
    "anima": ("anima", "CosmosTransformer3DModel", {**_TWO, "num_attention_heads": 16, "extra_pos_embed_type": None}),
    "anima conditioner": ("anima", "AnimaTextConditioner", {}),
    "wan": ("wan", "WanTransformer3DModel", {**_TWO, "image_dim": 1280, "added_kv_proj_dim": 5120}),
    "wan vace": ("wan", "WanVACETransformer3DModel", {**_TWO, "vace_layers": [0]}),
    "wan animate": ("wan", "WanAnimateTransformer3DModel", {"num_layers": 6}),
    "skyreels": ("wan", "SkyReelsV2Transformer3DModel", _TWO),
    "chronoedit": ("wan", "ChronoEditTransformer3DModel", _TWO),
    "helios": ("wan", "HeliosTransformer3DModel", _TWO),
    "ltx": ("ltx", "LTXVideoTransformer3DModel", _TWO),
    "ltx2": ("ltx2", "LTX2VideoTransformer3DModel", {**_TWO, "cross_attn_mod": True, "audio_cross_attn_mod": True}),
    "ltx2 connectors": ("ltx2", "LTX2TextConnectors", {"video_gated_attn": True, "audio_gated_attn": True}),
    "ltx2.3 connectors": ("ltx2", "LTX2TextConnectors", {"per_modality_projections": True}),
    "hunyuan-video": ("hunyuan-video", "HunyuanVideoTransformer3DModel", _TWO_OF_BOTH),
    "framepack": ("hunyuan-video", "HunyuanVideoFramepackTransformer3DModel", _TWO_OF_BOTH),
    "hunyuan-video15": ("hunyuan-video15", "HunyuanVideo15Transformer3DModel", {**_TWO, "use_meanflow": True}),
    "hunyuan-image": (
        "hunyuan-image",
        "HunyuanImageTransformer2DModel",
        {**_TWO_OF_BOTH, "guidance_embeds": True, "use_meanflow": True, "text_embed_2_dim": 1472},
    ),
    "lumina2": ("lumina2", "Lumina2Transformer2DModel", _TWO),
    "ideogram4": ("ideogram4", "Ideogram4Transformer2DModel", _TWO),
    "zimage": ("zimage", "ZImageTransformer2DModel", {"n_layers": 2}),
    "zimage omni": ("zimage", "ZImageTransformer2DModel", {"n_layers": 2, "siglip_feat_dim": 1152}),
    "sana": ("sana", "SanaTransformer2DModel", _TWO),
    "sana1.5": ("sana", "SanaTransformer2DModel", {**_TWO, "qk_norm": "rms_norm_across_heads"}),
    "pixart": (
        "pixart",
        "PixArtTransformer2DModel",
        {**_TWO, "caption_channels": 4096, "use_additional_conditions": True},
    ),
    "minimax-h3": ("minimax-h3", "MiniMaxH3Transformer3DModel", {**_TWO, "num_refiner_layers": 1}),
    "ace-step": ("ace-step", "AceStepTransformer1DModel", {"num_hidden_layers": 2}),
    "cogview4": (
        "cogview4",
        "CogView4Transformer2DModel",
        {**_TWO, "num_attention_heads": 32, "attention_head_dim": 128},
    ),
    "hidream": (
        "hidream",
        "HiDreamImageTransformer2DModel",
        {
            "patch_size": 2,
            "num_layers": 1,
            "num_single_layers": 1,
            "caption_channels": [4096, 4096],
            "llama_layers": [0, 1],
        },
    ),
}
# Layers whose original names are those of diffusers, in families in which the names of other layers differ.
SAME = {
    "chroma": "distilled_guidance_layer",
    "sd3": "context_embedder",
    "wan": "(vace_|pose_)?patch_(embedding|short|mid|long)|face_encoder.out_proj",
    "flux3": r"[a-ln-r]|early|single_stream|timestep|context|x_emb|.*norm_[qk]$",
    "minimax-h3": "token_refiner.final_norm",
    "ace-step": r"layers\.\d+\.(\w+_norm|mlp)|time_embed|condition_embedder|norm_out|proj_",
    "ltx": r"transformer_blocks\.\d+\.(attn[12]\.to_|ff)|caption_projection|proj_out",
    "ltx2": r"transformer_blocks\.\d+\.(\w*attn\d?\.to_|\w*ff)|(audio_)?(caption_projection|proj_out)",
    "lumina2": r"x_embedder|\w+\.\d+\.ffn_norm[12]",
    "zimage": r"(\w+\.\d+\.)?(feed_forward|ffn_norm|attention_norm|adaLN|t_embedder|cap_embedder|siglip_embedder)",
    "ideogram4": r"(layers\.\d+\.(feed_forward|ffn_norm|attention_norm|adaln|attention\.norm)|[a-km-z]|llm)",
    "cascade": r"\w+\.\d+\.\d+\.(depthwise|channelwise|mapper|kv_mapper)|embedding|clip_|clf|\w+scalers",
    "qwen21": "",
}
# Families whose files may be taken for those of another family if they cover few layers, since the names are the same.
KIN = {
    "flux": {"qwen"},
    "chroma": {"flux", "qwen"},
    "flux3": {"flux"},
    "hunyuan-video": {"flux", "qwen"},
    "hunyuan-image": {"flux"},
    "auraflow": {"flux"},
    "ltx2": {"ltx", "cogview4"},
}


@cache
def model(name: str) -> nn.Module:
    _, class_name, options = MODELS[name]
    if class_name == "LTX2TextConnectors":
        needs("diffusers", "0.37", class_name)
        from diffusers.pipelines.ltx2.connectors import LTX2TextConnectors as owner
    else:
        owner = getattr(diffusers, class_name)
    with torch.device("meta"), ignored(FutureWarning):
        return owner(**options)


@cache
def targets(name: str) -> Targets:
    return Targets(model(name))


@cache
def aliases(name: str) -> Aliases:
    return families.aliases(targets(name))


@cache
def layout(name: str) -> Layout:
    return families.layout(targets(name))


@cache
def layers(name: str) -> dict[str, LayerSpec]:
    """Return the layers that can carry an adapter."""
    specs = ((path, LayerSpec.of(module)) for path, module in targets(name).modules.items())
    return {path: spec for path, spec in specs if spec is not None}


def has_weights(module: nn.Module) -> bool:
    return next(module.parameters(recurse=False), None) is not None


every_model = pytest.mark.parametrize("name", MODELS)

# Names


@every_model
def test_the_family_of_a_model_is_recognised(name: str) -> None:
    assert families.of_models({"transformer": model(name)}) == MODELS[name][0]


def test_the_family_of_an_unknown_model_is_named_after_its_class() -> None:
    class SomeNewTransformer2DModel(nn.Module): ...

    assert families.of_models({"vae": nn.Linear(1, 1), "transformer": SomeNewTransformer2DModel()}) == "somenew"
    assert families.of_models({"text_encoder": nn.Linear(1, 1)}) is None


@every_model
def test_original_names_lead_to_layers_of_the_model_and_are_not_its_own(name: str) -> None:
    """All parts exist, no original name is a name of the model itself, and no layer is written under two names."""
    modules, found = targets(name).modules, aliases(name)
    for original, parts in found.items():
        assert parts
        assert all(has_weights(modules[part.path]) for part in parts), original
        assert original not in modules or not has_weights(modules[original]), original
        assert original.replace(".", "_") not in targets(name).flattened or original in modules, original
    written = [part.path for parts in layout(name).values() for part, _ in parts]
    assert len(written) == len(set(written))


@every_model
def test_flattened_original_names_are_unambiguous(name: str) -> None:
    flat: dict[str, object] = {}
    for original, parts in aliases(name).items():
        assert flat.setdefault(original.replace(".", "_"), parts) == parts, original


@every_model
def test_every_layer_has_an_original_name(name: str) -> None:
    family = MODELS[name][0]
    known = {part.path for parts in aliases(name).values() for part in parts}
    rest = set(layers(name)) - known
    if not known:
        assert family in {"qwen", "cogview4", "hidream"}
        return
    unknown = sorted(path for path in rest if not re.match(SAME.get(family, "$"), path))
    assert unknown == []


@every_model
def test_the_parts_of_a_fused_layer_have_the_same_inputs_and_consistent_outputs(name: str) -> None:
    specs = layers(name)
    for original, parts in aliases(name).items():
        if len(parts) > 1:
            assert len({specs[part.path].in_features for part in parts}) == 1, original
        if re.search(r"qkv$", original) and name != "lumina2":
            assert len({specs[part.path].out_features for part in parts}) == 1, original
        if any(part.swapped for part in parts):
            assert len(parts) == 1
            assert specs[parts[0].path].out_features % 2 == 0


def test_the_sizes_of_fused_layers_are_those_of_the_original_models() -> None:
    def outputs(name: str, original: str) -> int:
        return sum(layers(name)[part.path].out_features for part in aliases(name)[original])

    assert outputs("flux", "double_blocks.1.txt_attn.qkv") == 3 * 3072
    assert outputs("flux", "single_blocks.0.linear1") == 7 * 3072
    assert outputs("flux2", "single_blocks.0.linear1") == 9 * 6144
    assert outputs("hunyuan-video", "txt_in.individual_token_refiner.blocks.0.self_attn_qkv") == 3 * 3072
    assert outputs("lumina2", "context_refiner.1.attention.qkv") == 2304 + 768 + 768
    assert outputs("zimage", "noise_refiner.1.attention.qkv") == 3 * 3840
    assert outputs("pixart", "blocks.1.cross_attn.kv_linear") == 2 * 1152
    assert outputs("sd3.5", "joint_blocks.1.x_block.attn2.qkv") == 3 * 1536


SWAPPED = {
    "flux": {"final_layer.adaLN_modulation.1"},
    "flux2": {"final_layer.adaLN_modulation.1"},
    "flux2 klein": {"final_layer.adaLN_modulation.1"},
    "hunyuan-video": {"final_layer.adaLN_modulation.1"},
    "framepack": {"final_layer.adaLN_modulation.1"},
    "hunyuan-video15": {"final_layer.adaLN_modulation.1"},
    "hunyuan-image": {"final_layer.adaLN_modulation.1"},
    "sd3": {"final_layer.adaLN_modulation.1", "joint_blocks.2.context_block.adaLN_modulation.1"},
    "sd3.5": {"final_layer.adaLN_modulation.1", "joint_blocks.2.context_block.adaLN_modulation.1"},
    "auraflow": {"modF.1"},
    "minimax-h3": {"blocks.0.mlp.fc1", "blocks.1.mlp.fc1", "token_refiner.blocks.0.mlp.fc1"},
}


@every_model
def test_exactly_the_modulations_before_the_output_and_gated_layers_have_swapped_halves(name: str) -> None:
    found = aliases(name)
    assert {original for original, parts in found.items() if parts[0].swapped} == SWAPPED.get(name, set())
    for original in SWAPPED.get(name, ()):
        norm = targets(name).modules[found[original][0].path.rpartition(".")[0]]
        assert type(norm).__name__ in {"AdaLayerNormContinuous", "AuraFlowPreFinalBlock", "SwiGLU"}


@pytest.mark.parametrize(
    ("name", "original", "ours"),
    [
        ("sdxl", "input_blocks.5.1.proj_in", ["down_blocks.2.attentions.0.proj_in"]),
        ("sd3", "joint_blocks.2.context_block.attn.qkv", [f"transformer_blocks.2.attn.add_{p}_proj" for p in "qkv"]),
        ("flux", "double_blocks.1.img_attn.qkv.1", ["transformer_blocks.1.attn.to_k"]),
        ("flux2", "double_blocks.1.txt_mlp.2", ["transformer_blocks.1.ff_context.linear_out"]),
        ("auraflow", "double_layers.1.attn.w1o", ["joint_transformer_blocks.1.attn.to_add_out"]),
        ("krea2", "txtfusion.refiner_blocks.1.mlp.up", ["text_fusion.refiner_blocks.1.ff.up"]),
        ("anima", "blocks.1.adaln_modulation_cross_attn.2", ["transformer_blocks.1.norm2.linear_2"]),
        ("anima conditioner", "llm_adapter.blocks.3.mlp.2", ["blocks.3.mlp.2"]),
        ("wan", "blocks.1.cross_attn.v_img", ["blocks.1.attn2.add_v_proj"]),
        ("wan", "blocks.1.norm3", ["blocks.1.norm2"]),
        ("wan vace", "vace_blocks.0.before_proj", ["vace_blocks.0.proj_in"]),
        ("wan animate", "face_adapter.fuser_blocks.0.linear1_kv", ["face_adapter.0.to_k", "face_adapter.0.to_v"]),
        ("ltx2", "av_ca_a2v_gate_adaln_single.linear", ["av_cross_attn_video_a2v_gate.linear"]),
        ("ltx2 connectors", "text_embedding_projection.aggregate_embed", ["text_proj_in"]),
        ("hunyuan-video", "double_blocks.1.img_attn.qkv", [f"transformer_blocks.1.attn.to_{p}" for p in "qkv"]),
        ("hunyuan-image", "single_blocks.1.linear2.fc", ["single_transformer_blocks.1.proj_out"]),
        ("zimage", "final_layer.adaLN_modulation.1", ["all_final_layer.2-1.adaLN_modulation.1"]),
        ("lumina2", "noise_refiner.1.adaLN_modulation.1", ["noise_refiner.1.norm1.linear"]),
        ("ideogram4", "layers.1.attention.o", ["layers.1.attention.to_out.0"]),
        ("pixart", "t_block.1", ["adaln_single.linear"]),
        ("sana", "blocks.1.mlp.depth_conv.conv", ["transformer_blocks.1.ff.conv_depth"]),
        ("cascade prior", "up_blocks.0.5.attention.attn.in_proj.2", ["up_blocks.0.5.attention.to_v"]),
    ],
)  # fmt: skip
def test_names_that_are_easily_confused_lead_to_the_right_layers(name: str, original: str, ours: list[str]) -> None:
    assert [part.path for part in aliases(name)[original]] == ours


@every_model
def test_the_names_that_are_written_are_also_read(name: str) -> None:
    read = aliases(name)
    for original, parts in layout(name).items():
        assert read[original] == tuple(part for part, _ in parts)


CONVERTERS = {
    "flux": "convert_flux_transformer_checkpoint_to_diffusers",
    "chroma": "convert_chroma_transformer_checkpoint_to_diffusers",
    "flux2": "convert_flux2_transformer_checkpoint_to_diffusers",
    "sd3": "convert_sd3_transformer_checkpoint_to_diffusers",
    "sd3.5": "convert_sd3_transformer_checkpoint_to_diffusers",
    "auraflow": "convert_auraflow_transformer_checkpoint_to_diffusers",
    "lumina2": "convert_lumina2_to_diffusers",
    "sana": "convert_sana_transformer_to_diffusers",
    "hunyuan-video": "convert_hunyuan_video_transformer_to_diffusers",
    "ltx": "convert_ltx_transformer_checkpoint_to_diffusers",
    "ltx2": "convert_ltx2_transformer_to_diffusers",
    "wan": "convert_wan_transformer_to_diffusers",
    "wan vace": "convert_wan_transformer_to_diffusers",
    "wan animate": "convert_wan_transformer_to_diffusers",
    "anima": "convert_cosmos_transformer_checkpoint_to_diffusers",
    "zimage": "convert_z_image_transformer_checkpoint_to_diffusers",
    "krea2": "convert_krea2_transformer_checkpoint_to_diffusers",
}
# Parameters besides those of layers that the converters expect.
PARAMETERS = {
    "sd3": ["pos_embed"],
    "auraflow": ["register_tokens", "positional_encoding"],
    "sana": [
        "pos_embed",
        "y_embedder.y_embedding",
        *(f"{block}.scale_shift_table" for block in ("blocks.0", "blocks.1", "final_layer")),
    ],
}
SCALES = {"flux": "norm", "chroma": "norm", "flux2": "norm", "krea2": "norm|txtmlp.0"}


@pytest.mark.parametrize("name", CONVERTERS)
def test_names_and_rows_agree_with_the_converters_of_diffusers(name: str) -> None:
    """Every row holds its own number. A checkpoint under our original names is converted into the model's layers."""
    convert = getattr(single_file_utils, CONVERTERS[name], None)
    if convert is None:
        pytest.skip("the installed diffusers cannot read this family's checkpoints")
    family, expected, rows = MODELS[name][0], dict[str, torch.Tensor](), 0
    for path, module in targets(name).modules.items():
        for parameter, value in module.named_parameters(recurse=False):
            if parameter in ("weight", "bias"):
                expected[f"{path}.{parameter}"] = torch.arange(rows, rows + len(value), dtype=torch.float64)
                rows += len(value)
    checkpoint = {parameter: torch.zeros(1) for parameter in PARAMETERS.get(family, ())}
    originals = {original: aliases(name)[original] for original in layout(name) or aliases(name)}
    renamed: set[str] = set()
    for original, parts in originals.items():
        for parameter in ("weight", "bias"):
            keys = [f"{part.path}.{parameter}" for part in parts]
            if all(key in expected for key in keys):
                renamed.update(keys)
                values = [
                    torch.cat(expected[key].chunk(2)[::-1]) if part.swapped else expected[key]
                    for key, part in zip(keys, parts, strict=True)
                ]
                last = "scale" if re.search(SCALES.get(family, "$^"), original) else parameter
                checkpoint[f"{original}.{last}"] = torch.cat(values)
    for key in set(expected) - renamed:
        checkpoint[key.replace("weight", "scale") if ".norms." in key else key] = expected[key]
    found = convert(checkpoint)
    for key, value in expected.items():
        if "prompt_adaln" not in key:  # Only diffusers' converter for LoRA files knows these.
            assert torch.equal(found[key], value), key


# Files


FILES = {file.stem: file for file in (Path(__file__).parents[1] / "fixtures" / "families").glob("*.json")}


def listed(file: Path) -> tuple[str | None, Shapes]:
    content = json.loads(file.read_text())
    return content["family"], {key: tuple(shape or ()) for key, shape in content["keys"].items()}


@pytest.mark.parametrize("file", sorted(FILES))
def test_the_family_of_a_real_file_is_recognised(file: str) -> None:
    family, shapes = listed(FILES[file])
    assert families.of_file(shapes.items()) == family


PUBLISHED: dict[str, Callable[[], nn.Module]] = {
    "flux": lambda: diffusers.FluxTransformer2DModel(guidance_embeds=True),
    "qwen": lambda: diffusers.QwenImageTransformer2DModel(**_TWO),
    "anima": lambda: diffusers.CosmosTransformer3DModel(**_TWO, num_attention_heads=16),
    "sdxl": sdxl_unet,
    "sd": lambda: sd_unet(768),
}
PREFIX = re.compile(r"lora_(unet|te\d?)_|diffusion_model\.|transformer\.|unet\.")
TENSOR = re.compile(
    r"\.(lora_(A|B|down|up)\.weight|lora_B\.bias|alpha|dora_scale|lokr_w[12]|scale|lora\.(down|up)\.weight)$"
)


@cache
def published(family: str) -> set[str]:
    """Return the names of all layers of a published model: its own and the original ones, dotted and flattened."""
    with torch.device("meta"):
        known = Targets(PUBLISHED[family]())
    names = {*layers_of(known), *families.aliases(known)}
    return names | {name.replace(".", "_") for name in names}


def layers_of(known: Targets) -> Iterator[str]:
    return (path for path, module in known.modules.items() if has_weights(module))


@pytest.mark.parametrize("file", sorted(FILES))
def test_the_layers_of_a_real_file_are_found(file: str) -> None:
    family, shapes = listed(FILES[file])
    looked_at = 0
    for key in shapes:
        if key.startswith(("lora_te", "text_encoder")) or ".processor." in key or ":" in key:
            continue
        name = TENSOR.sub("", PREFIX.sub("", key, count=1))
        looked_at += 1
        assert name in published(family or "sd"), key
    assert looked_at or re.search("xlabs|qwerty|analog", file)


def lora(sizes: dict[str, tuple[int, int]], prefix: str, *, flat: bool) -> Shapes:
    """Return the shapes of a LoRA file for layers with these numbers of outputs and inputs."""
    found: Shapes = {}
    for path, (outputs, inputs) in sizes.items():
        name = path.replace(".", "_") if flat else path
        down, up = ("lora_down", "lora_up") if flat else ("lora_A", "lora_B")
        found[f"{prefix}{name}.{down}.weight"] = (4, inputs)
        found[f"{prefix}{name}.{up}.weight"] = (outputs, 4)
    return found


def own(name: str) -> dict[str, tuple[int, int]]:
    return {path: (spec.out_features, spec.in_features) for path, spec in layers(name).items() if spec.kind != "norm"}


def in_original(name: str) -> dict[str, tuple[int, int]]:
    """Return the sizes of all layers in the original layout."""
    sizes = own(name)
    found: dict[str, tuple[int, int]] = {}
    for original, parts in layout(name).items():
        if all(part.path in sizes for part, _ in parts):
            found[original] = sum(size for _, size in parts), sizes[parts[0][0].path][1]
            for part, _ in parts:
                del sizes[part.path]
    return {**found, **sizes}


DIALECTS: dict[str, Callable[[str], Shapes]] = {
    "diffusers": lambda name: lora(own(name), "transformer.", flat=False),
    "diffusers flattened": lambda name: lora(own(name), "lora_unet_", flat=True),
    "original": lambda name: lora(in_original(name), "diffusion_model.", flat=False),
    "original flattened": lambda name: lora(in_original(name), "lora_unet_", flat=True),
}
DENOISERS = [name for name in MODELS if "connectors" not in name and "conditioner" not in name]


@pytest.mark.parametrize("name", DENOISERS)
@for_each(dialect=DIALECTS)
def test_a_file_for_all_layers_is_recognised(name: str, dialect: str) -> None:
    family = MODELS[name][0]
    assert families.of_file(DIALECTS[dialect](name).items()) == family


@pytest.mark.parametrize("name", DENOISERS)
@for_each(dialect=DIALECTS)
def test_a_file_for_few_layers_is_never_taken_for_one_of_another_family(name: str, dialect: str) -> None:
    """A file for one of the layers that repeat in all blocks: its family is recognised, or none."""
    family = MODELS[name][0]
    repeated: dict[str, Shapes] = {}
    for key, shape in DIALECTS[dialect](name).items():
        layer = re.sub(r"\.lora_(A|B|down|up)\.weight$", "", key)
        repeated.setdefault(re.sub(r"(?<=[._])\d+(?=[._])", "", layer), {})[key] = shape
    wrong = {
        (found, next(iter(shapes)))
        for shapes in repeated.values()
        if (found := families.of_file(shapes.items())) not in {None, family, *KIN.get(family, ())}
    }
    assert wrong == set()


ATTENTION = re.compile(r"attn|attention|linear[12]$|\.w[12][qkvo]$")


@pytest.mark.parametrize("name", DENOISERS)
def test_a_file_for_attention_alone_is_recognised_where_possible(name: str) -> None:
    """Some families differ only in the number of blocks, and the models here have few."""
    family = MODELS[name][0]
    unclear = {"pixart", "ltx", "sana", "qwen21", *KIN} - {"flux"}
    for dialect, make in DIALECTS.items():
        shapes = {key: shape for key, shape in make(name).items() if ATTENTION.search(key.rsplit(".lora", 1)[0])}
        possible = {None, family, *KIN.get(family, ())} if family in unclear else {family}
        assert families.of_file(shapes.items()) in possible, dialect


def test_block_numbers_distinguish_hunyuan_video_from_flux() -> None:
    def attention(double: int, single: int) -> Shapes:
        sizes = {f"double_blocks.{double}.img_attn.qkv": (9216, 3072), f"single_blocks.{single}.linear1": (21504, 3072)}
        return lora(sizes, "lora_unet_", flat=True)

    assert families.of_file(attention(18, 37).items()) == "flux"
    assert families.of_file(attention(19, 39).items()) == "hunyuan-video"


# Stable Diffusion: the width of the text that cross-attention reads

WIDTHS = {"sd": 768, "sd2": 1024, "sdxl": 2048}


def of_type(name: str, inputs: int, outputs: int = 320) -> Shapes:
    """Return the shapes of the tensors of one adapter type for a linear layer."""
    return {
        "lora": {"lora_down.weight": (4, inputs), "lora_up.weight": (outputs, 4)},
        "peft": {"lora_A.default.weight": (4, inputs), "lora_B.default.weight": (outputs, 4)},
        "loha": {name: (4, inputs) if name.endswith("b") else (outputs, 4) for name in ("hada_w1_b", "hada_w1_a")},
        "lokr": {"lokr_w1": (8, 8), "lokr_w2": (outputs // 8, inputs // 8)},
        "small lokr": {"lokr_w1": (8, 8), "lokr_w2_a": (outputs // 8, 2), "lokr_w2_b": (2, inputs // 8)},
        "smallest lokr": {
            "lokr_w1_a": (8, 2),
            "lokr_w1_b": (2, 8),
            "lokr_w2_a": (outputs // 8, 2),
            "lokr_w2_b": (2, inputs // 8),
        },
        "oft of peft": {"oft_R.weight": (inputs // 32, 32 * 31 // 2)},
        "full": {"diff": (outputs, inputs)},
        "glora": {"a1.weight": (inputs, 4), "a2.weight": (4, inputs), "b1.weight": (outputs, 4)},
    }[name]  # fmt: skip


TYPES = ["lora", "peft", "loha", "lokr", "small lokr", "smallest lokr", "oft of peft", "full", "glora"]
UNET_NAMES = {
    "kohya": "lora_unet_down_blocks_2_attentions_0_transformer_blocks_0_attn2_to_k",
    "ldm": "lora_unet_input_blocks_7_1_transformer_blocks_0_attn2_to_k",
    "middle": "lora_unet_middle_block_1_transformer_blocks_0_attn2_to_v",
    "dotted": "unet.up_blocks.1.attentions.2.transformer_blocks.0.attn2.to_v",
    "comfy": "diffusion_model.output_blocks.5.1.transformer_blocks.0.attn2.to_v",
}


@pytest.mark.parametrize("family", WIDTHS)
@for_each(spelling=UNET_NAMES, adapter_type=TYPES)
def test_the_width_of_the_text_tells_which_stable_diffusion_it_is(
    family: str, spelling: str, adapter_type: str
) -> None:
    path = UNET_NAMES[spelling]
    shapes = {f"{path}.{tensor}": shape for tensor, shape in of_type(adapter_type, WIDTHS[family]).items()}
    attention = path.replace("attn2", "attn1")
    shapes |= {f"{attention}.{tensor}": shape for tensor, shape in of_type(adapter_type, 1280).items()}
    assert families.of_file(shapes.items()) == family


def test_stable_diffusion_without_cross_attention_is_recognised_by_names_or_not_at_all() -> None:
    def of(*keys: str, shape: tuple[int, ...] = (4, 320)) -> str | None:
        return families.of_file((key, shape) for key in keys)

    down = "lora_unet_down_blocks_1_resnets_0_conv1.lora_down.weight"
    assert of(down) is None
    assert of(down, "lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight") == "sdxl"
    text = "lora_te_text_model_encoder_layers_0_self_attn_q_proj.oft_blocks"
    assert families.of_file([(down, (4, 320, 3, 3)), (text, (96, 8, 8))]) == "sd"
    assert families.of_file([(down, (4, 320, 3, 3)), (text, (128, 8, 8))]) == "sd2"
    assert of("lora_unet_middle_block_1_transformer_blocks_7_attn1_to_q.oft_blocks") == "sdxl"
    assert of("unet:0:down", "unet:1:down") is None
    assert families.of_file([("unet:0:down", (4, 320)), ("unet:7:down", (4, 1024))]) == "sd2"


@for_each(
    key=[
        "lora_te1_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight",
        "text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_A.weight",
        "lora_te3_encoder_block_0_layer_0_SelfAttention_q.lora_down.weight",
        "text_encoders.qwen25_7b.transformer.model.layers.0.self_attn.q_proj.lora_A.weight",
        "text_encoders.llama.transformer.model.layers.3.mlp.gate_proj.lora_A.weight",
        "bundle_emb.token.clip_l",
        "",
        "\n",
    ],
)
def test_a_file_for_text_encoders_alone_has_no_family(key: str) -> None:
    assert families.of_file([(key, (4, 768))]) is None


# Effort

HOSTILE: dict[str, Callable[[int], list[str]]] = {
    "one long name": lambda size: ["blocks." * size],
    "one long word": lambda size: ["a" * 2 * size],
    "almost a family, over and over": lambda size: ["transformer_blocks.." * size, "double_blocks__img" * size],
    "only separators": lambda size: ["._" * size, "refiner" + "_" * 2 * size],
    "only digits": lambda size: ["1" * 2 * size, "0." * size, "blocks." + "9" * size + ".attn"],
    "line breaks": lambda size: ["\n" * size, "double_blocks.0.\nimg_attn.qkv.lora_A.weight"],
    "many names": lambda size: [f"layer{chr(97 + i % 26) * (1 + i // 26)}.lora_A.weight" for i in range(size // 5)],
    "other digits": lambda size: [
        "transformer_blocks.٣.attn.to_q.lora_A.weight",
        f"single_blocks.{'²' * size}.linear1",
    ],
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_are_recognised_in_linear_time(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def recognise(size: int, *shape: int) -> None:
        families.of_file((key, shape) for key in HOSTILE[name](size))

    assert_linear(lambda size: recognise(size, 4, 3072), 25, monkeypatch)
    for shape in ((), (0, 0), (4,), (4, 3072), (1, 1, 1, 1, 1)):
        recognise(10_000, *shape)


@pytest.mark.parametrize("expression", [r"\w*!", r"(\w+)+!", r"[a-z]+\.+attn"])
def test_an_expression_with_more_than_linear_effort_is_detected(
    expression: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(families, "_SIGNS", [("slow", pattern(expression))])
    with pytest.raises(AssertionError, match=r"more than linear|forever"):
        assert_linear(lambda size: families.of_file([("a" * size, (4, 3072))]), 50, monkeypatch)


def test_a_large_file_is_recognised_by_few_of_its_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    names = json.loads((Path(__file__).parents[1] / "fixtures" / "ldm_names_sdxl.json").read_text())
    paths = re.findall(r"(?:down|up|mid)_block[\w.]+", str(names))
    shapes = lora({path: (1280, 1280) for path in paths}, "lora_unet_", flat=True)
    assert len(shapes) > 1000
    steps = effort(lambda: families.of_file(shapes.items()), monkeypatch)
    assert steps.pop("calls") < 10 * len(shapes)
    assert len(steps) > 4
    # All expressions together take no more steps than one that looks at every letter.
    assert steps.total() < sum(map(len, shapes))


def test_family_names_are_stable_and_every_class_belongs_to_one_family() -> None:
    """The names of the families are part of error messages."""
    assert {family.name for family in FAMILIES} == {
        "sd", "sd2", "sdxl", "sd3", "flux", "flux2", "chroma", "qwen", "qwen21", "zimage", "krea2", "lumina2", "sana",
        "pixart", "auraflow", "hunyuan-video", "hunyuan-video15", "hunyuan-image", "wan", "ltx", "ltx2", "cogview4",
        "hidream", "ideogram4", "anima", "cascade", "controlnet", "flux3", "minimax-h3", "ace-step",
    }  # fmt: skip
    classes = [kind for family in FAMILIES for kind in family.models if not kind.startswith("UNet")]
    assert len(classes) == len(set(classes))
