"""Progress bars: on a terminal only, in the main thread only, and not for quick work."""

import io
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import diffadapt
from diffadapt import progress
from diffadapt.progress import with_progress
from tests.support import loras, models, spellings


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def terminal_at_once(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Make stderr a terminal that shows bars without a delay. This is no fixture: pytest sets stderr after those."""
    found = Terminal()
    monkeypatch.setattr(sys, "stderr", found)
    monkeypatch.setattr(progress, "_DELAY", 0.0)
    return found


def test_a_terminal_shows_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = terminal_at_once(monkeypatch)
    assert list(with_progress([1, 2, 3], "merging")) == [1, 2, 3]
    assert re.search(r"merging.*/3 .*layer", terminal.getvalue())


def test_quick_work_files_and_threads_have_no_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = terminal_at_once(monkeypatch)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(lambda: list(with_progress([1], "merging"))).result() == [1]
    monkeypatch.setattr(progress, "_DELAY", 60.0)
    assert list(with_progress([1, 2], "merging")) == [1, 2]
    assert terminal.getvalue() == ""
    monkeypatch.setattr(progress, "_DELAY", 0.0)
    file = io.StringIO()
    for stream in (file, None):
        monkeypatch.setattr(sys, "stderr", stream)
        assert list(with_progress([1, 2], "merging")) == [1, 2]
    assert file.getvalue() == ""


@pytest.mark.slow
def test_long_work_shows_what_it_does(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    terminal = terminal_at_once(monkeypatch)
    pipe = models.sd15()
    pipe.load_adapter(spellings.peft_names(loras.parts_for(pipe, ("unet",))), "a")
    pipe.adapters.merge("a")
    pipe.adapters.unmerge()
    pipe.adapters.to_lora("a", "b")
    pipe.adapters.save("a", tmp_path / "a.safetensors")
    models_of = {"unet": pipe.unet}
    diffadapt.convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "kohya", models=models_of)
    diffadapt.resize(tmp_path / "a.safetensors", tmp_path / "c.safetensors", rank=1, models=models_of)
    pipe.save_pretrained(tmp_path / "base")
    source = [(str(tmp_path / "a.safetensors"), 1.0)]
    diffadapt.merge_files(tmp_path / "base" / "unet", source, tmp_path / "merged", models=models_of)
    diffadapt.extract(tmp_path / "base" / "unet", tmp_path / "merged", rank=1, models=models_of)
    shown = terminal.getvalue()
    every = ("loading", "merging", "converting unet", "writing", "copying", "extracting")
    assert [doing for doing in every if doing not in shown] == []
