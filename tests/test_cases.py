"""Tests with many cases in one: every failure is named, every case starts afresh."""

from pathlib import Path

import pytest
import torch

from tests.support.cases import for_each
from tests.support.versions import TooOld


def test_every_failing_case_is_reported_by_its_name() -> None:
    ran: list[tuple[str, int]] = []

    @for_each(word=["one", "two"], number=lambda given: range(given["count"]))
    def check(word: str, number: int, count: int) -> None:
        ran.append((word, number))
        if word == "two":
            assert number + 10 == count, "an explanation"

    with pytest.raises(pytest.fail.Exception) as caught:
        check(count=5)
    text = str(caught.value)
    assert ran == [(word, number) for word in ("one", "two") for number in range(5)]
    assert text.startswith("5 of 10 cases failed")
    for number in range(3):
        assert f"case two, {number}:\n" in text
    assert text.count("assert number + 10 == count") == 3
    for number in range(3, 5):
        assert f"case two, {number}: AssertionError: an explanation\n" in f"{text}\n"
    assert "case one" not in text


@pytest.mark.parametrize("values", [[], [1]], ids=["no case", "a case that skips"])
def test_a_test_without_a_case_that_runs_fails(values: list[int]) -> None:
    @for_each(value=values)
    def check(value: int) -> None:
        pytest.skip("not here")

    with pytest.raises((AssertionError, pytest.fail.Exception), match=r"no cases|not here"):
        check()


def test_cases_that_an_old_version_lacks_are_left_out_and_skip_the_test_if_there_are_no_others() -> None:
    ran: list[int] = []

    def check(value: int, least: int) -> None:
        if value < least:
            raise TooOld(f"{value} needs a newer version")
        ran.append(value)

    for_each(value=range(3))(check)(least=1)
    assert ran == [1, 2]
    with pytest.raises(pytest.skip.Exception, match="0 needs a newer version"):
        for_each(value=range(3))(check)(least=3)


def test_every_case_starts_from_the_same_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []

    @for_each(number=range(2))
    def check(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        assert list(tmp_path.iterdir()) == []
        (tmp_path / "file").touch()
        assert not hasattr(torch, "for_each")
        monkeypatch.setattr(torch, "for_each", number, raising=False)
        seen.append(float(torch.randn(())))

    check(tmp_path=tmp_path, monkeypatch=monkeypatch)
    assert seen[0] == seen[1]
    assert not hasattr(torch, "for_each")
