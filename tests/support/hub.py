"""A cache of huggingface_hub without a download."""

from pathlib import Path

from torch import Tensor

from tests.support import files


def hub_cache(folder: Path, repo: str, name: str, tensors: dict[str, Tensor]) -> Path:
    """Write a cache of huggingface_hub with one file of one repository, and return its folder."""
    commit = "0" * 40
    storage = folder / f"models--{repo.replace('/', '--')}"
    (storage / "refs").mkdir(parents=True)
    (storage / "refs" / "main").write_text(commit)
    files.write(storage / "snapshots" / commit / name, tensors)
    return folder
