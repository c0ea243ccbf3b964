"""The outcomes of the compatibility matrix, kept in files so that a run can be resumed.

`.cache/matrix/<family>.json` has an outcome for every dialect and type. It counts for the code that it was computed
with: a digest of this library and of the test code. What plain diffusers makes of a file depends on the file and on the
versions of its packages alone, so it is used again when this library has changed.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests.support.judge import Outcome, RoundTrips

ROOT = Path(__file__).parent.parent
PEERS = ("torch", "diffusers", "transformers", "peft")
_FOLDER = ROOT / ".cache" / "matrix"
_OF_FILES = ("formulas", "peft_formulas", "dialects", "denoisers", "matrix", "models")
"""The modules of `tests/support/` that make the files."""


def _digest(files: Iterable[Path]) -> str:
    digest = hashlib.sha256(" ".join(version(name) for name in PEERS).encode())
    for file in sorted(files):
        digest.update(f"{file.relative_to(ROOT)}\0".encode() + file.read_bytes())
    return digest.hexdigest()[:16]


@cache
def _digests() -> tuple[str, str]:
    """Return the digest of all code, and that of the code that makes the files."""
    support = ROOT / "tests" / "support"
    made = [support / f"{name}.py" for name in _OF_FILES]
    return _digest([*(ROOT / "diffadapt").rglob("*.py"), *made, support / "judge.py"]), _digest(made)


class Kept:
    """The kept outcomes of one family."""

    def __init__(self, family: str, *, any_code: bool = False, again: bool = False) -> None:
        """
        Args:
            family: The name of the family.
            any_code: Outcomes of other versions of this library count, too.
            again: No outcome counts, except those of diffusers.
        """
        self._file = _FOLDER / f"{family}.json"
        self._any_code, self._again = any_code, again
        self._entries: dict[str, dict[str, Any]] = json.loads(self._file.read_text()) if self._file.exists() else {}

    def knows(self, dialect: str, kind: str) -> bool:
        """Return whether the outcome for a dialect and a type is kept and counts."""
        entry = self._entries.get(f"{dialect}: {kind}")
        return entry is not None and not self._again and (self._any_code or entry["code"] == _digests()[0])

    def outcome(self, dialect: str, kind: str) -> Outcome | None:
        """Return a kept outcome; `None` if nobody writes such a file."""
        fields = self._entries[f"{dialect}: {kind}"]["outcome"]
        if fields is None:
            return None
        trips = {key: tuple(value) if isinstance(value, list) else value for key, value in fields["trips"].items()}
        return Outcome(**{**fields, "trips": RoundTrips(**trips)})

    def of_diffusers(self, dialect: str, kind: str) -> str | None:
        """Return what diffusers makes of the file, or `None` if that is not kept."""
        entry = self._entries.get(f"{dialect}: {kind}")
        if entry is None or entry["outcome"] is None or entry["files"] != _digests()[1]:
            return None
        return entry["outcome"]["diffusers"]

    def keep(self, dialect: str, kind: str, outcome: Outcome | None) -> None:
        """Keep an outcome; `write` writes it."""
        code, files = _digests()
        fields = None if outcome is None else asdict(outcome)
        self._entries[f"{dialect}: {kind}"] = {"code": code, "files": files, "outcome": fields}

    def write(self) -> None:
        """Write all outcomes to the file of the family."""
        self._file.parent.mkdir(parents=True, exist_ok=True)
        written = self._file.with_suffix(".tmp")
        written.write_text(json.dumps(self._entries))
        written.replace(self._file)
