"""Textual inversions in pickle files, as A1111 and the original code write them."""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import diffadapt
from diffadapt import AdapterError
from tests.support import models


def written(path: Path, param: Any) -> Path:
    content = {"string_to_token": {"*": 265}, "string_to_param": param, "name": "other", "step": 500}
    torch.save({**content, "sd_checkpoint": None, "sd_checkpoint_name": None}, path)
    return path


def vectors(count: int = 3) -> Tensor:
    return torch.randn(count, models.WIDTH, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "param",
    [
        {"*": vectors()},
        {"*": nn.Parameter(vectors())},
        nn.ParameterDict({"*": nn.Parameter(vectors())}),
    ],
    ids=["tensor", "parameter", "parameter dict"],
)
def test_the_name_of_the_file_is_the_token(param: Any, tmp_path: Path) -> None:
    pipe = models.sd15()
    report = pipe.load_adapter(diffadapt.read_pickle(written(tmp_path / "my-cat.v1.pt", param)), "cat")
    assert (report.format, report.tokens, report.used, report.unused) == ("embeddings", {"my-cat.v1": 3}, 1, [])
    (learned,) = pipe.adapters["cat"].learned
    assert torch.equal(next(iter(learned.state.values())), vectors())


def test_other_placeholders_are_tokens_of_their_own(tmp_path: Path) -> None:
    param = {"*": vectors(1), "<dog>": 2 * vectors(2)}
    report = models.sd15().load_adapter(diffadapt.read_pickle(written(tmp_path / "cat.pt", param)))
    assert report.tokens == {"cat": 1, "<dog>": 2}


def test_vectors_that_are_no_tensors_are_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="maps str to Tensor; found str -> list"):
        diffadapt.read_pickle(written(tmp_path / "cat.pt", {"*": [1.0]}))


@pytest.mark.parametrize("content", [{"a": functools.partial(print)}, b"hello", b""], ids=["code", "text", "empty"])
def test_what_is_no_state_dict_is_refused_without_advice_to_run_it(content: Any, tmp_path: Path) -> None:
    file = tmp_path / "trap.pt"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        torch.save(content, file)
    with pytest.raises(AdapterError, match=r"trap\.pt: cannot be unpickled with weights_only=True") as refused:
        diffadapt.read_pickle(file)
    message = str(refused.value)
    assert ("functools.partial" if content and not isinstance(content, bytes) else "no intact pickle") in message
    assert "safetensors" in message
    assert not any(word in message for word in ("False", "safe_globals", "trust"))
    assert refused.value.__suppress_context__
