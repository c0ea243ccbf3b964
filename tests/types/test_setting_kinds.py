"""Every setting of every adapter type refuses what is no number, truth value or mapping, with its name."""

import dataclasses
import math
from collections.abc import Mapping
from types import NoneType
from typing import Any, get_args, get_origin

import pytest

import diffadapt
from diffadapt import AdapterConfig, AdapterError
from tests.support.cases import for_each

CONFIGS = [
    found
    for name in diffadapt.__all__
    if isinstance(found := getattr(diffadapt, name), type) and issubclass(found, AdapterConfig)
]
REQUIRED: dict[str, Any] = {"target_modules": "to_q", "rank": 8, "block_size": 4, "token_indices": [1]}


def wrong_for(kind: Any) -> list[Any]:
    kinds = set(get_args(kind)) or {kind}
    if kinds == {bool}:
        return ["x", 2, None]
    if kinds <= {int, NoneType}:
        return [1.5, "a", True, math.nan, -(10**9)]
    if kinds <= {float, int, NoneType}:
        return ["a", True, math.nan, math.inf]
    return [3, "a"] if get_origin(kind) is Mapping else []


@for_each(config=CONFIGS)
def test_a_value_of_another_kind_is_refused_by_name(config: type[AdapterConfig]) -> None:
    entries = dataclasses.fields(config)
    given = {name: value for name, value in REQUIRED.items() if any(entry.name == name for entry in entries)}
    config(**given)
    for entry in entries:
        for wrong in wrong_for(entry.type):
            with pytest.raises(AdapterError, match=entry.name):
                config(**given | {entry.name: wrong})
