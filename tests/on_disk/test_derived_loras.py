"""Plain LoRAs made from adapter files."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import diffadapt
from diffadapt import AdapterError, Combination, combine_files, resize
from diffadapt.cli import main
from tests.support.compare import relative_error

TINY = Path(__file__).parents[2] / "examples" / "tiny_pipeline"
HOTSWAP = TINY.parent / "hotswap"
PIXEL, INK = (TINY / "adapters" / f"{name}.safetensors" for name in ("pixel", "ink"))


def changes(source: Path) -> dict[str, Tensor]:
    """Return the change of every layer of the embedded pipeline's UNet that a file makes, by path."""
    from diffadapt.pipelines.saved import models_of

    planned = diffadapt.adapters(models_of(TINY)["unet"]).prefetch(source)
    return {
        path: (layer.adapter_type.delta_weight(layer.tensors, layer.spec) * layer.scale).detach()
        for path, layer in planned.layers["unet"].items()
    }


def models() -> dict[str, nn.Module]:
    from diffadapt.pipelines.saved import models_of

    return models_of(TINY)


def test_resizing_truncates_the_singular_values(tmp_path: Path) -> None:
    report = resize(PIXEL, tmp_path / "small.safetensors", rank=3, models=models())
    wanted, found = changes(PIXEL), changes(tmp_path / "small.safetensors")
    lost = total = 0.0
    for path, change in wanted.items():
        values = torch.linalg.svdvals(change.flatten(1).double())
        assert relative_error(found[path], change) == pytest.approx(
            float(values[3:].norm() / values.norm()), rel=1e-2, abs=1e-3
        )
        lost, total = lost + float(values[3:].square().sum()), total + float(values.square().sum())
    assert report.error == pytest.approx((lost / total) ** 0.5, rel=1e-2)
    assert report.error > 0.05
    assert all(layer.rank == 3 for layer in report.layers)
    assert (tmp_path / "small.safetensors").stat().st_size < 0.5 * PIXEL.stat().st_size


def test_combining_adds_the_weighted_changes(tmp_path: Path) -> None:
    lokr = HOTSWAP / "ink_lokr.safetensors"
    combine_files([(PIXEL, 1.0), (INK, -0.5)], tmp_path / "sum.safetensors", Combination("cat"), models=models())
    one, other = changes(PIXEL), changes(INK)
    for path, change in changes(tmp_path / "sum.safetensors").items():
        assert relative_error(change, one[path] - 0.5 * other[path]) < 1e-2
    assert (
        main(
            [
                "combine",
                str(PIXEL),
                f"{lokr}:0.5",
                str(tmp_path / "b.safetensors"),
                "--rank",
                "256",
                "--pipeline",
                str(TINY),
            ]
        )
        == 0
    )
    other = changes(lokr)
    for path, change in changes(tmp_path / "b.safetensors").items():
        wanted = one[path] + 0.5 * other[path] if path in other else one[path]
        assert relative_error(change, wanted) < 0.02, path


def test_what_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.safetensors"
    with pytest.raises(AdapterError, match="depends on the weight of the model; load the file into a pipeline"):
        resize(HOTSWAP / "pixel_oft.safetensors", out, rank=4, models=models())
    with pytest.raises(AdapterError, match="no adapters to combine"):
        combine_files([], out, models=models())
    assert main(["resize", str(PIXEL), str(out), "--rank", "0", "--pipeline", str(TINY)]) == 1
    assert "rank is 0, expected an integer of at least 1" in capsys.readouterr().err
    assert not out.exists()
