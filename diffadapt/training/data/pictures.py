"""Decode pictures: upright, in sRGB, 8 bits a channel, with what is transparent in front of a chosen colour."""

import io
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageColor, ImageOps

from diffadapt.errors import UsageError

PICTURE_SUFFIXES = frozenset({".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".jxl", ".png", ".tif", ".tiff", ".webp"})
_WIDE_GREY = ("I;16", "I;16B", "I;16L", "I;16N", "I")
"""Modes of grey values of more than 8 bits, which Pillow's conversion to 8 bits would clip at 255."""
_TRANSPARENT = ("RGBA", "LA", "PA", "RGBa", "La")


class Picture(NamedTuple):
    """A decoded picture.

    Attributes:
        image: the picture in mode RGB.
        alpha: its alpha channel in mode L; `None` if it is opaque.
        notes: what was ignored or changed, for the report.
    """

    image: Image.Image
    alpha: Image.Image | None
    notes: tuple[str, ...] = ()


def read_picture(path: Path, background: str = "white") -> Picture:
    """Return the first frame of a picture file: upright, in sRGB, composited on `background`.

    Raises:
        UsageError: the file cannot be read as a picture, or not completely.
    """
    try:
        with Image.open(path) as opened:
            opened.load()
            return _decoded(opened, background)
    except UsageError:
        raise
    except MemoryError as error:
        raise UsageError(f"{path} cannot be read as a picture: there is too little memory") from error
    except Exception as error:  # Decoders raise errors of any class for damaged files.
        raise UsageError(f"{path} cannot be read as a picture ({str(error) or type(error).__name__})") from error


def read_mask(path: Path) -> Image.Image:
    """Return a mask in mode L: white is trained. Its own transparency counts as black."""
    return read_picture(path, "black").image.convert("L")


def check_colour(name: str) -> None:
    """Raise `UsageError` if Pillow knows no colour of this name."""
    try:
        ImageColor.getrgb(name)
    except ValueError as error:
        raise UsageError(f"--background {name!r} is no colour; expected a name or #rrggbb") from error


def _decoded(opened: Image.Image, background: str) -> Picture:
    notes: list[str] = []
    profile = opened.info.get("icc_profile")
    image = ImageOps.exif_transpose(opened)
    if image.mode in _WIDE_GREY:
        image = _eight_bits(image)
        profile = None
    elif image.mode == "F":
        raise ValueError("its values are floating-point numbers; save it with 8 or 16 bits")
    if image.mode in _TRANSPARENT or "transparency" in image.info:
        image = image.convert("RGBA")
    elif image.mode == "P":
        image = image.convert("RGB")
    alpha = image.getchannel("A") if image.mode == "RGBA" else None
    if alpha is not None and alpha.getextrema()[0] == 255:
        alpha = None
    if image.mode == "RGBA":
        image = image.convert("RGB")
    if profile:
        image = _in_srgb(image, profile, notes)
    image = image.convert("RGB")
    if alpha is not None:
        behind = Image.new("RGB", image.size, ImageColor.getrgb(background)[:3])
        image = Image.composite(image, behind, alpha)
    return Picture(image, alpha, tuple(notes))


def _eight_bits(image: Image.Image) -> Image.Image:
    """Return grey values of 16 bits as ones of 8: 65535 becomes 255."""
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError(f"its grey values reach {values.max()}, expected at most 65535; save it with 8 or 16 bits")
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))


def _in_srgb(image: Image.Image, profile: bytes, notes: list[str]) -> Image.Image:
    """Return a picture with its colours converted from its ICC profile to sRGB."""
    try:
        from PIL import ImageCms

        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImportError, OSError) as error:  # A `PyCMSError` is raised from an `OSError`, but is none itself.
        notes.append(f"its ICC profile is ignored ({error})")
    except Exception as error:
        notes.append(f"its ICC profile does not suit it and is ignored ({error})")
    else:
        if converted is not None:
            return converted
    return image
