"""Pictures that the pipeline draws: of the class before training, and of the validation prompt while training."""

import itertools
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from diffadapt.training.base_model import takes
from diffadapt.training.data.folders import Found, list_pictures, read_folder
from diffadapt.training.data.metadata_files import append_captions, read_metadata
from diffadapt.training.families import Pipeline, family_of


@torch.no_grad()
def draw(
    pipe: Pipeline,
    prompts: list[str],
    seeds: Sequence[int],
    *,
    resolution: int,
    guidance: float | None = None,
    steps: int | None = None,
    controls: Sequence[Image.Image] | None = None,
) -> list[Image.Image]:
    """Draw one picture per prompt and seed. A picture does not depend on the others in the batch."""
    given = family_of(pipe).drawing(prompts, guidance, steps, controls or ())
    given |= {"height": resolution, "width": resolution}
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    output = "frames" if takes(type(pipe).__call__, "num_frames") else "images"
    with _vae_of_any_dtype(pipe):
        images = getattr(pipe(generator=generators, output_type="pil", **given), output)
    return [image[0] if isinstance(image, list) else image for image in images]


@contextmanager
def _vae_of_any_dtype(pipe: Pipeline) -> Generator[None, None, None]:
    """Let the VAE take and give the dtype of the denoiser. It is float32 itself."""
    encode, decode = pipe.vae.encode, pipe.vae.decode

    def encode_cast(pixels: Tensor, *args: Any, **kwargs: Any) -> Any:
        output = encode(pixels.to(pipe.vae.dtype), *args, **kwargs)
        distribution = vars(output.latent_dist)
        distribution |= {name: x.to(pixels.dtype) for name, x in distribution.items() if isinstance(x, Tensor)}
        return output

    def decode_cast(latents: Tensor, *args: Any, **kwargs: Any) -> Any:
        return decode(latents.to(pipe.vae.dtype), *args, **kwargs)

    pipe.vae.encode, pipe.vae.decode = encode_cast, decode_cast
    try:
        yield
    finally:
        del pipe.vae.encode, pipe.vae.decode


def ensure_class_pictures(
    folder: Path,
    prompts: Sequence[str],
    count: int,
    batch_size: int,
    draw_all: Callable[[list[str], list[int]], list[Image.Image]],
    *,
    turn: tuple[int, int],
    wait: Callable[[], None],
    progress: Callable[[list[list[int]]], Iterable[list[int]]],
    seed: int,
) -> Found:
    """Return the class pictures. Missing ones are drawn with the base pipeline, distributed over all processes.

    Args:
        folder: their folder.
        prompts: their prompts, which take turns.
        count: how many there have to be at least.
        batch_size: how many to draw at once.
        draw_all: draws prompts with seeds.
        turn: (rank, number of processes).
        wait: waits for the other processes.
        progress: wraps the batches that are drawn.
        seed: seed of the first picture.
    """
    folder.mkdir(parents=True, exist_ok=True)
    missing = missing_class_pictures(folder, count)
    wait()  # No process may draw before all have found out what is missing.
    mine = missing[turn[0] :: turn[1]]
    batches = [mine[first : first + batch_size] for first in range(0, len(mine), batch_size)]
    for batch in progress(batches):
        images = draw_all([prompts[n % len(prompts)] for n in batch], [seed + n for n in batch])
        for number, image in zip(batch, images, strict=True):
            partial = folder / f".class-{number:05d}.tmp"
            image.save(partial, format="PNG")
            partial.replace(_class_path(folder, number))
    wait()
    if turn[0] == 0:
        # This includes pictures of an earlier run that was interrupted before it wrote their captions.
        drawn = [number for number in range(count) if _class_path(folder, number).exists()]
        known = {path.name for path in read_metadata(folder)}
        captions = {_class_path(folder, n).name: prompts[n % len(prompts)] for n in drawn}
        append_captions(folder, {name: text for name, text in captions.items() if name not in known})
    wait()
    return read_folder(folder, prompts[0])


def missing_class_pictures(folder: Path, count: int) -> list[int]:
    """Return the numbers of the class pictures that have to be drawn."""
    lacking = max(0, count - len(list_pictures(folder))) if folder.is_dir() else count
    return list(itertools.islice((n for n in itertools.count() if not _class_path(folder, n).exists()), lacking))


def _class_path(folder: Path, number: int) -> Path:
    return folder / f"class-{number:05d}.png"
