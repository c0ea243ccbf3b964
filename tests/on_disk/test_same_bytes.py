"""Whatever writes files writes the same bytes again for the same input."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import diffadapt
from tests.support.cases import for_each
from tests.support.small_models import unet
from tests.support.swaps import CONFIGS, make


def written(adapters: diffadapt.Adapters, target: Path, format: str) -> Path:
    return adapters.save("one", target if format == "peft" else target.with_suffix(".safetensors"), format)


SAVED: dict[str, tuple[str, ...]] = {
    "lora": ("diffusers", "kohya", "peft", "comfy", "onetrainer"),
    "dora": ("kohya", "peft", "comfy"),
    "lokr": ("kohya", "peft"),
    "oft": ("peft",),
}
"""The settings of an adapter -> formats that can express it."""


@pytest.fixture
def models() -> dict[str, nn.Module]:
    return {"unet": unet()}


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    one, other = (make(unet, CONFIGS["lora"], tmp_path / f"{name}.safetensors") for name in ("one", "other"))
    return one, other


WRITERS: dict[str, Callable[[Path, tuple[Path, Path], dict[str, nn.Module]], Any]] = {
    "resize": lambda to, files, models: diffadapt.resize(files[0], to, rank=2, models=models),
    "combine": lambda to, files, models: diffadapt.combine_files([(f, 0.5) for f in files], to, models=models),
    "extract": lambda to, files, models: diffadapt.extract(unet(), merged(files[0]), to, rank=4, models=models),
    **{
        f"convert to {name}": lambda to, files, models, name=name: diffadapt.convert(files[0], to, name, models=models)
        for name in SAVED["lora"]
    },
}


def merged(file: Path) -> nn.Module:
    model = unet()
    diffadapt.load_adapter(model, file, "one", component="unet")
    diffadapt.adapters(model).merge()
    return model


def contents(path: Path) -> dict[str, bytes]:
    """Return the bytes of a file, or of all files of a folder."""
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    return {str(file.relative_to(path)): file.read_bytes() for file in files if file.is_file()}


def assert_same_bytes(paths: list[Path]) -> None:
    first, *others = (contents(path) for path in paths)
    assert sum(map(len, first.values())) > 1000
    assert all(other == first for other in others)


@for_each(name=list(WRITERS))
def test_files_are_made_of_files(
    name: str, tmp_path: Path, files: tuple[Path, Path], models: dict[str, nn.Module]
) -> None:
    targets = [tmp_path / f"{number}{'' if name.endswith('peft') else '.safetensors'}" for number in range(2)]
    for target in targets:
        WRITERS[name](target, files, models)
    assert_same_bytes(targets)


def test_a_model_is_merged(tmp_path: Path, files: tuple[Path, Path]) -> None:
    unet().save_pretrained(tmp_path / "base")
    targets = [tmp_path / str(number) for number in range(2)]
    for target in targets:
        diffadapt.merge_files(tmp_path / "base", [(file, 0.5) for file in files], target)
    assert_same_bytes(targets)


@for_each(kind=list(SAVED))
def test_an_adapter_is_saved_in_every_format(kind: str, tmp_path: Path) -> None:
    """After it was loaded again, too: what is written does not depend on what was in the file before."""
    file = make(unet, CONFIGS[kind], tmp_path / "source", "peft")
    for format in SAVED[kind]:
        targets: list[Path] = []
        for number in range(2):
            model = unet()
            diffadapt.load_adapter(model, file, "one", component="unet")
            adapters = diffadapt.adapters(model)
            for again in range(2):
                targets.append(written(adapters, tmp_path / f"{format}-{number}-{again}", format))
        assert_same_bytes(targets)
