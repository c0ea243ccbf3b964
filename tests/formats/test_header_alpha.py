"""Alphas that stand in the header of a file only, those that contradict the tensors, and what the report says."""

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from diffadapt.files.read import read
from diffadapt.loading.plan import Plan, plan
from tests.support.compare import assert_same
from tests.support.denoisers import SMALL
from tests.support.files import write
from tests.support.formulas import normal

Tensors = dict[str, Tensor]
RANK, PATH, NATIVE = 4, "layers.0.attention.to_q", "layers.0.attention.qkv"
PARTS = tuple(f"layers.0.attention.to_{name}" for name in "qkv")
PEFT = "diffusers", "lora_A.weight", "lora_B.weight"


@cache
def models() -> dict[str, nn.Module]:
    return SMALL["zimage"].build()


def factors(stem: str, down: str = "lora_A.weight", up: str = "lora_B.weight", parts: int = 1) -> Tensors:
    torch.manual_seed(0)
    out, columns = models()["transformer"].get_parameter(f"{PATH}.weight").shape
    return {f"{stem}.{down}": normal(RANK, columns).float(), f"{stem}.{up}": normal(parts * out, RANK).float()}


def planned(folder: Path, tensors: Tensors, metadata: Mapping[str, object]) -> Plan:
    entries = {key: value if isinstance(value, str) else json.dumps(value) for key, value in metadata.items()}
    found = plan(read(write(folder / "a.safetensors", tensors, entries)), models())
    assert not found.faults, found.faults
    return found


def scale(found: Plan, tensors: Tensors, path: str = PATH, rows: slice = slice(None)) -> float:
    """Return the number by which the file's product is multiplied in the layer at `path`."""
    layer = found.layers["transformer"][path]
    change = layer.adapter_type.delta_weight(layer.tensors, layer.spec) * layer.scale
    down, up, *_ = tensors.values()
    product = up[rows] @ down
    number = float((change * product).sum() / product.square().sum())
    assert_same(change, number * product)
    return number


def options(component: str, **values: object) -> dict[str, object]:
    return {"lora_adapter_metadata": {f"{component}{option}": value for option, value in values.items()}}


HEADERS: dict[str, tuple[Mapping[str, object], float]] = {
    "of diffusers": (options("transformer.", r=4, lora_alpha=16), 4.0),
    "of a single model": (options("", r=4, lora_alpha=16), 4.0),
    "of another component": (options("unet.", r=4, lora_alpha=16), 4.0),
    "with a pattern": (options("transformer.", r=4, lora_alpha=16, alpha_pattern={PATH: 2}), 0.5),
    "stabilised": (options("transformer.", r=4, lora_alpha=16, use_rslora=True), 8.0),
    "of a larger rank": (options("transformer.", r=8, lora_alpha=16), 2.0),
    "plain lora_alpha": ({"lora_alpha": "16", "rank": "4"}, 4.0),
    "plain alpha": ({"alpha": "1", "rank": "4"}, 0.25),
    "alpha without a rank": ({"alpha": "2.0"}, 0.5),
    "both kinds": ({**options("transformer.", r=4, lora_alpha=16), "alpha": "1"}, 4.0),
    "only of sd-scripts": ({"ss_network_alpha": "1", "ss_network_dim": "4"}, 1.0),
    "without any": ({"format": "pt"}, 1.0),
}


@pytest.mark.parametrize("stem", ["transformer.", "diffusion_model.", "", "base_model.model."])
@pytest.mark.parametrize("header", HEADERS)
def test_an_alpha_in_the_header_alone_is_used(header: str, stem: str, tmp_path: Path) -> None:
    metadata, expected = HEADERS[header]
    tensors = factors(stem + PATH)
    found = planned(tmp_path, tensors, metadata)
    assert scale(found, tensors) == pytest.approx(expected)
    scales = found.report("a").scales["lora"]
    assert (scales.least, scales.most) == pytest.approx((expected, expected))
    assert set(scales.sources) == {"none" if header in ("only of sd-scripts", "without any") else "header"}


def test_the_name_of_an_adapter_in_keys_does_not_hide_the_header(tmp_path: Path) -> None:
    tensors = factors(PATH, "lora_A.default.weight", "lora_B.default.weight")
    assert scale(planned(tmp_path, tensors, {"alpha": "1", "rank": "4"}), tensors) == pytest.approx(0.25)


@pytest.mark.parametrize("rank", [RANK, 3 * RANK])
def test_a_pattern_for_one_rank_of_several_does_not_change_others(rank: int, tmp_path: Path) -> None:
    """A fused layer has the rank of a pattern under names that are not in the file."""
    tensors = factors(f"diffusion_model.{NATIVE}", parts=3)
    metadata = options("transformer.", r=8, lora_alpha=16, rank_pattern={"elsewhere": rank})
    found = planned(tmp_path, tensors, metadata)
    out = len(tensors[f"diffusion_model.{NATIVE}.lora_B.weight"]) // 3
    for number, path in enumerate(PARTS):
        rows = slice(number * out, (number + 1) * out)
        assert scale(found, tensors, path, rows) == pytest.approx(16 / (RANK if rank == RANK else 8))


def test_an_alpha_tensor_wins_and_the_contradiction_is_reported(tmp_path: Path) -> None:
    tensors = {**factors(f"diffusion_model.{PATH}"), f"diffusion_model.{PATH}.alpha": torch.tensor(2.0)}
    found = planned(tmp_path, tensors, {"alpha": "16", "rank": "4"})
    assert scale(found, tensors) == pytest.approx(0.5)
    report = found.report("a")
    assert report.scales["lora"].sources == {"tensor": 1}
    (note,) = report.notes
    assert note.key == f"transformer.{PATH}"
    assert "alpha tensor makes the scale 0.5 and the header makes it 4; the tensor is used" in str(report)
    assert "scales     lora 0.5 (alpha tensors)" in str(report)


CONTRADICTIONS: dict[str, tuple[Mapping[str, object], str]] = {
    "between the two kinds": ({**options("transformer.", r=4, lora_alpha=16), "alpha": "1"}, "alpha=1, but lora_ada"),
    "between plain entries": ({"lora_alpha": "16", "alpha": "1"}, "lora_alpha=16 and alpha=1; the first is used"),
    "of the rank": ({"alpha": "1", "rank": "64"}, "rank=64, but the factors have rank 4, which alpha=1 is divided by"),
    "not a number": ({"alpha": "twice"}, "alpha=twice, which is not a number; the scale is 1"),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_contradictions_in_the_header_are_reported(case: str, tmp_path: Path) -> None:
    metadata, expected = CONTRADICTIONS[case]
    report = planned(tmp_path, factors(f"transformer.{PATH}"), metadata).report("a")
    assert [expected in note.reason for note in report.notes] == [True]
    assert expected in str(report)


def test_a_header_without_contradictions_has_no_notes(tmp_path: Path) -> None:
    metadata = {**options("transformer.", r=4, lora_alpha=16), "lora_alpha": "16", "rank": "4"}
    assert planned(tmp_path, factors(f"transformer.{PATH}"), metadata).report("a").notes == []


def test_plain_entries_do_not_count_for_files_with_alpha_tensors(tmp_path: Path) -> None:
    """Files with these names have a scale of 1 without an alpha tensor."""
    stem = "lora_unet_" + PATH.replace(".", "_")
    tensors = factors(stem, "lora_down.weight", "lora_up.weight")
    found = planned(tmp_path, tensors, {"alpha": "1", "rank": "4"})
    assert scale(found, tensors) == pytest.approx(1.0)
    assert "files with these names have alphas as tensors; the scale is 1" in str(found.report("a"))


def test_the_range_of_scales_is_reported(tmp_path: Path) -> None:
    tensors = {**factors(f"diffusion_model.{PARTS[0]}"), **factors(f"diffusion_model.{PARTS[1]}")}
    tensors[f"diffusion_model.{PARTS[0]}.alpha"] = torch.tensor(2.0)
    report = planned(tmp_path, tensors, {}).report("a")
    scales = report.scales["lora"]
    assert (scales.least, scales.most, scales.sources) == (0.5, 1.0, {"tensor": 1, "none": 1})
    assert "scales     lora 0.5 to 1 (alpha tensors 1, no alpha 1)" in str(report)


@pytest.mark.parametrize("alpha", [1.0, 4.0, float("inf")])
def test_an_alpha_that_a_whole_lokr_ignores_is_reported(alpha: float, tmp_path: Path) -> None:
    out, columns = models()["transformer"].get_parameter(f"{PATH}.weight").shape
    stem = f"diffusion_model.{PATH}"
    tensors = {
        f"{stem}.lokr_w1": normal(4, 4).float(),
        f"{stem}.lokr_w2": normal(out // 4, columns // 4).float(),
        f"{stem}.alpha": torch.tensor(alpha),
    }
    found = planned(tmp_path, tensors, {})
    layer = found.layers["transformer"][PATH]
    change = layer.adapter_type.delta_weight(layer.tensors, layer.spec) * layer.scale
    assert_same(change, torch.kron(tensors[f"{stem}.lokr_w1"], tensors[f"{stem}.lokr_w2"]))
    notes = [note.reason for note in found.report("a").notes]
    assert notes == (
        [] if alpha == 1 else [f"its alpha ({alpha:g}) has no effect, because both factors of the LoKr are whole"]
    )


@pytest.mark.parametrize(("stabilised", "expected"), [(False, 16 / 32), (True, 16 / 32**0.5)])
@pytest.mark.parametrize("pattern", [{}, {PATH: 32}])
def test_peft_divides_by_the_rank_in_its_config(
    pattern: dict[str, int], stabilised: bool, expected: float, tmp_path: Path
) -> None:
    """Factors that were initialised from the weight have no more ranks than the weight has."""
    tensors = factors(f"base_model.model.{PATH}")
    options = {"r": 8 if pattern else 32, "lora_alpha": 16, "rank_pattern": pattern, "use_rslora": stabilised}
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **options}))
    write(tmp_path / "adapter_model.safetensors", tensors)
    found = plan(read(tmp_path), models())
    assert found.faults == []
    assert scale(found, tensors) == pytest.approx(expected)
    assert found.report("a").scales["lora"].sources == {"header": 1}
