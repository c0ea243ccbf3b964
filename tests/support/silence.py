"""Warnings of other libraries that a test does not mean."""

import warnings
from collections.abc import Generator
from contextlib import contextmanager


@contextmanager
def ignored(category: type[Warning] = Warning) -> Generator[None, None, None]:
    """Ignore warnings of a category inside the block; `warnings.catch_warnings` can do that from Python 3.11 on."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", category)
        yield
