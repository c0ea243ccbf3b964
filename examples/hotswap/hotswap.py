"""Swap styles of different adapter types on a compiled pipeline: between runs, at every step of a run, and between the
rows of one batch. Prints how often the UNet was compiled, and writes a grid of the pictures. The default backend of
torch.compile is aot_eager, which compiles within seconds.

    python examples/hotswap/hotswap.py [--backend inductor] [--output hotswap.png]
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from torch._dynamo.testing import CompileCounterWithBackend

import diffadapt
from diffadapt.demo import PROMPTS, Row, grid

HERE = Path(__file__).parent
TINY = HERE.parent / "tiny_pipeline"
FILES = {
    "critter": TINY / "adapters" / "critter.safetensors",
    "ink": TINY / "adapters" / "ink.safetensors",
    "ink LoKr": HERE / "ink_lokr.safetensors",
    "pixel OFT": HERE / "pixel_oft.safetensors",
}


def draw(pipe: StableDiffusionPipeline, **options: Any) -> np.ndarray[Any, Any]:
    """Draw the prompts of the demo with fixed seeds; return pictures `(prompt, height, width, 3)` in 0..1."""
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(PROMPTS))]
    result: Any = pipe(
        list(PROMPTS), generator=generators, num_inference_steps=20, guidance_scale=3.0, output_type="np", **options
    )
    return result.images


def main() -> None:
    """Draw all rows, write the grid, and print how often the UNet was compiled."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="aot_eager", help="backend of torch.compile (default: %(default)s)")
    parser.add_argument("--output", default="hotswap.png", help="PNG file to write (default: %(default)s)")
    options = parser.parse_args()
    pipe = StableDiffusionPipeline.from_pretrained(TINY, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)

    # Reserve slots for any two of the files at once, and for a mix of its own in every row of a batch. Only the headers
    # of the files are read here.
    print(pipe.adapters.prepare_hotswap(list(FILES.values()), slots=2, samples=len(PROMPTS)))
    counter = CompileCounterWithBackend(options.backend)
    pipe.unet.compile(backend=counter, fullgraph=True)

    rows = [Row("no adapter", draw(pipe))]
    compiled = counter.frame_count
    style, *others = ("ink", "pixel OFT", "ink LoKr")
    print(pipe.load_adapter(FILES[style], "style"), end="\n\n")
    rows.append(Row(style, draw(pipe)))
    for other in others:
        print(pipe.adapters.hotswap("style", FILES[other]), end="\n\n")
        rows.append(Row(other, draw(pipe)))

    # Swap at every step. The adapters are read and checked before the run.
    ready = [pipe.adapters.prefetch(FILES[name]) for name in ("pixel OFT", "ink")]

    def swap(pipe: StableDiffusionPipeline, step: int, timestep: int, tensors: dict[str, Any]) -> dict[str, Any]:
        pipe.adapters.hotswap("style", ready[step % 2])
        return tensors

    pipe.adapters.hotswap("style", ready[1])
    rows.append(Row("ink and pixel OFT,\nstep by step", draw(pipe, callback_on_step_end=swap)))
    fading = diffadapt.Linear(1.0, 0.0)
    with pipe.adapters.activated({"style": fading}):
        rows.append(Row("fading out", draw(pipe)))

    pipe.load_adapter(FILES["critter"], "critter", activate=False)
    pipe.adapters.hotswap("style", FILES["ink LoKr"])
    with pipe.adapters.per_sample([{"critter": 1.0}, {}, {"style": 1.0}, {"critter": 0.5, "style": 0.8}]):
        rows.append(Row("each its own", draw(pipe)))
    with pipe.adapters.disabled():
        rows.append(Row("disabled", draw(pipe)))

    grid(rows).save(options.output)
    print(f"wrote {options.output}")
    print(
        f"graphs compiled at first: {compiled}; recompiled in {len(rows) - 1} changes: {counter.frame_count - compiled}"
    )
    if not np.array_equal(rows[0].pictures, rows[-1].pictures):
        raise AssertionError("the pictures without adapters differ from the first row")


if __name__ == "__main__":
    main()
