"""Read folders of captioned pictures, make endless batches of them, and draw labelled sheets."""

import itertools
import json
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm.auto import tqdm

PICTURE_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".webp"})
CAPTIONS_FILE = "metadata.jsonl"


class UsageError(ValueError):
    """A mistake in an option, a folder or a caption. The message says what to change."""


@dataclass(frozen=True)
class Example:
    """One training picture and its caption."""

    path: Path
    caption: str


def read_folder(folder: Path, default_caption: str | None) -> list[Example]:
    """Return the pictures of `folder`, sorted by name, with captions from its `metadata.jsonl` or the default.

    Raises:
        UsageError: the folder does not exist or has no pictures, or a picture has no caption or cannot be read.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder} is not a folder")
    captions = read_captions(folder)
    pictures = list_pictures(folder)
    if not pictures:
        raise UsageError(f"{folder} holds no pictures ({', '.join(sorted(PICTURE_SUFFIXES))})")
    examples: list[Example] = []
    for path in pictures:
        caption = captions.get(path.name, default_caption)
        if caption is None:
            raise UsageError(f"{path} has no caption: list it in {CAPTIONS_FILE} or pass a prompt for all pictures")
        try:
            Image.open(path).close()
        except (UnidentifiedImageError, OSError) as error:
            raise UsageError(f"{path} cannot be read as a picture ({error})") from error
        examples.append(Example(path, caption))
    return examples


def list_pictures(folder: Path) -> list[Path]:
    """Return the picture files directly in `folder`, sorted by name."""
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in PICTURE_SUFFIXES)


def read_captions(folder: Path) -> dict[str, str]:
    """Return file name -> caption from `metadata.jsonl`, which has one JSON object with file_name and text per line.

    Raises:
        UsageError: a line is not such an object, or its file does not exist.
    """
    path = folder / CAPTIONS_FILE
    captions: dict[str, str] = {}
    if not path.exists():
        return captions
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            name, text = entry["file_name"], entry["text"]
            if not (isinstance(name, str) and isinstance(text, str)):
                raise TypeError
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise UsageError(f'{path}, line {number}: expected {{"file_name": ..., "text": ...}}') from error
        if not (folder / name).is_file():
            raise UsageError(f"{path}, line {number}: there is no file {name} in {folder}")
        captions[name] = text
    return captions


def append_captions(folder: Path, captions: Mapping[str, str]) -> None:
    """Append lines to `metadata.jsonl`. Existing lines may have more fields, and stay as they are."""
    with (folder / CAPTIONS_FILE).open("a", encoding="utf-8") as file:
        for name in sorted(captions):
            file.write(json.dumps({"file_name": name, "text": captions[name]}) + "\n")


def load_picture(path: Path, resolution: int) -> Tensor:
    """Return a picture scaled to cover a square and cropped around its centre: (3, side, side) in -1..1."""
    with Image.open(path) as opened:
        upright = ImageOps.exif_transpose(opened).convert("RGB")
    square = ImageOps.fit(upright, (resolution, resolution), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(square)).permute(2, 0, 1).float() / 127.5 - 1


class Draw(NamedTuple):
    """One picture of a batch, and all random choices about it.

    Attributes:
        picture: index of the picture.
        flip: whether it is mirrored.
        drop_caption: whether its caption is left out.
    """

    picture: int
    flip: bool
    drop_caption: bool


class Batch(NamedTuple):
    """Pictures (or the moments of their latents, where these are cached) with their captions, group after group."""

    pictures: Tensor
    captions: list[str]


class Pictures(Dataset[tuple[Tensor, str]]):
    """The pictures of all groups one after the other, looked up by `Draw`."""

    def __init__(self, groups: Sequence[Sequence[Example]], resolution: int) -> None:
        self.examples = list(itertools.chain.from_iterable(groups))
        self.group_sizes = [len(group) for group in groups]
        self.resolution = resolution
        self.moments: dict[tuple[int, bool], Tensor] = {}

    def __getitem__(self, draw: Draw) -> tuple[Tensor, str]:
        content = self.moments.get((draw.picture, draw.flip))
        if content is None:
            content = self._picture(draw.picture, draw.flip)
        return content, "" if draw.drop_caption else self.examples[draw.picture].caption

    def cache_latents(self, encode: Callable[[Tensor], Tensor], *, flips: bool, quiet: bool) -> None:
        """Encode every picture once and keep the moments of its latent distribution in memory.

        Args:
            encode: returns the moments of a batch of pictures.
            flips: whether to encode mirrored pictures, too.
            quiet: whether to show no progress bar.
        """
        wanted = itertools.product(range(len(self.examples)), (False, True) if flips else (False,))
        for index, flip in tqdm(list(wanted), "cache latents", disable=quiet):
            self.moments[index, flip] = encode(self._picture(index, flip)[None])[0].cpu()

    def _picture(self, index: int, flip: bool) -> Tensor:
        picture = load_picture(self.examples[index].path, self.resolution)
        return picture.flip(-1) if flip else picture


class EndlessBatches(Sampler[list[Draw]]):
    """Endless batches with equally many pictures of every group. A group is reshuffled whenever it is used up.

    Every batch depends on its number alone. So a resumed run only needs to know how many batches came before, and the
    processes of one run take turns (`first`, `stride`) without communicating.
    """

    def __init__(
        self,
        group_sizes: Sequence[int],
        batch_size: int,
        *,
        seed: int,
        flip: bool = False,
        caption_dropout: float = 0.0,
        first: int = 0,
        stride: int = 1,
    ) -> None:
        self.group_sizes = group_sizes
        self.batch_size = batch_size
        self.seed = seed
        self.flip = flip
        self.caption_dropout = caption_dropout
        self.first = first
        self.stride = stride

    def __iter__(self) -> Iterator[list[Draw]]:
        return map(self.batch, itertools.count(self.first, self.stride))

    def batch(self, number: int) -> list[Draw]:
        """Return the draws of batch `number`."""
        chance = np.random.default_rng((self.seed, 0, number))
        draws: list[Draw] = []
        offset = 0
        for group, size in enumerate(self.group_sizes, 1):
            for position in range(number * self.batch_size, (number + 1) * self.batch_size):
                epoch, place = divmod(position, size)
                order = np.random.default_rng((self.seed, group, epoch)).permutation(size)
                flip = self.flip and chance.random() < 0.5
                drop = chance.random() < self.caption_dropout
                draws.append(Draw(offset + int(order[place]), bool(flip), bool(drop)))
            offset += size
        return draws


def collate(items: list[tuple[Tensor, str]]) -> Batch:
    """Return one batch of items of `Pictures`."""
    return Batch(torch.stack([picture for picture, _ in items]), [caption for _, caption in items])


def load_batches(pictures: Pictures, batches: EndlessBatches, workers: int) -> Iterable[Batch]:
    """Return an iterable of batches as tensors, read by `workers` background processes."""
    # A generator of its own, so that starting workers does not consume random numbers of the training.
    own = torch.Generator()
    return DataLoader(pictures, batch_sampler=batches, collate_fn=collate, num_workers=workers, generator=own)


def labelled_sheet(images: Sequence[Image.Image], labels: Sequence[str], title: str, columns: int = 4) -> Image.Image:
    """Return a sheet of pictures under a title, each above its label. Small ones are enlarged without smoothing."""
    factor = max(1, 160 // images[0].width)
    width, height = images[0].width * factor, images[0].height * factor
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    line, gap = 14, 6
    sheet_width = columns * (width + gap) + gap
    header = textwrap.wrap(title, max(20, sheet_width // 6))
    top = line * len(header) + 2 * gap
    sheet = Image.new("RGB", (sheet_width, top + rows * (height + line + 2 * gap)), "white")
    draw = ImageDraw.Draw(sheet)
    for number, text in enumerate(header):
        draw.text((gap, gap + line * number), text, fill="black")
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        x = gap + number % columns * (width + gap)
        y = top + number // columns * (height + line + 2 * gap)
        sheet.paste(image.resize((width, height), Image.Resampling.NEAREST), (x, y))
        draw.text((x, y + height + 2), label, fill="black")
    return sheet
