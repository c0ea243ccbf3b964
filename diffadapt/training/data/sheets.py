"""Sheets of labelled pictures."""

import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw


def labelled_sheet(images: Sequence[Image.Image], labels: Sequence[str], title: str, columns: int = 4) -> Image.Image:
    """Return a sheet of pictures under a title, each above its label. Small ones are enlarged without smoothing."""
    factor = max(1, 160 // max(image.width for image in images))
    sizes = [(image.width * factor, image.height * factor) for image in images]
    width, height = max(size[0] for size in sizes), max(size[1] for size in sizes)
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    line, gap = 14, 6
    sheet_width = columns * (width + gap) + gap
    header = [part for text in title.split("\n") for part in textwrap.wrap(text, max(20, sheet_width // 6)) or [""]]
    top = line * len(header) + 2 * gap
    sheet = Image.new("RGB", (sheet_width, top + rows * (height + line + 2 * gap)), "white")
    draw = ImageDraw.Draw(sheet)
    for number, text in enumerate(header):
        draw.text((gap, gap + line * number), text, fill="black")
    for number, (image, size, label) in enumerate(zip(images, sizes, labels, strict=True)):
        x = gap + number % columns * (width + gap)
        y = top + number // columns * (height + line + 2 * gap)
        sheet.paste(image.resize(size, Image.Resampling.NEAREST), (x, y))
        draw.text((x, y + height + 2), label[: width // 6], fill="black")
    return sheet
