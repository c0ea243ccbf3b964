"""JSON in safetensors metadata and configs, and the values in it.

Files may come from anyone. Parsing one costs no more than a file of its size should, and everything unexpected raises
`AdapterError`.
"""

import json
import math
from typing import Any

from diffadapt.errors import AdapterError

MAX_JSON = 4 * 2**20
"""Characters of a JSON text. PEFT writes a tenth of that for the largest models; parsed, it takes up to 20 times the
memory."""


def parse_json(text: str, what: str) -> Any:
    """Return the content of a JSON text.

    Args:
        text: the text.
        what: what messages call it.

    Raises:
        AdapterError: the text is not JSON, or is longer or nested more deeply than in any adapter file.
    """
    if len(text) > MAX_JSON:
        raise AdapterError(f"{what} has {len(text)} characters, expected at most {MAX_JSON}; remove it from the file")
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{what} is not readable as JSON ({error})") from error


def finite_number(value: Any, what: str) -> float:
    """Return `value` as a float.

    Raises:
        AdapterError: the value is not a finite number.
    """
    try:
        if not isinstance(value, bool) and isinstance(value, (int, float)) and math.isfinite(value):
            return float(value)
    except OverflowError:
        pass
    raise AdapterError(f"{what} in the file's metadata is {value!r}, expected a finite number")


def whole_number(value: Any, what: str, most: int) -> int:
    """Return `value` if it is a whole number from 1 to `most`.

    Raises:
        AdapterError: the value is something else.
    """
    if type(value) is int and 1 <= value <= most:
        return value
    raise AdapterError(f"{what} in the file's metadata is {value!r}, expected a whole number from 1 to {most}")


def flag(value: Any, what: str) -> bool:
    """Return `value` if it is true or false; `None` counts as false.

    Raises:
        AdapterError: the value is something else.
    """
    if value is None or isinstance(value, bool):
        return bool(value)
    raise AdapterError(f"{what} in the file's metadata is {value!r}, expected true or false")
