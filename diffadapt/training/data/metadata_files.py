"""Read captions: metadata.jsonl and metadata.csv of a folder, and text files beside pictures."""

import csv
import io
import json
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from diffadapt.errors import UsageError

METADATA_FILES = ("metadata.jsonl", "metadata.csv")
TEXT_SUFFIXES = (".txt", ".caption")


def read_metadata(folder: Path, column: str = "text") -> dict[Path, str]:
    """Return path of a picture -> caption from the `metadata.jsonl` or `metadata.csv` of a folder.

    Every line has a `file_name`, relative to the folder, and the caption under `column`.

    Raises:
        UsageError: an entry is not like that, names no file in the folder, or contradicts another one.
    """
    captions: dict[Path, str] = {}
    for name in METADATA_FILES:
        path = folder / name
        if not path.is_file():
            continue
        entries = _json_lines(path) if name.endswith(".jsonl") else _csv_rows(path)
        for where, entry in entries:
            picture = _find(folder, _string(entry, "file_name", where, column), where)
            text = _string(entry, column, where, column)
            if captions.setdefault(picture, text) != text:
                raise UsageError(f"{where}: {picture.name} has a second caption, {text!r}; keep one")
    return captions


def append_captions(folder: Path, captions: Mapping[str, str]) -> None:
    """Append lines to `metadata.jsonl`. Existing lines may have more fields, and stay as they are."""
    path = folder / METADATA_FILES[0]
    joint = "\n" if path.is_file() and path.read_bytes()[-1:] not in (b"", b"\n") else ""
    with path.open("a", encoding="utf-8") as file:
        for name in sorted(captions):
            file.write(joint + json.dumps({"file_name": name, "text": captions[name]}) + "\n")
            joint = ""


def read_text(picture: Path) -> tuple[str, ...] | None:
    """Return the captions in the text file beside a picture, one per line; `None` if there is no such file."""
    for suffix in TEXT_SUFFIXES:
        path = picture.with_suffix(suffix)
        if path.is_file():
            lines = (line.strip() for line in _text(path).split("\n"))
            return tuple(line for line in lines if line) or ("",)
    return None


def _text(path: Path) -> str:
    """Return the content of a text file, without a byte order mark."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not in UTF-8 ({error}); save it as UTF-8") from error


def _json_lines(path: Path) -> Iterator[tuple[str, dict[str, object]]]:
    # `str.splitlines` would also split at U+2028 and others, which are valid inside JSON strings.
    for number, line in enumerate(_text(path).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise UsageError(f'{where}: expected {{"file_name": ..., "text": ...}} ({error})') from error
        if not isinstance(entry, dict):
            raise UsageError(f'{where}: expected {{"file_name": ..., "text": ...}}')
        yield where, entry


def _csv_rows(path: Path) -> Iterator[tuple[str, dict[str, object]]]:
    reader = csv.DictReader(io.StringIO(_text(path), newline=""))
    try:
        for row in reader:
            yield f"{path}, line {reader.line_num}", {key.strip(): value for key, value in row.items() if key}
    except csv.Error as error:
        raise UsageError(f"{path}, line {reader.line_num}: {error}") from error


def _string(entry: Mapping[str, object], key: str, where: str, column: str) -> str:
    value = entry.get(key)
    if not isinstance(value, str):
        there = ", ".join(map(repr, _names(entry)))
        raise UsageError(
            f'{where}: expected {{"file_name": ..., "{column}": ...}}, two strings, but it has {there}; '
            "--caption_column names another column of captions"
        )
    return value


def _names(entry: Mapping[str, object]) -> Iterable[str]:
    return entry.keys() or ["nothing"]


def _find(folder: Path, name: str, where: str) -> Path:
    """Return the file that an entry names."""
    relative = Path(name.strip().replace("\\", "/"))
    path = folder / relative
    if relative.is_absolute() or not _inside(folder, path):
        raise UsageError(f"{where}: {name} is not inside {folder}")
    if path.is_file():
        return folder.resolve() / path.resolve().relative_to(folder.resolve()) if ".." in relative.parts else path
    # Names come in two forms of Unicode: composed, and decomposed as macOS stores them.
    wanted = unicodedata.normalize("NFC", path.name)
    if path.parent.is_dir():
        for other in path.parent.iterdir():
            if unicodedata.normalize("NFC", other.name) == wanted:
                return other
    raise UsageError(f"{where}: there is no file {name} in {folder}")


def _inside(folder: Path, path: Path) -> bool:
    try:
        # Links may lead out of the folder; only the name itself may not.
        Path(_normal(path)).relative_to(_normal(folder))
    except ValueError:
        return False
    return True


def _normal(path: Path) -> str:
    import os

    return os.path.normpath(path.absolute())
