"""Pictures in rows and columns, with labels."""

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

_MARGIN = 8
_SMALLEST = 192
"""Smaller pictures are enlarged to at least this size, in pixels."""


def labelled_grid(
    pictures: Sequence[Sequence[Image.Image]], rows: Sequence[str], columns: Sequence[str], *, font_size: int = 17
) -> Image.Image:
    """Return one picture with all `pictures`, row by row.

    Args:
        pictures: rows of pictures; every row has one for each column.
        rows: the label of each row, drawn at its left; may have several lines.
        columns: the label of each column, drawn above it; may have several lines.
        font_size: height of the letters in pixels.
    """
    font = ImageFont.load_default(size=font_size)
    ruler = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    boxes = [ruler.multiline_textbbox((0, 0), label, font=font) for label in (*rows, *columns)]
    left = 2 * _MARGIN + int(max((box[2] for box in boxes[: len(rows)]), default=0))
    top = 2 * _MARGIN + int(max((box[3] for box in boxes[len(rows) :]), default=0))
    shown = [[_enlarged(picture) for picture in row] for row in pictures]
    width = max(picture.width for row in shown for picture in row)
    # A label must not run into the next column.
    step = max(width, int(max((box[2] for box in boxes[len(rows) :]), default=0))) + _MARGIN
    heights = [max(picture.height for picture in row) for row in shown]
    # Nor into the next row.
    spans = [max(height, int(box[3])) + _MARGIN for height, box in zip(heights, boxes[: len(rows)], strict=True)]
    sheet = Image.new("RGB", (left + step * len(columns), top + sum(spans)), "white")
    draw = ImageDraw.Draw(sheet)
    for column, label in enumerate(columns):
        draw.multiline_text((left + column * step, _MARGIN), label, fill="black", font=font)
    y = top
    for row, label, span, box in zip(shown, rows, spans, boxes[: len(rows)], strict=True):
        draw.multiline_text((_MARGIN, y + (span - _MARGIN - box[3]) // 2), label, fill="black", font=font)
        for column, picture in enumerate(row):
            sheet.paste(picture, (left + column * step, y))
        y += span
    return sheet


def _enlarged(picture: Image.Image) -> Image.Image:
    """Return a small picture enlarged by a whole factor."""
    factor = -(-_SMALLEST // max(picture.width, picture.height))
    picture = picture.convert("RGB")
    if factor <= 1:
        return picture
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.LANCZOS)
