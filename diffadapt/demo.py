"""`diffadapt demo`: load, mix and remove adapters on the embedded pipeline, and draw the results as one picture."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from diffadapt.errors import AdapterError
from diffadapt.strengths.by_prefix import Strength

PROMPTS = (
    "a sks critter on a yellow background",
    "a red circle on a white background",
    "a yellow star on a blue background",
    "a green triangle on a black background",
)
_STEPS = 20
_ZOOM = 2
_LABEL_WIDTH = 160
_MARGIN = 6


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
    plan.append((f"{subject} 1.0 + {style} 0.8", {subject: 1.0, style: 0.8}))
    plan.extend((f"{style} at scale {scale:g}", {style: scale}) for scale in (0.0, 0.5, 1.0))
    rows: list[Row] = []
    with tqdm(total=len(plan) + 1, unit="row", desc="drawing") as progress:
        for label, active in plan:
            pipe.adapters.activate(active)
            rows.append(Row(label, _generate(pipe)))
            progress.update()
        pipe.adapters.clear()
        rows.append(Row("all removed", _generate(pipe)))
        progress.update()
    return rows


def _generate(pipe: Any) -> np.ndarray[Any, Any]:
    """Draw every prompt with a fixed seed; return pictures `(prompt, height, width, 3)` in 0..1."""
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(PROMPTS))]
    result = pipe(list(PROMPTS), generator=generators, num_inference_steps=_STEPS, guidance_scale=3.0, output_type="np")
    return result.images


def grid(rows: Sequence[Row]) -> Image.Image:
    """Return a picture of all rows, each after its label, with the prompts above the columns."""
    size = rows[0].pictures.shape[1] * _ZOOM
    step = size + _MARGIN
    grid = Image.new("RGB", (_LABEL_WIDTH + step * len(PROMPTS), 40 + step * len(rows)), "white")
    draw = ImageDraw.Draw(grid)
    font = ImageFont.load_default(size=13)
    for column, prompt in enumerate(PROMPTS):
        label = prompt.replace(" on a ", "\n")
        draw.text((_LABEL_WIDTH + column * step, 6), label, fill="black", font=font)
    for index, row in enumerate(rows):
        top = 40 + index * step
        draw.text((8, top + size // 2 - 6), row.label, fill="black", font=font)
        for column, picture in enumerate(row.pictures):
            image = Image.fromarray((picture * 255).round().astype(np.uint8))
            grid.paste(image.resize((size, size), Image.Resampling.NEAREST), (_LABEL_WIDTH + column * step, top))
    return grid
