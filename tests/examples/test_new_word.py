"""The example that teaches the embedded pipeline a new word."""

import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
from diffusers import StableDiffusionPipeline

import diffadapt

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "new_word" / "learn_word.py"


@pytest.mark.slow
def test_the_script_trains_and_saves_a_word_with_a_lora(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "critter.safetensors"
    options = ["--rank", "2", "--steps", "1", "--batch", "1", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *options])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    pipe: Any = StableDiffusionPipeline.from_pretrained(ROOT / "examples" / "tiny_pipeline", safety_checker=None)
    report = pipe.load_adapter(output)
    assert report.tokens == {"<critter>": 2}
    assert set(report.types) == {"lora"}
    assert isinstance(pipe.adapters, diffadapt.Adapters)
