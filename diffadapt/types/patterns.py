"""Values by layer name, as in `rank_pattern` and `alpha_pattern` of settings and files. The rules are PEFT's."""

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from diffadapt.errors import AdapterError


def matches(pattern: str, path: str) -> bool:
    """Return whether `pattern` names the layer at `path`.

    Args:
        pattern: a name or a regular expression that has to match whole path components at the end of the path. After a
            leading `^`, it has to match the whole path.
        path: the module path of the layer.

    Raises:
        AdapterError: `pattern` is not a valid regular expression.
    """
    return _expression(pattern).fullmatch(path) is not None


def value(patterns: Mapping[str, Any], path: str) -> Any:
    """Return the value of the first pattern that names the layer at `path`, or `None`. Raises as `matches` does."""
    return next((found for pattern, found in patterns.items() if matches(pattern, path)), None)


# Every layer is compared with every pattern, and a file may have one per layer: more than the cache of `re` holds.
@lru_cache(4096)
def _expression(pattern: str) -> re.Pattern[str]:
    start = "" if pattern.startswith("^") else "(.*[.])?"
    try:
        return re.compile(f"{start}({pattern.removeprefix('^')})")
    except (re.error, OverflowError, RecursionError) as error:
        raise AdapterError(f"{pattern!r} is no regular expression: {error}") from error
