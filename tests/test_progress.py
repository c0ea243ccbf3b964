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
    diffadapt.convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "kohya", models={"unet": pipe.unet})
    shown = terminal.getvalue()
    assert all(doing in shown for doing in ("loading", "merging", "converting unet"))
