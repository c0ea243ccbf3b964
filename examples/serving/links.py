"""Pictures behind links, for clients that ask for `response_format="url"`.

They are files next to the adapters, so that every front of a cluster finds them. A link is valid for an hour, as in the
OpenAI API, and cannot be guessed.
"""

import re
import secrets
import time
from contextlib import suppress
from pathlib import Path

LIFETIME_S = 3600.0
MOST_BYTES = 2**28
"""Bytes of all pictures together; the oldest are deleted first."""
_SWEEP_S = 30.0
"""Seconds between two looks at what can be deleted."""
_NAME = re.compile(r"[0-9a-f]{32}\.(png|jpeg|webp)")


class PictureLinks:
    """A folder of pictures with names that cannot be guessed."""

    def __init__(self, folder: Path) -> None:
        """
        Args:
            folder: path of the folder; it is created with the first picture.
        """
        self.folder = folder
        self._swept = 0.0

    def keep(self, content: bytes, suffix: str) -> str:
        """Write a picture, delete those that are too old or too many, and return its name."""
        self.folder.mkdir(exist_ok=True)
        if time.time() - self._swept > _SWEEP_S:
            self._swept = time.time()
            self._sweep()
        name = f"{secrets.token_hex(16)}.{suffix}"
        (self.folder / name).write_bytes(content)
        return name

    def find(self, name: str) -> Path | None:
        """Return the file of a picture; `None` if there is none of this name, or if the link is no longer valid."""
        file = self.folder / name
        try:
            is_valid = _NAME.fullmatch(name) is not None and time.time() - file.stat().st_mtime < LIFETIME_S
        except FileNotFoundError:
            return None
        return file if is_valid else None

    def _sweep(self) -> None:
        """Delete the pictures that are too old, and the oldest beyond `MOST_BYTES`."""
        found: list[tuple[float, int, Path]] = []
        for file in self.folder.iterdir():
            with suppress(FileNotFoundError):  # Another front may have deleted it.
                status = file.stat()
                found.append((status.st_mtime, status.st_size, file))
        total = 0
        for written, size, file in sorted(found, reverse=True):
            total += size
            if total > MOST_BYTES or time.time() - written > LIFETIME_S:
                file.unlink(missing_ok=True)
