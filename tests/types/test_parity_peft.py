"""A LoRA file draws the same picture here and in plain diffusers with peft, whoever wrote it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from tests.support import files, loras, models, spellings
from tests.support.compare import assert_differs, assert_same
from tests.support.models import draw

pytestmark = pytest.mark.slow

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0", "q_proj", "k_proj", "v_proj", "out_proj"]
CONVOLUTIONS = ["conv1", "conv2", "conv_shortcut", "time_emb_proj", "proj_in"]
FEED_FORWARD = ["ff.net.0.proj", "ff.net.2", "proj_mlp", "fc1", "fc2"]


@dataclass(frozen=True)
class Case:
    build: Callable[[], DiffusionPipeline]
    components: tuple[str, ...]
    targets: list[str]


CASES = {
    "sd15": Case(models.sd15, ("unet", "text_encoder"), ATTENTION),
    "sd15 convolutions": Case(models.sd15, ("unet",), CONVOLUTIONS),
    "sdxl": Case(models.sdxl, ("unet", "text_encoder", "text_encoder_2"), ATTENTION),
    "sd3": Case(models.sd3, ("transformer", "text_encoder", "text_encoder_2"), [*ATTENTION, *FEED_FORWARD]),
    "flux": Case(models.flux, ("transformer", "text_encoder"), [*ATTENTION, *FEED_FORWARD]),
}


@pytest.fixture(params=CASES.values(), ids=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


def write_with_peft(case: Case, folder: Path, with_metadata: bool, **options: Any) -> None:
    """Write a file as diffusers' training scripts do, with random factors."""
    pipe = case.build()
    arguments: dict[str, Any] = {}
    for component in case.components:
        model = getattr(pipe, component)
        present = [name for name in case.targets if any(path.endswith(f".{name}") for path, _ in model.named_modules())]
        config = peft.LoraConfig(r=4, lora_alpha=6, init_lora_weights=False, target_modules=present, **options)
        model.add_adapter(config)
        arguments[f"{component}_lora_layers"] = peft.get_peft_model_state_dict(model, adapter_name="default")
        if with_metadata:
            arguments[f"{component}_lora_adapter_metadata"] = model.peft_config["default"].to_dict()
    type(pipe).save_lora_weights(folder, **arguments)


def drawn_by_diffusers(build: Callable[[], DiffusionPipeline], source: Any, **options: Any) -> Tensor:
    pipe = build()
    pipe.load_lora_weights(source)
    return draw(pipe, **options)


@pytest.mark.parametrize("with_metadata", [True, False], ids=["alpha in metadata", "no alpha"])
def test_a_file_of_diffusers_draws_the_same(case: Case, with_metadata: bool, tmp_path: Path) -> None:
    write_with_peft(case, tmp_path, with_metadata)
    expected = drawn_by_diffusers(case.build, tmp_path)
    pipe = case.build()
    base = draw(pipe)
    report = pipe.load_adapter(tmp_path)
    assert set(report.components) == set(case.components)
    assert_differs(expected, base)
    assert_same(draw(pipe), expected)


@pytest.mark.parametrize(
    "options",
    [
        {"use_rslora": True},
        {"lora_bias": True},
        {"rank_pattern": {"attn1.to_q": 7}, "alpha_pattern": {"attn1.to_q": 2, "attn2.to_k": 9}},
    ],
    ids=["rank stabilised", "bias", "patterns"],
)
# peft mistakes a LoRA bias for a factor that lost a dimension.
@pytest.mark.filterwarnings("ignore:.*LoRA tensor.*have invalid shape:peft.utils.warning.PeftWarning")
def test_settings_in_the_metadata_are_followed(options: dict[str, Any], tmp_path: Path) -> None:
    # peft warns if a layer without a bias gets one.
    case = Case(models.sd15, ("unet",), ["to_out.0", "proj_in"] if "lora_bias" in options else ATTENTION[:4])
    write_with_peft(case, tmp_path, True, **options)
    expected = drawn_by_diffusers(case.build, tmp_path)
    pipe = case.build()
    assert_differs(expected, draw(pipe))
    pipe.load_adapter(tmp_path)
    assert_same(draw(pipe), expected)


def test_a_folder_of_peft_has_the_same_output(tmp_path: Path) -> None:
    unet = models.sd15().unet
    inputs = torch.randn(1, 4, 8, 8), 1, torch.randn(1, 4, models.WIDTH)
    base = unet(*inputs).sample
    config = peft.LoraConfig(r=4, lora_alpha=6, init_lora_weights=False, target_modules=ATTENTION[:4])
    adapted = peft.get_peft_model(unet, config)
    expected = adapted(*inputs).sample
    adapted.save_pretrained(tmp_path)
    pipe = models.sd15()
    assert pipe.load_adapter(tmp_path).format == "peft"
    assert_differs(expected, base)
    assert_same(pipe.unet(*inputs).sample, expected)


@pytest.mark.parametrize(("family", "prefixes"), [("sd15", spellings.SD_PREFIXES), ("sdxl", spellings.SDXL_PREFIXES)])
def test_a_kohya_file_with_one_alpha_draws_the_same(family: str, prefixes: dict[str, str]) -> None:
    build = models.FAMILIES[family]
    parts = loras.parts_for(build(), tuple(prefixes), alpha=lambda index: 6.0)
    tensors = spellings.kohya_names(parts, prefixes)
    expected = drawn_by_diffusers(build, tensors)
    pipe = build()
    assert_differs(expected, draw(pipe))
    pipe.load_adapter(tensors)
    assert_same(draw(pipe), expected)


@pytest.mark.parametrize("family", models.FAMILIES)
def test_a_saved_file_draws_the_same_in_diffusers(family: str, tmp_path: Path) -> None:
    build = models.FAMILIES[family]
    pipe = build()
    names = ("unet", "transformer", "text_encoder", "text_encoder_2")
    # Plain diffusers does not support LoRA on T5.
    components = tuple(name for name in names if hasattr(pipe, name) and not (family == "flux" and name[-1] == "2"))
    parts = loras.parts_for(pipe, components, alpha=loras.varied_alpha)
    base = draw(pipe)
    source = files.write(tmp_path / "in.safetensors", spellings.peft_names(parts), spellings.alpha_metadata(parts))
    pipe.load_adapter(source, "a")
    picture = draw(pipe)
    assert_differs(picture, base)
    pipe.adapters.save("a", tmp_path / "out", format="diffusers")
    assert_same(drawn_by_diffusers(build, tmp_path / "out"), picture)


def test_a_saved_file_with_convolutions_draws_the_same_in_diffusers(tmp_path: Path) -> None:
    pipe = models.sd15()
    parts = loras.parts_for(pipe, ("unet",), "conv1|conv2|proj_in|proj_out|to_q", alpha=loras.varied_alpha)
    pipe.load_adapter(spellings.kohya_names(parts), "a")
    picture = draw(pipe)
    pipe.adapters.save("a", tmp_path, format="diffusers")
    assert_differs(picture, draw(models.sd15()))
    assert_same(drawn_by_diffusers(models.sd15, tmp_path), picture)


@pytest.mark.parametrize(("family", "prefixes"), [("sd15", spellings.SD_PREFIXES), ("sdxl", spellings.SDXL_PREFIXES)])
def test_a_saved_kohya_file_draws_the_same_in_diffusers(family: str, prefixes: dict[str, str], tmp_path: Path) -> None:
    build = models.FAMILIES[family]
    pipe = build()
    base = draw(pipe)
    parts = loras.parts_for(pipe, tuple(prefixes), alpha=lambda index: 6.0)
    source = files.write(tmp_path / "in.safetensors", spellings.peft_names(parts), spellings.alpha_metadata(parts))
    pipe.load_adapter(source, "a")
    picture = draw(pipe)
    assert_differs(picture, base)
    file = pipe.adapters.save("a", tmp_path / "out.safetensors", format="kohya")
    assert_same(drawn_by_diffusers(build, file), picture)


@pytest.mark.parametrize("family", ["sd15", "flux"])
def test_the_call_scale_has_the_same_effect(family: str, tmp_path: Path) -> None:
    case = CASES[family]
    write_with_peft(case, tmp_path, True)
    keyword = "cross_attention_kwargs" if family == "sd15" else "joint_attention_kwargs"
    options = {keyword: {"scale": 0.5}}
    expected = drawn_by_diffusers(case.build, tmp_path, **options)
    pipe = case.build()
    pipe.load_adapter(tmp_path)
    assert_differs(draw(pipe), expected)
    assert_same(draw(pipe, **options), expected)
