"""The parts of `gpu_check` find nothing wrong on a CPU, and something where something is wrong."""

from collections.abc import Callable, Iterable
from functools import partial

import pytest
import torch

from diffadapt.runtime import compose
from scripts import gpu_check, gpu_parts, gpu_speed
from scripts.gpu_parts import Row, Setting
from tests.support.cases import for_each

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

CPU = Setting(torch.device("cpu"), tiny=True, compile={"disable": True})
COMPILED = Setting(torch.device("cpu"), tiny=True, compile={"backend": "eager", "fullgraph": True})

PARTS: dict[str, Callable[[], Iterable[Row]]] = {
    "graphs": partial(gpu_parts.swaps_of_compiled_models, COMPILED),
    "prefetch": partial(gpu_parts.prefetching, CPU),
    "offload": partial(gpu_parts.group_offloading, CPU),
    "merge": partial(gpu_parts.merging, CPU),
    "precision": partial(gpu_parts.half_precision, CPU),
    "flux": partial(gpu_speed.flux_speed, CPU),
    "unet": partial(gpu_speed.unet_speed, CPU),
}


@for_each(part=PARTS)
def test_every_part_finds_a_cpu_right(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Collecting the garbage of a process with all backends takes long.
    monkeypatch.setattr(gpu_speed, "release", lambda setting: None)
    monkeypatch.setattr(gpu_speed, "_ROUNDS", 1)
    rows = list(PARTS[part]())
    assert any(row.right for row in rows)
    assert [row for row in rows if row.right is False] == []


def test_backends_that_are_installed_are_right() -> None:
    pytest.importorskip("torchao")
    rows = list(gpu_parts.backends(CPU, ["torchao int8"]))
    assert len(rows) == 5
    assert all(row.right for row in rows)


def test_a_wrong_output_and_an_error_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    add = compose._add_changes
    monkeypatch.setattr(compose, "_add_changes", lambda *args: add(*args) * 1.01)
    assert all(row.right is False for row in gpu_parts.half_precision(CPU) if row.right is not None)
    monkeypatch.undo()

    def fails(setting: Setting) -> Iterable[Row]:
        yield Row("first", "done", True)
        raise ValueError("no memory\nand more")

    rows = list(gpu_check.rows_of(CPU, {"part": fails}, 60))
    assert rows == [("part", Row("first", "done", True)), ("part", Row("part", "ValueError: no memory", False))]


def test_the_table_counts_what_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [("a", Row("what", "found", True)), ("b", Row("other", "3 ms")), ("b", Row("third", "differs", False))]
    assert gpu_check.print_table(rows[:2]) == 0
    assert gpu_check.print_table(rows) == 1
    printed = capsys.readouterr().out
    assert "| a | what | found | ok |\n| b | other | 3 ms |  |\n| b | third | differs | WRONG |" in printed
    assert printed.endswith("1 row wrong\n")


def test_what_does_not_start_in_time_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 0.0, 10.0, 70.0, 80.0])
    monkeypatch.setattr("scripts.gpu_check.time.monotonic", lambda: next(clock))

    def part(setting: Setting) -> Iterable[Row]:
        yield Row("first", "")
        yield Row("second", "")
        pytest.fail("went on")

    rows = [row.what for _, row in gpu_check.rows_of(CPU, {"one": part, "two": part}, 60)]
    assert rows == ["first", "second", "the rest of this part is left out", "left out"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_cuda_it_says_that_it_did_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_check.main([]) == 0
    assert capsys.readouterr().out == "gpu_check: no CUDA device here, so nothing was checked\n"
