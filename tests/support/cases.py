"""Many cases in one test: a decorator that runs all of them and reports every failure by the name of its case."""

import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator
from functools import wraps
from typing import Any, TypeVar

import pytest
import torch

Test = TypeVar("Test", bound=Callable[..., None])
Values = Iterable[Any] | Callable[[dict[str, Any]], Iterable[Any]]


def for_each(**cases: Values) -> Callable[[Test], Test]:
    """Return a decorator that runs a test once for every combination of values, as one test.

    `pytest.mark.parametrize` makes every case a test of its own, which costs more than a small case itself. Here, too,
    every case starts from the same seed and has its own `tmp_path` and `monkeypatch`, and all cases run even if some
    fail. A case must not skip; leave it out of the values instead.

    Args:
        cases: Argument name -> the values it takes, or a function that returns them for the test's other arguments.
    """

    def decorate(test: Test) -> Test:
        @wraps(test)
        def run(**given: Any) -> None:
            __tracebackhide__ = True
            failures: list[str] = []
            number = -1
            for number, case in enumerate(_combinations(cases, given)):
                torch.default_generator.manual_seed(0)
                with pytest.MonkeyPatch.context() as monkeypatch:
                    try:
                        test(**given | _own_fixtures(given, number, monkeypatch) | case)
                    except (Exception, pytest.fail.Exception, pytest.skip.Exception) as error:
                        report = pytest.ExceptionInfo.from_exception(error).getrepr(style="short")
                        failures.append(f"case {', '.join(map(_name, case.values()))}:\n{report}")
            assert number >= 0, "no cases"
            if failures:
                count = f"{len(failures)} of {number + 1} cases failed"
                pytest.fail("\n\n".join([count, *failures]), pytrace=False)

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


def _name(value: Any) -> str:
    return str(value) if isinstance(value, str) else getattr(value, "__name__", None) or repr(value)
