"""The errors that users can catch. Every message says where, what was expected, what was found, and what to do."""

from collections.abc import Generator
from contextlib import contextmanager
from typing import NamedTuple

_LONGEST_LINE = 2000


class Fault(NamedTuple):
    """A tensor of a file that is not used, and the reason.

    Attributes:
        key: the tensor's name in the file.
        reason: why the tensor is not used.
    """

    key: str
    reason: str


class AdapterError(ValueError):
    """The base class of all errors that this library raises on purpose.

    It is a `ValueError`, so code written for other loaders still catches it. Very long lines of a message, which come
    from names in a file, are shortened.
    """

    def __init__(self, message: str) -> None:
        super().__init__("\n".join(map(_shortened, message.split("\n"))))


class LoadError(AdapterError):
    """A file cannot be applied as requested. Nothing has changed when this is raised.

    Attributes:
        faults: `(key, reason)` for every tensor of the file that could not be used; empty if the file was refused as a
            whole.
    """

    def __init__(self, message: str, faults: list[Fault] | None = None) -> None:
        super().__init__(message)
        self.faults = faults or []


class UsageError(AdapterError):
    """A mistake in an option of a training run, a folder or a caption. The message says what to change."""


class Diverged(AdapterError):
    """The loss of a training run is not finite. The message says in which step, and what to change."""


@contextmanager
def naming(where: str) -> Generator[None, None, None]:
    """Prefix the message of an `AdapterError` raised in the `with` block with `where`, the path of a layer."""
    try:
        yield
    except AdapterError as error:
        raise AdapterError(f"{where}: {error}") from error


def _shortened(line: str) -> str:
    half = _LONGEST_LINE // 2
    return line if len(line) <= _LONGEST_LINE else f"{line[:half]} ... {line[-half:]}"
