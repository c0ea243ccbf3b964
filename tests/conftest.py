"""The environment of every test: one thread, a fixed seed, no traces of the previous test."""

import importlib
import sys
import warnings
from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING

import pytest
import torch

from tests.support import versions

if TYPE_CHECKING:
    from torch._dynamo.testing import CompileCounterWithBackend

pytest.register_assert_rewrite("tests.support.compare", "tests.support.effort")
importlib.import_module("diffadapt")
with warnings.catch_warnings():
    # diffusers imports the quantisation backends that are installed, and those warn of what torch deprecates.
    warnings.simplefilter("ignore")
    importlib.import_module("diffusers.loaders.peft")


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call() -> Generator[None, object, object]:
    """Skip a test that fails because an old version of a library lacks a model."""
    try:
        return (yield)
    except Exception as error:
        skip = versions.too_old(error)
        raise error if skip is None else skip from error


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    # `torch.manual_seed` also seeds every kind of device, which takes longer than many tests.
    torch.default_generator.manual_seed(0)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    yield
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None:
        dynamo.reset()


@pytest.fixture
def counter() -> "Iterator[CompileCounterWithBackend]":
    """A backend that counts graphs; a recompile is an error."""
    from torch._dynamo.testing import CompileCounterWithBackend  # Loading this module takes long.

    with torch._dynamo.config.patch(error_on_recompile=True):
        yield CompileCounterWithBackend("aot_eager")


@pytest.fixture
def peft_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers behaves as if peft were not installed."""
    for name, module in list(sys.modules.items()):
        if name.startswith("diffusers.") and "USE_PEFT_BACKEND" in vars(module):
            monkeypatch.setattr(module, "USE_PEFT_BACKEND", False)
