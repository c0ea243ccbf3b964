"""Draw with one style at the left of the picture and another at the right, on the embedded pipeline, and write a grid
of the pictures.

    python examples/regions/regions.py [--output regions.png]
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline

import diffadapt
from diffadapt.demo import PROMPTS, Row, grid

TINY = Path(__file__).parents[1] / "tiny_pipeline"
SIDE = 64


def draw(pipe: StableDiffusionPipeline) -> np.ndarray[Any, Any]:
    """Draw the prompts of the demo with fixed seeds; return pictures `(prompt, height, width, 3)` in 0..1."""
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(PROMPTS))]
    result: Any = pipe(
        list(PROMPTS), generator=generators, num_inference_steps=20, guidance_scale=3.0, output_type="np"
    )
    return result.images


def main() -> None:
    """Draw all rows and write the grid."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="regions.png", help="PNG file to write (default: %(default)s)")
    options = parser.parse_args()
    pipe = StableDiffusionPipeline.from_pretrained(TINY, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    for name in ("ink", "pixel"):
        diffadapt.load_adapter(pipe, TINY / "adapters" / f"{name}.safetensors", activate=False)
    rows: list[Row] = []
    for name in ("ink", "pixel"):
        with pipe.adapters.activated(name):
            rows.append(Row(name, draw(pipe)))

    # A mask covers the whole picture, whatever its resolution.
    across = torch.linspace(0, 1, SIDE).expand(SIDE, SIDE)
    left = (across < 0.5).float()
    with pipe.adapters.regions({"ink": left, "pixel": 1 - left}):
        rows.append(Row("ink left,\npixel right", draw(pipe)))
    with pipe.adapters.regions({"ink": 1 - across, "pixel": across}):
        rows.append(Row("from ink\nto pixel", draw(pipe)))

    grid(rows).save(options.output)
    print(f"wrote {options.output}")


if __name__ == "__main__":
    main()
