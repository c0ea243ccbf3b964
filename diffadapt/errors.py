"""The errors users can catch. Every message says path, expected, found, and what to do."""

from collections.abc import Generator
from contextlib import contextmanager

_LONGEST_LINE = 2000


class AdapterError(ValueError):
    """Base of every error this library raises on purpose.

    A `ValueError`, so that code written against other loaders keeps catching it. Lines that a file made very long are
    shortened.
    """

    def __init__(self, message: str) -> None:
        super().__init__("\n".join(map(_shortened, message.split("\n"))))


class LoadError(AdapterError):
    """A file that cannot be applied as asked; nothing has been changed when this is raised.

    Attributes:
        faults: one `(key, reason)` per tensor of the file that could not be used.
    """

    def __init__(self, message: str, faults: list[tuple[str, str]] | None = None) -> None:
        super().__init__(message)
        self.faults = faults or []


@contextmanager
def naming(where: str) -> Generator[None, None, None]:
    """Put the path of a layer in front of what is said about it."""
    try:
        yield
    except AdapterError as error:
        raise AdapterError(f"{where}: {error}") from error


def _shortened(line: str) -> str:
    half = _LONGEST_LINE // 2
    return line if len(line) <= _LONGEST_LINE else f"{line[:half]} ... {line[-half:]}"
