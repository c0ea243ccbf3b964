"""The effort of reading names, counted and not timed: the library's calls, and the steps of its regular expressions.

`re` does not report its steps. Therefore every expression is matched a second time, by backtracking in the way of `re`,
and the results are compared.
"""

import importlib
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import pytest

# Python 3.10 has the parser elsewhere.
_PARSER: Any = importlib.import_module("re._parser" if sys.version_info >= (3, 11) else "sre_parse")
_MOST = 2 * 10**5
"""Number of steps after which an expression is given up: with names of a few hundred characters it takes forever."""
_CLASSES: dict[str, Callable[[str], bool]] = {
    "CATEGORY_DIGIT": str.isdecimal,
    "CATEGORY_SPACE": str.isspace,
    "CATEGORY_WORD": lambda letter: letter.isalnum() or letter == "_",
}

Node = tuple[Any, Any]


def assert_linear(work: Callable[[int], object], size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Assert that twice the size takes at most twice the effort, in calls and in every expression."""
    # The first run does some things that are never done again.
    _, once, twice = (effort(partial(work, size * times), monkeypatch) for times in (1, 1, 2))
    assert once["calls"]
    # Allow a tenth and a constant more, since a size of 0 takes effort, too, and names differ.
    steep = {what: (once[what], count) for what, count in twice.items() if count > 2.2 * once[what] + 50}
    assert not steep, f"more than linear: {steep}"


def effort(work: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Return the steps of every expression that `work` uses, and the number of calls that the library makes ("calls").

    An expression is counted if it is a variable of a module, or in a tuple or list that is one.
    """
    counts: Counter[str] = Counter()

    def called(frame: Any, event: str, arg: object) -> None:
        if event in ("call", "c_call") and frame.f_globals.get("__name__", "").startswith("diffadapt"):
            counts["calls"] += 1

    with monkeypatch.context() as patch:
        for name, module in list(sys.modules.items()):
            if name.startswith("diffadapt"):
                for variable, value in list(vars(module).items()):
                    if (counted := _counted(value, counts)) is not value:
                        patch.setattr(module, variable, counted)
        before = sys.getprofile()
        sys.setprofile(called)
        try:
            work()
        finally:
            sys.setprofile(before)
    return counts


def _counted(value: Any, counts: Counter[str]) -> Any:
    """Return the same value with every expression replaced by a counting one; the same object if it has none."""
    if isinstance(value, re.Pattern):
        return Expression(value, counts)
    if type(value) in (list, tuple):
        items = [_counted(item, counts) for item in value]
        if any(new is not old for new, old in zip(items, value, strict=True)):
            return type(value)(items)
    return value


class Expression:
    """A compiled expression that counts its steps."""

    def __init__(self, real: re.Pattern[str], counts: Counter[str]) -> None:
        self._real, self._counts = real, counts
        self._multiline = bool(real.flags & re.MULTILINE)
        self._nodes: Sequence[Node] = _PARSER.parse(real.pattern, real.flags)

    def __getattr__(self, name: str) -> Any:
        # Methods that are not counted.
        return getattr(self._real, name)

    def match(self, text: str, start: int = 0) -> re.Match[str] | None:
        return self._found(lambda text: self._real.match(text, start), text, self._ends(self._nodes, text, start))

    def fullmatch(self, text: str) -> re.Match[str] | None:
        ends = (end for end in self._ends(self._nodes, text, 0) if end == len(text))
        return self._found(self._real.fullmatch, text, ends)

    def search(self, text: str) -> re.Match[str] | None:
        ends = (end for start in range(len(text) + 1) for end in self._ends(self._nodes, text, start))
        return self._found(self._real.search, text, ends)

    def _found(
        self, real: Callable[[str], re.Match[str] | None], text: str, ends: Iterator[int]
    ) -> re.Match[str] | None:
        profile = sys.getprofile()
        sys.setprofile(None)
        end = next(ends, None)
        sys.setprofile(profile)
        # An expression that takes forever is given up before `re` is called.
        found = real(text)
        assert end == (None if found is None else found.end()), self._real.pattern
        return found

    def _ends(self, nodes: Sequence[Node], text: str, at: int) -> Iterator[int]:
        """Yield the ends of all matches of `nodes` that start at `at`, in the order in which they are tried."""
        if not len(nodes):
            yield at
            return
        for end in self._ends_of(nodes[0], text, at):
            yield from self._ends(nodes[1:], text, end)

    def _ends_of(self, node: Node, text: str, at: int) -> Iterator[int]:
        kind, value = str(node[0]), node[1]
        self._step()
        if kind == "SUBPATTERN":
            yield from self._ends(value[3], text, at)
        elif kind == "BRANCH":
            for branch in value[1]:
                yield from self._ends(branch, text, at)
        elif kind in ("MAX_REPEAT", "MIN_REPEAT"):
            least, most, body = value
            yield from self._repeated(body, least, int(most), kind == "MAX_REPEAT", text, at)
        elif kind in ("ASSERT", "ASSERT_NOT"):
            direction, body = value
            start = at if direction > 0 else at - body.getwidth()[0]
            found = start >= 0 and next(self._ends(body, text, start), None) is not None
            if found == (kind == "ASSERT"):
                yield at
        elif kind == "AT":
            if self._is_at(str(value), text, at):
                yield at
        elif at < len(text) and _fits(kind, value, text[at]):
            yield at + 1

    def _repeated(self, body: Sequence[Node], least: int, most: int, greedy: bool, text: str, at: int) -> Iterator[int]:
        if least <= 0 and not greedy:
            yield at
        if most > 0:
            for end in self._ends(body, text, at):
                if end > at:
                    yield from self._repeated(body, least - 1, most - 1, greedy, text, end)
        if least <= 0 and greedy:
            yield at

    def _is_at(self, place: str, text: str, at: int) -> bool:
        if place == "AT_BEGINNING":
            return at == 0 or (self._multiline and text[at - 1] == "\n")
        if place == "AT_END":
            return at >= len(text.removesuffix("\n")) or (self._multiline and text[at] == "\n")
        raise NotImplementedError(place)

    def _step(self) -> None:
        self._counts[self._real.pattern] += 1
        assert self._counts[self._real.pattern] < _MOST, f"{self._real.pattern} takes forever"


def _fits(kind: str, value: Any, letter: str) -> bool:
    """Return whether a node for one letter matches this letter."""
    if kind == "ANY":
        return letter != "\n"
    if kind == "LITERAL":
        return ord(letter) == value
    if kind == "NOT_LITERAL":
        return ord(letter) != value
    if kind == "RANGE":
        return value[0] <= ord(letter) <= value[1]
    if kind == "CATEGORY":
        positive = str(value).replace("_NOT_", "_")
        return _CLASSES[positive](letter) == (str(value) == positive)
    if kind == "IN":
        negated = str(value[0][0]) == "NEGATE"
        return any(_fits(str(inner), what, letter) for inner, what in value[negated:]) != negated
    raise NotImplementedError(kind)
