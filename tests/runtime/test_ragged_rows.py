"""`per_sample` on layers that get the tokens of all prompts as one matrix."""

from typing import Any

import pytest
import torch
from torch import Tensor

import diffadapt
from diffadapt import AdapterError
from tests.support.calls import CALLS, output
from tests.support.compare import assert_differs, assert_same
from tests.support.denoisers import SMALL


@torch.no_grad()
def test_prompts_of_different_lengths_in_one_matrix_are_refused() -> None:
    model = SMALL["zimage"].build()["transformer"].double()
    # The tables of the small model are too short for a text that is padded to 64 tokens.
    model.rope_embedder.axes_lens = [128, 128, 128]  # type: ignore[union-attr]
    call = CALLS["zimage"](2)
    config = diffadapt.LoraConfig(rank=2, target_modules=["cap_embedder.1"], init=False)
    diffadapt.add_adapter(model, config, "a").requires_grad_(False)
    adapters = diffadapt.adapters(model)
    adapters.activate({})
    base = output(model, call)
    with adapters.per_sample([{"a": 1.0}, {}]):
        mixed = output(model, call)
    assert_differs(mixed[0], base[0], 1e-3)
    assert_same(mixed[1], base[1], 1e-10)
    texts: list[Tensor] = call["cap_feats"]
    longer: dict[str, Any] = {**call, "cap_feats": [texts[0], torch.cat([texts[1]] * 8)]}
    message = "per_sample: 2 mixes, but a layer gets the 96 tokens of all prompts as one matrix"
    with adapters.per_sample([{"a": 1.0}, {}]), pytest.raises(AdapterError, match=message):
        output(model, longer)
    adapters.activate("a")
    assert output(model, longer).isfinite().all()
