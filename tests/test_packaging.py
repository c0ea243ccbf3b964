"""What is distributed: one version, and a wheel that works without this checkout."""

import re
import subprocess
import sys
import zipfile
from importlib.metadata import metadata
from pathlib import Path

import pytest

import diffadapt
from scripts.try_dist import try_distribution

ROOT = Path(__file__).parents[1]
PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_the_version_stands_in_one_place() -> None:
    assert re.search(r'^dynamic = \["version"\]$', PROJECT, re.MULTILINE)
    assert not re.search(r"^version\s*=\s*\"", PROJECT, re.MULTILINE)
    assert metadata("diffadapt")["Version"] == diffadapt.__version__
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert "\nversion:" not in citation
    description = re.search(r'^description = "(.*)"$', PROJECT, re.MULTILINE)
    assert description is not None
    assert f"abstract: {description[1]}\n" in citation


def test_the_oldest_versions_tested_are_the_oldest_supported() -> None:
    oldest = (ROOT / "constraints-oldest.txt").read_text(encoding="utf-8")
    supported = dict(re.findall(r'^  "([a-z_]+)>=([\d.]+)",$', PROJECT.split("[project.optional", 1)[0], re.MULTILINE))
    tested = dict(re.findall(r"^([a-z_]+)==([\d.]+)$", oldest, re.MULTILINE))
    assert tested.keys() == supported.keys()
    assert all(tested[name] in (version, f"{version}.0") for name, version in supported.items())


@pytest.mark.slow
def test_the_wheel_has_every_module_and_works_alone(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name == f"diffadapt-{diffadapt.__version__}-py3-none-any.whl"
    names = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("diffadapt/")}
    expected = {file.relative_to(ROOT).as_posix() for file in (ROOT / "diffadapt").rglob("*.py")} | {
        "diffadapt/py.typed"
    }
    assert names == expected
    try_distribution(wheel)
