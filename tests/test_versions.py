"""What the oldest supported versions of other libraries lack skips the tests that need it, and nothing else does."""

import importlib
from importlib.metadata import version

import pytest

from tests.support import versions
from tests.support.versions import SINCE, Library, TooOld


def test_every_listed_name_exists_from_its_version_on() -> None:
    for library, names_by_version in SINCE.items():
        for names in names_by_version.values():
            for name in names.split():
                try:
                    found = getattr(Library(library), name)
                except TooOld:
                    # The table would hide a name that exists.
                    assert not hasattr(importlib.import_module(library), name), name
                else:
                    assert found is getattr(importlib.import_module(library), name)


def test_an_old_version_skips_with_what_is_needed_and_an_unknown_name_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {"diffusers": "0.33.1"}
    monkeypatch.setattr(versions, "version", lambda library: installed.get(library, version(library)))
    with pytest.raises(pytest.skip.Exception, match=r"ChromaPipeline needs diffusers 0\.34 or newer; this is 0\.33\.1"):
        _ = versions.diffusers.ChromaPipeline
    assert versions.diffusers.UNet2DConditionModel.__name__ == "UNet2DConditionModel"
    with pytest.raises(AttributeError):
        _ = versions.diffusers.NoSuchModel
