"""Runs that were interrupted, that several processes share, or that go wrong."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import diffadapt
from diffadapt import Diverged, UsageError
from diffadapt.training import checkpoint, loop
from tests.support import models
from tests.support.cases import for_each
from tests.support.training import WEIGHTS, largest_difference, options, same_tensors, train, write_pictures
from tests.support.versions import at_least, imported

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sd15")
    models.sd15().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("pictures"))


EVERYTHING: dict[str, Any] = {
    "max_train_steps": 4,
    "checkpointing_steps": 2,
    "gradient_accumulation_steps": 2,
    "lora_dropout": 0.2,
    "random_flip": True,
    "caption_dropout": 0.3,
    "lr_scheduler": "cosine",
    "lr_warmup_steps": 1,
}
"""All that draws random numbers or has a state, and a number of batches at which no epoch ends."""

SIMPLE: dict[str, Any] = {"gradient_accumulation_steps": 1, "train_batch_size": 1}

RUNS: dict[str, dict[str, Any]] = {
    "adamw with encoders and words": {
        "train_text_encoder": True,
        "new_words": {"<dog>": 1},
        "instance_prompt": "a <dog>",
        "save_format": "kohya",
        "ema_decay": 0.9,
    },
    "adamw8bit with ema": {"optimizer": "adamw8bit", "ema_decay": 0.9, "cache_latents": True, **SIMPLE},
    "prodigy": {"optimizer": "prodigy", "learning_rate": 1.0, **SIMPLE},
    "schedulefree": {"optimizer": "schedulefree", "lr_scheduler": "constant", "lr_warmup_steps": 0, **SIMPLE},
    "lion with lora+": {"optimizer": "lion", "loraplus_lr_ratio": 4.0, "learning_rate": 1e-3, **SIMPLE},
    "came": {"optimizer": "came", "learning_rate": 1e-3, **SIMPLE},
}


@for_each(name=list(RUNS))
def test_resuming_is_exact(base: Path, pictures: Path, tmp_path: Path, name: str) -> None:
    if name.startswith("adamw8bit"):
        imported("bitsandbytes")
    further = {**EVERYTHING, **RUNS[name]}
    whole = train(base, pictures, tmp_path / "whole", **further)
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
    torch.manual_seed(99)
    resumed = train(base, pictures, tmp_path / "resumed", **further, resume_from_checkpoint="latest")
    assert same_tensors(resumed, whole)
    states = [
        torch.load(folder / "checkpoint-4" / checkpoint.STATE_FILE, weights_only=True)
        for folder in (tmp_path / "whole", tmp_path / "resumed")
    ]
    assert flat(states[0]) == flat(states[1])
    if "schedulefree" in name:
        return
    middle = tmp_path / "whole" / "checkpoint-2" / WEIGHTS
    assert not same_tensors(middle, whole)


def flat(state: Any) -> Any:
    """Return a state with tensors as lists, which can be compared with ==."""
    if isinstance(state, dict):
        return {key: flat(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return [flat(value) for value in state]
    return state.tolist() if hasattr(state, "tolist") else state


def test_a_resume_with_other_options_says_which_and_refuses(base: Path, pictures: Path, tmp_path: Path) -> None:
    usual = {"max_train_steps": 2, "checkpointing_steps": 1}
    train(base, pictures, tmp_path / "out", **usual)
    others: dict[str, Any] = {"rank": 8, "lora_alpha": 2.0, "train_batch_size": 1, "seed": 1, "learning_rate": 0.5}
    for name, value in others.items():
        again = {**usual, name: value, "resume_from_checkpoint": "latest", "max_train_steps": 4}
        with pytest.raises(UsageError, match=rf"--{name} is {value}, but the checkpoint was made with"):
            train(base, pictures, tmp_path / "out", **again)
    other = write_pictures(tmp_path / "other", count=2)
    with pytest.raises(UsageError, match="--instance_data_dir: the contents are not those"):
        train(base, other, tmp_path / "out", **usual, resume_from_checkpoint="latest")
    # The same pictures elsewhere are the same run, and with a constant rate more steps are no change.
    shutil.copytree(pictures, tmp_path / "moved")
    train(
        base, tmp_path / "moved", tmp_path / "out", **{**usual, "max_train_steps": 3}, resume_from_checkpoint="latest"
    )


def test_an_accepted_change_takes_effect(base: Path, pictures: Path, tmp_path: Path) -> None:
    usual: dict[str, Any] = {"checkpointing_steps": 2}
    train(base, pictures, tmp_path, **usual)
    before = load_file(tmp_path / "checkpoint-2" / checkpoint.ADAPTERS_FILE)
    again = {**usual, "max_train_steps": 4, "learning_rate": 1e-30, "adam_weight_decay": 0.0}
    train(
        base,
        pictures,
        tmp_path,
        **again,
        resume_from_checkpoint="latest",
        accept_changes=["learning_rate", "adam_weight_decay"],
    )
    after = load_file(tmp_path / "checkpoint-4" / checkpoint.ADAPTERS_FILE)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_resuming_without_a_checkpoint_starts_over_and_checkpoints_are_limited(
    base: Path, pictures: Path, tmp_path: Path
) -> None:
    further = {"max_train_steps": 6, "checkpointing_steps": 2, "checkpoints_total_limit": 2}
    train(base, pictures, tmp_path, **further, resume_from_checkpoint="latest")
    assert {path.name for path in tmp_path.glob("*checkpoint*")} == {"checkpoint-4", "checkpoint-6"}
    models.sd15().load_adapter(tmp_path / "checkpoint-6", weight_name=WEIGHTS)
    run = json.loads((tmp_path / "checkpoint-6" / checkpoint.RUN_FILE).read_text())
    assert [entry["step"] for entry in run["history"]["steps"]] == [1, 2, 3, 4, 5, 6]
    (tmp_path / "checkpoint-6" / checkpoint.STATE_FILE).write_bytes(b"damaged")
    with pytest.raises(UsageError, match=r"checkpoint-6 cannot be read .*continue from another checkpoint"):
        train(base, pictures, tmp_path, **further, resume_from_checkpoint="latest")


def test_a_full_disk_leaves_nothing_half_written(
    base: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, calls = torch.save, 0

    def full(state: Any, path: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save(state, path)

    monkeypatch.setattr(torch, "save", full)
    further = {"max_train_steps": 4, "checkpointing_steps": 2}
    with pytest.raises(UsageError, match=r"checkpoint-4 cannot be written .*No space left.*checkpoint-2"):
        train(base, pictures, tmp_path, **further)
    assert [path.name for path in tmp_path.glob("*checkpoint*")] == ["checkpoint-2"]
    assert not (tmp_path / WEIGHTS).exists()
    assert train(base, pictures, tmp_path, **further, resume_from_checkpoint="latest").is_file()


def test_too_little_memory_is_explained(
    base: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def step(*_: Any) -> float:
        # Not enough anywhere, and the error that torch raises for it.
        return float(torch.empty(1 << 60, dtype=torch.uint8).sum())

    monkeypatch.setattr(loop.Loop, "_step", step)
    with pytest.raises(UsageError, match=r"too little memory .*--cache_latents, --gradient_checkpointing"):
        train(base, pictures, tmp_path)


def test_a_diverged_run_stops_and_says_so(base: Path, pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(Diverged, match=r"the loss is \S+ in step \d+: lower --learning_rate"):
        train(base, pictures, tmp_path, learning_rate=1e30, max_train_steps=10)
    assert not (tmp_path / WEIGHTS).exists()


SHARED_RUN = """
import os
import diffadapt, torch
from torch import nn
from torch.distributed.fsdp import fully_shard

diffadapt.train(diffadapt.TrainingOptions(**{chosen!r}))
if not {with_fsdp}:
    raise SystemExit
os.environ["ACCELERATE_USE_FSDP"] = "true"
diffadapt.train(diffadapt.TrainingOptions(**{sharded!r}))

model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4))
adapter = diffadapt.add_adapter(model, diffadapt.LoraConfig(rank=2, target_modules=["0", "1"], init=False), "a")
diffadapt.adapters(model).save("a", "{folder}/whole.safetensors", "kohya")
fully_shard(model)
assert hasattr(next(adapter.parameters()), "full_tensor")
diffadapt.adapters(model).save("a", "{folder}/gathered.safetensors", "kohya")
"""
"""What both processes run: the training, the same with FSDP2, and an adapter that is sharded itself."""


def test_two_processes_are_one_with_twice_the_batches(base: Path, pictures: Path, tmp_path: Path) -> None:
    further: dict[str, Any] = {
        "max_train_steps": 2, "random_flip": True, "train_text_encoder": True, "checkpointing_steps": 2,
        "class_prompt": "a dog", "with_prior_preservation": True, "class_data_dir": str(tmp_path / "class"),
        "num_class_images": 3,
    }  # fmt: skip
    alone = train(base, pictures, tmp_path / "alone", **further, gradient_accumulation_steps=2)
    chosen = vars(options(base, pictures, tmp_path / "both", **further))
    sharded = {**chosen, "output_dir": str(tmp_path / "sharded"), "gradient_checkpointing": True}
    script = tmp_path / "run.py"
    # Before torch 2.7, FSDP2 itself fails on the CPU: "'Stream' object has no attribute 'record_event'".
    with_fsdp = at_least("torch", "2.7")
    script.write_text(SHARED_RUN.format(chosen=chosen, sharded=sharded, folder=tmp_path, with_fsdp=with_fsdp))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(launch, env=environment, check=False, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    # Not to the bit: torch computes with other kernels in processes that torchrun starts.
    assert largest_difference(tmp_path / "both" / WEIGHTS, alone) < 1e-4
    if with_fsdp:
        # With the base spread over the processes (FSDP2), the adapter is the same.
        assert largest_difference(tmp_path / "sharded" / WEIGHTS, alone) < 1e-4
        assert same_tensors(tmp_path / "whole.safetensors", tmp_path / "gathered.safetensors")
    histories = [
        json.loads((tmp_path / name / "checkpoint-2" / checkpoint.RUN_FILE).read_text())["history"]["steps"]
        for name in ("both", "alone")
    ]
    for both, one in zip(*histories, strict=True):
        assert both == pytest.approx(one, rel=1e-4)


def test_a_change_of_a_caption_is_a_change_of_the_data(base: Path, tmp_path: Path) -> None:
    pictures = write_pictures(tmp_path / "pictures")
    train(base, pictures, tmp_path / "out", checkpointing_steps=2)
    (pictures / "0.txt").write_text("another caption")
    with pytest.raises(diffadapt.AdapterError, match="instance_data_dir: the contents are not those"):
        train(base, pictures, tmp_path / "out", resume_from_checkpoint="latest", max_train_steps=3)
    (pictures / "0.txt").unlink()
    Image.new("RGB", (16, 16), "pink").save(pictures / "0.png")
    with pytest.raises(diffadapt.AdapterError, match="instance_data_dir: the contents are not those"):
        train(base, pictures, tmp_path / "out", resume_from_checkpoint="latest", max_train_steps=3)
