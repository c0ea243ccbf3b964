"""Values by layer name, by PEFT's rules: as in `rank_pattern` and `alpha_pattern`, of configs and of files."""

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from diffadapt.errors import AdapterError


def matches(pattern: str, path: str) -> bool:
    """Whether `pattern` names the layer at `path`.

    It is a name or a regular expression for whole path components at the end of the path; with `^` in front for the
    whole path.

    Raises:
        AdapterError: it is no regular expression.
    """
    return _expression(pattern).fullmatch(path) is not None


def value(patterns: Mapping[str, Any], path: str) -> Any:
    """Value of the first pattern that names `path`, or `None`."""
    return next((found for pattern, found in patterns.items() if matches(pattern, path)), None)


# Every layer asks every pattern, and a file may have one for each of its layers: more than `re` itself remembers.
@lru_cache(4096)
def _expression(pattern: str) -> re.Pattern[str]:
    start = "" if pattern.startswith("^") else "(.*[.])?"
    try:
        return re.compile(f"{start}({pattern.removeprefix('^')})")
    except (re.error, OverflowError, RecursionError) as error:
        raise AdapterError(f"{pattern!r} is no regular expression: {error}") from error
