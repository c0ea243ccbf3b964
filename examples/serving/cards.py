"""What `GET /v1/adapters` tells of an adapter, read from the header of its file."""

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import diffadapt
from examples.serving.adapters import AdapterFolder, Stamp

_TRIGGERS = ("modelspec.trigger_phrase", "ss_trigger_words", "trigger_word", "trigger_words")
_LONGEST_VALUE = 500


def card(folder: AdapterFolder, name: str) -> dict[str, Any]:
    """Return the card of an adapter.

    Raises:
        UnknownAdapter: the folder has no such adapter.
        AdapterError: its file cannot be read.
    """
    return _card(folder.path(name), name, folder.stamp(name))


@lru_cache(maxsize=10_000)
def _card(file: Path, name: str, stamp: Stamp) -> dict[str, Any]:
    """Return the card of a file, which is read again if its stamp changes."""
    report = diffadapt.inspect(file)
    metadata = {key: value if len(value) <= _LONGEST_VALUE else "..." for key, value in report.metadata.items()}
    return {
        "id": name,
        "object": "adapter",
        "created": int(stamp.modified / 1e9),
        "bytes": stamp.size,
        "format": report.format,
        "family": report.family,
        "types": dict(report.types),
        "ranks": list(report.ranks),
        "components": dict(report.components),
        "trigger_words": _trigger_words(report),
        "metadata": metadata,
    }


def _trigger_words(report: diffadapt.Report) -> list[str]:
    """Return what a prompt has to contain: learned tokens, and what the trainer wrote into the header."""
    words = list(report.tokens)
    for key in _TRIGGERS:
        value = report.metadata.get(key)
        if value:
            words += _as_list(value)
    return list(dict.fromkeys(words))


def _as_list(value: str) -> list[str]:
    """Return the strings of a JSON list, or a plain string as the only one."""
    try:
        parsed = json.loads(value)
    except ValueError:
        return [value]
    return [str(word) for word in parsed] if isinstance(parsed, list) else [value]
