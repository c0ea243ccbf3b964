"""`diffadapt grid` and `diffadapt inspect --plot`."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffadapt.cli import main
from diffadapt.picture_grid import labelled_grid

TINY = Path(__file__).parents[2] / "examples" / "tiny_pipeline"
INK, PIXEL = (str(TINY / "adapters" / f"{name}.safetensors") for name in ("ink", "pixel"))


@pytest.mark.slow
def test_rows_are_adapters_and_columns_strengths(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["grid", INK, PIXEL, "--pipeline", str(TINY), "--prompt", "a red circle", "--steps", "2"]
    output = tmp_path / "grid.png"
    assert main([*arguments, "--strength", "0", "1", "--output", str(output)]) == 0
    assert capsys.readouterr().out.strip() == str(output)
    sheet = np.asarray(Image.open(output), dtype=float)
    top, left, step = 192 + 8, 192 + 8, 192
    cells = [
        [sheet[-(2 - row) * top :, -(2 - column) * left :][:step, :step] for column in range(2)] for row in range(2)
    ]
    assert np.array_equal(cells[0][0], cells[1][0]), "strength 0 is the base model"
    differences = [np.abs(one - other).max() for one, other in ((cells[0][0], cells[0][1]), (cells[0][1], cells[1][1]))]
    assert min(differences) > 30


def test_labels_do_not_run_into_each_other() -> None:
    pictures = [[Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")] for _ in range(2)]
    narrow = labelled_grid(pictures, ["a", "b"], ["0", "1"])
    wide = labelled_grid(pictures, ["a", "b\n" * 20], ["0" * 60, "1"])
    assert wide.width > narrow.width + 300
    assert wide.height > narrow.height + 100
    assert narrow.getpixel((narrow.width - 20, narrow.height - 20)) == (0, 0, 255)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--strength", "nan"], "'nan' is no finite number"),
        (["--steps", "0"], "'0' is no whole number of at least 1"),
        (["--size", "64"], "'64' is no size such as 1024x768"),
    ],
)
def test_wrong_options(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["grid", INK, "--pipeline", str(TINY), "--prompt", "a", *options])
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_a_folder_that_does_not_exist(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "none" / "grid.png"
    assert main(["grid", INK, "--pipeline", str(TINY), "--prompt", "a", "--output", str(output)]) == 1
    assert "no such folder" in capsys.readouterr().err


def test_a_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", INK, "--pipeline", str(TINY), "--plot", str(tmp_path / "ink.png")]) == 0
    assert len(np.unique(np.asarray(Image.open(tmp_path / "ink.png")).reshape(-1, 4), axis=0)) > 50
    assert main(["inspect", INK, "--pipeline", str(TINY), "--plot", str(tmp_path / "ink.xyz")]) == 1
    assert "xyz" in capsys.readouterr().err
