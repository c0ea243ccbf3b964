"""The `diffadapt` command."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import diffadapt
from diffadapt.cli import main

TINY = Path(__file__).parents[1] / "examples" / "tiny_pipeline"
INK = str(TINY / "adapters" / "ink.safetensors")


def test_help_and_version_import_no_torch() -> None:
    code = (
        "import sys; from diffadapt.cli import main\n"
        "assert main([]) == 0\n"
        "try: main(['--version'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "assert 'torch' not in sys.modules and 'diffusers' not in sys.modules\n"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "usage: diffadapt" in shown
    assert shown.splitlines()[-1] == f"diffadapt {diffadapt.__version__}"


def test_the_module_is_the_command() -> None:
    command = [sys.executable, "-m", "diffadapt", "--version"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.startswith("diffadapt ")


def test_the_package_shows_its_public_names_only() -> None:
    assert set(dir(diffadapt)) == {*diffadapt.__all__, "__version__"}
    assert all(getattr(diffadapt, name) is not None for name in diffadapt.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = diffadapt.nothing


def test_a_report_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", INK, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["types"] == {"lora": 119}
    assert report["used"] == 238
    assert report["unused"] == []


def test_converting_for_a_saved_pipeline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "ink.safetensors"
    assert main(["convert", INK, str(output), "--to", "kohya", "--pipeline", str(TINY)]) == 0
    assert capsys.readouterr().out.strip() == str(output)
    assert main(["inspect", str(output), "--pipeline", str(TINY)]) == 0
    assert " used, 0 unused" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "nothing/ikn.safetensors"], "no folder nothing"),
        (["inspect", INK.replace("ink", "ikn")], "did you mean .*ink.safetensors"),
        (["inspect", str(TINY / "adapters")], "pass --weight_name with one of critter.safetensors, ink.safetensors"),
        (["inspect", INK, "--family", "sdx"], "sd, .*sdxl"),
        (["inspect", INK, "--pipeline", str(TINY / "unet")], "no saved pipeline"),
    ],
)
def test_an_error_is_one_line_with_the_options_of_the_command(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("diffadapt: ")
    assert re.search(message, error), error


def test_wrong_options_end_with_2() -> None:
    with pytest.raises(SystemExit) as ended:
        main(["convert", INK])
    assert ended.value.code == 2
