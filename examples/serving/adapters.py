"""The folder of adapters that a service offers: one `.safetensors` file per adapter, named after it.

All replicas read the same folder. It is the only record of what exists, so a replica that starts later, or was not told
of an upload, sees the same adapters. A file is never written in place: it appears complete under a name that was free,
and a name can be used again only after it was deleted. A `Stamp` therefore tells whether a name still means the same
file.
"""

import difflib
import os
import re
from pathlib import Path
from typing import NamedTuple

from diffadapt import AdapterError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
NAME_RULE = "1 to 64 letters, digits, dots, dashes and underscores, starting with a letter or digit"
SUFFIX = ".safetensors"


class UnknownAdapter(AdapterError):
    """The folder has no such adapter. The message names those with a similar name."""


class NameTaken(AdapterError):
    """The folder has another adapter of this name."""


class Stamp(NamedTuple):
    """The identity of a file: another file of the same name has another one."""

    inode: int
    size: int
    modified: int


class AdapterFolder:
    """A folder of adapter files, by name."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        """
        Args:
            folder: path of the folder; it is created if it does not exist.
        """
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)

    def names(self) -> list[str]:
        """Return the names of all adapters, sorted."""
        found = (file.name.removesuffix(SUFFIX) for file in self.folder.iterdir() if file.name.endswith(SUFFIX))
        return sorted(name for name in found if NAME.fullmatch(name))

    def path(self, name: str) -> Path:
        """Return the path of an adapter's file.

        Raises:
            UnknownAdapter: there is no such file.
        """
        path = self.folder / f"{name}{SUFFIX}"
        if not NAME.fullmatch(name) or not path.is_file():
            raise UnknownAdapter(f"no adapter {name!r}; {self._similar(name)}")
        return path

    def stamp(self, name: str) -> Stamp:
        """Return the identity of an adapter's file.

        Raises:
            UnknownAdapter: there is no such file.
        """
        try:
            found = self.path(name).stat()
        except FileNotFoundError:
            raise UnknownAdapter(f"no adapter {name!r}; it was deleted") from None
        return Stamp(found.st_ino, found.st_size, found.st_mtime_ns)

    def without_paths(self, message: str) -> str:
        """Return a message with the names of the folder's files in place of their paths, for clients."""
        return message.replace(f"{self.folder}{os.sep}", "")

    def publish(self, file: Path, name: str) -> Path:
        """Move a complete file into the folder, in one step; return its path there.

        Args:
            file: a file on the same file system.

        Raises:
            NameTaken: there is an adapter of this name. It stays as it is, and so does `file`.
        """
        target = self.folder / f"{check_name(name)}{SUFFIX}"
        try:
            # Unlike a rename, a link never replaces a file, even if two uploads race.
            os.link(file, target)
        except FileExistsError:
            raise NameTaken(f"an adapter {name!r} exists; delete it first, or choose another name") from None
        file.unlink()
        return target

    def remove(self, name: str) -> None:
        """Delete an adapter's file.

        Raises:
            UnknownAdapter: there is no such file.
        """
        try:
            self.path(name).unlink()
        except FileNotFoundError:
            raise UnknownAdapter(f"no adapter {name!r}; it was deleted") from None

    def _similar(self, name: str) -> str:
        names = self.names()
        near = difflib.get_close_matches(name.lower(), [known.lower() for known in names], n=3, cutoff=0.5)
        similar = [known for known in names if known.lower() in near]
        if similar:
            return f"similar names: {', '.join(similar)}"
        return f"there are {len(names)} adapters; GET /v1/adapters lists them"


def check_name(name: str) -> str:
    """Return `name`, or raise `AdapterError` if it cannot be the name of a file in the folder."""
    if not NAME.fullmatch(name):
        raise AdapterError(f"{name!r} is no name for an adapter: expected {NAME_RULE}")
    return name
