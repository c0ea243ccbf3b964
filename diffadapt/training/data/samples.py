"""From a draw to what a training step needs: pixels, or latents from the cache, with everything random about them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from diffadapt.errors import UsageError
from diffadapt.training.data.caption_variants import CaptionVariants
from diffadapt.training.data.draws import CLASS, INSTANCE, Draw, Draws
from diffadapt.training.data.folders import Example
from diffadapt.training.data.pictures import read_mask, read_picture
from diffadapt.training.data.shapes import Crop, Shapes, Size
from diffadapt.training.randomness import chance

Encoded: TypeAlias = dict[str, Tensor]
View: TypeAlias = tuple[Crop, bool]
"""How a picture is seen: the crop, and whether it is mirrored."""


@dataclass
class Sample:
    """One picture of a batch.

    Attributes:
        draw: the draw.
        caption: its caption; `None` if it is dropped.
        weight: its weight in the loss.
        sizes: height and width of the original, top and left of the crop, height and width of the crop.
        pixels: the picture in -1..1, of shape (3, height, width); `None` if its latents are cached.
        latents: its cached latents, without a batch dimension.
        mask: what is trained, in 0..1, of shape (1, height, width); `None` for everything.
        control: the picture to edit in -1..1, of shape (3, height, width).
        references: the cached encoding of `control`.
    """

    draw: Draw
    caption: str | None
    weight: float
    sizes: tuple[int, ...]
    pixels: Tensor | None = None
    latents: Encoded | None = None
    mask: Tensor | None = None
    control: Tensor | None = None
    references: Encoded | None = None


@dataclass(frozen=True)
class PictureOptions:
    """How pictures are made into samples; see the options of the same names."""

    seed: int = 0
    random_flip: bool = False
    random_crop: bool = False
    background: str = "white"
    masked_loss: bool = False
    paints_masks: bool = False

    @property
    def reads_masks(self) -> bool:
        """Whether the masks of pictures are read: to weight the loss, or as what an inpainting model paints."""
        return self.masked_loss or self.paints_masks


@dataclass
class Stream:
    """The pictures of one stream with their sizes.

    Attributes:
        examples: the pictures.
        sizes: the size in which each is trained.
    """

    examples: list[Example]
    sizes: list[Size]

    @classmethod
    def of(cls, examples: Sequence[Example], shapes: Shapes) -> "Stream":
        """Return a stream of pictures in the sizes that suit them.

        Raises:
            UsageError: a picture is too small.
        """
        sizes: list[Size] = []
        for example in examples:
            try:
                sizes.append(shapes.size_for(example.size))
            except UsageError as error:
                raise UsageError(f"{example.path}: {error}") from error
        return cls(list(examples), sizes)


@dataclass
class Samples(Dataset[Sample]):
    """The samples of all streams, looked up by `Draw`.

    Attributes:
        streams: the pictures by stream.
        options: how they are made into samples.
        variants: how captions vary.
        reference_size: returns the width and height of the picture to edit, from its own and those of the trained
            picture; `None` if it is cropped like the trained picture.
        cached: looks up the cached latents and references of a picture and a view; `None` without a cache.
    """

    streams: Mapping[str, Stream]
    options: PictureOptions
    variants: CaptionVariants
    reference_size: Callable[[Size, Size], Size] | None = None
    cached: Callable[[str, int, View], tuple[Encoded, Encoded | None]] | None = None
    _masks: dict[tuple[str, int, View], Tensor | None] = field(default_factory=dict, repr=False)

    def __getitem__(self, draw: Draw) -> Sample:
        example = self.streams[draw.stream].examples[draw.picture]
        view = self.view(draw)
        sample = Sample(
            draw, self.variants.caption(example.captions, draw), example.weight, self.condition(example, view)
        )
        if self.cached is None:
            sample.pixels, sample.mask, sample.control = self.load(draw.stream, draw.picture, view)
            return sample
        sample.latents, sample.references = self.cached(draw.stream, draw.picture, view)
        if self.options.reads_masks and draw.stream == INSTANCE:
            key = (draw.stream, draw.picture, view)
            if key not in self._masks:
                self._masks[key] = self.load(*key)[1]
            sample.mask = self._masks[key]
        return sample

    def view(self, draw: Draw) -> View:
        """Return how the picture of a draw is seen. Class pictures are neither mirrored nor cropped at random."""
        size = self.streams[draw.stream].sizes[draw.picture]
        if draw.stream != INSTANCE:
            return Crop(size), False
        random = chance(self.options.seed, draw.stream, draw.number, "view")
        flip = self.options.random_flip and bool(random.random() < 0.5)
        at = (float(random.random()), float(random.random())) if self.options.random_crop else (0.5, 0.5)
        return Crop(size, at), flip

    def views(self, stream: str) -> Iterator[tuple[int, View]]:
        """Return all pictures of a stream with every way in which they are seen, without random crops."""
        flips = (False, True) if self.options.random_flip and stream == INSTANCE else (False,)
        for index, size in enumerate(self.streams[stream].sizes):
            for flip in flips:
                yield index, (Crop(size), flip)

    def load(self, stream: str, index: int, view: View) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return the pixels, the mask and the picture to edit, see `Sample`."""
        example = self.streams[stream].examples[index]
        crop, flip = view
        picture = read_picture(example.path, self.options.background)
        mask = None
        if self.options.reads_masks and stream == INSTANCE:
            covering = read_mask(example.mask) if example.mask is not None else picture.alpha
            if covering is not None:
                if covering.size != picture.image.size:
                    covering = covering.resize(picture.image.size, Image.Resampling.BOX)
                mask = (to_tensor(crop.apply(covering, Image.Resampling.BOX), flip) + 1) / 2
        control = None
        if example.control is not None:
            control = to_tensor(
                self._reference(read_picture(example.control, self.options.background).image, crop), flip
            )
        return to_tensor(crop.apply(picture.image), flip), mask, control

    def _reference(self, image: Image.Image, crop: Crop) -> Image.Image:
        size = crop.size if self.reference_size is None else self.reference_size(image.size, crop.size)
        return crop.apply(image) if size == crop.size else image.resize(size, Image.Resampling.LANCZOS)

    def condition(self, example: Example, view: View) -> tuple[int, ...]:
        """Return the sizes of `Sample.sizes`."""
        crop, flip = view
        height, width, top, left, *target = crop.condition(example.size)
        if flip:
            scale = max(crop.size[0] / width, crop.size[1] / height)
            left = max(0, round(width * scale) - crop.size[0] - left)
        return (height, width, top, left, *target)

    def batches(self, batch_size: int, first: int, stride: int, workers: int) -> Iterator[list[Sample]]:
        """Return every `stride`-th batch from number `first` on: samples of the pictures, then of class pictures.

        Args:
            batch_size: pictures per batch; as many class pictures are added.
            first: number of the first batch.
            stride: how many processes take turns.
            workers: number of background processes that read pictures.
        """
        shares = [
            Draws(
                stream.sizes,
                batch_size,
                seed=self.options.seed,
                stream=name,
                repeats=[example.repeats for example in stream.examples],
            ).share(first, stride)
            for name, stream in self.streams.items()
        ]
        joined = (list(chain.from_iterable(parts)) for parts in zip(*shares, strict=True))
        if not workers:
            return ([self[draw] for draw in batch] for batch in joined)
        loader = DataLoader(
            self,
            batch_sampler=_Iterable(joined),  # type: ignore[arg-type]
            collate_fn=list,
            num_workers=workers,
            # A generator of its own, so that starting workers does not consume random numbers of the training.
            generator=torch.Generator(),
        )
        return iter(loader)


class _Iterable:
    """An iterator as the sampler of a `DataLoader`, which asks for an iterator once."""

    def __init__(self, batches: Iterator[list[Draw]]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[list[Draw]]:
        return self.batches


def to_tensor(image: Image.Image, flip: bool) -> Tensor:
    """Return a picture as (channels, height, width) in -1..1."""
    pixels = torch.from_numpy(np.array(image)).float() / 127.5 - 1
    pixels = pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)
    return (pixels.flip(-1) if flip else pixels).contiguous()


__all__ = ["CLASS", "INSTANCE", "Encoded", "PictureOptions", "Sample", "Samples", "Stream", "View", "to_tensor"]
