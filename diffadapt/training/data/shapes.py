"""The size at which each picture is trained, and what is cropped away for it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from PIL import Image, ImageOps

from diffadapt.errors import UsageError

Size = tuple[int, int]
"""Width and height in pixels."""


class Crop(NamedTuple):
    """A picture scaled to cover a size and cropped to it.

    Attributes:
        size: width and height of the result.
        centering: where the crop is: 0 is left or top, 1 right or bottom.
    """

    size: Size
    centering: tuple[float, float] = (0.5, 0.5)

    def apply(self, image: Image.Image, resample: Image.Resampling = Image.Resampling.LANCZOS) -> Image.Image:
        """Return `image` scaled and cropped."""
        return ImageOps.fit(image, self.size, resample, centering=self.centering)

    def condition(self, original: Size) -> tuple[int, ...]:
        """Return height and width of the original, top and left of the crop, height and width of the crop.

        The corner is measured in pixels of the scaled picture.
        """
        width, height = self.size
        scale = max(width / original[0], height / original[1])
        left, top = (
            round((side * scale - wanted) * share)
            for side, wanted, share in zip(original, self.size, self.centering, strict=True)
        )
        return (original[1], original[0], max(0, top), max(0, left), height, width)


@dataclass(frozen=True)
class Shapes:
    """The sizes in which pictures are trained.

    Attributes:
        resolution: side of the square; with buckets, their area is at most its square.
        divisor: what width and height are multiples of.
        buckets: whether pictures keep about their aspect ratio.
        upscale: whether buckets may enlarge pictures.
    """

    resolution: int
    divisor: int
    buckets: bool = False
    upscale: bool = False

    def __post_init__(self) -> None:
        if self.resolution % self.divisor:
            lower = self.resolution // self.divisor * self.divisor
            choices = " or ".join(str(side) for side in (lower, lower + self.divisor) if side)
            raise UsageError(
                f"--resolution must be a multiple of {self.divisor} for this pipeline, not {self.resolution}; "
                f"take {choices}"
            )

    @property
    def step(self) -> int:
        """By how many pixels the sides of buckets differ: about an eighth of the resolution, at most 64."""
        return self.divisor * max(1, round(min(64, self.resolution / 8) / self.divisor))

    def sizes(self) -> list[Size]:
        """Return the sizes of all buckets: sides from half to twice the resolution, as much area as fits."""
        area, step = self.resolution**2, self.step
        first = max(step, math.ceil(self.resolution / 2 / step) * step)
        found = {(self.resolution, self.resolution)}
        for width in range(first, 2 * self.resolution + 1, step):
            height = min(area // width, 2 * self.resolution) // step * step
            if height:
                found |= {(width, height), (height, width)}
        return sorted(found)

    def size_for(self, picture: Size) -> Size:
        """Return the size in which a picture is trained.

        Raises:
            UsageError: the picture is smaller than the smallest size, and must not be enlarged.
        """
        if not self.buckets:
            return (self.resolution, self.resolution)
        ratio = math.log(picture[0] / picture[1])
        nearest = min(self.sizes(), key=lambda size: (abs(math.log(size[0] / size[1]) - ratio), -size[0] * size[1]))
        if self.upscale or (picture[0] >= nearest[0] and picture[1] >= nearest[1]):
            return nearest
        own = tuple(min(side, most) // self.divisor * self.divisor for side, most in zip(picture, nearest, strict=True))
        if not all(own):
            raise UsageError(
                f"it has {picture[0]} x {picture[1]} pixels, expected at least {self.divisor} x {self.divisor}; "
                "leave it out, or pass --allow_upscaling"
            )
        return (own[0], own[1])


def enlarged(picture: Size, size: Size) -> bool:
    """Return whether a picture has to be enlarged to cover a size."""
    return picture[0] < size[0] or picture[1] < size[1]


def cropped_share(picture: Size, size: Size) -> float:
    """Return the share of a picture that is cropped away for a size."""
    scale = max(size[0] / picture[0], size[1] / picture[1])
    return 1 - size[0] * size[1] / (picture[0] * picture[1] * scale**2)


def common_sizes(sizes: Sequence[Size]) -> dict[Size, int]:
    """Return size -> how many pictures have it, the most frequent first."""
    counts: dict[Size, int] = {}
    for size in sizes:
        counts[size] = counts.get(size, 0) + 1
    return dict(sorted(counts.items(), key=lambda entry: (-entry[1], entry[0])))
