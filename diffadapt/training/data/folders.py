"""Find the pictures of a folder, with their captions, masks and the pictures to edit; check every file."""

import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from diffadapt.errors import UsageError
from diffadapt.training.data.metadata_files import read_metadata, read_text
from diffadapt.training.data.pictures import PICTURE_SUFFIXES, read_mask, read_picture

MASK_ENDING, CONTROL_ENDING = "-masklabel", "-condlabel"
_REPEATS = re.compile(r"(\d{1,4})_(.+)")
_SHOWN_FAULTS = 20


@dataclass(frozen=True)
class Example:
    """One training picture.

    Attributes:
        path: the file.
        captions: its captions, of which one is drawn each time.
        source: where the captions come from: "metadata", "text file", "folder name" or "prompt".
        repeats: how often the picture is seen in an epoch.
        weight: its weight in the loss.
        mask: the file of its mask, if any.
        control: the picture to edit, if any.
        size: width and height, upright.
        transparent: whether it has an alpha channel.
        notes: what was ignored when it was decoded.
        digest: a digest of the contents of its files.
    """

    path: Path
    captions: tuple[str, ...]
    source: str = "prompt"
    repeats: int = 1
    weight: float = 1.0
    mask: Path | None = None
    control: Path | None = None
    size: tuple[int, int] = (0, 0)
    transparent: bool = False
    notes: tuple[str, ...] = ()
    digest: str = ""

    @property
    def caption(self) -> str:
        """The first caption."""
        return self.captions[0]


@dataclass
class Found:
    """The pictures of a folder, and what the user should know about them."""

    examples: list[Example]
    notes: list[str] = field(default_factory=list[str])


def read_folder(
    folder: Path,
    default_caption: str | None,
    *,
    column: str = "text",
    repeats: int = 1,
    weight: float = 1.0,
    control: Path | None = None,
    background: str = "white",
) -> Found:
    """Return the pictures of `folder` and its sub-folders, sorted by path, all of them decoded once.

    A caption comes from `metadata.jsonl` or `metadata.csv`, or else from a text file beside the picture, or else from
    the name of a sub-folder like `10_sks dog` (10 repeats), or else it is the default.

    Args:
        folder: the folder.
        default_caption: caption of pictures without one of their own.
        column: key of the captions in metadata files.
        repeats: how often each picture is seen in an epoch.
        weight: the weight of the pictures in the loss.
        control: folder with the pictures to edit, under the same names.
        background: colour behind transparent pictures.

    Raises:
        UsageError: the folder does not exist or has no pictures, or pictures have no caption or cannot be read.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder} is not a folder")
    captions = {path: text for inner in _folders(folder) for path, text in read_metadata(inner, column).items()}
    pictures = sorted({*_pictures(folder), *captions})
    if not pictures:
        raise UsageError(f"{folder} holds no pictures ({', '.join(sorted(PICTURE_SUFFIXES))})")
    found = Found([])
    faults: list[str] = []
    contradictions: list[str] = []
    for path in pictures:
        own, source = _captions(path, captions, default_caption, folder, contradictions)
        if own is None:
            faults.append(
                f"{path} has no caption: list it in metadata.jsonl or metadata.csv, write {path.stem}.txt beside it, "
                "or pass a prompt for all pictures (--instance_prompt)"
            )
            continue
        example = Example(path, own, source, repeats * _repeats(path, folder), weight, _beside(path, MASK_ENDING))
        try:
            found.examples.append(_checked(_with_control(example, folder, control), background))
        except UsageError as error:
            faults.append(str(error))
    if faults:
        more = f"\n... and {len(faults) - _SHOWN_FAULTS} more" if len(faults) > _SHOWN_FAULTS else ""
        raise UsageError("\n".join(faults[:_SHOWN_FAULTS]) + more)
    found.notes = _notes(folder, found.examples, contradictions)
    return found


def list_pictures(folder: Path) -> list[Path]:
    """Return the picture files directly in `folder`, sorted by name, without masks and hidden files."""
    return sorted(path for path in folder.iterdir() if _is_picture(path))


def _pictures(folder: Path) -> Iterator[Path]:
    for inner in _folders(folder):
        yield from list_pictures(inner)


def _folders(folder: Path) -> Iterator[Path]:
    yield folder
    for inner in sorted(folder.iterdir()):
        if inner.is_dir() and not inner.name.startswith((".", "__MACOSX")):
            yield from _folders(inner)


def _is_picture(path: Path) -> bool:
    return (
        path.suffix.lower() in PICTURE_SUFFIXES
        and not path.name.startswith(".")
        and not path.stem.endswith((MASK_ENDING, CONTROL_ENDING))
        and path.is_file()
    )


def _captions(
    path: Path, listed: dict[Path, str], default: str | None, top: Path, contradictions: list[str]
) -> tuple[tuple[str, ...] | None, str]:
    """Return the captions of a picture, and where they come from."""
    beside = read_text(path)
    if path in listed:
        if beside is not None and beside != (listed[path].strip(),):
            contradictions.append(path.name)
        return (listed[path],), "metadata"
    if beside is not None:
        return beside, "text file"
    for inner in _parents(path, top):
        match = _REPEATS.fullmatch(inner.name)
        if match:
            return (match[2].strip(),), "folder name"
    return (None if default is None else (default,)), "prompt"


def _repeats(path: Path, top: Path) -> int:
    matches = [_REPEATS.fullmatch(inner.name) for inner in _parents(path, top)]
    return next((int(match[1]) for match in matches if match), 1)


def _parents(path: Path, top: Path) -> Iterator[Path]:
    """Return the sub-folders of `top` that a picture is in, the innermost first."""
    for parent in path.parents:
        if parent == top or len(parent.parts) <= len(top.parts):
            return
        yield parent


def _beside(path: Path, ending: str) -> Path | None:
    """Return the picture with the same name and an ending, if it exists."""
    candidates = (path.with_name(f"{path.stem}{ending}{suffix}") for suffix in (".png", *sorted(PICTURE_SUFFIXES)))
    return next((candidate for candidate in candidates if candidate.is_file()), None)


def _with_control(example: Example, folder: Path, control: Path | None) -> Example:
    """Return an example with the picture to edit."""
    if control is None:
        return replace(example, control=_beside(example.path, CONTROL_ENDING))
    if not control.is_dir():
        raise UsageError(f"{control} is not a folder")
    at = control / example.path.relative_to(folder)
    candidates = [at, *(at.with_suffix(suffix) for suffix in sorted(PICTURE_SUFFIXES))]
    source = next((candidate for candidate in candidates if candidate.is_file()), None)
    if source is None:
        raise UsageError(f"{example.path} has no picture to edit: there is no {at.stem} in {at.parent}")
    return replace(example, control=source)


def _checked(example: Example, background: str) -> Example:
    """Decode the files of an example and return it with its size."""
    if example.repeats < 1:
        raise UsageError(f"{example.path}: its folder says 0 repeats; rename the folder, or remove it")
    picture = read_picture(example.path, background)
    if example.mask is not None:
        size = read_mask(example.mask).size
        if abs(size[0] * picture.image.height - size[1] * picture.image.width) > max(*size, *picture.image.size):
            raise UsageError(
                f"{example.mask} has the size {size[0]} x {size[1]}, expected the aspect ratio of "
                f"{example.path.name}, {picture.image.width} x {picture.image.height}"
            )
    if example.control is not None:
        read_picture(example.control, background)
    files = [file for file in (example.path, example.mask, example.control) if file is not None]
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        digest.update(hashlib.blake2b(file.read_bytes(), digest_size=16).digest())
    return replace(
        example,
        size=picture.image.size,
        transparent=picture.alpha is not None,
        notes=picture.notes,
        digest=digest.hexdigest(),
    )


def _notes(folder: Path, examples: Sequence[Example], contradictions: Sequence[str]) -> list[str]:
    """Return what the user should know about a folder."""
    notes: list[str] = []
    sources = Counter(example.source for example in examples)
    if len(sources) > 1:
        parts = ", ".join(f"{count} from {_SOURCES[source]}" for source, count in sources.items())
        notes.append(f"{folder}: captions: {parts}")
    if contradictions:
        notes.append(f"{folder}: metadata is used, and not the text file beside it, for {_some(contradictions)}")
    empty = [example.path.name for example in examples if "" in example.captions]
    if empty:
        notes.append(f"{folder}: the caption is empty for {_some(empty)}")
    several = [example.path.name for example in examples if len(example.captions) > 1]
    if several:
        notes.append(f"{folder}: one of several captions is drawn each time for {_some(several)}")
    notes += [f"{example.path.name}: {note}" for example in examples for note in example.notes]
    return notes


_SOURCES = {
    "metadata": "metadata files",
    "text file": "text files",
    "folder name": "folder names",
    "prompt": "the prompt for all",
}


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
