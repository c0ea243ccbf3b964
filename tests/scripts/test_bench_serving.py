"""`bench_serving` measures every system, its faults are noticed, and its page has what was measured."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from examples.serving.engine import Request
from scripts import serving_adapters, serving_faults, serving_soak, serving_tables
from scripts.bench_serving import append, systems
from scripts.serving_load import closed_loop, zipf_requests
from scripts.serving_peers import Ours, Resident

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

COUNT = 6


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the first adapters."""
    folder = tmp_path_factory.mktemp("work")
    serving_adapters.write(folder / "adapters", COUNT)
    return folder


def test_popularity_follows_zipf_and_the_seed() -> None:
    requests = zipf_requests("abcd", 3000, steps=1, seed=0)
    counts = [sum(name in request.adapters for request in requests) for name in "abcd"]
    expected = [3000 / rank * 12 / 25 for rank in (1, 2, 3, 4)]
    assert all(abs(count - wanted) < 0.1 * wanted for count, wanted in zip(counts, expected, strict=True))
    assert requests == zipf_requests("abcd", 3000, steps=1, seed=0) != zipf_requests("abcd", 3000, steps=1, seed=1)


def test_every_system_draws_what_its_peers_draw(work: Path) -> None:
    names = [serving_adapters.name_of(number) for number in range(COUNT)]
    requests = [Request("a red circle", {name: 0.8}, seed=1, steps=1) for name in names]
    found: dict[str, Any] = {}
    for system, make in systems(work / "adapters", names, 2**22).items():
        made = make()
        found[system] = made.draw(requests[:1] if "diffusers" in system else requests)
        if system == "diffusers, resident":
            # The types differ, but the LoRAs of diffusers are those that ours are made from.
            others = made.draw(requests[1:])
            assert np.abs(others[0] - found[system][0]).max() > 16
        figures = closed_loop(made, requests[:2], clients=2).summary()
        assert figures["pictures"] == 2
        assert figures["p95_ms"] >= figures["p50_ms"] > 0
        made.close()
    first = found["ours, batched"][0]
    assert all(np.abs(pictures[0] - first).max() <= 1 for pictures in found.values())
    pairs = zip(found["ours, batched"], found["ours, one by one"], strict=True)
    assert all(np.abs(batched - single).max() <= 1 for batched, single in pairs)
    assert all(np.abs(picture - first).max() > 16 for picture in found["ours, batched"][1:])


def test_adapters_that_are_added_to_peft_at_once_equal_loaded_ones(work: Path) -> None:
    names = [serving_adapters.name_of(number) for number in range(2)]
    resident = Resident(work / "adapters" / "lora", names)
    request = Request("a red circle", {names[1]: 0.8}, seed=1, steps=1)
    added = resident.draw([request])[0]
    resident.pipe.load_lora_weights(work / "adapters" / "lora" / f"{names[1]}.safetensors", adapter_name="loaded")
    loaded = resident.draw([Request(request.prompt, {"loaded": 0.8}, seed=1, steps=1)])[0]
    np.testing.assert_array_equal(added, loaded)


def test_a_request_that_fails_ends_the_run(work: Path) -> None:
    ours = Ours(work / "adapters", batch=2, pool_bytes=2**22)
    with pytest.raises(Exception, match="no adapter 'missing'"):
        closed_loop(ours, zipf_requests(["missing"], 3, steps=1, seed=0), clients=2)
    ours.close()


def test_faults_are_counted_and_a_wrong_picture_is_noticed(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving_faults, "KNOWN", 10)
    monkeypatch.setattr(serving_faults, "DISK_DELAY", 0.01)
    results = list(serving_faults.run(work, count=20, served=0))
    assert [result["wrong"] for result in results] == [0, 0, 0]
    assert [result["refused"] for result in results] == [14, 0, 1]
    assert [result["right"] for result in results] == [14, 14, 19]
    outcome = serving_faults.Outcome("wrong")
    picture = np.zeros((2, 2, 3), np.int16)
    outcome.judge(picture + 9, picture)
    outcome.judge(picture, None)
    outcome.judge(ValueError("lost"), picture)
    assert outcome.result()["wrong"] == 3


def test_the_soak_ends_with_the_base_it_began_with(work: Path) -> None:
    log = work / "soak.jsonl"
    line = serving_soak.run(work, minutes=0.05, threads=3, log=log, count=COUNT, catalogued=4)
    assert line["drift"] == line["left_behind"] == line["first_wrong"] == []
    pipe = serving_soak.StableDiffusionPipeline.from_pretrained(serving_adapters.PIPELINE)
    with torch.no_grad():
        pipe.unet.conv_in.bias[0] += 1e-7
    assert serving_soak.drift(pipe) == ["unet.conv_in.bias"]
    assert "| wrong pictures and errors | 0 |" in serving_tables.soak(serving_tables.lines_of(log))


def test_the_page_gets_medians_and_ratios(tmp_path: Path) -> None:
    figures = {"pictures": 8, "per_second_wall": 1.0, "p50_ms": 5.0}
    results = [
        {
            "what": "systems",
            "system": system,
            "clients": 16,
            "round": number,
            "per_second": speed,
            "cpu_ms": 1e3 / speed,
        }
        | {"p95_ms": 100 / speed, **figures}
        for system, speed in (("ours, batched", 8.0), ("diffusers, resident", 2.0))
        for number in range(3)
    ]
    append(tmp_path / "results.jsonl", results, steps=4)
    page = tmp_path / "page.md"
    marks = "".join(
        f"<!-- {name}: x -->\nold\n<!-- end of {name} -->\n" for name in ("speed", "goals", "faults", "soak")
    )
    page.write_text(marks)
    serving_tables.write_page(tmp_path, page)
    written = page.read_text()
    assert "| 16 | ours, batched | 8.00 | 125 | 5 | 12 |" in written
    assert "| throughput at 16 clients, next to diffusers with all adapters resident | at least 4 | 4.00 |" in written
    assert written.count("old") == 2
    assert json.loads((tmp_path / "results.jsonl").read_text().splitlines()[0])["versions"]["torch"]


def test_variations_are_of_five_types_and_small(work: Path) -> None:
    files = [load_file(work / "adapters" / f"{serving_adapters.name_of(number)}.safetensors") for number in range(5)]
    suffixes = [{key.partition(".")[2] for key in tensors} for tensors in files]
    assert len(set(map(frozenset, suffixes))) == 5
    assert serving_adapters.TYPES.keys() == {serving_adapters.type_of(number) for number in range(5)}
