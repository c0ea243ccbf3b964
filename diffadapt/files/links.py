"""Links to the hub, and repositories with the name of a file behind them, taken apart into an id and a location."""

import difflib
import re
from dataclasses import replace
from pathlib import Path
from urllib.parse import unquote, urlsplit

from diffadapt.errors import AdapterError
from diffadapt.files.checkpoint import Location
from diffadapt.files.file_names import PICKLE_SUFFIXES

_LINK = re.compile(r"(?:(?:https?|hf)://|(?:www\.)?(?:huggingface\.co|hf\.co)/)", re.IGNORECASE)
_HOSTS = ("huggingface.co", "www.huggingface.co", "hf.co")
_WEIGHTS = ".safetensors"


def taken_apart(text: str, location: Location) -> tuple[str, Location]:
    """Return the id of a repository and the location of the file in it.

    Args:
        text: what the caller passed and is no local file: an id, `owner/repo/file.safetensors`, or a link to a
            repository, a folder or a file on the hub.
        location: the other arguments of the caller. What they say must not contradict `text`.

    Raises:
        AdapterError: a link that does not lead to the hub, a name that can only be that of a missing local file, or
            arguments that contradict the link.
    """
    if _LINK.match(text):
        return _from_link(text, location)
    refuse_missing_path(text)
    parts = text.split("/")
    if len(parts) > 2 and not text.endswith(_WEIGHTS):
        raise AdapterError(f"{text}: no such file or folder, and not a hub id either{_close_to(Path(text))}")
    if not text.endswith(_WEIGHTS) or location.weight_name is not None:
        return text, location
    if len(parts) < 3 or not all(parts) or parts[0] in (".", "..", "~") or Path(parts[0]).is_dir():
        raise AdapterError(f"{text}: no such file{_close_to(Path(text).expanduser())}")
    return "/".join(parts[:2]), _inside(text, location, parts[2:])


def refuse_missing_path(text: str) -> None:
    """Raise `AdapterError` if `text`, which is no file or folder, can only be a path, and so no hub id."""
    beginnings = ("/", "./", "../", "~", "file:")
    if text.startswith(beginnings) or "\\" in text or text.endswith(PICKLE_SUFFIXES) or Path(text).is_absolute():
        what = "file" if text.endswith((_WEIGHTS, *PICKLE_SUFFIXES)) else "file or folder"
        raise AdapterError(f"{text}: no such {what}{_close_to(Path(text).expanduser())}")


def _from_link(text: str, location: Location) -> tuple[str, Location]:
    is_hf = text.lower().startswith("hf://")
    link = urlsplit(text if "://" in text else f"https://{text}")
    path = f"{link.netloc}{link.path}" if is_hf else link.path
    parts = [unquote(part) for part in path.split("/") if part]
    if not is_hf and link.netloc.lower() not in _HOSTS:
        raise AdapterError(
            f"{text}: a link, expected a file, a folder or a hub id; download it first and pass its path"
        )
    if len(parts) < 2 or parts[0] in ("datasets", "spaces"):
        raise AdapterError(
            f"{text}: leads to no model repository, expected https://huggingface.co/<owner>/<repository>"
        )
    owner, repo, *rest = parts
    revision = None
    if is_hf:
        repo, _, revision = repo.partition("@")
    elif rest:
        if len(rest) < 2 or rest[0] not in ("blob", "resolve", "raw", "tree"):
            raise AdapterError(f"{text}: leads to no file; pass the link of the file, or {owner}/{repo}")
        # A pull request is a revision of three words.
        count = 3 if rest[1] == "refs" else 1
        revision, rest = "/".join(rest[1 : 1 + count]), rest[1 + count :]
    if revision and location.revision not in (None, revision):
        raise AdapterError(
            f"{text}: the link says revision {revision!r}, but revision={location.revision!r} was passed"
        )
    location = replace(location, revision=revision or location.revision)
    return f"{owner}/{repo}", _inside(text, location, rest)


def _inside(text: str, location: Location, parts: list[str]) -> Location:
    """Return the location of the file or folder that `parts` name inside a repository."""
    if not parts:
        return location
    is_file = "." in parts[-1]
    folder, name = ("/".join(parts[:-1]), parts[-1]) if is_file else ("/".join(parts), None)
    asked = location.subfolder, location.weight_name
    if (folder and asked[0] not in (None, folder)) or (name is not None and asked[1] not in (None, name)):
        raise AdapterError(f"{text}: contradicts subfolder={asked[0]!r} and weight_name={asked[1]!r}; pass one of them")
    return replace(location, subfolder=folder or asked[0], weight_name=name or asked[1])


def _close_to(path: Path) -> str:
    """Return a suggestion for the name of a file that does not exist, or ""."""
    folder = path.parent
    if not folder.is_dir():
        return f"; there is no folder {folder} either"
    files = [file for file in folder.iterdir() if file.suffix == _WEIGHTS or file.is_dir()]
    # The suffix may have been left out.
    found = {**{file.stem: file for file in files}, **{file.name: file for file in files}}
    close = difflib.get_close_matches(path.name, found, n=1)
    if not close:
        return f"; {folder.resolve()} has no file of that name"
    return f"; did you mean {folder / found[close[0]].name}?"
