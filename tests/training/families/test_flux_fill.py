"""Whole runs on a small Flux.1 Fill: pictures with masks, and edit pairs."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from diffadapt import UsageError
from tests.support.tiny_pipelines import tiny
from tests.support.training import same_tensors, train

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:`FluxPosEmbed`:FutureWarning"),
    pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning"),
]
SIDE = 64


def write_pictures(folder: Path, seed: int, masks: bool) -> Path:
    folder.mkdir()
    generator = torch.Generator().manual_seed(seed)
    for number in range(2):
        values = torch.randint(256, (SIDE, SIDE, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(values.numpy()).save(folder / f"{number}.png")
        if masks:
            mask = np.zeros((SIDE, SIDE), np.uint8)
            mask[:, : SIDE // 2] = 255
            Image.fromarray(mask).save(folder / f"{number}-masklabel.png")
    return folder


def paint(pipe: Any) -> torch.Tensor:
    mask = Image.new("L", (SIDE, SIDE), 0)
    mask.paste(255, (0, 0, SIDE // 2, SIDE))
    given = {"height": SIDE, "width": SIDE, "num_inference_steps": 2, "max_sequence_length": 16, "output_type": "pt"}
    generator = torch.Generator().manual_seed(0)
    image = Image.new("RGB", (SIDE, SIDE), "teal")
    pipe.set_progress_bar_config(disable=True)
    return pipe("a dog", image=image, mask_image=mask, generator=generator, **given).images


def test_masks_and_edit_pairs_train_save_and_reload_equal(tmp_path: Path) -> None:
    assert tiny("flux-fill").transformer.config.in_channels == 4 * 4 * 2 + 256
    after = write_pictures(tmp_path / "after", 0, masks=True)
    before = write_pictures(tmp_path / "before", 1, masks=False)
    files: dict[str, Path] = {}
    for name, further in {
        "alone": {},
        "again": {"cache_latents": True},
        "pairs": {"control_data_dir": str(before)},
        "pairs again": {"control_data_dir": str(before), "cache_latents": True},
    }.items():
        pipe = tiny("flux-fill")
        untrained = paint(pipe) if name == "pairs" else None
        usual = {"resolution": SIDE, "max_sequence_length": 16, "max_train_steps": 3, "learning_rate": 0.02}
        files[name] = train("", after, tmp_path / name, pipe, pretrained_model_name_or_path="", **usual, **further)
        if untrained is None:
            continue
        trained = paint(pipe)
        fresh = tiny("flux-fill")
        report = fresh.load_adapter(files[name])
        assert report.unused == []
        assert torch.equal(paint(fresh), trained)
        assert not torch.equal(trained, untrained)
        with fresh.adapters.disabled():
            assert torch.equal(paint(fresh), untrained)
    assert same_tensors(files["alone"], files["again"])
    assert same_tensors(files["pairs"], files["pairs again"])
    # The model is shown what surrounds the mask in the picture to edit.
    assert not same_tensors(files["alone"], files["pairs"])


def test_pictures_without_masks_and_previews_are_refused(tmp_path: Path) -> None:
    pictures = write_pictures(tmp_path / "a", 0, masks=False)
    for message, further in {
        "give every picture a mask": {},
        "cannot draw previews without a mask": {"validation_prompt": "a dog"},
    }.items():
        with pytest.raises(UsageError, match=message):
            train(
                "",
                pictures,
                tmp_path / "out",
                tiny("flux-fill"),
                pretrained_model_name_or_path="",
                resolution=SIDE,
                **further,
            )
    assert not list((tmp_path / "out").glob("*.safetensors"))
