"""`diffadapt demo`: load, mix and remove adapters on the embedded pipeline, and draw the results as one picture."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from diffadapt.errors import AdapterError
from diffadapt.picture_grid import labelled_grid
from diffadapt.progress import with_progress
from diffadapt.strengths.by_prefix import Strength

PROMPTS = (
    "a sks critter on a yellow background",
    "a red circle on a white background",
    "a yellow star on a blue background",
    "a green triangle on a black background",
)
_STEPS = 20


@dataclass(frozen=True)
class Row:
    """One row of the grid.

    Attributes:
        label: text at the left of the row.
        pictures: `(columns, height, width, 3)` in 0..1.
    """

    label: str
    pictures: np.ndarray[Any, Any]


def run(pipeline: str | None = None, output: str = "demo.png") -> None:
    """Draw the same prompts and seeds without adapters, with each adapter, with a mix, at several strengths, and after
    removing all adapters.

    Args:
        pipeline: folder of the embedded pipeline, with adapters in its folder `adapters`; defaults to the one in this
            checkout.
        output: path of the PNG file to write.

    Raises:
        AdapterError: the folder has no adapters.
    """
    folder = Path(pipeline) if pipeline else Path(__file__).parents[1] / "examples" / "tiny_pipeline"
    files = sorted((folder / "adapters").glob("*.safetensors"))
    if not files:
        raise AdapterError(
            f"{folder} has no adapters/*.safetensors; run the demo from a checkout, or pass --pipeline FOLDER"
        )
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    for file in files:
        print(pipe.load_adapter(file, activate=False), end="\n\n")  # pyright: ignore[reportAttributeAccessIssue]
    print(pipe.adapters)  # pyright: ignore[reportAttributeAccessIssue]
    rows = _draw(pipe, [file.stem for file in files])
    grid(rows).save(output)
    print(f"\nwrote {output}: {len(rows)} rows of the same {len(PROMPTS)} prompts and seeds")
    if not np.array_equal(rows[0].pictures, rows[-1].pictures):
        raise AssertionError("the pictures after removing all adapters differ from the first row")
    print("after removing all adapters the pictures equal the first row, bit for bit")


def _draw(pipe: Any, names: Sequence[str]) -> list[Row]:
    """Draw all rows with the loaded adapters `names`, and remove these before the last row."""
    plan: list[tuple[str, dict[str, Strength]]] = [("no adapter", {})]
    plan.extend((name, {name: 1.0}) for name in names)
    subject, style = ("critter", "ink") if {"critter", "ink"} <= set(names) else (names[0], names[-1])
    plan.append((f"{subject} 1.0\n+ {style} 0.8", {subject: 1.0, style: 0.8}))
    plan.extend((f"{style}\nat scale {scale:g}", {style: scale}) for scale in (0.0, 0.5, 1.0))
    rows: list[Row] = []
    for label, active in with_progress(plan, "drawing", "row"):
        pipe.adapters.activate(active)
        rows.append(Row(label, _generate(pipe)))
    pipe.adapters.clear()
    return [*rows, Row("all removed", _generate(pipe))]


def _generate(pipe: Any) -> np.ndarray[Any, Any]:
    """Draw every prompt with a fixed seed; return pictures `(prompt, height, width, 3)` in 0..1."""
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(PROMPTS))]
    result = pipe(list(PROMPTS), generator=generators, num_inference_steps=_STEPS, guidance_scale=3.0, output_type="np")
    return result.images


def grid(rows: Sequence[Row]) -> Image.Image:
    """Return a picture of all rows, each after its label, with the prompts above the columns."""
    pictures = [[Image.fromarray((each * 255).round().astype(np.uint8)) for each in row.pictures] for row in rows]
    prompts = [prompt.replace(" on a ", "\non a ") for prompt in PROMPTS]
    return labelled_grid(pictures, [row.label for row in rows], prompts)
