"""`examples/dreambooth`: the script is the trainer with the command line of before, and its configs can be read."""

import importlib
import sys
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState

from diffadapt.training.option_sources import read_config
from tests.support import models
from tests.support.training import WEIGHTS, same_tensors, train, write_pictures

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "dreambooth"

sys.path.append(str(EXAMPLE))
script = importlib.import_module("train_dreambooth")


@pytest.mark.slow
def test_the_script_trains_as_the_library_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models.sd15().save_pretrained(tmp_path / "base")
    pictures = write_pictures(tmp_path / "pictures")
    whole = train(tmp_path / "base", pictures, tmp_path / "whole", snr_gamma=5.0, rank=2)
    model = f"--pretrained_model_name_or_path {tmp_path / 'base'} --instance_data_dir {pictures} --resolution 16"
    options = f"--max_train_steps 2 --train_batch_size 2 --output_dir {tmp_path / 'out'} --learning_rate 1e-2 --rank 2"
    further = [*model.split(), *options.split(), "--instance_prompt", "a sks", "--min_snr_gamma", "5"]
    assert script.main(further) == 0
    assert same_tensors(tmp_path / "out" / WEIGHTS, whole)
    AcceleratorState._reset_state(reset_partial_state=True)
    assert script.main([*further, "--learning_rate", "1e30", "--max_train_steps", "9"]) == 1
    assert "--learning_rate" in capsys.readouterr().err
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(SystemExit):
        script.main([*further, "--rank", "0"])
    assert "--rank must be at least 1" in capsys.readouterr().err


def test_every_config_can_be_read() -> None:
    configs = sorted((EXAMPLE / "configs").glob("*.toml"))
    assert {config.stem for config in configs} >= {"tiny-critter", "tiny-ink", "tiny-pixel"}
    for config in configs:
        assert read_config(config)["pretrained_model_name_or_path"]
