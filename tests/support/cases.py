"""Many cases in one test: a decorator that runs all of them and reports every failure by the name of its case."""

import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator
from functools import wraps
from typing import Any, TypeVar

import pytest
import torch

from tests.support.versions import TooOld, too_old

Test = TypeVar("Test", bound=Callable[..., None])
Values = Iterable[Any] | Callable[[dict[str, Any]], Iterable[Any]]

_TRACEBACKS = 3
"""The number of failures in a test that are reported with a traceback."""


def for_each(**cases: Values) -> Callable[[Test], Test]:
    """Return a decorator that runs a test once for every combination of values, as one test.

    `pytest.mark.parametrize` makes every case a test of its own, which costs more than a small case itself. Here, too,
    every case starts from the same seed and has its own `tmp_path` and `monkeypatch`, and all cases run even if some
    fail. A case must not skip, except for an old version of a library (`versions`); leave it out of the values instead.

    Args:
        cases: Argument name -> the values it takes, or a function that returns them for the test's other arguments.
    """

    def decorate(test: Test) -> Test:
        @wraps(test)
        def run(**given: Any) -> None:
            failures: dict[str, BaseException] = {}
            skipped: list[TooOld] = []
            number = -1
            for number, case in enumerate(_combinations(cases, given)):
                torch.default_generator.manual_seed(0)
                with pytest.MonkeyPatch.context() as monkeypatch:
                    try:
                        test(**given | _own_fixtures(given, number, monkeypatch) | case)
                    except TooOld as skip:
                        skipped.append(skip)
                    except (Exception, pytest.fail.Exception, pytest.skip.Exception) as error:
                        skip = too_old(error)
                        if skip is not None:
                            skipped.append(skip)
                            continue
                        failures[", ".join(map(_name, case.values()))] = error
            assert number >= 0, "no cases"
            if failures:
                pytest.fail(_report(failures, number + 1), pytrace=False)
            if len(skipped) == number + 1:
                raise skipped[0]

        signature = inspect.signature(test)
        left = [parameter for name, parameter in signature.parameters.items() if name not in cases]
        run.__signature__ = signature.replace(parameters=left)  # type: ignore[attr-defined]
        return run  # type: ignore[return-value]

    return decorate


def _combinations(cases: dict[str, Values], given: dict[str, Any]) -> Iterator[dict[str, Any]]:
    found = [values(given) if callable(values) else values for values in cases.values()]
    return (dict(zip(cases, chosen, strict=True)) for chosen in itertools.product(*found))


def _own_fixtures(given: dict[str, Any], number: int, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    own: dict[str, Any] = {"monkeypatch": monkeypatch, "tmp_path": None}
    if "tmp_path" in given:
        own["tmp_path"] = given["tmp_path"] / str(number)
        own["tmp_path"].mkdir()
    return {name: value for name, value in own.items() if name in given}


def _report(failures: dict[str, BaseException], count: int) -> str:
    """Return a report of all failures: the first ones with a traceback, the others with the first line of a message."""
    lines = [f"{len(failures)} of {count} cases failed"]
    for number, (name, error) in enumerate(failures.items()):
        if number < _TRACEBACKS:
            caught = pytest.ExceptionInfo.from_exception(error)
            caught.traceback = caught.traceback[1:]
            lines.append(f"\ncase {name}:\n{caught.getrepr(style='short')}")
        else:
            lines.append(f"case {name}: {type(error).__name__}: {str(error).partition(chr(10))[0]}")
    return "\n".join(lines)


def _name(value: Any) -> str:
    return str(value) if isinstance(value, str) else getattr(value, "__name__", None) or repr(value)
