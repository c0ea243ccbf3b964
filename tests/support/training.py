"""A small run of the trainer: a saved pipeline, three pictures, few steps."""

from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file

import diffadapt

WEIGHTS = "pytorch_lora_weights.safetensors"


def write_pictures(folder: Path, side: int = 16, count: int = 3) -> Path:
    """Write pictures of different colours, each with a white corner, without captions."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        picture = Image.new("RGB", (side + 4, side), (90 * number % 256, 60, 200 - 80 * number % 200))
        picture.paste("white", (0, 0, side // 4, side // 4))
        picture.save(folder / f"{number}.png")
    return folder


def options(base: Path | str, pictures: Path, output: Path, **further: Any) -> diffadapt.TrainingOptions:
    """Return the options of a small run."""
    usual: dict[str, Any] = {
        "pretrained_model_name_or_path": str(base),
        "instance_data_dir": str(pictures),
        "output_dir": str(output),
        "instance_prompt": "a sks",
        "max_train_steps": 2,
        "train_batch_size": 2,
        "resolution": 16,
        "learning_rate": 1e-2,
        "report_to": "none",
        "validation_inference_steps": 2,
    }
    return diffadapt.TrainingOptions(**{**usual, **further})


def train(base: Path | str, pictures: Path, output: Path, pipe: Any = None, **further: Any) -> Path:
    """Train as if this were the first run of the process, whose settings accelerate keeps."""
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        return diffadapt.train(options(base, pictures, output, **further), pipe)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def same_tensors(one: Path, other: Path) -> bool:
    """Return whether two files contain the same tensors."""
    ours, theirs = load_file(one), load_file(other)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def largest_difference(one: Path, other: Path) -> float:
    """Return the largest difference between the tensors of two files with the same names."""
    ours, theirs = load_file(one), load_file(other)
    assert ours.keys() == theirs.keys()
    return max(float((ours[key] - theirs[key]).abs().max()) for key in ours)
