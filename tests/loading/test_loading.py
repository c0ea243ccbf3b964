"""Every source and every spelling of a LoRA becomes the same weights, on the layers that it was made for."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from diffusers import (
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    FluxTransformer2DModel,
    UNet2DModel,
)
from torch import Tensor, nn

import diffadapt.files.hub
from tests.support import files, loras, models, spellings
from tests.support.compare import assert_differs, assert_same
from tests.support.full_size import clip_l, sd_unet, sdxl_unet
from tests.support.hub import hub_cache
from tests.support.models import draw

Spelling = Callable[[loras.Parts], dict[str, Tensor]]


def baked(build: Callable[[], DiffusionPipeline], parts: loras.Parts, strength: float = 1.0, **options: Any) -> Tensor:
    """Return what the pipeline draws with the changes added to its weights, which must differ from the base."""
    base = draw(build(), **options)
    picture = draw(loras.bake(build(), parts, strength), **options)
    assert_differs(picture, base)
    return picture


@pytest.mark.slow
@pytest.mark.parametrize("name", ["file", "path as text", "folder", "state dict"])
def test_an_adapter_is_loaded_from_every_kind_of_source(name: str, tmp_path: Path) -> None:
    pipe = models.sd15()
    parts = loras.parts_for(pipe)
    tensors = spellings.peft_names(parts)
    file = files.write(tmp_path / "pixel" / "pytorch_lora_weights.safetensors", tensors)
    sources = {"file": file, "path as text": str(file), "folder": file.parent, "state dict": tensors}
    report = pipe.load_adapter(sources[name])
    assert report.name == ("default_0" if name == "state dict" else pipe.adapters.names[0])
    assert report.used == len(tensors)
    assert_same(draw(pipe), baked(models.sd15, parts))


@pytest.mark.slow
def test_a_file_in_a_folder_is_chosen_by_weight_name_and_subfolder(tmp_path: Path) -> None:
    pipe = models.sd15()
    parts = loras.parts_for(pipe)
    files.write(tmp_path / "styles" / "ink.safetensors", spellings.peft_names(parts))
    files.write(tmp_path / "styles" / "other.safetensors", {"other": torch.zeros(1)})
    pipe.load_adapter(tmp_path, weight_name="ink.safetensors", subfolder="styles")
    assert pipe.adapters.names == ["ink"]
    assert_same(draw(pipe), baked(models.sd15, parts))


def test_a_folder_with_several_files_needs_weight_name(tmp_path: Path) -> None:
    pipe = models.sd15()
    for name in ("ink", "oil"):
        files.write(tmp_path / f"{name}.safetensors", spellings.peft_names(loras.parts_for(pipe)))
    with pytest.raises(diffadapt.AdapterError, match=r"weight_name.*ink\.safetensors.*oil\.safetensors"):
        pipe.load_adapter(tmp_path)


def test_a_missing_file_and_a_missing_weight_name_are_reported(tmp_path: Path) -> None:
    pipe = models.sd15()
    with pytest.raises(diffadapt.AdapterError, match="no/such/file"):
        pipe.load_adapter(str(tmp_path / "no/such/file.safetensors"))
    files.write(tmp_path / "ink.safetensors", spellings.peft_names(loras.parts_for(pipe)))
    with pytest.raises(diffadapt.AdapterError, match=r"oil\.safetensors.*ink\.safetensors"):
        pipe.load_adapter(tmp_path, weight_name="oil.safetensors")


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".ckpt"])
def test_pickles_are_refused(suffix: str, tmp_path: Path) -> None:
    pipe = models.sd15()
    file = tmp_path / f"adapter{suffix}"
    torch.save(spellings.peft_names(loras.parts_for(pipe)), file)
    with pytest.raises(diffadapt.AdapterError, match="safetensors"):
        pipe.load_adapter(file)
    assert len(pipe.adapters) == 0


def test_a_pickle_with_a_safetensors_name_is_refused(tmp_path: Path) -> None:
    pipe = models.sd15()
    file = tmp_path / "adapter.safetensors"
    torch.save(spellings.peft_names(loras.parts_for(pipe)), file)
    with pytest.raises(diffadapt.AdapterError, match=r"adapter\.safetensors"):
        pipe.load_adapter(file)


@pytest.mark.slow
def test_a_given_state_dict_is_never_changed() -> None:
    pipe = models.sd15()
    tensors = spellings.peft_names(loras.parts_for(pipe))
    before = {key: tensor.clone() for key, tensor in tensors.items()}
    base = draw(pipe)
    pipe.load_adapter(tensors, "a", scale=0.5)
    assert_differs(draw(pipe), base)
    pipe.adapters.merge("a")
    pipe.adapters.unmerge()
    pipe.to(torch.bfloat16)
    pipe.adapters.clear()
    assert all(torch.equal(tensor, before[key]) for key, tensor in tensors.items())
    assert all(tensor.dtype == before[key].dtype for key, tensor in tensors.items())
    assert not any(tensor.requires_grad for tensor in tensors.values())


@pytest.mark.slow
def test_a_file_may_change_after_loading(tmp_path: Path) -> None:
    pipe = models.sd15()
    parts = loras.parts_for(pipe)
    file = tmp_path / "ink.safetensors"
    files.write(file, spellings.peft_names(parts))
    pipe.load_adapter(file)
    with file.open("r+b") as opened:
        opened.seek(file.stat().st_size // 2)
        opened.write(bytes(file.stat().st_size // 2))
    assert_same(draw(pipe), baked(models.sd15, parts))


@pytest.mark.slow
def test_a_hub_id_is_loaded_from_the_cache(tmp_path: Path) -> None:
    pipe = models.sd15()
    parts = loras.parts_for(pipe)
    name = "pytorch_lora_weights.safetensors"
    cache = hub_cache(tmp_path, "someone/pixel", name, spellings.peft_names(parts))
    pipe.load_adapter("someone/pixel", cache_dir=cache, local_files_only=True)
    assert pipe.adapters.names == ["pixel"]
    pipe.load_adapter(
        "someone/pixel", "again", weight_name=name, cache_dir=cache, local_files_only=True, activate=False
    )
    assert_same(draw(pipe), baked(models.sd15, parts))


@pytest.mark.slow
def test_arguments_for_the_hub_reach_huggingface_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = models.sd15()
    parts = loras.parts_for(pipe)
    file = files.write(tmp_path / "ink.safetensors", spellings.peft_names(parts))
    asked: dict[str, Any] = {}

    def download(repo_id: str, filename: str, **options: Any) -> str:
        asked.update(options, repo_id=repo_id, filename=filename)
        return str(file)

    monkeypatch.setattr(diffadapt.files.hub, "hf_hub_download", download)
    options = {"revision": "v2", "token": "secret", "cache_dir": tmp_path, "subfolder": "styles"}
    pipe.load_adapter("someone/styles", weight_name="ink.safetensors", **options)
    assert asked.pop("repo_id") == "someone/styles"
    assert "/".join(filter(None, (asked.pop("subfolder", None), asked.pop("filename")))) == "styles/ink.safetensors"
    assert {name: asked[name] for name in ("revision", "token", "cache_dir")} == {
        name: options[name] for name in ("revision", "token", "cache_dir")
    }
    assert_same(draw(pipe), baked(models.sd15, parts))


@pytest.mark.slow
def test_the_files_of_a_hub_repository_are_listed_without_weight_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = models.sd15()
    parts = loras.parts_for(pipe)
    file = files.write(tmp_path / "ink.safetensors", spellings.peft_names(parts))
    monkeypatch.setattr(
        diffadapt.files.hub, "list_repo_files", lambda *args, **options: ["README.md", "ink.safetensors"]
    )
    monkeypatch.setattr(
        diffadapt.files.hub, "hf_hub_download", lambda repo, filename, **options: str(file.parent / filename)
    )
    pipe.load_adapter("someone/ink")
    assert_same(draw(pipe), baked(models.sd15, parts))


@pytest.mark.parametrize("options", [{}, {"weight_name": "ink.safetensors"}, {"local_files_only": True}])
def test_an_offline_error_says_what_to_do(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    pipe = models.sd15()
    with pytest.raises(diffadapt.AdapterError, match="someone/pixel") as caught:
        pipe.load_adapter("someone/pixel", cache_dir=tmp_path, **options)
    assert any(hint in str(caught.value) for hint in ("local file", "weight_name"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "spelled",
    [
        spellings.peft_names,
        spellings.old_names,
        spellings.kohya_names,
        lambda parts: {key.replace(".weight", ".default.weight"): t for key, t in spellings.peft_names(parts).items()},
    ],
    ids=["peft", "lora.down", "kohya", "lora_A.default"],
)
def test_every_spelling_of_sd15_becomes_the_same_weights(spelled: Spelling) -> None:
    pipe = models.sd15()
    parts = loras.parts_for(pipe)
    tensors = spelled(parts)
    report = pipe.load_adapter(tensors)
    assert (report.used, report.unused) == (len(tensors), [])
    assert report.components == {name: len(layers) for name, layers in parts.items()}
    assert_same(draw(pipe), baked(models.sd15, parts))


@pytest.mark.slow
@pytest.mark.parametrize("prefix", ["", "unet."])
def test_names_of_attention_processors_become_the_same_weights(prefix: str) -> None:
    pipe = models.sd15()
    parts = loras.parts_for(pipe, ("unet",), r"to_[qkv]|to_out\.0")
    report = pipe.load_adapter(spellings.processor_names(parts["unet"], prefix))
    assert report.format == "diffusers"
    assert_same(draw(pipe), baked(models.sd15, parts))


@pytest.mark.slow
def test_a_file_may_mix_spellings() -> None:
    pipe = models.sd15()
    parts = loras.parts_for(pipe)
    unet = parts["unet"]
    in_processor = {path: factors for path, factors in unet.items() if "attn1" in path}
    others = {path: factors for path, factors in unet.items() if "attn1" not in path}
    tensors = {
        **spellings.processor_names(in_processor, "unet."),
        **spellings.peft_names({"unet": others}),
        **spellings.old_names({"text_encoder": parts["text_encoder"]}),
    }
    report = pipe.load_adapter(tensors)
    assert (report.used, report.unused) == (len(tensors), [])
    assert_same(draw(pipe), baked(models.sd15, parts))


@pytest.mark.slow
def test_the_metadata_can_hold_the_alpha_of_every_layer(tmp_path: Path) -> None:
    pipe = models.sd15()
    parts = loras.parts_for(pipe, alpha=loras.varied_alpha)
    metadata = spellings.alpha_metadata(parts)
    report = pipe.load_adapter(files.write(tmp_path / "a.safetensors", spellings.peft_names(parts), metadata))
    assert report.metadata == metadata
    assert_same(draw(pipe), baked(models.sd15, parts))


@pytest.mark.slow
def test_the_alpha_of_every_layer_of_a_text_encoder_is_saved(tmp_path: Path) -> None:
    """In files, CLIP's names have a level that the model lacks; the patterns in the header match both."""
    pipe = models.sd15()
    parts = loras.parts_for(pipe, ("unet", "text_encoder"), alpha=loras.varied_alpha)
    expected = baked(models.sd15, parts)
    pipe.load_adapter(spellings.kohya_names(parts), "a")
    saved = pipe.adapters.save("a", tmp_path / "saved.safetensors", format="diffusers")
    again, theirs = models.sd15(), models.sd15()
    again.load_adapter(saved)
    assert_same(draw(again), expected, 1e-4)
    theirs.load_lora_weights(saved)
    assert_same(draw(theirs), expected, 1e-4)


@pytest.mark.slow
def test_alpha_tensors_are_read_with_dotted_names() -> None:
    pipe = models.sd15()
    parts = loras.parts_for(pipe, alpha=loras.varied_alpha)
    tensors = spellings.peft_names(parts)
    for component, layers in parts.items():
        tensors.update({f"{component}.{path}.alpha": torch.tensor(part.alpha) for path, part in layers.items()})
    assert pipe.load_adapter(tensors).unused == []
    assert_same(draw(pipe), baked(models.sd15, parts))


@pytest.mark.slow
def test_the_metadata_can_ask_for_a_rank_stabilized_scale(tmp_path: Path) -> None:
    pipe = models.sd15()
    parts = loras.parts_for(pipe, ("unet",), alpha=lambda index: 8.0)
    config = {"unet.r": 4, "unet.lora_alpha": 4.0, "unet.use_rslora": True}
    metadata = {"lora_adapter_metadata": json.dumps(config)}
    pipe.load_adapter(files.write(tmp_path / "a.safetensors", spellings.peft_names(parts), metadata))
    # 4 / sqrt(4) equals 8 / 4.
    assert_same(draw(pipe), baked(models.sd15, parts))


@pytest.mark.slow
def test_a_peft_folder_is_loaded_with_its_alpha(tmp_path: Path) -> None:
    pipe = models.sd15()
    parts = loras.parts_for(pipe, ("unet",), alpha=lambda index: 2.0)
    files.write(tmp_path / "adapter_model.safetensors", spellings.peft_names(parts, "base_model.model."))
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 2}))
    report = pipe.load_adapter(tmp_path)
    assert report.format == "peft"
    assert report.components == {"unet": len(parts["unet"])}
    assert_same(draw(pipe), baked(models.sd15, parts))


@pytest.mark.slow
def test_a_kohya_file_for_all_layers_of_sd15_is_loaded() -> None:
    pipe = models.sd15()
    parts = loras.parts_for(pipe, pattern=".*", alpha=loras.varied_alpha)
    tensors = spellings.kohya_names(parts)
    report = pipe.load_adapter(tensors)
    assert (report.format, report.family) == ("kohya", "sd")
    assert (report.used, report.unused) == (len(tensors), [])
    assert report.types == {"lora": sum(map(len, parts.values()))}
    assert_same(draw(pipe), baked(models.sd15, parts))


@pytest.mark.slow
@pytest.mark.parametrize(("family", "build"), [("sd15", models.sd15_full), ("sdxl", models.sdxl)])
def test_a_kohya_file_may_have_the_original_names_of_the_unet(
    family: str, build: Callable[[], DiffusionPipeline]
) -> None:
    pipe = build()
    parts = loras.parts_for(pipe, ("unet",), ".*", alpha=loras.varied_alpha)
    names = files.fixture(f"ldm_names_{family}")["names"]
    assert set(parts["unet"]) <= set(names)
    report = pipe.load_adapter(spellings.kohya_names(parts, renamed=names))
    assert report.unused == []
    assert_same(draw(pipe), baked(build, parts))


@pytest.mark.slow
def test_a_kohya_file_for_sdxl_with_both_text_encoders_is_loaded() -> None:
    pipe = models.sdxl()
    parts = loras.parts_for(pipe, tuple(spellings.SDXL_PREFIXES), alpha=loras.varied_alpha)
    tensors = spellings.kohya_names(parts, spellings.SDXL_PREFIXES)
    report = pipe.load_adapter(tensors)
    assert (report.family, report.used, report.unused) == ("sdxl", len(tensors), [])
    assert list(report.components) == list(spellings.SDXL_PREFIXES)
    assert_same(draw(pipe), baked(models.sdxl, parts))


@pytest.mark.slow
def test_the_tucker_core_of_a_convolution_is_applied() -> None:
    pipe = models.sd15()
    path = "down_blocks.0.resnets.0.conv1"
    layer = pipe.unet.get_submodule(path)
    down, mid, up = (
        torch.randn(4, layer.in_channels),
        torch.randn(4, 4, 3, 3),
        torch.randn(layer.out_channels, 4),
    )
    stem = f"lora_unet_{path.replace('.', '_')}"
    tensors = {
        f"{stem}.lora_down.weight": down[:, :, None, None],
        f"{stem}.lora_mid.weight": mid,
        f"{stem}.lora_up.weight": up[:, :, None, None],
        f"{stem}.alpha": torch.tensor(2.0),
    }
    base = draw(pipe)
    pipe.load_adapter(tensors)
    changed = models.sd15()
    delta = 2.0 / 4 * torch.einsum("omhw,mnhw,ni->oihw", up[:, :, None, None].expand(-1, -1, 3, 3), mid, down)
    changed.unet.get_submodule(path).weight.data += delta
    assert_differs(draw(pipe), base)
    assert_same(draw(pipe), draw(changed))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "components", "pattern"),
    [
        ("sdxl", ("unet", "text_encoder", "text_encoder_2"), loras.ATTENTION),
        (
            "sd3",
            ("transformer", "text_encoder", "text_encoder_2", "text_encoder_3"),
            rf"{loras.ATTENTION}|[qkvo]|wi_0",
        ),
        (
            "flux",
            ("transformer", "text_encoder", "text_encoder_2"),
            rf"{loras.ATTENTION}|[qkvo]|wo|proj_mlp|linear",
        ),
    ],
)
def test_dotted_names_are_loaded_on_every_component(family: str, components: tuple[str, ...], pattern: str) -> None:
    build = models.FAMILIES[family]
    pipe = build()
    parts = loras.parts_for(pipe, components, pattern)
    report = pipe.load_adapter(spellings.peft_names(parts))
    assert report.components == {name: len(layers) for name, layers in parts.items()}
    assert (report.family, report.unused) == (family, [])
    assert_same(draw(pipe), baked(build, parts))


@pytest.mark.parametrize(
    ("name", "build", "format", "family"),
    [
        ("diffusers_sd15_unet", {"unet": lambda: sd_unet(768)}, "diffusers", "sd"),
        ("diffusers_sd15_processors", {"unet": lambda: sd_unet(768)}, "diffusers", "sd"),
        ("kohya_sd15", {"unet": lambda: sd_unet(768), "text_encoder": clip_l}, "kohya", "sd"),
        ("kohya_sd15_locon", {"unet": lambda: sd_unet(768)}, "kohya", "sd"),
        ("kohya_sdxl", {"unet": sdxl_unet}, "kohya", "sdxl"),
        ("diffusers_flux", {"transformer": FluxTransformer2DModel}, "diffusers", "flux"),
        ("diffusers_flux_no_proj_mlp", {"transformer": FluxTransformer2DModel}, "diffusers", "flux"),
    ],
)
def test_every_name_of_a_real_file_is_found(
    name: str, build: dict[str, Callable[[], nn.Module]], format: str, family: str
) -> None:
    tensors = files.placeholders(name)
    with torch.device("meta"):
        target = {component: make() for component, make in build.items()}
    report = diffadapt.inspect(tensors, target)
    assert report.unused == []
    assert (report.format, report.family, report.used) == (format, family, len(tensors))
    assert set(report.components) == set(target)
    assert diffadapt.inspect(tensors).format == format


def test_a_file_for_sd15_does_not_fit_sd2() -> None:
    with torch.device("meta"):
        target = {"unet": sd_unet(1024)}
    report = diffadapt.inspect(files.placeholders("kohya_sd15_locon"), target)
    assert any("attn2_to_k" in key and "1024" in reason and "768" in reason for key, reason in report.unused)


def test_inspect_reads_headers_and_touches_nothing(tmp_path: Path) -> None:
    pipe = models.sd15()
    tensors = spellings.kohya_names(loras.parts_for(pipe, alpha=loras.varied_alpha))
    file = files.write(tmp_path / "pixel.safetensors", tensors)
    report = diffadapt.inspect(file, pipe)
    assert (report.name, report.used, report.unused) == ("pixel", len(tensors), [])
    assert len(pipe.adapters) == 0
    without_target = diffadapt.inspect(file)
    assert (without_target.format, without_target.used) == ("kohya", len(tensors))


def test_the_report_says_what_was_loaded_where(tmp_path: Path) -> None:
    pipe = models.sd15()
    parts = loras.parts_for(pipe)
    file = files.write(tmp_path / "pixel.safetensors", spellings.peft_names(parts), {"trigger": "pxl"})
    report = pipe.load_adapter(file)
    assert (report.name, report.format, report.family) == ("pixel", "diffusers", "sd")
    assert report.metadata == {"trigger": "pxl"}
    text = str(report)
    for word in ("pixel", "diffusers", "sd", "lora", "unet", "text_encoder", str(report.used)):
        assert word in text


def test_state_dicts_get_numbered_names() -> None:
    pipe = models.sd15()
    tensors = spellings.peft_names(loras.parts_for(pipe))
    assert [pipe.load_adapter(tensors).name for _ in range(3)] == ["default_0", "default_1", "default_2"]


def test_a_name_in_use_is_refused(tmp_path: Path) -> None:
    pipe = models.sd15()
    file = files.write(tmp_path / "pixel.safetensors", spellings.peft_names(loras.parts_for(pipe)))
    pipe.load_adapter(file)
    for name in (None, "pixel"):
        with pytest.raises(diffadapt.AdapterError, match="'pixel'"):
            pipe.load_adapter(file, name)
    assert pipe.adapters.names == ["pixel"]


@pytest.mark.slow
def test_load_adapter_takes_scale_and_activate() -> None:
    parts = loras.parts_for(models.sd15())
    tensors = spellings.peft_names(parts)
    pipe = models.sd15()
    base = draw(pipe)
    pipe.load_adapter(tensors, "idle", activate=False)
    assert torch.equal(draw(pipe), base)
    pipe.load_adapter(tensors, "half", scale=0.5)
    assert pipe.adapters.active == {"half": 0.5}
    assert_same(draw(pipe), baked(models.sd15, parts, 0.5))


@pytest.mark.slow
def test_load_adapter_takes_a_scale_by_component() -> None:
    pipe = models.sd15()
    parts = loras.parts_for(pipe)
    pipe.load_adapter(spellings.peft_names(parts), scale={"unet": 0.5, "text_encoder": 0.0})
    assert_same(draw(pipe), baked(models.sd15, {"unet": parts["unet"]}, 0.5))


@pytest.mark.slow
def test_components_restricts_where_an_adapter_is_loaded() -> None:
    pipe = models.sd15()
    parts = loras.parts_for(pipe)
    report = pipe.load_adapter(spellings.peft_names(parts), components=["unet"])
    assert list(report.components) == ["unet"]
    assert {key.split(".")[0] for key, _ in report.unused} == {"text_encoder"}
    assert_same(draw(pipe), baked(models.sd15, {"unet": parts["unet"]}))


def test_an_unknown_component_is_refused() -> None:
    pipe = models.sd15()
    with pytest.raises(diffadapt.AdapterError, match=r"text_encoder_2.*unet"):
        pipe.load_adapter(spellings.peft_names(loras.parts_for(pipe)), components=["text_encoder_2"])
    file = spellings.peft_names(loras.parts_for(pipe, ("unet",), "to_q"))
    with pytest.raises(diffadapt.LoadError, match=r"has nothing for these components(.|\n)*component unet was"):
        pipe.load_adapter(file, components=["text_encoder"])


@pytest.mark.slow
def test_a_loaded_adapter_becomes_active_next_to_the_others() -> None:
    pipe = models.sd15()
    unet, text = (loras.parts_for(pipe, (name,)) for name in ("unet", "text_encoder"))
    pipe.load_adapter(spellings.peft_names(unet), "one")
    pipe.load_adapter(spellings.kohya_names(text), "two", scale=0.5)
    assert pipe.adapters.active == {"one": 1.0, "two": 0.5}
    expected = loras.bake(loras.bake(models.sd15(), unet), text, 0.5)
    assert_same(draw(pipe), draw(expected))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_adapter_is_loaded_in_the_given_dtype(dtype: torch.dtype) -> None:
    pipe = models.sd15()
    base, parts = draw(pipe), loras.parts_for(pipe)
    pipe.load_adapter(spellings.peft_names(parts), "a", dtype=dtype)
    adapted = {parameter.dtype for parameter in pipe.adapters["a"].components["unet"].parameters()}
    assert adapted == {dtype}
    assert_differs(draw(pipe), base)
    assert_same(draw(pipe), baked(models.sd15, parts), 1e-5 if dtype == torch.float32 else 5e-2)


def test_the_default_dtype_is_that_of_the_model() -> None:
    pipe = models.sd15().to(torch.bfloat16)
    pipe.load_adapter(spellings.peft_names(loras.parts_for(pipe)), "a")
    assert {parameter.dtype for parameter in pipe.adapters["a"].components["unet"].parameters()} == {torch.bfloat16}


def test_loading_leaves_requires_grad_alone() -> None:
    pipe = models.sd15()
    pipe.text_encoder.requires_grad_(False)
    before = {name: p.requires_grad for m in (pipe.unet, pipe.text_encoder) for name, p in m.named_parameters()}
    pipe.load_adapter(spellings.peft_names(loras.parts_for(pipe)), "a")
    after = {name: p.requires_grad for m in (pipe.unet, pipe.text_encoder) for name, p in m.named_parameters()}
    assert {name: after[name] for name in before} == before
    loaded = pipe.adapters["a"].components.values()
    assert not any(parameter.requires_grad for adapter in loaded for parameter in adapter.parameters())


def test_a_pipeline_without_lora_support_of_its_own_gets_adapters() -> None:
    def build() -> DDPMPipeline:
        torch.manual_seed(0)
        unet = UNet2DModel(
            sample_size=8,
            block_out_channels=(8, 8),
            norm_num_groups=4,
            attention_head_dim=4,
            layers_per_block=1,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        )
        return DDPMPipeline(unet.eval(), DDPMScheduler())

    def picture(pipe: DDPMPipeline) -> Tensor:
        pipe.set_progress_bar_config(disable=True)
        images = pipe(num_inference_steps=2, output_type="np", generator=torch.Generator().manual_seed(0)).images
        return torch.from_numpy(images)

    pipe = build()
    base, parts = picture(pipe), loras.parts_for(pipe, ("unet",), rf"{loras.ATTENTION}|conv1")
    pipe.load_adapter(spellings.peft_names(parts))
    assert_differs(picture(pipe), base)
    assert_same(picture(pipe), picture(loras.bake(build(), parts)))


@pytest.mark.slow
def test_a_modular_pipeline_gets_adapters() -> None:
    pipe = models.sdxl_modular()
    base = draw(pipe)
    parts = loras.parts_for(pipe, tuple(spellings.SDXL_PREFIXES))
    report = pipe.load_adapter(spellings.kohya_names(parts, spellings.SDXL_PREFIXES), "a")
    assert report.components == {name: len(layers) for name, layers in parts.items()}
    picture = draw(pipe)
    assert_differs(picture, base)
    assert_same(picture, draw(loras.bake(models.sdxl_modular(), parts)))
    pipe.adapters.clear()
    assert torch.equal(draw(pipe), base)


@pytest.mark.slow
def test_a_single_model_takes_its_part_of_a_file() -> None:
    pipe = models.sd15()
    parts = loras.parts_for(pipe)
    report = diffadapt.load_adapter(pipe.unet, spellings.peft_names(parts), name="pixel")
    assert list(report.components) == ["unet"]
    assert diffadapt.adapters(pipe.unet).names == ["pixel"]
    assert_same(draw(pipe), baked(models.sd15, {"unet": parts["unet"]}))


@pytest.mark.slow
def test_a_file_without_a_component_in_its_names_loads_into_a_single_model() -> None:
    pipe = models.sd15()
    parts = loras.parts_for(pipe, ("unet",))
    diffadapt.load_adapter(pipe.unet, spellings.peft_names(parts, prefix=""))
    assert_same(draw(pipe), baked(models.sd15, parts))


@pytest.mark.slow
def test_a_new_adapter_changes_nothing_at_first_and_trains() -> None:
    pipe = models.sd15()
    base = draw(pipe)
    pipe.unet.requires_grad_(False)
    config = diffadapt.LoraConfig(rank=4, alpha=8, target_modules=["to_q", "to_out.0"])
    adapter = diffadapt.add_adapter(pipe.unet, config, name="new")
    assert torch.equal(draw(pipe), base)
    assert pipe.adapters.names == ["new"]
    assert all(parameter.requires_grad for parameter in adapter.parameters())
    optimizer = torch.optim.SGD(adapter.parameters(), lr=10.0)
    pipe.unet(torch.randn(1, 4, 8, 8), 1, torch.randn(1, 4, models.WIDTH)).sample.square().sum().backward()
    optimizer.step()
    assert_differs(draw(pipe), base, 1e-4)
    assert all(parameter.grad is None for name, parameter in pipe.unet.named_parameters() if "diffadapt" not in name)


def test_a_pattern_that_matches_nothing_is_refused() -> None:
    unet = models.unet_sd15()
    with pytest.raises(diffadapt.AdapterError, match=r"to_queue.*to_q"):
        diffadapt.add_adapter(unet, diffadapt.LoraConfig(rank=4, target_modules=["to_queue"]))


def test_a_layer_that_is_never_called_is_refused() -> None:
    model = nn.Sequential(nn.MultiheadAttention(8, 2))
    with pytest.raises(diffadapt.AdapterError, match="MultiheadAttention"):
        diffadapt.add_adapter(model, diffadapt.LoraConfig(rank=2, target_modules=["out_proj"]))
    state = {"0.out_proj.lora_A.weight": torch.zeros(2, 8), "0.out_proj.lora_B.weight": torch.zeros(8, 2)}
    with pytest.raises(diffadapt.AdapterError, match="MultiheadAttention"):
        diffadapt.load_adapter(model, state)
