"""`diffadapt grid`: pictures of prompts, adapters and strengths, side by side."""

import re
import textwrap
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from pathlib import Path
from typing import Any

from diffadapt.cli.command import Command, Result
from diffadapt.errors import AdapterError

_LABEL_LETTERS = 24


def _add_options(parser: ArgumentParser) -> None:
    parser.add_argument("adapters", nargs="+", metavar="ADAPTER", help="adapter file, folder or hub id")
    parser.add_argument("--pipeline", required=True, help="folder or hub id of the pipeline")
    parser.add_argument("--prompt", nargs="+", required=True, metavar="TEXT", help="one or more prompts")
    parser.add_argument(
        "--strength", nargs="+", type=_number, default=[0.0, 0.5, 1.0], help="one column each (default: 0 0.5 1)"
    )
    parser.add_argument("--output", default="grid.png", help="picture to write (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of every picture (default: %(default)s)")
    parser.add_argument("--steps", type=_positive, help="steps of a run (default: the pipeline's)")
    parser.add_argument("--guidance", type=_number, help="guidance scale (default: the pipeline's)")
    parser.add_argument("--negative_prompt", help="what the pictures should not show")
    parser.add_argument("--size", metavar="WIDTHxHEIGHT", type=_size, help="size in pixels (default: the pipeline's)")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    parser.add_argument("--device", default="cpu", help="device to run on, such as cuda (default: %(default)s)")


def _run(options: Namespace) -> Result:
    import torch
    from diffusers import DiffusionPipeline

    from diffadapt.picture_grid import labelled_grid
    from diffadapt.pipelines.entry import adapters_of
    from diffadapt.progress import with_progress

    output = Path(options.output).expanduser()
    if not output.parent.is_dir():
        raise AdapterError(f"{output}: no such folder as {output.parent}")
    pipe: Any = DiffusionPipeline.from_pretrained(options.pipeline)
    pipe.to(options.device)
    if options.dtype != "float32":
        pipe.to(getattr(torch, options.dtype))
    pipe.set_progress_bar_config(disable=True)
    adapters = adapters_of(pipe)
    names = [adapters.load(source, activate=False).name for source in options.adapters]
    call: dict[str, Any] = {"num_inference_steps": options.steps, "guidance_scale": options.guidance}
    call["negative_prompt"] = options.negative_prompt
    if options.size is not None:
        call["width"], call["height"] = options.size
    given = {name: value for name, value in call.items() if value is not None}
    cells = [(prompt, name, strength) for prompt in options.prompt for name in names for strength in options.strength]
    drawn: list[Any] = []
    for prompt, name, strength in with_progress(cells, "drawing", "picture"):
        adapters.activate({name: strength})
        drawn += pipe(prompt, generator=torch.Generator().manual_seed(options.seed), **given).images
    width = len(options.strength)
    rows = ["\n".join([name, *textwrap.wrap(prompt, _LABEL_LETTERS)]) for prompt in options.prompt for name in names]
    pictures = [drawn[start : start + width] for start in range(0, len(drawn), width)]
    labelled_grid(pictures, rows, [f"{strength:g}" for strength in options.strength]).save(output)
    return Result(str(output), {"output": str(output), "rows": len(pictures), "columns": width})


def _number(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = float("nan")
    if not abs(number) < float("inf"):
        raise ArgumentTypeError(f"{text!r} is no finite number")
    return number


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"{text!r} is no whole number of at least 1")
    return int(text)


def _size(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)x(\d+)", text)
    if found is None or "0" in found.groups():
        raise ArgumentTypeError(f"{text!r} is no size such as 1024x768")
    return int(found[1]), int(found[2])


GRID = Command("grid", "draw prompts, adapters and strengths side by side", _add_options, _run)
