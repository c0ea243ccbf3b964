"""Load, save, load: the same bits in every family, dialect and type; and what peer libraries make of our files.

`scripts/compat_matrix.py` does the same with all layers, and has diffusers read the original files, too.
"""

import json
import re
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file

from diffadapt import AdapterError, LoraConfig, add_adapter
from diffadapt.families import FAMILIES
from diffadapt.formats import FORMATS
from diffadapt.formats.control_lora import CONTROL_LORA
from diffadapt.formats.embeddings import EMBEDDINGS
from diffadapt.formats.faceid import FACEID
from diffadapt.management.manager import Adapters
from diffadapt.management.owner import Owner
from diffadapt.types import TYPES
from tests.support.denoisers import SMALL
from tests.support.dialects import DIALECTS
from tests.support.judge import in_diffusers, judge
from tests.support.listed import FOREIGN, listed, refusal
from tests.support.matrix import KINDS, File, Workbench, file_of, files
from tests.support.variants import TESTED_APART

pytestmark = pytest.mark.slow

OF_PEFT = ("sd", "flux", "qwen")
"""Families that types of PEFT alone are tested with: their files have the model's own names, whatever the family."""

DIALECT = {dialect.name: dialect for dialect in DIALECTS}
REFUSED = "length for every input|new weight of a norm"
"""Why some files cannot be used: a map that joins the outputs of fused layers cannot be split, and new norm weights."""

_benches: dict[str, Workbench] = {}


def bench_of(family: str) -> Workbench:
    return _benches.setdefault(family, Workbench(family))


def made(bench: Workbench, dialect: str, kind: str) -> File:
    file = file_of(bench, DIALECT[dialect], kind)
    assert file is not None
    return file


@pytest.mark.parametrize("family", SMALL)
def test_every_type_in_every_dialect_is_loaded_saved_and_loaded_again(family: str, tmp_path: Path) -> None:
    """The files have one layer of each component, a fused one if the dialect has any."""
    bench = bench_of(family)
    kinds = [kind for kind in KINDS if family in OF_PEFT or not KINDS[kind].of_peft]
    every = [file for dialect in DIALECTS for file in files(bench, dialect, most=1, kinds=kinds)]
    assert every
    for number, file in enumerate(every):
        outcome = judge(bench, file, tmp_path / str(number), peer=False)
        if outcome.loads != "yes":
            assert re.search(REFUSED, outcome.loads), outcome
            continue
        assert outcome.equals == "yes", outcome
        assert not outcome.trips.changed, outcome
        # Other formats store a scale that only PEFT has in a factor, and PEFT cannot express every shape.
        assert outcome.trips.saved or (outcome.dialect, outcome.kind) == ("PEFT folder", "LoKr, whole"), outcome


def test_the_layers_of_two_denoisers_do_not_overwrite_each_other(tmp_path: Path) -> None:
    """For Wan 2.2, sd-scripts and OneTrainer have one file for each denoiser."""
    one, two = (SMALL["wan"].build()["transformer"] for _ in range(2))
    models = {"transformer": one, "transformer_2": two}
    manager = Adapters(Owner(lambda: models))
    for component in models:
        add_adapter(models[component], LoraConfig(rank=2, target_modules=["to_q"], init=False), "a")
    for format in ("kohya", "comfy", "onetrainer"):
        with pytest.raises(AdapterError, match=r"transformer_2.*(one by one|has its name in this format|no name)"):
            manager.save("a", tmp_path / "refused.safetensors", format)
    saved = manager.save("a", tmp_path / "saved.safetensors", "diffusers")
    assert {key.partition(".")[0] for key in load_file(saved)} == {"transformer", "transformer_2"}


def test_every_registered_type_format_and_family_is_tested(tmp_path: Path) -> None:
    # ControlNets, Control-LoRAs, FaceID and files of tokens have one layout each, and their own tests.
    alone = {CONTROL_LORA.name, FACEID.name, EMBEDDINGS.name}
    assert {family.name for family in FAMILIES} - {"controlnet"} == {family for family in SMALL if " " not in family}
    known = {dialect.format for dialect in DIALECTS} | {refusal(keys)[0] for keys in FOREIGN.values()}
    assert known | alone == {format.name for format in FORMATS}
    assert all(refusal(keys)[1] for keys in FOREIGN.values())
    bench, kinds, types = bench_of("qwen"), set[str](), set[str]()
    for dialect in ("kohya", "PEFT folder"):
        for number, file in enumerate(files(bench, DIALECT[dialect], most=1)):
            kinds.add(file.kind)
            types |= set(bench.manager.load(file.write(tmp_path / f"{dialect}{number}"), "a").types)
    bench.manager.clear()
    assert types | TESTED_APART == {kind.name for kind in TYPES}
    # Tucker cores need convolutions, which the model lacks, and only one program writes control LoRAs.
    assert set(KINDS) - kinds == {"LoRA with Tucker cores", "control"}


def test_types_of_peft_alone_are_saved_for_peft_and_in_the_layout_of_lycoris(tmp_path: Path) -> None:
    """A Flux has layers that are fused in the original layout, and the names of LyCORIS are the model's own."""
    bench = bench_of("flux")
    for kind in (kind for kind in KINDS if KINDS[kind].of_peft):
        file = file_of(bench, DIALECT["PEFT folder"], kind, most=2)
        assert file is not None
        outcome = judge(bench, file, tmp_path / kind, peer=False)
        assert (outcome.equals, outcome.trips.saved) == ("yes", ("kohya", "peft")), outcome
        assert all(re.search("which .* cannot read", outcome.trips.refused[name]) for name in ("comfy", "onetrainer"))


def test_the_judge_detects_wrong_factors_and_missing_layers(tmp_path: Path) -> None:
    bench = bench_of("qwen")
    file = made(bench, "diffusers", "LoRA")
    key = next(key for key in file.tensors if key.endswith("lora_B.weight"))
    file.tensors[key] = file.tensors[key].flip(0)
    outcome = judge(bench, file, tmp_path / "other")
    assert outcome.equals.startswith("1 of")
    assert outcome.diffusers == "wrong"
    file.tensors[key] = torch.zeros_like(file.tensors[key])
    outcome = judge(bench, file, tmp_path / "zero")
    assert outcome.equals.startswith("1 of")
    assert outcome.diffusers == f"drops 2 of {len(file.tensors)} keys"


# Peer libraries read our files


@pytest.mark.parametrize("kind", ["LoRA", "DoRA"])
@pytest.mark.parametrize("family", ["sd", "sdxl", "flux", "flux2", "qwen", "wan"])
def test_plain_diffusers_reads_a_file_saved_in_its_format(family: str, kind: str, tmp_path: Path) -> None:
    bench = bench_of(family)
    file = made(bench, "LyCORIS", kind)
    bench.manager.load(file.write(tmp_path), "a")
    saved = bench.loaded.save("a", tmp_path / "saved.safetensors", "diffusers")
    bench.loaded.clear()
    assert in_diffusers(bench, file, saved) == "yes"


@pytest.mark.parametrize(
    ("family", "format"), [("sd", "kohya"), ("sdxl", "kohya"), ("qwen", "comfy"), ("wan", "comfy")]
)
def test_plain_diffusers_reads_a_file_saved_for_another_program(family: str, format: str, tmp_path: Path) -> None:
    bench = bench_of(family)
    file = made(bench, "diffusers", "LoRA in blocks, one alpha")
    bench.manager.load(file.write(tmp_path), "a")
    saved = bench.loaded.save("a", tmp_path / "saved.safetensors", format)
    bench.loaded.clear()
    assert in_diffusers(bench, file, saved) == "yes"


@pytest.mark.parametrize(
    "kind",
    ["LoRA", "LoRA with biases", "DoRA", "LoHa", "OFT on inputs", "OFT on inputs, exact", "IA3", "IA3 on inputs"],
)
def test_peft_reads_a_saved_folder(kind: str, tmp_path: Path) -> None:
    bench = bench_of("cogview4")
    file = made(bench, "PEFT folder", kind)
    bench.manager.load(file.write(tmp_path / "file"), "a")
    folder = bench.loaded.save("a", tmp_path / "saved", "peft").parent
    bench.loaded.clear()
    assert json.loads((folder / "adapter_config.json").read_text())["target_modules"]
    model = bench.lend()["transformer"]
    theirs = peft.PeftModel.from_pretrained(model, folder).get_base_model()
    for where, wanted in file.wanted.items():
        with torch.no_grad():
            assert wanted.is_output(theirs.get_submodule(where[1])(bench.input(where))), where


@pytest.mark.parametrize("kind", ["LoRA", "LoHa", "DoRA", "DoRA of LoHa", "GLoRA", "full", "norms"])
def test_lycoris_reads_a_file_saved_for_it(kind: str, tmp_path: Path) -> None:
    lycoris = pytest.importorskip("lycoris.modules")
    bench = bench_of("sd")
    file = made(bench, "OneTrainer", kind)
    bench.manager.load(file.write(tmp_path), "a")
    tensors = load_file(bench.loaded.save("a", tmp_path / "saved.safetensors", "kohya"))
    bench.loaded.clear()
    unet, looked_at = bench.lend()["unet"], 0
    for where, wanted in file.wanted.items():
        if where[0] != "unet":
            continue
        host, name = unet.get_submodule(where[1]), f"lora_unet_{where[1]}".replace(".", "_")
        module = lycoris.make_module(*lycoris.get_module(tensors, name), name, host)
        module.apply_to()
        with torch.no_grad():
            assert wanted.is_output(host(bench.input(where))), where
        looked_at += 1
    assert looked_at


# Lists of keys


def test_every_key_of_a_list_is_used_or_reported(tmp_path: Path) -> None:
    keys = {
        "transformer.transformer_blocks.0.attn.to_q": (64, 3072),
        "transformer.transformer_blocks.0.nothing": (1, 1),
    }
    content = {
        "kind": "sample",
        "keys": {
            "transformer.transformer_blocks.0.img_mlp.net.2.lora_A.weight": [4, 12288],
            "transformer.transformer_blocks.0.img_mlp.net.2.lora_B.weight": [3072, 4],
            **{f"{key}.lora_A.weight": list(shape) for key, shape in keys.items()},
        },
    }
    (tmp_path / "list.json").write_text(json.dumps(content))
    found = listed(tmp_path / "list.json")
    assert (found.format, found.family, found.tensors, found.used) == ("diffusers", "qwen", 4, 2)
    assert found.reason
