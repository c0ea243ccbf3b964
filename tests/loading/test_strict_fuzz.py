"""Damaged files: every fault is reported by the name of a tensor, and the pipeline stays the same, bit for bit."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

import diffadapt
from tests.support import files, loras, models, spellings
from tests.support.compare import assert_unchanged, snapshot

pytestmark = pytest.mark.slow

Tensors = dict[str, Tensor]
SPELLINGS: dict[str, Callable[[loras.Parts], Tensors]] = {
    "peft": spellings.peft_names,
    "lora.down": spellings.old_names,
    "kohya": spellings.kohya_names,
    "processors": lambda parts: spellings.processor_names(parts["unet"], "unet."),
}


def clean(pipe: DiffusionPipeline, spelling: str) -> Tensors:
    only_unet = spelling == "processors"
    parts = loras.parts_for(
        pipe,
        ("unet",) if only_unet else ("unet", "text_encoder"),
        r"to_[qkv]|to_out\.0" if only_unet else loras.ATTENTION,
        alpha=loras.varied_alpha,
    )
    return SPELLINGS[spelling](parts)


def assert_refused(pipe: DiffusionPipeline, tensors: Tensors, *named: str) -> None:
    """Assert that a file is refused with one of the names in the message, and that nothing has changed."""
    before = snapshot(pipe)
    with pytest.raises(diffadapt.AdapterError) as caught:
        pipe.load_adapter(tensors, "damaged")
    message = str(caught.value)
    assert any(name in message for name in named), message
    assert "damaged" not in pipe.adapters
    assert_unchanged(pipe, before)


def matrices(tensors: Tensors) -> list[str]:
    return [key for key, tensor in tensors.items() if tensor.ndim > 1]


def layer_of(key: str) -> str:
    """Return the part of a key that all tensors of one layer share."""
    for mark in (".lora", "_lora.", ".alpha"):
        position = key.rfind(mark)
        if position > 0:
            return key[:position]
    return key


# Faults: each changes a file in place at one of its keys, and returns names of which the error must contain one.


def drop(tensors: Tensors, key: str) -> list[str]:
    layer = layer_of(key)
    del tensors[key]
    return [other for other in tensors if layer_of(other) == layer]


def rename(tensors: Tensors, key: str) -> list[str]:
    renamed = key.replace("attn", "attm", 1)
    tensors[renamed] = tensors.pop(key)
    return [renamed, *(other for other in tensors if layer_of(other) == layer_of(key))]


def unknown_suffix(tensors: Tensors, key: str) -> list[str]:
    tensors[f"{layer_of(key)}.gamma"] = torch.zeros(4)
    return [f"{layer_of(key)}.gamma"]


def foreign_tensor(tensors: Tensors, key: str) -> list[str]:
    tensors["optimizer.state.0"] = torch.zeros(4)
    return ["optimizer.state.0"]


def widen(tensors: Tensors, key: str) -> list[str]:
    tensors[key] = torch.cat([tensors[key]] * 2, dim=1)
    return [layer_of(key)]


def lengthen(tensors: Tensors, key: str) -> list[str]:
    tensors[key] = torch.cat([tensors[key]] * 2)
    return [layer_of(key)]


def flatten(tensors: Tensors, key: str) -> list[str]:
    tensors[key] = tensors[key].flatten()
    return [layer_of(key)]


def empty(tensors: Tensors, key: str) -> list[str]:
    tensors[key] = tensors[key][:0]
    return [layer_of(key)]


def add_dimension(tensors: Tensors, key: str) -> list[str]:
    tensors[key] = torch.stack([tensors[key]] * 2)
    return [layer_of(key)]


def poison(value: float) -> Callable[[Tensors, str], list[str]]:
    def apply(tensors: Tensors, key: str) -> list[str]:
        tensors[key] = tensors[key].clone()
        tensors[key].view(-1)[0] = value
        return [layer_of(key)]

    return apply


def integers(tensors: Tensors, key: str) -> list[str]:
    tensors[key] = torch.ones_like(tensors[key], dtype=torch.int32)
    return [layer_of(key)]


FAULTS = {
    "drop": drop,
    "rename": rename,
    "unknown suffix": unknown_suffix,
    "foreign tensor": foreign_tensor,
    "widen": widen,
    "lengthen": lengthen,
    "flatten": flatten,
    "empty": empty,
    "add dimension": add_dimension,
    "NaN": poison(float("nan")),
    "infinity": poison(float("-inf")),
    "integers": integers,
}


@pytest.fixture(scope="module")
def untouched() -> DiffusionPipeline:
    """One pipeline for all refused files, none of which may leave a trace."""
    return models.sd15()


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_one_fault_is_reported_and_changes_nothing(untouched: DiffusionPipeline, spelling: str, fault: str) -> None:
    pipe = untouched
    tensors = clean(pipe, spelling)
    for key in random.Random(f"{spelling} {fault}").sample(matrices(tensors), 3):
        damaged = dict(tensors)
        assert_refused(pipe, damaged, *FAULTS[fault](damaged, key))


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_clean_file_loads_after_a_refused_one(spelling: str) -> None:
    pipe = models.sd15()
    tensors = clean(pipe, spelling)
    damaged = dict(tensors)
    drop(damaged, matrices(tensors)[5])
    before = snapshot(pipe)
    with pytest.raises(diffadapt.AdapterError):
        pipe.load_adapter(damaged)
    report = pipe.load_adapter(tensors, "clean")
    assert (report.used, report.unused) == (len(tensors), [])
    pipe.adapters.clear()
    assert_unchanged(pipe, before)


def test_a_refused_file_leaves_loaded_adapters_alone() -> None:
    pipe = models.sd15()
    tensors = clean(pipe, "peft")
    pipe.load_adapter(tensors, "first", scale=0.5)
    picture = models.draw(pipe)
    damaged = dict(tensors)
    named = drop(damaged, matrices(tensors)[-1])
    assert_refused(pipe, damaged, *named)
    assert pipe.adapters.active == {"first": 0.5}
    assert torch.equal(models.draw(pipe), picture)


def test_a_fault_in_one_component_leaves_the_others_alone() -> None:
    pipe = models.sd15()
    tensors = clean(pipe, "peft")
    key = next(key for key in tensors if key.startswith("text_encoder"))
    assert_refused(pipe, tensors, *drop(tensors, key))


def test_all_faults_are_listed() -> None:
    pipe = models.sd15()
    tensors = clean(pipe, "kohya")
    first, second = matrices(tensors)[0], matrices(tensors)[-1]
    named = [*drop(tensors, first), *drop(tensors, second)]
    with pytest.raises(diffadapt.LoadError) as caught:
        pipe.load_adapter(tensors)
    assert {key for key, _ in caught.value.faults} == set(named)


def test_one_tensor_under_two_names_is_refused() -> None:
    pipe = models.sd15()
    parts = loras.parts_for(pipe)
    for twins in (
        {**spellings.peft_names(parts), **spellings.old_names(parts)},
        {**spellings.peft_names(parts), **spellings.processor_names(loras.parts_for(pipe, ("unet",), "to_q")["unet"])},
    ):
        names = [key for key in twins if key.endswith((".up.weight", "lora_B.weight"))]
        assert_refused(pipe, twins, *names)


def test_one_layer_under_its_own_and_its_original_name_is_refused() -> None:
    pipe = models.sd15_full()
    parts = loras.parts_for(pipe, ("unet",), "to_q")
    ldm = spellings.kohya_names(parts, renamed=files.fixture("ldm_names_sd15")["names"])
    assert_refused(pipe, {**spellings.kohya_names(parts), **ldm}, *ldm)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_alpha_that_is_not_finite_is_refused(value: float) -> None:
    pipe = models.sd15()
    tensors = clean(pipe, "kohya")
    key = next(key for key in tensors if key.endswith(".alpha"))
    tensors[key] = torch.tensor(value)
    assert_refused(pipe, tensors, layer_of(key))


def test_an_alpha_that_is_not_a_single_number_is_refused() -> None:
    pipe = models.sd15()
    tensors = clean(pipe, "kohya")
    key = next(key for key in tensors if key.endswith(".alpha"))
    tensors[key] = torch.ones(3)
    assert_refused(pipe, tensors, layer_of(key))


def test_an_alpha_without_factors_is_refused() -> None:
    pipe = models.sd15()
    tensors = {key: tensor for key, tensor in clean(pipe, "kohya").items() if "mid_block" not in key}
    key = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q.alpha"
    tensors[key] = torch.tensor(1.0)
    assert_refused(pipe, tensors, key)


@pytest.mark.parametrize(
    "tensors",
    [{}, {"weight": torch.zeros(2, 2)}, {"conv_in.weight": torch.zeros(8, 4, 3, 3)}],
    ids=["nothing", "one weight", "a checkpoint"],
)
def test_a_state_dict_that_is_not_an_adapter_is_refused(tensors: Tensors) -> None:
    assert_refused(models.sd15(), tensors, *tensors, "state dict")


def test_a_source_that_is_not_a_state_dict_is_refused() -> None:
    pipe = models.sd15()
    with pytest.raises(diffadapt.AdapterError, match="'a'"):
        pipe.load_adapter({"a": [1.0, 2.0]})  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("made_for", "loaded_into"), [("sdxl", "sd15"), ("sd15", "sdxl"), ("flux", "sd15"), ("flux", "sd3")]
)
def test_an_adapter_for_another_base_model_is_refused(made_for: str, loaded_into: str) -> None:
    source = models.FAMILIES[made_for]()
    denoiser = "unet" if hasattr(source, "unet") else "transformer"
    tensors = spellings.peft_names(loras.parts_for(source, (denoiser,)))
    assert_refused(models.FAMILIES[loaded_into](), tensors, *tensors)


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:6],
        lambda content: content[: len(content) // 2],
        lambda content: content[:-1],
        lambda content: content + b"\0",
        lambda content: b"\xff" * 8 + content[8:],
        lambda content: content[:8] + b"!" + content[9:],
        lambda content: content.replace(b'"F32"', b'"Q99"', 1),
        lambda content: b"<html>not found</html>",
    ],
    ids=["empty", "6 bytes", "half", "one byte short", "one byte long", "length", "header", "dtype", "html"],
)
def test_a_file_with_damaged_bytes_is_refused(damage: Callable[[bytes], bytes], tmp_path: Path) -> None:
    pipe = models.sd15()
    file = files.write(tmp_path / "pixel.safetensors", clean(pipe, "peft"))
    file.write_bytes(damage(file.read_bytes()))
    before = snapshot(pipe)
    with pytest.raises(diffadapt.AdapterError, match=r"pixel\.safetensors"):
        pipe.load_adapter(file)
    assert_unchanged(pipe, before)


@pytest.mark.parametrize("text", ["{", "[]", '{"peft_type": "LORA", "r": 4, "lora_alpha": "four"}'])
def test_a_damaged_adapter_config_is_refused(text: str, tmp_path: Path) -> None:
    pipe = models.sd15()
    parts = loras.parts_for(pipe, ("unet",))
    files.write(tmp_path / "adapter_model.safetensors", spellings.peft_names(parts, "base_model.model."))
    (tmp_path / "adapter_config.json").write_text(text)
    before = snapshot(pipe)
    with pytest.raises(diffadapt.AdapterError, match=r"adapter_config|alpha"):
        pipe.load_adapter(tmp_path)
    assert_unchanged(pipe, before)


@pytest.mark.parametrize("text", ["{", "[]", '{"unet.r": 4, "unet.lora_alpha": [4]}'])
def test_damaged_metadata_is_refused(text: str, tmp_path: Path) -> None:
    pipe = models.sd15()
    parts = loras.parts_for(pipe, ("unet",))
    file = files.write(tmp_path / "a.safetensors", spellings.peft_names(parts), {"lora_adapter_metadata": text})
    before = snapshot(pipe)
    with pytest.raises(diffadapt.AdapterError, match=r"metadata|alpha"):
        pipe.load_adapter(file)
    assert_unchanged(pipe, before)


@pytest.mark.parametrize("fault", ["rename", "foreign tensor", "drop", "NaN", "widen"])
def test_loading_with_strict_false_uses_the_rest_and_lists_the_unused(fault: str) -> None:
    pipe = models.sd15()
    base = models.draw(pipe)
    tensors = clean(pipe, "peft")
    key = matrices(tensors)[4]
    named = FAULTS[fault](tensors, key)
    report = pipe.load_adapter(tensors, strict=False)
    assert report.used + len(report.unused) == len(tensors)
    assert report.unused
    assert any(name in unused for unused, _ in report.unused for name in named)
    assert all(reason for _, reason in report.unused)
    assert not torch.equal(models.draw(pipe), base)


def test_loading_with_strict_false_refuses_a_file_of_which_nothing_fits() -> None:
    source = models.flux()
    tensors = spellings.peft_names(loras.parts_for(source, ("transformer",)))
    pipe = models.sd15()
    before = snapshot(pipe)
    with pytest.raises(diffadapt.AdapterError):
        pipe.load_adapter(tensors, strict=False)
    assert_unchanged(pipe, before)


def test_an_invalid_scale_is_refused_before_anything_is_attached() -> None:
    pipe = models.sd15()
    before = snapshot(pipe)
    for scale in ({"unet.down_block": 0.5}, {"vae": 1.0}, float("nan"), "much"):
        with pytest.raises(diffadapt.AdapterError):
            pipe.load_adapter(clean(pipe, "peft"), scale=scale)  # type: ignore[arg-type]
        assert_unchanged(pipe, before)
