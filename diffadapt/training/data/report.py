"""What the user is told about a data set before training: a text, and a contact sheet of what will be trained."""

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image

from diffadapt.training.data.draws import INSTANCE
from diffadapt.training.data.samples import Samples, Stream
from diffadapt.training.data.shapes import common_sizes, cropped_share, enlarged
from diffadapt.training.data.sheets import labelled_sheet

_MUCH_CROPPED = 0.25
_LONGEST_SHEET = 64


def describe(samples: Samples, notes: Sequence[str]) -> str:
    """Return the report on a data set."""
    lines = [line for name, stream in samples.streams.items() for line in _stream(name, stream)]
    if samples.options.masked_loss:
        lines.append(f"masks cover {covered_share(samples):.0%} of the pictures that are trained")
    return "\n".join(lines + [f"note: {note}" for note in notes])


def contact_sheet(samples: Samples) -> Image.Image:
    """Return a sheet of the pictures as they are trained, with captions; what a mask leaves out is dark."""
    images: list[Image.Image] = []
    labels: list[str] = []
    for name, stream in samples.streams.items():
        for index, view in samples.views(name):
            if view[1] or len(images) >= _LONGEST_SHEET:
                continue
            pixels, mask, _ = samples.load(name, index, view)
            shown = (pixels + 1) * 127.5
            if mask is not None:
                shown = shown * (0.25 + 0.75 * mask)
            image = Image.fromarray(shown.permute(1, 2, 0).round().numpy().astype(np.uint8))
            image.thumbnail((256, 256))
            images.append(image)
            example = stream.examples[index]
            labels.append(samples.variants.with_trigger(example.caption) if name == INSTANCE else example.caption)
    total = sum(len(stream.examples) for stream in samples.streams.values())
    return labelled_sheet(images, labels, f"{len(images)} of {total} pictures, as they are trained")


def covered_share(samples: Samples) -> float:
    """Return the share of the trained pictures that masks cover."""
    shares: list[float] = []
    for index, view in samples.views(INSTANCE):
        if not view[1]:
            mask = samples.load(INSTANCE, index, view)[1]
            shares.append(1.0 if mask is None else float(mask.mean()))
    return sum(shares) / len(shares)


def _stream(name: str, stream: Stream) -> list[str]:
    examples, sizes = stream.examples, stream.sizes
    kind = "pictures" if name == INSTANCE else "class pictures"
    seen = sum(example.repeats for example in examples)
    repeats = f", {seen} in an epoch" if seen != len(examples) else ""
    shapes = ", ".join(f"{width} x {height}: {count}" for (width, height), count in common_sizes(sizes).items())
    lines = [f"{len(examples)} {kind}{repeats}; trained sizes: {shapes}"]
    small = [e.path.name for e, size in zip(examples, sizes, strict=True) if enlarged(e.size, size)]
    if small:
        lines.append(f"{_some(small)} enlarged, which makes them soft: smaller than the trained size")
    cropped = {e.path.name: cropped_share(e.size, size) for e, size in zip(examples, sizes, strict=True)}
    much = [key for key, share in cropped.items() if share > _MUCH_CROPPED]
    if much:
        lines.append(
            f"{_some(much)} cropped by more than {_MUCH_CROPPED:.0%}; --aspect_ratio_buckets would keep more of them"
        )
    same = [group for group in _groups({e.path.name: e.digest for e in examples}) if len(group) > 1]
    lines += [f"the same picture {len(group)} times: {', '.join(group)}" for group in same]
    captions = Counter(caption for example in examples for caption in example.captions)
    lines += [f"  {count} x {caption!r}" for caption, count in captions.most_common(5)]
    if len(captions) > 5:
        lines.append(f"  and {len(captions) - 5} more captions")
    return lines


def _groups(values: Mapping[str, str]) -> list[list[str]]:
    groups: dict[str, list[str]] = {}
    for key, value in values.items():
        groups.setdefault(value, []).append(key)
    return list(groups.values())


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:3])
    verb = "is" if len(names) == 1 else "are"
    return f"{shown} {verb}" if len(names) <= 3 else f"{shown} and {len(names) - 3} more are"
