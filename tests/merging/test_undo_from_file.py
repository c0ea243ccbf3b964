"""Merging without copies: the original weights are read again from the files that the model came from."""

import io
import os
import pickle
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from accelerate import cpu_offload
from diffusers import DiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file

import diffadapt
from diffadapt.merging.undo_by_correction import UndoByCorrection
from diffadapt.merging.undo_from_file import UndoFromFile
from diffadapt.runtime.bank import bank_of
from diffadapt.runtime.undo import UndoByCopy
from tests.support import loras, models, spellings
from tests.support.compare import assert_differs, assert_same, assert_unchanged, snapshot
from tests.support.hub import hub_cache
from tests.support.small_models import predict, unet
from tests.support.swaps import CONFIGS, ON_CONVOLUTIONS, make
from tests.support.versions import at_least

pytestmark = pytest.mark.slow

ALL = CONFIGS | ON_CONVOLUTIONS
NAME = "diffusion_pytorch_model.safetensors"


def saved(folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Path:
    """Save a small UNet, and return its folder."""
    unet().to(dtype).save_pretrained(folder, **options)
    return folder


def loaded(folder: Path, dtype: torch.dtype = torch.float32) -> UNet2DConditionModel:
    """Load that UNet into separate memory; diffusers would map the file into memory until a weight is written."""
    named = "dtype" if at_least("diffusers", "0.40") else "torch_dtype"
    model = UNet2DConditionModel.from_pretrained(folder, **{named: dtype}).eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


@torch.no_grad()
@pytest.mark.parametrize(
    ("stored", "dtype"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.bfloat16),
        (torch.float16, torch.bfloat16),
        (torch.float16, torch.float32),
        (torch.float64, torch.float64),
    ],
    ids=str,
)
def test_every_type_is_undone_and_swapped_without_copies(
    stored: torch.dtype, dtype: torch.dtype, tmp_path: Path
) -> None:
    folder = saved(tmp_path / "unet", stored)
    model, copied = loaded(folder, dtype), loaded(folder, dtype)
    before = snapshot(model)
    sources = {name: make(unet, ALL[name], tmp_path / name) for name in ALL if name not in ("lora with a bias", "full")}
    first, *others = sources
    for owner in (model, copied):
        diffadapt.load_adapter(owner, sources[first], "a", scale=0.1)
    adapters, expected = diffadapt.adapters(model), diffadapt.adapters(copied)
    adapters.merge("a", base_files=True)
    expected.merge("a", compact=False)
    for name in (first, *others):
        if name != first:
            adapters.hotswap("a", sources[name])
            expected.hotswap("a", sources[name])
        assert adapters.undo_bytes == 0
        pairs = zip(model.state_dict().items(), copied.state_dict().values(), strict=True)
        assert all(torch.equal(mine, its) for (_, mine), its in pairs)
        assert any(not torch.equal(value, before[f"model.state.{key}"]) for key, value in model.state_dict().items())
    with adapters.disabled():
        assert all(torch.equal(value, before[f"model.state.{key}"]) for key, value in model.state_dict().items())
    assert adapters.undo_bytes == 0
    adapters.clear()
    assert_unchanged(model, before)


@torch.no_grad()
@pytest.mark.parametrize("form", ["remembered", "pipeline", "folders", "files", "shards"])
def test_the_files_are_found_in_every_form_of_base_files(form: str, tmp_path: Path) -> None:
    options = {"max_shard_size": "20KB"} if form == "shards" else {}
    models.sd15().save_pretrained(tmp_path, **options)
    pipe = DiffusionPipeline.from_pretrained(tmp_path)
    before = snapshot(pipe)
    parts = loras.parts_for(pipe)
    pipe.load_adapter(spellings.kohya_names(parts), "a", scale=0.5)
    given: dict[str, Any] = {
        "remembered": True,
        "shards": True,
        "pipeline": tmp_path,
        "folders": {"unet": tmp_path / "unet", "text_encoder": str(tmp_path / "text_encoder")},
        "files": {"unet": tmp_path / "unet" / NAME, "text_encoder": tmp_path / "text_encoder/model.safetensors"},
    }
    assert (len(list((tmp_path / "unet").glob("*.safetensors"))) > 1) == (form == "shards")
    pipe.adapters.merge(base_files=given[form])
    ways = {type(way) for model in (pipe.unet, pipe.text_encoder) for way in bank_of(model).undo}
    assert (pipe.adapters.undo_bytes, ways) == (0, {UndoFromFile})
    pipe.adapters.unmerge()
    pipe.adapters.merge(base_files={"unet": tmp_path / "unet"})
    assert {type(way) for way in bank_of(pipe.unet).undo} == {UndoFromFile}
    assert {type(way) for way in bank_of(pipe.text_encoder).undo} == {UndoByCopy}
    pipe.adapters.clear()
    assert_unchanged(pipe, before)


def test_the_files_of_a_model_from_the_hub_are_found_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = hub_cache(tmp_path / "hub", "someone/pixel", f"unet/{NAME}", load_file(saved(tmp_path / "unet") / NAME))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    model = loaded(tmp_path / "unet")
    model.register_to_config(_name_or_path="someone/pixel")
    diffadapt.load_adapter(model, make(unet, ALL["lora"], tmp_path / "a"), "a")
    adapters = diffadapt.adapters(model)
    adapters.merge(base_files=True)
    assert adapters.undo_bytes == 0
    adapters.unmerge()
    model.register_to_config(_name_or_path="someone/else")
    with pytest.raises(diffadapt.AdapterError, match=r"does not say what folder.*someone/else"):
        adapters.merge(base_files=True)
    assert adapters.merged == []


def test_weights_under_original_names_are_found_by_their_endings_and_values(tmp_path: Path) -> None:
    """The ending alone is not unique: every block has a `transformer_blocks.0.attn1.to_q`."""
    model = models.unet_sd15(2).requires_grad_(False)
    prefixes: dict[str, str] = {}
    tensors = {}
    for key, tensor in model.state_dict().items():
        block, _, rest = key.partition("transformer_blocks.")
        ending = f"transformer_blocks.{rest}" if rest else key.replace(".", "_")
        prefix = prefixes.setdefault(block, f"model.diffusion_model.blocks.{len(prefixes)}") if rest else "model"
        tensors[f"{prefix}.{ending}"] = tensor.clone()
    assert len(prefixes) > 2
    save_file(tensors, tmp_path / "single.safetensors")
    before = snapshot(model)
    config = diffadapt.LoraConfig(rank=2, target_modules=r".*\.(to_q|proj_in)", init=False)
    diffadapt.add_adapter(model, config, "a").requires_grad_(False)
    adapters = diffadapt.adapters(model)
    adapters.merge(base_files=tmp_path / "single.safetensors")
    ways = bank_of(model).undo
    assert {type(way) for way in ways} == {UndoFromFile, UndoByCopy}
    assert {way.key.rpartition("transformer_blocks")[0] for way in ways if isinstance(way, UndoFromFile)} == {
        f"{prefix}." for prefix in prefixes.values()
    }
    adapters.clear()
    assert_unchanged(model, before)


@torch.no_grad()
@pytest.mark.parametrize("compact", [None, True, False])
def test_weights_that_differ_from_the_file_are_copied(compact: bool | None, tmp_path: Path) -> None:
    model = loaded(saved(tmp_path / "unet", torch.bfloat16), torch.bfloat16)
    diffadapt.load_adapter(model, make(unet, ALL["lora"], tmp_path / "a"), "a", scale=0.05)
    weights = [host.get_parameter("weight") for host in bank_of(model).hosts.values()]
    weights[0][-1, -1] += 1
    # The same number with other bits.
    weights[1][0, 0] = -0.0
    before = snapshot(model)
    adapters = diffadapt.adapters(model)
    adapters.merge(base_files=True, compact=compact)
    ways = [type(way) for way in bank_of(model).undo]
    assert ways == [UndoByCopy if compact is False else UndoByCorrection] * 2 + [UndoFromFile] * (len(weights) - 2)
    assert 0 < adapters.undo_bytes <= weights[0].nbytes + weights[1].nbytes
    adapters.unmerge()
    assert_unchanged(model, before)


@torch.no_grad()
@pytest.mark.parametrize("change", ["deleted", "replaced", "written", "cut off"])
def test_a_file_that_changes_after_merging_is_read_if_it_still_can_be(change: str, tmp_path: Path) -> None:
    model = loaded(saved(tmp_path / "unet"))
    diffadapt.load_adapter(model, make(unet, ALL["lora"], tmp_path / "a"), "a", scale=0.5)
    before, file = snapshot(model), tmp_path / "unet" / NAME
    adapters = diffadapt.adapters(model)
    adapters.merge(base_files=file)
    merged = predict(model)
    if change == "deleted":
        file.unlink()
    elif change == "replaced":
        other = tmp_path / "other.safetensors"
        save_file({key: tensor + 1 for key, tensor in load_file(file).items()}, other)
        os.replace(other, file)
    elif change == "cut off":
        os.truncate(file, 100)
    else:
        with file.open("r+b") as opened:
            opened.seek(-8, os.SEEK_END)
            opened.write(b"12345678")
        os.utime(file, ns=(0, 0))
    if change in ("deleted", "replaced"):
        adapters.unmerge()
        assert_unchanged(model, before)
        return
    with pytest.raises(diffadapt.AdapterError, match=r"cannot be read from .* any more"):
        adapters.unmerge()
    assert adapters.merged == ["a"]
    assert torch.equal(predict(model), merged)
    with pytest.raises(diffadapt.AdapterError, match="cannot be read from"):
        adapters.hotswap("a", make(unet, ALL["loha"], tmp_path / "b"))
    assert torch.equal(predict(model), merged)


def unreadable(file: Path) -> dict[str, Any]:
    file.unlink()
    file.symlink_to(file)
    return {"base_files": file.parent, "match": "no .safetensors file"}


def damaged(file: Path) -> dict[str, Any]:
    file.write_bytes(file.read_bytes()[:-10])
    return {"base_files": file, "match": "not a readable safetensors file"}


@pytest.mark.parametrize(
    "fault",
    [
        lambda file: {"base_files": file.parent / "nowhere", "match": "no .safetensors file for unet"},
        lambda file: {"base_files": {"vae": file}, "match": "no component vae"},
        lambda file: {"base_files": other_model(file.parent.parent), "match": "none of the weights of unet"},
        damaged,
        unreadable,
    ],
    ids=["nowhere", "component", "other model", "damaged", "unreadable"],
)
def test_unusable_files_are_refused_before_anything_changes(
    fault: Callable[[Path], dict[str, Any]], tmp_path: Path
) -> None:
    model = loaded(saved(tmp_path / "unet"))
    diffadapt.load_adapter(model, make(unet, ALL["lora"], tmp_path / "a"), "a")
    before, options = snapshot(model), fault(tmp_path / "unet" / NAME)
    with pytest.raises(diffadapt.AdapterError, match=options.pop("match")):
        diffadapt.adapters(model).merge("a", **options)
    assert_unchanged(model, before)
    assert diffadapt.adapters(model).merged == []


def other_model(folder: Path) -> Path:
    models.vae().save_pretrained(folder / "vae")
    return folder / "vae"


@torch.no_grad()
def test_a_merge_that_fails_halfway_changes_nothing(tmp_path: Path) -> None:
    model = loaded(saved(tmp_path / "unet", torch.float16), torch.float16)
    diffadapt.load_adapter(model, make(unet, ALL["lora"], tmp_path / "a"), "a", scale=0.1)
    diffadapt.load_adapter(model, make(unet, ALL["lora elsewhere"], tmp_path / "b"), "b", scale=0.1)
    adapters, first = diffadapt.adapters(model), snapshot(model)
    last = list(bank_of(model).adapters["b"].layers.values())[-1]
    right = [tensor.clone() for tensor in last.tensors.values()]
    for stack in (False, True):
        if stack:
            adapters.merge("a", base_files=True)
        before = snapshot(model)
        for tensor in last.tensors.values():
            tensor.mul_(1e4)
        with pytest.raises(diffadapt.AdapterError, match="cannot hold"):
            adapters.merge("b", base_files=True)
        for tensor, content in zip(last.tensors.values(), right, strict=True):
            tensor.copy_(content)
        assert_unchanged(model, before)
        assert adapters.merged == (["a"] if stack else [])
        assert adapters.undo_bytes == 0
    adapters.merge("b", base_files=True)
    assert {type(way) for way in bank_of(model).undo} == {UndoFromFile}
    adapters.unmerge()
    assert_unchanged(model, first)


@torch.no_grad()
@pytest.mark.parametrize("compact", [True, False])
def test_the_file_of_a_fully_merged_model_is_recognised_by_its_original_weights(compact: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(32, 48, bias=False)).requires_grad_(False)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    before = snapshot(model)
    for name in ("a", "b"):
        diffadapt.add_adapter(model, diffadapt.LoraConfig(rank=2, target_modules=["0"], init=False), name)
    adapters = diffadapt.adapters(model)
    adapters.merge("a", compact=compact)
    adapters.merge("b", base_files=tmp_path / "model.safetensors")
    assert adapters.merged == ["a", "b"]
    adapters.clear()
    assert_unchanged(model, before)


@torch.no_grad()
def test_copies_of_a_merged_model_restore_their_weights(tmp_path: Path) -> None:
    model = loaded(saved(tmp_path / "unet"))
    base = predict(model)
    diffadapt.load_adapter(model, make(unet, ALL["oft"], tmp_path / "a"), "a", scale=0.5)
    diffadapt.adapters(model).merge("a", base_files=True)
    assert_differs(predict(model), base, 1e-4)
    copied, content = deepcopy(model), pickle.dumps(model)
    # A pickle may be read on another machine.
    torch.save(model, buffer := io.BytesIO())
    assert {type(way) for way in bank_of(copied).undo} == {UndoFromFile}
    diffadapt.adapters(model).clear()
    (tmp_path / "unet" / NAME).unlink()
    buffer.seek(0)
    for other in (model, copied, pickle.loads(content), torch.load(buffer, weights_only=False)):
        if other is not model:
            assert_differs(predict(other), base, 1e-4)
            diffadapt.adapters(other).clear()
        assert torch.equal(predict(other), base)


@torch.no_grad()
def test_original_weights_are_read_when_they_are_needed(tmp_path: Path) -> None:
    folder = saved(tmp_path / "unet")
    oft, lora = (make(unet, ALL[name], tmp_path / name) for name in ("oft", "conv loha"))
    expected = loaded(folder)
    diffadapt.load_adapter(expected, oft, "a", scale=0.5)
    diffadapt.adapters(expected).to_lora({"a": 1.0}, "b", rank=3)
    model = loaded(folder)
    adapters = diffadapt.adapters(model)
    diffadapt.load_adapter(model, oft, "a", scale=0.5)
    adapters.merge("a", base_files=True)
    adapters.to_lora({"a": 1.0}, "b", rank=3)
    pairs = [list(diffadapt.adapters(owner)["b"].components["unet"].parameters()) for owner in (model, expected)]
    assert all(torch.equal(mine, other) for mine, other in zip(*pairs, strict=True))
    # A later merge without files keeps copies; weights merged before are still read.
    diffadapt.load_adapter(model, lora, "c", scale=0.5)
    adapters.merge("c")
    assert {type(way) for way in bank_of(model).undo} == {UndoFromFile, UndoByCopy}
    merged = predict(model)
    adapters.unmerge()
    assert_same(predict(model), merged)


@torch.no_grad()
@pytest.mark.parametrize("form", ["compiled", "layerwise casting", "group offloading", "sequential offloading"])
def test_compiled_casting_and_offloaded_models_are_undone(form: str, tmp_path: Path) -> None:
    model: Any = loaded(saved(tmp_path / "unet"))
    cpu = torch.device("cpu")
    if form == "compiled":
        model = torch.compile(model, backend="eager")
    elif form == "layerwise casting":
        model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    elif form == "group offloading":
        model.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type="leaf_level")
    else:
        cpu_offload(model, execution_device=cpu)
    base = predict(model)
    diffadapt.load_adapter(model, make(unet, ALL["lora"], tmp_path / "a"), "a", scale=2.0)
    adapters = diffadapt.adapters(model)
    adapters.merge("a", base_files=True)
    assert adapters.undo_bytes == 0
    merged = predict(model)
    assert_differs(merged, base, 1e-3)
    adapters.hotswap("a", make(unet, ALL["loha"], tmp_path / "b"))
    assert_differs(predict(model), merged, 1e-3)
    assert adapters.undo_bytes == 0
    adapters.clear()
    assert torch.equal(predict(model), base)
