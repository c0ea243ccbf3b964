"""Checkpoints of a run: complete or not there at all, and only continued with the options that they were made with."""

import dataclasses
import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from diffadapt.errors import UsageError
from diffadapt.runtime.adapter import Adapter
from diffadapt.training.options import TrainingOptions

ADAPTERS_FILE = "adapters.safetensors"
"""A folder with this file is a checkpoint."""
STATE_FILE, RUN_FILE = "training_state.pt", "run.json"
CHECKPOINT = re.compile(r"checkpoint-(\d+)")

_FREE = {
    "output_dir", "cache_dir", "cache_latents", "cache_text", "dataloader_num_workers", "checkpointing_steps",
    "checkpoints_total_limit", "resume_from_checkpoint", "accept_changes", "validation_prompt", "validation_steps",
    "num_validation_images", "validation_guidance_scale", "validation_inference_steps", "save_format", "save_precision",
    "report_to", "dry_run", "gradient_checkpointing", "sample_batch_size", "compile",
}  # fmt: skip
"""Options that may change on resume: they have no influence on the numbers, or only on what is written."""
_BY_CONTENT = {"instance_data_dir", "folders", "control_data_dir", "class_data_dir", "init_adapter", "num_class_images",
               "caption_column", "instance_prompt", "class_prompt"}  # fmt: skip
"""Options that stand for contents, which are compared instead of names."""


def fingerprint(options: TrainingOptions, contents: Mapping[str, str], processes: int) -> dict[str, Any]:
    """Return what a resumed run must have in common with the run before.

    Args:
        options: the options.
        contents: digests of what options stand for, by the name of the option.
        processes: the number of processes.
    """
    values = {
        entry.name: getattr(options, entry.name)
        for entry in dataclasses.fields(options)
        if entry.name not in _FREE | _BY_CONTENT
    }
    if options.lr_scheduler in ("constant", "constant_with_warmup"):
        # Then the end of the training has no influence on what comes before it.
        values["max_train_steps"] = values["num_train_epochs"] = None
    return json.loads(json.dumps({**values, **contents, "processes": processes}))


def refuse_changes(saved: Mapping[str, Any], now: Mapping[str, Any], accepted: Sequence[str], where: Path) -> list[str]:
    """Return the names of options that differ from those of a checkpoint.

    Raises:
        UsageError: some differ that are not among `accepted`.
    """
    differing = [name for name in sorted(saved.keys() | now.keys()) if saved.get(name) != now.get(name)]
    refused = [name for name in differing if name not in accepted and "all" not in accepted]
    if refused:
        lines = [_difference(name, saved.get(name), now.get(name)) for name in refused]
        raise UsageError(
            f"{where} was made with other options:\n"
            + "\n".join(f"  {line}" for line in lines)
            + f"\nRestore them, start a new run in another --output_dir, or pass --accept_changes {' '.join(refused)}"
        )
    return differing


def _difference(name: str, before: Any, after: Any) -> str:
    if name in _BY_CONTENT:
        return f"--{name}: the contents are not those of the checkpoint"
    return f"--{name} is {after}, but the checkpoint was made with {before}"


def save(
    folder: Path,
    step: int,
    *,
    adapters: Mapping[str, Adapter],
    state: Mapping[str, Any],
    run: Mapping[str, Any],
    write_file: Callable[[Path], None],
    limit: int | None,
) -> Path:
    """Write a checkpoint.

    Args:
        folder: the output folder.
        step: the number of steps done.
        adapters: the adapters by component name.
        state: the states of optimiser and average.
        run: the fingerprint and the history.
        write_file: writes the adapter to a folder, as a file to try out.
        limit: how many checkpoints to keep; the older ones are deleted after the new one is complete.

    Raises:
        UsageError: it cannot be written. What was written of it is removed; older checkpoints stay.
    """
    complete, partial, outdated = (folder / f"{prefix}checkpoint-{step}" for prefix in ("", "partial-", "outdated-"))
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        save_file({n: t.contiguous() for n, t in nn.ModuleDict(adapters).state_dict().items()}, partial / ADAPTERS_FILE)
        torch.save(dict(state), partial / STATE_FILE)
        (partial / RUN_FILE).write_text(json.dumps(run), encoding="utf-8")
        write_file(partial)
        if complete.exists():
            complete.rename(outdated)
        partial.rename(complete)
        shutil.rmtree(outdated, ignore_errors=True)
    except Exception as error:  # safetensors and torch raise errors of their own for a full disk.
        shutil.rmtree(partial, ignore_errors=True)
        last = next(reversed(list_checkpoints(folder)), None)
        advice = f"continue with --resume_from_checkpoint {last}" if last else "there is no earlier checkpoint"
        free = shutil.disk_usage(folder).free / 2**20
        raise UsageError(
            f"{complete} cannot be written ({error}); {free:.0f} MiB are free. Nothing of it is left behind. Free "
            f"space or pass --checkpoints_total_limit; {advice}"
        ) from error
    if limit is not None:
        for old in list_checkpoints(folder)[:-limit]:
            shutil.rmtree(old)
    return complete


def load(folder: Path, adapters: Mapping[str, Adapter]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Put the adapters of a checkpoint into `adapters`; return its states and its run.

    Raises:
        UsageError: the checkpoint is damaged, or was made with other layers.
    """
    try:
        nn.ModuleDict(adapters).load_state_dict(load_file(folder / ADAPTERS_FILE))
        state = torch.load(folder / STATE_FILE, map_location="cpu", weights_only=True)
    except RuntimeError as error:
        raise UsageError(f"{folder} was made with other layers or another rank: {error}") from error
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UsageError(f"{folder} cannot be read ({reason}); continue from another checkpoint") from error
    return state, read_run(folder)


def read_run(folder: Path) -> dict[str, Any]:
    """Return the fingerprint and the history of a checkpoint."""
    try:
        return json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{folder} is not a checkpoint: its {RUN_FILE} cannot be read ({error})") from error


def find(options: TrainingOptions) -> Path | None:
    """Return the checkpoint to resume from, if any."""
    if options.resume_from_checkpoint is None:
        return None
    if options.resume_from_checkpoint == "latest":
        return next(reversed(list_checkpoints(Path(options.output_dir))), None)
    path = Path(options.resume_from_checkpoint)
    if not (path / ADAPTERS_FILE).is_file():
        raise UsageError(f"--resume_from_checkpoint: {path} is not a checkpoint (it has no {ADAPTERS_FILE})")
    step_of(path)
    return path


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints in `folder`, the oldest first."""
    return sorted((path for path in folder.glob("checkpoint-*") if CHECKPOINT.fullmatch(path.name)), key=step_of)


def step_of(path: Path) -> int:
    """Return the number of steps after which a checkpoint was saved."""
    match = CHECKPOINT.fullmatch(path.resolve().name)
    if match is None:
        raise UsageError(f"{path}: the folder of a checkpoint has to be named checkpoint-<steps done>")
    return int(match.group(1))
