"""The `diffadapt` command."""

import io
import json
import logging
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import diffadapt
from diffadapt.cli import COMMANDS, main

TINY = Path(__file__).parents[2] / "examples" / "tiny_pipeline"
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


def test_what_was_converted_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = str(tmp_path / "ink.safetensors")
    assert main(["convert", INK, output, "--to", "kohya", "--pipeline", str(TINY), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"output": output, "format": "kohya"}


@pytest.mark.slow
def test_every_command_prints_its_result_as_json_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def result(*arguments: object) -> dict[str, Any]:
        assert main([*map(str, arguments), "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    file = tmp_path / "made.safetensors"
    resized = result("resize", INK, file, "--rank", 2, "--pipeline", TINY)
    assert (resized["output"], resized["exact"], 0 < resized["error"] < 1) == (str(file), False, True)
    assert {layer["rank"] for layer in resized["layers"]} == {2}
    combined = result("combine", f"{INK}:0.5", INK, file, "--method", "cat", "--pipeline", TINY)
    assert (combined["exact"], combined["format"]) == (True, "diffusers")
    base, merged = TINY / "unet", tmp_path / "unet"
    assert result("merge", base, f"{INK}:0.7", merged, "--pipeline", TINY) == {
        "output": str(merged),
        "adapters": [{"adapter": INK, "strength": 0.7}],
    }
    extracted = result("extract", base, merged, file, "--rank", 1, "--pipeline", TINY)
    assert extracted["left_out"] == []
    assert len(extracted["layers"]) >= 100
    picture = tmp_path / "grid.png"
    call = ("--pipeline", TINY, "--prompt", "a", "--steps", 1, "--strength", 0, 1, "--output", picture)
    assert result("grid", INK, *call) == {"output": str(picture), "rows": 1, "columns": 2}
    monkeypatch.setattr("diffadapt.demo.run", lambda *_: print("a line for people"))
    assert result("demo", "--output", picture) == {"output": str(picture)}
    config = TINY.parent / "dreambooth" / "configs" / "tiny-critter.toml"
    trained = result("train", config, "--dry_run", "--output_dir", tmp_path / "run")
    assert trained["dry_run"]
    assert Path(trained["output"]).is_file()
    commands = {command.name for command in COMMANDS}
    assert commands == {"inspect", "convert", "resize", "combine", "extract", "merge", "grid", "train", "demo"}


@pytest.mark.parametrize(
    ("terminal", "environment", "is_red"),
    [(True, {}, True), (False, {}, False), (True, {"NO_COLOR": "1"}, False), (True, {"TERM": "dumb"}, False)],
)
def test_colours_are_for_terminals_that_want_them(
    terminal: bool, environment: dict[str, str], is_red: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stream(io.StringIO):
        def isatty(self) -> bool:
            return terminal

    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "stderr", Stream())
    assert main(["inspect", "nothing.safetensors"]) == 1
    assert sys.stderr.getvalue().startswith("\033[31mdiffadapt:\033[0m" if is_red else "diffadapt:")


def test_exit_statuses_are_in_the_help_and_in_the_documents(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([]) == 0
    listed = re.findall(r"^  (\d+) ", capsys.readouterr().out.partition("exit status:")[2], re.MULTILINE)
    page = (TINY.parents[1] / "docs" / "command-line.md").read_text(encoding="utf-8")
    assert listed == re.findall(r"^\| (\d+) \|", page, re.MULTILINE) == ["0", "1", "2", "130"]

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("diffadapt.pipelines.inspection.inspect", interrupted)
    assert main(["inspect", INK]) == 130


def test_warnings_that_other_libraries_log_stay_off_the_screen_and_ours_do_not(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    inspect = diffadapt.inspect

    def warn(*arguments: Any, **options: Any) -> diffadapt.Report:
        for name in ("transformers.models", "diffusers", "diffadapt.formats"):
            logging.getLogger(name).warning("from %s", name)
        return inspect(*arguments, **options)

    monkeypatch.setattr("diffadapt.pipelines.inspection.inspect", warn)
    levels = [logging.getLogger(name).level for name in ("diffusers", "transformers")]
    assert main(["inspect", INK]) == 0
    assert "from diffadapt.formats" in caplog.text
    assert "from diffusers" not in caplog.text
    assert [logging.getLogger(name).level for name in ("diffusers", "transformers")] == levels


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
        (["merge", str(TINY), str(TINY / "adapters"), "merged"], "several files; pass the path of one of critter"),
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
