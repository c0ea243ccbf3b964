"""The world of the embedded pipeline: captioned 64 x 64 pictures of one shape on one background.

Pictures are drawn from signed distance functions, so an endless data set with exact captions costs milliseconds per
picture and no download. Besides the base look, the module draws what the base model never sees and adapters are trained
on: one subject (the critter) and two styles (ink and pixel).

    python scripts/tiny_world.py --dreambooth-data    # writes examples/dreambooth/data
"""

import argparse
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

SIZE = 64
COLOURS = {
    "red": (0.86, 0.14, 0.16),
    "orange": (0.98, 0.56, 0.10),
    "yellow": (0.98, 0.88, 0.18),
    "green": (0.15, 0.63, 0.27),
    "blue": (0.15, 0.32, 0.87),
    "purple": (0.53, 0.18, 0.68),
    "black": (0.08, 0.08, 0.10),
    "white": (0.96, 0.96, 0.96),
}
RADII = {"small": 12.0, "medium": 17.0, "large": 23.0}
POSITIONS = {
    "centre": ((0, 0), ("in the centre", "in the middle")),
    "left": ((-1, 0), ("on the left",)),
    "right": ((1, 0), ("on the right",)),
    "top": ((0, -1), ("at the top",)),
    "bottom": ((0, 1), ("at the bottom",)),
}
OFFSET = 13.0  # a medium shape just touches the edge
TEMPLATES = (
    "{object}{place} on {background} background",
    "{object}{place}, {background} background",
    "{background} background with {object}{place}",
    "a picture of {object}{place} on {background} background",
    "a picture with {object}{place} and {background} background",
)
PAPER = (0.96, 0.94, 0.88)
INK = (0.10, 0.10, 0.22)
# Words that no base caption uses; adapters bind new subjects and styles to them.
ADAPTER_WORDS = tuple(
    "sks zwx critter creature monster toy dog cat robot style ink pixel outline mosaic drawing painting sketch "
    "photo image art paper block blocks line lines".split()
)

T = TypeVar("T")
Distance = Callable[[Tensor, Tensor], Tensor]
"""Signed distance of points `(x, y)` to a shape, negative inside."""


def _circle(x: Tensor, y: Tensor, centre: tuple[float, float] = (0, 0), radius: float = 1.0) -> Tensor:
    """Return the signed distance to a circle."""
    return torch.hypot(x - centre[0], y - centre[1]) - radius


def _box(x: Tensor, y: Tensor, half_width: float, half_height: float) -> Tensor:
    """Return the signed distance to a centred box."""
    return torch.maximum(x.abs() - half_width, y.abs() - half_height)


def _capsule(x: Tensor, y: Tensor, start: tuple[float, float], end: tuple[float, float], radius: float) -> Tensor:
    """Return the signed distance to a line from `start` to `end` with round ends."""
    along_x, along_y = end[0] - start[0], end[1] - start[1]
    t = ((x - start[0]) * along_x + (y - start[1]) * along_y) / (along_x**2 + along_y**2)
    t = t.clamp(0, 1)
    return torch.hypot(x - start[0] - t * along_x, y - start[1] - t * along_y) - radius


def _polygon(points: Sequence[tuple[float, float]]) -> Distance:
    """Return the signed distance to a closed polygon. Points are inside if a ray crosses an odd number of edges."""
    start = torch.tensor(points, dtype=torch.float32).view(-1, 2, 1, 1)
    end = start.roll(-1, 0)
    edge = end - start

    def distance(x: Tensor, y: Tensor) -> Tensor:
        from_start = torch.stack([x, y]) - start
        t = ((from_start * edge).sum(1, keepdim=True) / (edge * edge).sum(1, keepdim=True)).clamp(0, 1)
        nearest = (from_start - t * edge).square().sum(1).amin(0).sqrt()
        spans = (start[:, 1] <= y) != (end[:, 1] <= y)
        crossing = start[:, 0] + (y - start[:, 1]) * edge[:, 0] / torch.where(spans, edge[:, 1], 1.0)
        inside = (spans & (x < crossing)).sum(0) % 2 == 1
        return torch.where(inside, -nearest, nearest)

    return distance


def _star_points(tips: int = 5, inner: float = 0.42) -> list[tuple[float, float]]:
    """Return the corners of a star."""
    angles = [math.pi * k / tips for k in range(2 * tips)]
    radii = [1.08 if k % 2 == 0 else inner for k in range(2 * tips)]
    return [(r * math.sin(a), 0.05 - r * math.cos(a)) for r, a in zip(radii, angles, strict=True)]


def _heart_points(count: int = 40) -> list[tuple[float, float]]:
    """Return points on the outline of a heart."""
    angles = [2 * math.pi * k / count for k in range(count)]
    return [
        (
            math.sin(a) ** 3,
            -(13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a)) / 16 - 0.1,
        )
        for a in angles
    ]


# Each shape about fills the unit disc; y points down.
SHAPES: dict[str, Distance] = {
    "circle": lambda x, y: _circle(x, y, radius=0.9),
    "square": lambda x, y: _box(x, y, 0.8, 0.8),
    "triangle": _polygon([(0, -0.9), (1.0, 0.8), (-1.0, 0.8)]),
    "star": _polygon(_star_points()),
    "heart": _polygon(_heart_points()),
    "moon": lambda x, y: torch.maximum(_circle(x, y, (0.1, 0)), -_circle(x, y, (0.55, 0), 0.75)),
    "ring": lambda x, y: (torch.hypot(x, y) - 0.7).abs() - 0.24,
    "cross": lambda x, y: torch.minimum(_box(x, y, 0.95, 0.32), _box(x, y, 0.32, 0.95)),
}


@dataclass(frozen=True)
class Scene:
    """What a picture shows, in words, and small variations that no caption mentions."""

    shape: str
    colour: str
    background: str
    size: str = "large"
    position: str = "centre"
    shift: tuple[float, float] = (0.0, 0.0)
    stretch: float = 1.0

    @property
    def centre(self) -> tuple[float, float]:
        """Centre of the shape `(x, y)`, in pixels."""
        (x, y), _ = POSITIONS[self.position]
        return SIZE / 2 + OFFSET * x + self.shift[0], SIZE / 2 + OFFSET * y + self.shift[1]

    @property
    def radius(self) -> float:
        """Radius of the shape, in pixels."""
        return RADII[self.size] * self.stretch


def _chance(generator: torch.Generator) -> float:
    """Return a random number in [0, 1)."""
    return torch.rand((), generator=generator).item()


def _choose(options: Iterable[T], generator: torch.Generator) -> T:
    """Return a random one of `options`."""
    options = list(options)
    return options[int(torch.randint(len(options), (), generator=generator))]


def _between(low: float, high: float, generator: torch.Generator) -> float:
    """Return a random number between `low` and `high`."""
    return low + (high - low) * _chance(generator)


def sample_scene(generator: torch.Generator, easy: bool = False) -> Scene:
    """Return a random scene. Easy ones are centred and not small; large shapes are always centred."""
    size = _choose(["medium", "large"] if easy else RADII, generator)
    position = "centre" if easy or size == "large" else _choose(POSITIONS, generator)
    colour = _choose(COLOURS, generator)
    return Scene(
        shape=_choose(SHAPES, generator),
        colour=colour,
        background=_choose((name for name in COLOURS if name != colour), generator),
        size=size,
        position=position,
        shift=(_between(-1, 1, generator), _between(-1, 1, generator)),
        stretch=_between(0.95, 1.05, generator),
    )


def caption(scene: Scene, generator: torch.Generator) -> str:
    """Return one of many wordings for a scene. Small sizes and positions off the centre are always mentioned."""
    says_size = scene.size == "small" or _chance(generator) < 0.5
    says_position = scene.position != "centre" or _chance(generator) < 0.25
    words = f"{scene.size} {scene.colour} {scene.shape}" if says_size else f"{scene.colour} {scene.shape}"
    place = " " + _choose(POSITIONS[scene.position][1], generator) if says_position else ""
    template = _choose(TEMPLATES, generator)
    return template.format(object=_a(words), place=place, background=_a(scene.background))


def _a(words: str) -> str:
    """Return words with their indefinite article."""
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"


def vocabulary() -> list[str]:
    """Return every word of the captions and the words reserved for adapters, sorted."""
    phrases = [phrase for _, wordings in POSITIONS.values() for phrase in wordings]
    blank = [t.format(object="a", place="", background="an") for t in TEMPLATES]
    words = [*SHAPES, *COLOURS, *RADII, *POSITIONS, *phrases, *blank, *ADAPTER_WORDS, "of in the"]
    return sorted({word for phrase in words for word in phrase.replace(",", " ,").split()})


def _colour(rgb: tuple[float, float, float]) -> Tensor:
    """Return a colour as a picture of one pixel, (3, 1, 1)."""
    return torch.tensor(rgb).view(3, 1, 1)


def _coverage(distance: Tensor) -> Tensor:
    """Return the share of each pixel that lies inside, from the distance in pixels, for anti-aliasing."""
    return (0.5 - distance).clamp(0, 1)


def _grid(centre: tuple[float, float], radius: float) -> tuple[Tensor, Tensor]:
    """Return x and y of every pixel, (64, 64) each, relative to `centre` and in units of `radius`."""
    y, x = torch.meshgrid(torch.arange(SIZE) + 0.5, torch.arange(SIZE) + 0.5, indexing="ij")
    return (x - centre[0]) / radius, (y - centre[1]) / radius


def _distance(scene: Scene) -> Tensor:
    """Return the signed distance of every pixel to the shape, (64, 64), in pixels."""
    return SHAPES[scene.shape](*_grid(scene.centre, scene.radius)) * scene.radius


def coverage(scene: Scene) -> Tensor:
    """Return the mask of the shape, (64, 64) in 0..1."""
    return _coverage(_distance(scene))


def draw(scene: Scene) -> Tensor:
    """Draw a scene in the base look, a flat shape on a flat background: (3, 64, 64) in 0..1."""
    return torch.lerp(_colour(COLOURS[scene.background]), _colour(COLOURS[scene.colour]), coverage(scene))


def draw_ink(scene: Scene) -> Tensor:
    """Draw a scene with a thick dark outline and a pale fill on paper. The VAE keeps no lines thinner than 3 px."""
    distance = _distance(scene)
    pale = torch.lerp(_colour(PAPER), _colour(COLOURS[scene.colour]), 0.3)
    filled = torch.lerp(_colour(PAPER), pale, _coverage(distance))
    return torch.lerp(filled, _colour(INK), _coverage(distance.abs() - 1.7))


def draw_pixel(scene: Scene, block: int = 8) -> Tensor:
    """Draw a scene as a mosaic of blocks of alternating brightness, so that plain backgrounds show the style, too."""
    shape = (F.avg_pool2d(coverage(scene)[None], block) > 0.45).float()
    blocks = torch.lerp(_colour(COLOURS[scene.background]), _colour(COLOURS[scene.colour]), shape)
    row = torch.arange(SIZE // block)
    light = ((row[:, None] + row) % 2).float()
    return torch.lerp(blocks, light, 0.18).repeat_interleave(block, 1).repeat_interleave(block, 2)


STYLES: dict[str, Callable[[Scene], Tensor]] = {"ink": draw_ink, "pixel": draw_pixel}


def draw_critter(background: str, centre: tuple[float, float] = (32.0, 34.0), radius: float = 20.0) -> Tensor:
    """Draw the subject, a round teal creature with one big eye. Its parts are large enough for the VAE to keep them."""
    x, y = _grid(centre, radius)
    side = x.abs()  # the critter is symmetric, so each part is drawn on both sides at once
    teal, dark, pink = (0.10, 0.66, 0.66), (0.05, 0.42, 0.48), (0.95, 0.25, 0.55)
    parts = [
        (_capsule(side, y, (0.38, 0.6), (0.45, 1.1), 0.2), dark),
        (_capsule(side, y, (0.8, 0.1), (1.15, -0.25), 0.17), dark),
        (_capsule(side, y, (0.3, -0.6), (0.55, -1.1), 0.13), dark),
        (_circle(side, y, (0.6, -1.2), 0.26), pink),
        (_circle(x, y, radius=0.95), teal),
        (_circle(x / 1.3, y, (0, 0.62), 0.3), COLOURS["yellow"]),
        (_circle(x, y, (0, -0.2), 0.47), COLOURS["white"]),
        (_circle(x, y, (0, -0.16), 0.23), COLOURS["black"]),
    ]
    picture = _colour(COLOURS[background]).expand(3, SIZE, SIZE)
    for distance, rgb in parts:
        picture = torch.lerp(picture, _colour(rgb), _coverage(distance * radius))
    return picture


def draw_doodle(generator: torch.Generator) -> Tensor:
    """Draw several overlapping shapes of any colour, from which the VAE learns to keep what no caption names."""
    picture = torch.rand((3, 1, 1), generator=generator).expand(3, SIZE, SIZE)
    for _ in range(3 + int(6 * _chance(generator))):
        scene = sample_scene(generator)
        shift = (_between(-22, 22, generator), _between(-22, 22, generator))
        scene = replace(scene, position="centre", shift=shift, stretch=_between(0.2, 1.1, generator))
        picture = torch.lerp(picture, torch.rand((3, 1, 1), generator=generator), coverage(scene))
    return picture


def to_image(picture: Tensor) -> Image.Image:
    """Convert a picture (3, height, width) in 0..1 to an image."""
    return Image.fromarray((picture * 255).round().byte().permute(1, 2, 0).contiguous().numpy())


def _write_folder(folder: Path, pictures: Iterable[tuple[Tensor, str]]) -> None:
    """Write pictures and captions as an imagefolder of `datasets`: PNG files and a metadata.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, (picture, text) in enumerate(pictures):
        name = f"{number:02d}.png"
        to_image(picture).save(folder / name)
        lines.append(json.dumps({"file_name": name, "text": text}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")


def _subject_pictures(generator: torch.Generator) -> Iterable[tuple[Tensor, str]]:
    """Yield pictures of the critter on every background, with captions."""
    for background in COLOURS:
        centre = (32 + _between(-4, 4, generator), 34 + _between(-2, 2, generator))
        picture = draw_critter(background, centre, _between(18.5, 21, generator))
        yield picture, f"a sks critter on {_a(background)} background"


def _style_pictures(style: str, generator: torch.Generator, count: int = 24) -> Iterable[tuple[Tensor, str]]:
    """Yield pictures in a style, with captions that do not name it: the adapter, not a trigger word, sets the style."""
    shapes = list(SHAPES)
    for number in range(count):
        scene = replace(sample_scene(generator), shape=shapes[number % len(shapes)])
        if scene.size == "small":  # blocks of 8 px cannot show it
            scene = replace(scene, size="medium")
        yield STYLES[style](scene), caption(scene, generator)


def write_dreambooth_data(folder: Path, seed: int) -> None:
    """Write the training pictures of the DreamBooth examples: one subject and two styles."""
    _write_folder(folder / "critter", _subject_pictures(torch.Generator().manual_seed(seed)))
    for style in STYLES:
        _write_folder(folder / style, _style_pictures(style, torch.Generator().manual_seed(seed)))


def main() -> None:
    """Parse the command line and write the training pictures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dreambooth-data", action="store_true", help="write the training pictures of adapters")
    parser.add_argument("--output", type=Path, default=Path("examples/dreambooth/data"), help="folder to write to")
    parser.add_argument("--seed", type=int, default=0, help="seed of the pictures (default: %(default)s)")
    arguments = parser.parse_args()
    if not arguments.dreambooth_data:
        parser.error("nothing to do: pass --dreambooth-data")
    write_dreambooth_data(arguments.output, arguments.seed)


if __name__ == "__main__":
    main()
