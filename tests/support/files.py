"""Writing adapter files, and the lists of names in `fixtures/` that stand for real files."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

FIXTURES = Path(__file__).parents[1] / "fixtures"


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Path:
    """Write a safetensors file, and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(
        {key: tensor.contiguous() for key, tensor in tensors.items()},
        path,
        metadata=dict(metadata or {"format": "pt"}),
    )
    return path


def fixture(name: str) -> dict[str, Any]:
    """Return a list of names from `fixtures/`, with its source."""
    return json.loads((FIXTURES / f"{name}.json").read_text())


def shapes_of(content: Mapping[str, Any], rank: int = 4) -> dict[str, tuple[int, ...] | None]:
    """Return the keys and shapes of a real file from a list of names, with `None` for an unknown shape.

    Some lists have whole keys, some have layers and the tensors of each, some have layers and the shapes of the base
    model's weights.
    """
    if "keys" in content:
        return {key: None if shape is None else tuple(shape) for key, shape in content["keys"].items()}
    if "modules" in content:
        return {f"{module}.{tensor}": None for module in content["modules"] for tensor in content["tensors"]}
    shapes: dict[str, tuple[int, ...] | None] = {}
    for module, (out, *fan_in) in content["base_weights"].items():
        shapes[f"{module}.lora_down.weight"] = (rank, *fan_in)
        shapes[f"{module}.lora_up.weight"] = (out, rank, *(1 for _ in fan_in[1:]))
        shapes[f"{module}.alpha"] = ()
    return shapes


def placeholders(name: str, rank: int = 4) -> dict[str, Tensor]:
    """Return the tensors of a real file on the meta device: names and shapes; in some lists alphas have a value."""
    content = fixture(f"keys/{name}")
    alpha = torch.tensor(float(rank)) if "base_weights" in content else torch.empty((), device="meta")
    shapes = shapes_of(content, rank)
    return {key: torch.empty(shape, device="meta") if shape else alpha for key, shape in shapes.items()}
