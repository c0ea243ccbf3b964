"""What files say in JSON: in safetensors metadata and in configs. They may come from anyone, so reading one costs no
more than a file of its size should, and whatever is not as expected is an `AdapterError`.
"""

import json
import math
from typing import Any

from diffadapt.errors import AdapterError

MAX_JSON = 4 * 2**20
"""Characters. What PEFT writes for the largest models has a tenth of them; parsed they take twenty times the memory."""


def parsed(text: str, what: str) -> Any:
    """The content of a JSON text.

    Args:
        what: to call it in messages.

    Raises:
        AdapterError: it is none, or longer or nested deeper than any adapter's is.
    """
    if len(text) > MAX_JSON:
        raise AdapterError(f"{what} has {len(text)} characters, expected at most {MAX_JSON}; remove it from the file")
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{what} is not readable as JSON ({error})") from error


def number(value: Any, what: str) -> float:
    """A finite number.

    Raises:
        AdapterError: the value is something else.
    """
    try:
        if not isinstance(value, bool) and isinstance(value, (int, float)) and math.isfinite(value):
            return float(value)
    except OverflowError:
        pass
    raise AdapterError(f"{what} in the file's metadata is {value!r}, expected a finite number")


def count(value: Any, what: str, most: int) -> int:
    """A whole number from 1 to `most`.

    Raises:
        AdapterError: the value is something else.
    """
    if type(value) is int and 1 <= value <= most:
        return value
    raise AdapterError(f"{what} in the file's metadata is {value!r}, expected a whole number from 1 to {most}")


def flag(value: Any, what: str) -> bool:
    """True or false; nothing is false.

    Raises:
        AdapterError: the value is something else.
    """
    if value is None or isinstance(value, bool):
        return bool(value)
    raise AdapterError(f"{what} in the file's metadata is {value!r}, expected true or false")
