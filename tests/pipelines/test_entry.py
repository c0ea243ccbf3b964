"""`diffadapt.load_adapter` and `diffadapt.adapters`: pipelines and models, and what type checkers know of them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import diffadapt
from tests.support import loras, models, spellings

ROOT = Path(__file__).parents[2]

USER_CODE = """
from diffusers import StableDiffusionPipeline

import diffadapt

pipe = StableDiffusionPipeline.from_pretrained("folder")
report = diffadapt.load_adapter(pipe, "ink.safetensors", "ink", scale=0.8)
adapters = diffadapt.adapters(pipe)
adapters.activate({"ink": diffadapt.Linear(1.0, 0.2)})
reveal_type(report)
reveal_type(adapters)
reveal_type(adapters["ink"])
reveal_type(diffadapt.add_adapter(pipe.unet, diffadapt.LoraConfig(target_modules="all-linear"), name="mine"))
reveal_type(diffadapt.adapters(pipe).prefetch("ink.safetensors"))
adapters.activat("ink")
diffadapt.load_adapter(pipe, "ink.safetensors", scale="strong")
"""


def test_a_pipeline_is_taken_like_a_model() -> None:
    pipe = models.sd15()
    file = spellings.peft_names(loras.parts_for(pipe, ("unet", "text_encoder")))
    assert diffadapt.load_adapter(pipe, file, "a").components.keys() == {"unet", "text_encoder"}
    report = diffadapt.load_adapter(pipe, file, "b", component="unet", scale=0.5)
    assert report.components.keys() == {"unet"}
    assert diffadapt.adapters(pipe).active == pipe.adapters.active == {"a": 1.0, "b": 0.5}
    for other in ("pixel", 3, torch.zeros(1)):
        with pytest.raises(diffadapt.AdapterError, match="expected a pipeline or a model"):
            diffadapt.adapters(other)
        with pytest.raises(diffadapt.AdapterError, match="expected a pipeline or a model"):
            diffadapt.load_adapter(other, file)


@pytest.mark.slow
def test_a_type_checker_knows_the_functions_and_what_they_return(tmp_path: Path) -> None:
    file = tmp_path / "user.py"
    file.write_text(USER_CODE)
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable, str(file)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    found = json.loads(done.stdout)["generalDiagnostics"]
    revealed = [each["message"] for each in found if each["severity"] == "information"]
    types = [message.rpartition('is "')[2].rstrip('"') for message in revealed]
    assert types == ["Report", "Adapters", "LoadedAdapter", "Adapter", "Plan"]
    rules = {each["range"]["start"]["line"] + 1: each["rule"] for each in found if each["severity"] == "error"}
    last = len(USER_CODE.splitlines())
    assert {line: rules.get(line) for line in (last - 1, last)} == {
        last - 1: "reportAttributeAccessIssue",
        last: "reportArgumentType",
    }
