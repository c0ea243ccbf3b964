"""The example config of every family trains the family's tiny pipeline, and its preview is drawn."""

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image

from diffadapt.training.families import family_of
from diffadapt.training.option_sources import options_from
from diffadapt.training.run import train
from tests.support.cases import for_each
from tests.support.tiny_pipelines import tiny
from tests.support.versions import needs

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:`FluxPosEmbed`:FutureWarning"),
    pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning"),
]

CONFIGS = Path(__file__).parents[2] / "examples/dreambooth/configs"
NAMES = sorted(path.stem for path in CONFIGS.glob("*.toml") if not path.stem.startswith("tiny-"))
# Their tiny processors cannot be saved.
IN_MEMORY = ("qwen-image-edit",)


def write_pictures(folder: Path) -> str:
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    for number, size in enumerate(((96, 96), (80, 160))):
        values = torch.randint(256, (*size, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(values.numpy()).save(folder / f"{number}.png")
    return str(folder)


def read_small_references(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the pipelines and the trainer from scaling references to a megapixel."""
    pipelines = "diffusers.pipelines"
    monkeypatch.setattr(f"{pipelines}.flux.pipeline_flux_kontext.PREFERRED_KONTEXT_RESOLUTIONS", [(64, 64)])
    monkeypatch.setattr(
        f"{pipelines}.qwenimage.pipeline_qwenimage_edit.calculate_dimensions", lambda area, ratio: (64, 64, None)
    )
    monkeypatch.setattr("diffadapt.training.families.qwen._REFERENCE_AREA", 64 * 64)


@for_each(name=NAMES)
def test_the_config_of_every_family_trains_it(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "ltx":
        needs("diffusers", "0.35", "the names of LTX's blocks")
    pipe = tiny(name)
    is_edit = family_of(pipe).references[1] and name.endswith(("kontext", "edit"))
    given: dict[str, Any] = {
        "instance_data_dir": write_pictures(tmp_path / "after"),
        "output_dir": str(tmp_path / "out"),
        "resolution": 64,
        "max_train_steps": 2,
        "gradient_accumulation_steps": 1,
        "learning_rate": 0.01,
        "lr_scheduler": "constant",
        "lr_warmup_steps": 0,
        "num_validation_images": 1,
        "validation_inference_steps": 2,
        "report_to": "none",
    }
    if is_edit:
        given["control_data_dir"] = write_pictures(tmp_path / "before")
    if name not in IN_MEMORY:
        pipe.save_pretrained(tmp_path / "base")
        given["pretrained_model_name_or_path"] = str(tmp_path / "base")
    if is_edit:
        read_small_references(monkeypatch)
    options = options_from(CONFIGS / f"{name}.toml", given)
    AcceleratorState._reset_state(reset_partial_state=True)
    file = train(options, pipe if name in IN_MEMORY else None)
    AcceleratorState._reset_state(reset_partial_state=True)
    fresh = tiny(name)
    report = fresh.load_adapter(file, "trained")
    assert report.unused == []
    changed = [weight for key, weight in _tensors(file).items() if key.endswith("lora_B.weight") and weight.any()]
    assert changed
    assert (tmp_path / "out" / "validation-000002.png").is_file()


def _tensors(file: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(file)
