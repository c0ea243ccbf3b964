"""The embedded pipeline and its adapters are as described in the README, and the demo draws them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from torch import Tensor

from diffadapt import demo
from diffadapt.cli import main

pytestmark = pytest.mark.slow

FOLDER = Path(__file__).parents[2] / "examples" / "tiny_pipeline"
ADAPTERS = sorted((FOLDER / "adapters").glob("*.safetensors"))


@pytest.fixture(scope="module")
def pipe() -> Any:
    pipe = StableDiffusionPipeline.from_pretrained(FOLDER, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def picture(pipe: Any) -> Tensor:
    noise = torch.Generator().manual_seed(0)
    prompt = "a red circle on a blue background"
    return pipe(prompt, generator=noise, num_inference_steps=2, guidance_scale=3.0, output_type="pt").images


def test_the_pipeline_is_small_and_has_several_adapters() -> None:
    files = [file for file in FOLDER.rglob("*") if file.is_file() and file.parent.name != "adapters"]
    assert sum(file.stat().st_size for file in files) <= 12 * 2**20
    assert len(ADAPTERS) >= 3


@pytest.mark.parametrize("file", ADAPTERS, ids=lambda file: file.stem)
def test_every_adapter_is_fully_used_and_leaves_no_trace(pipe: Any, file: Path) -> None:
    base = picture(pipe)
    report = pipe.load_adapter(file)
    assert report.unused == []
    assert report.name == file.stem
    assert (picture(pipe) - base).abs().max() > 0.05
    pipe.adapters.activate({file.stem: 0.0})
    assert torch.equal(picture(pipe), base)
    pipe.adapters.clear()
    assert torch.equal(picture(pipe), base)


def test_the_demo_draws_a_grid(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "_STEPS", 1)
    assert main(["demo", "--output", str(tmp_path / "demo.png")]) == 0
    assert "equal the first row, bit for bit" in capsys.readouterr().out
    assert np.asarray(Image.open(tmp_path / "demo.png")).std() > 10


def test_the_demo_without_adapters_says_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--pipeline", str(tmp_path)]) == 1
    assert "--pipeline FOLDER" in capsys.readouterr().err
