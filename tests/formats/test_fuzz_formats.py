"""One fault in a file of every dialect and every type: it is reported by name, and nothing is changed."""

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

import diffadapt
from diffadapt import AdapterError
from tests.support import files, loras, models, spellings
from tests.support.compare import assert_unchanged, snapshot
from tests.support.spellings import DIALECTS, OF_DENOISERS

pytestmark = pytest.mark.slow

Tensors = dict[str, Tensor]

FORMATS = ("diffusers", "peft", "kohya", "comfy", "onetrainer")
LAYERS = r"(down_blocks\.1\.attentions\.0\.)?transformer_blocks\.0\.attn1?\.(to_[qkv]|to_out\.0)"
TYPES: dict[str, diffadapt.AdapterConfig] = {
    name: config_class(target_modules=LAYERS, init=False, **settings)
    for name, (config_class, settings) in {
        "lora": (diffadapt.LoraConfig, {"rank": 2}),
        "dora": (diffadapt.LoraConfig, {"rank": 2, "use_dora": True}),
        "dora by input": (diffadapt.LoraConfig, {"rank": 2, "use_dora": True, "dora_axis": "input"}),
        "loha": (diffadapt.LoHaConfig, {"rank": 2}),
        "lokr": (diffadapt.LoKrConfig, {"rank": 1, "factor": 2}),
        "whole lokr": (diffadapt.LoKrConfig, {"full_matrix": True}),
        "oft by input": (diffadapt.OFTConfig, {"block_size": 4}),
        "oft by output": (diffadapt.OFTConfig, {"block_size": 4, "side": "output", "rescale": True}),
        "boft by input": (diffadapt.BOFTConfig, {"block_size": 4}),
        "boft by output": (diffadapt.BOFTConfig, {"block_size": 4, "side": "output", "butterfly_factors": 2}),
        "ia3": (diffadapt.IA3Config, {}),
        "ia3 with bias": (diffadapt.IA3Config, {"scale_bias": True}),
        "glora": (diffadapt.GLoRAConfig, {"rank": 2}),
        "full": (diffadapt.FullConfig, {}),
    }.items()
}
OPTIONAL = ("alpha", "dora_scale", "lora_magnitude_vector", "rescale", "diff_b")
"""Tensors that a file may lack: without one it is another file, not a damaged one."""


# Faults: each changes one tensor of a file, and returns names of which the error message must contain one.


def drop(tensors: Tensors, key: str) -> list[str]:
    del tensors[key]
    return siblings(tensors, key)


def rename(tensors: Tensors, key: str) -> list[str]:
    pairs = (("attn", "attm"), ("blocks", "blokcs"), (":", ":9"))
    old, new = next((old, new) for old, new in pairs if old in key)
    renamed = key.replace(old, new, 1)
    tensors[renamed] = tensors.pop(key)
    return [renamed, *siblings(tensors, key)]


def reshape(tensors: Tensors, key: str) -> list[str]:
    twice = [tensors[key]] * 2
    # A BOFT may have more factors, but not more blocks in a factor.
    tensors[key] = torch.cat(twice, int(tensors[key].ndim == 4)) if tensors[key].ndim else torch.stack(twice)
    return [key, *siblings(tensors, key)]


def integers(tensors: Tensors, key: str) -> list[str]:
    tensors[key] = torch.ones_like(tensors[key], dtype=torch.int32)
    return [key, *siblings(tensors, key)]


def poison(tensors: Tensors, key: str) -> list[str]:
    tensors[key] = tensors[key].clone()
    tensors[key].view(-1)[-1] = float("nan")
    return [key, *siblings(tensors, key)]


FAULTS: dict[str, Callable[[Tensors, str], list[str]]] = {
    "drop": drop,
    "rename": rename,
    "reshape": reshape,
    "integers": integers,
    "NaN": poison,
}


def layer_of(key: str) -> str:
    """Return what the keys of one layer have in common."""
    for mark in (
        ".lora",
        "_lora.",
        "_lora1.",
        "_lora2.",
        ".hada",
        ".lokr",
        ".oft",
        ".boft",
        ".ia3",
        ".a1.",
        ".a2.",
        ".b1.",
        ".b2.",
        ".diff",
    ):
        if mark in key:
            return key[: key.rindex(mark)]
    return key.rpartition("." if "." in key else ":")[0]


def siblings(tensors: Tensors, key: str) -> list[str]:
    return [other for other in tensors if layer_of(other) == layer_of(key)]


def suits(fault: str, key: str, tensors: Tensors) -> bool:
    """Return whether the fault makes the file invalid."""
    tensor = tensors[key]
    if fault == "drop":
        # Without its only tensor, the layer is missing and not damaged.
        return not any(part in OPTIONAL for part in key.split(".")) and len(siblings(tensors, key)) > 1
    if fault == "integers":
        return tensor.is_floating_point() and not key.endswith("alpha")
    return fault != "NaN" or tensor.is_floating_point()


def assert_every_fault_is_refused(
    pipe: DiffusionPipeline, clean: Tensors, seed: str, load: Callable[[Tensors], Any]
) -> None:
    """Assert that each fault is refused at every name of a tensor in the file, in a random layer."""
    before = snapshot(pipe)
    for fault, damage in FAULTS.items():
        names: dict[str, list[str]] = {}
        for key in clean:
            if suits(fault, key, clean):
                names.setdefault(key.removeprefix(layer_of(key)), []).append(key)
        assert names or fault == "drop"
        for name, keys in names.items():
            key = random.Random(f"{seed} {fault} {name}").choice(keys)
            damaged = dict(clean)
            named = damage(damaged, key)
            with pytest.raises(AdapterError) as caught:
                load(damaged)
            found = {fault_key for fault_key, _ in getattr(caught.value, "faults", [])}
            is_named = found & set(named) or any(other in str(caught.value) for other in named)
            assert is_named, (fault, key, caught.value)
        assert_unchanged(pipe, before)


def written(pipe: DiffusionPipeline, name: str, folder: Path) -> Iterator[tuple[str, Path]]:
    """Save the adapter in every format that can express it; yield the format and the file with its tensors."""
    for format in FORMATS:
        try:
            path = pipe.adapters.save(name, folder / format, format=format)
        except AdapterError:
            continue
        yield format, path


@pytest.mark.parametrize("adapter_type", TYPES)
@pytest.mark.parametrize("family", ["sd15", "flux"])
def test_faults_in_every_type_and_format_are_refused(family: str, adapter_type: str, tmp_path: Path) -> None:
    pipe = models.FAMILIES[family]()
    before = snapshot(pipe)
    denoiser = pipe.unet if family == "sd15" else pipe.transformer
    diffadapt.add_adapter(denoiser, TYPES[adapter_type], name="a")
    paths = dict(written(pipe, "a", tmp_path))
    assert paths
    pipe.adapters.clear()
    assert_unchanged(pipe, before)
    for format, path in paths.items():
        clean = load_file(path)
        with safe_open(path, framework="pt") as opened:
            metadata = opened.metadata()

        def load(
            tensors: Tensors,
            path: Path = path,
            source: Path = path if format != "peft" else path.parent,
            metadata: dict[str, str] = metadata,
        ) -> Any:
            files.write(path, tensors, metadata)
            return pipe.load_adapter(source, "b")

        report = load(clean)
        assert (report.used, report.unused) == (len(clean), [])
        pipe.adapters.clear()
        assert_every_fault_is_refused(pipe, clean, f"{family} {adapter_type} {format}", load)


@pytest.mark.parametrize("dialect", [*DIALECTS, *OF_DENOISERS])
@pytest.mark.parametrize("family", ["sdxl", "sd3"])
def test_faults_in_every_dialect_are_refused(family: str, dialect: str) -> None:
    pipe = models.FAMILIES[family]()
    denoiser = "unet" if family == "sdxl" else "transformer"
    components = (denoiser,) if dialect in OF_DENOISERS else (denoiser, "text_encoder", "text_encoder_2")
    parts = loras.parts_for(pipe, components, "to_q|q_proj", alpha=lambda index: 2.0 + index % 3)
    _, write = (DIALECTS | OF_DENOISERS)[dialect]
    assert_every_fault_is_refused(pipe, write(parts, family), f"{family} {dialect}", pipe.load_adapter)


def xlabs(pipe: DiffusionPipeline) -> Tensors:
    width = pipe.transformer.transformer_blocks[0].attn.to_q.in_features
    sizes = {
        "double_blocks.0.processor.qkv_lora1": 3 * width,
        "double_blocks.1.processor.proj_lora2": width,
        "single_blocks.0.processor.qkv_lora": 3 * width,
    }
    tensors: Tensors = {}
    for name, out in sizes.items():
        tensors |= {f"{name}.down.weight": torch.randn(2, width), f"{name}.up.weight": torch.randn(out, 2)}
    return tensors


def cloneofsimo(pipe: DiffusionPipeline) -> Tensors:
    layers = loras.layers_of(pipe.text_encoder, r"[qkv]_proj|out_proj")
    tensors: Tensors = {}
    for index, layer in enumerate(layers.values()):
        tensors[f"text_encoder:{index}:down"] = torch.randn(2, layer.in_features)
        tensors[f"text_encoder:{index}:up"] = torch.randn(layer.out_features, 2)
    return tensors


def processors(pipe: DiffusionPipeline) -> Tensors:
    return spellings.processor_names(loras.parts_for(pipe, ("unet",), r"to_[qkv]|to_out\.0")["unet"])


@pytest.mark.parametrize(("family", "write"), [("flux", xlabs), ("sd15", cloneofsimo), ("sd15", processors)])
def test_faults_in_dialects_of_one_family_are_refused(
    family: str, write: Callable[[DiffusionPipeline], Tensors]
) -> None:
    pipe = models.FAMILIES[family]()
    clean = write(pipe)
    report = pipe.load_adapter(clean, "a")
    assert (report.used, report.unused) == (len(clean), [])
    pipe.adapters.clear()
    assert_every_fault_is_refused(pipe, clean, write.__name__, pipe.load_adapter)
