"""Invalid files of every type: the error names the layer, what was expected and what was found."""

import math
import re

import pytest
import torch
from torch import Tensor, nn

import diffadapt
from diffadapt import AdapterError
from tests.support.compare import assert_unchanged, snapshot

Shapes = dict[str, tuple[int, ...] | float]
LINEAR, CONV, GROUPED, NORM, TOKENS = "net.linear", "net.conv", "net.grouped", "net.norm", "net.tokens"


def net() -> nn.Module:
    torch.manual_seed(0)
    layers = {
        "linear": nn.Linear(12, 8),
        "conv": nn.Conv2d(4, 6, 3),
        "grouped": nn.Conv2d(4, 8, 3, groups=2),
        "norm": nn.LayerNorm(8),
        "tokens": nn.Embedding(7, 8),
    }
    return nn.ModuleDict({"net": nn.ModuleDict(layers)})


HADA: Shapes = {"hada_w1_a": (8, 2), "hada_w1_b": (2, 12), "hada_w2_a": (8, 2), "hada_w2_b": (2, 12)}
GLORA: Shapes = {"a1.weight": (12, 2), "a2.weight": (2, 12), "b1.weight": (8, 2), "b2.weight": (2, 12)}

CASES: dict[str, tuple[str, Shapes, str]] = {
    # A partner is missing
    "lora, no up": (LINEAR, {"lora_down.weight": (2, 12)}, "lora_up is missing, only lora_down found"),
    "lora, no down": (LINEAR, {"lora_up.weight": (8, 2)}, "lora_down is missing, only lora_up found"),
    "dora, no up": (LINEAR, {"lora_down.weight": (2, 12), "dora_scale": (8, 1)}, "lora_up is missing"),
    "dora, magnitude alone": (LINEAR, {"dora_scale": (8, 1)}, "dora_scale: no adapter type"),
    "alpha alone": (LINEAR, {"alpha": 1.0}, "only an alpha"),
    "loha": (LINEAR, {k: v for k, v in HADA.items() if k != "hada_w2_b"}, "hada_w2_b missing"),
    "loha, one core": (CONV, {**HADA, "hada_t1": (2, 2, 3, 3)}, "hada_t2 missing"),
    "lokr, one factor": (LINEAR, {"lokr_w1": (2, 3)}, "lokr_w2, or lokr_w2_a and lokr_w2_b expected, lokr_w1 found"),
    "lokr, half a factor": (LINEAR, {"lokr_w1": (2, 3), "lokr_w2_a": (4, 1)}, "lokr_w2_a and lokr_w2_b expected"),
    "lokr, both forms": (LINEAR, {"lokr_w1": (2, 3), "lokr_w2": (4, 4), "lokr_w2_a": (4, 1)}, "lokr_w2_b expected"),
    "glora": (LINEAR, {k: v for k, v in GLORA.items() if k != "a2.weight"}, "glora_a2"),
    "boft": (LINEAR, {"boft_s": (8, 1)}, "boft_R"),
    # Ranks that differ
    "lora, ranks": (LINEAR, {"lora_down.weight": (2, 12), "lora_up.weight": (8, 3)}, "(8, 3), expected (8, 2)"),
    "lora, core": (
        CONV,
        {"lora_down.weight": (2, 4, 1, 1), "lora_mid.weight": (3, 3, 3, 3), "lora_up.weight": (6, 2)},
        "lora_mid has shape (3, 3, 3, 3), expected (2, 2, 3, 3)",
    ),
    "loha, ranks": (LINEAR, {**HADA, "hada_w2_a": (8, 3)}, "hada_w2_a has shape (8, 3), expected (8, 2)"),
    "lokr, ranks": (LINEAR, {"lokr_w1": (2, 3), "lokr_w2_a": (4, 1), "lokr_w2_b": (2, 4)}, "cannot be multiplied"),
    "glora, ranks": (LINEAR, {**GLORA, "a2.weight": (3, 12)}, "(3, 12)"),
    # Rank zero
    "lora, rank 0": (LINEAR, {"lora_down.weight": (0, 12), "lora_up.weight": (8, 0)}, "at least one rank"),
    "loha, rank 0": (
        LINEAR,
        {name: (8, 0) if name.endswith("a") else (0, 12) for name in HADA},
        "hada_w1_a has shape (8, 0)",
    ),
    "lokr, rank 0": (LINEAR, {"lokr_w1": (2, 3), "lokr_w2_a": (4, 0), "lokr_w2_b": (0, 4)}, "expected matrices"),
    "glora, rank 0": (
        LINEAR,
        {"a1.weight": (12, 0), "a2.weight": (0, 12), "b1.weight": (8, 0), "b2.weight": (0, 12)},
        "a1",
    ),
    # Shapes of another layer
    "lora, columns": (LINEAR, {"lora_down.weight": (2, 11), "lora_up.weight": (8, 2)}, "(2, 11), expected (2, 12)"),
    "lora, rows": (LINEAR, {"lora_down.weight": (2, 12), "lora_up.weight": (9, 2)}, "(9, 2), expected (8, 2)"),
    "lora, kernel": (
        CONV,
        {"lora_down.weight": (2, 4, 1, 9), "lora_up.weight": (6, 2)},
        "(2, 4, 1, 9), expected (2, 4, 3, 3)",
    ),
    "dora, magnitude": (
        LINEAR,
        {"lora_down.weight": (2, 12), "lora_up.weight": (8, 2), "dora_scale": (7, 1)},
        "dora_scale has shape (7, 1), expected (8, 1) per output or (1, 12) per input",
    ),
    "dora, by input on tokens": (
        TOKENS,
        {"lora_down.weight": (2, 7), "lora_up.weight": (8, 2), "dora_scale": (1, 7)},
        "dora_scale has shape (1, 7)",
    ),
    "loha, columns": (LINEAR, {**HADA, "hada_w1_b": (2, 10)}, "hada_w1_b has shape (2, 10), expected (2, 12)"),
    "lokr, product": (LINEAR, {"lokr_w1": (2, 3), "lokr_w2": (4, 3)}, "multiply to (8, 9), expected (8, 12)"),
    "oft, channels": (LINEAR, {"oft_blocks": (3, 4, 4)}, "oft_blocks has shape (3, 4, 4)"),
    "boft, channels": (LINEAR, {"oft_blocks": (1, 3, 4, 4)}, "oft_blocks has shape (1, 3, 4, 4)"),
    "boft, pairs": (LINEAR, {"oft_blocks": (4, 2, 4, 4)}, "4 butterfly factors of 2 blocks, expected a multiple of 8"),
    "full": (LINEAR, {"diff": (8, 13)}, "diff has shape (8, 13), expected (8, 12)"),
    "full, bias": (LINEAR, {"diff_b": (9,)}, "diff_b has shape (9,), expected (8,)"),
    "norm": (NORM, {"w_norm": (9,)}, "(9,), expected (8,)"),
    # Layers on which the type has no meaning
    "oft on groups": (GROUPED, {"oft_blocks": (2, 4, 4)}, "2 groups; a rotation would mix them"),
    "lora on a norm": (NORM, {"lora_down.weight": (2, 8), "lora_up.weight": (8, 2)}, "LayerNorm cannot carry this"),
    "glora on tokens": (TOKENS, {**GLORA, "a1.weight": (7, 2)}, "an embedding has no inputs that GLoRA could map"),
    # Alphas
    "lora, alpha 0": (LINEAR, {"lora_down.weight": (2, 12), "lora_up.weight": (8, 2), "alpha": 0.0}, "alpha is 0.0"),
    "loha, alpha 0": (LINEAR, {**HADA, "alpha": 0.0}, "alpha is 0.0, expected a finite number other than 0"),
    "lora, alpha infinite": (
        LINEAR,
        {"lora_down.weight": (2, 12), "lora_up.weight": (8, 2), "alpha": math.inf},
        "alpha is inf",
    ),
    "lora, alpha of many": (
        LINEAR,
        {"lora_down.weight": (2, 12), "lora_up.weight": (8, 2), "alpha": (2,)},
        "alpha has shape (2,), expected a single number",
    ),
    # Types mixed in one layer
    "lora and loha": (LINEAR, {**HADA, "lora_down.weight": (2, 12), "lora_up.weight": (8, 2)}, "no adapter type"),
}

WHOLE: dict[str, tuple[str, Shapes]] = {
    "lora": (LINEAR, {"lora_down.weight": (2, 12), "lora_up.weight": (8, 2)}),
    "dora": (LINEAR, {"lora_down.weight": (2, 12), "lora_up.weight": (8, 2), "dora_scale": (8, 1)}),
    "loha": (LINEAR, HADA),
    "lokr": (LINEAR, {"lokr_w1": (2, 3), "lokr_w2": (4, 4)}),
    "oft": (LINEAR, {"oft_blocks": (2, 4, 4)}),
    "boft": (LINEAR, {"oft_blocks": (2, 2, 4, 4)}),
    "glora": (LINEAR, GLORA),
    "full": (LINEAR, {"diff": (8, 12), "diff_b": (8,)}),
}


def tensors(path: str, shapes: Shapes, fill: float = 1.0) -> dict[str, Tensor]:
    return {
        f"base_model.model.{path}.{name}": torch.full(shape, fill) if isinstance(shape, tuple) else torch.tensor(shape)
        for name, shape in shapes.items()
    }


@pytest.mark.parametrize("name", CASES)
def test_the_fault_is_reported_and_nothing_loaded(name: str) -> None:
    path, shapes, reason = CASES[name]
    model = net()
    before = snapshot(model)
    with pytest.raises(AdapterError, match=re.escape(reason)) as error:
        diffadapt.load_adapter(model, tensors(path, shapes))
    assert path in str(error.value)
    assert_unchanged(model, before)


@pytest.mark.parametrize("name", WHOLE)
def test_a_valid_file_is_loaded_and_one_with_nan_refused(name: str) -> None:
    path, shapes = WHOLE[name]
    model = net()
    report = diffadapt.load_adapter(model, tensors(path, shapes), "a")
    assert report.types == {name: 1}
    assert report.unused == []
    diffadapt.adapters(model).clear()
    for key in tensors(path, shapes):
        broken = tensors(path, shapes)
        broken[key].view(-1)[0] = math.nan
        with pytest.raises(AdapterError, match=f"{re.escape(path)}.*{re.escape(key)} holds NaN"):
            diffadapt.load_adapter(model, broken, "a")
        assert diffadapt.adapters(model).names == []


@pytest.mark.parametrize("name", WHOLE)
def test_inspection_without_a_model_finds_the_same_types(name: str) -> None:
    path, shapes = WHOLE[name]
    report = diffadapt.inspect(tensors(path, shapes))
    assert report.types == {name: 1}
    assert report.unused == []


def test_an_infinite_alpha_has_no_meaning_with_two_whole_factors() -> None:
    """ai-toolkit writes 1e10, which float16 cannot hold."""
    model = net()
    state = {**tensors(LINEAR, WHOLE["lokr"][1]), f"base_model.model.{LINEAR}.alpha": torch.tensor(math.inf).half()}
    diffadapt.load_adapter(model, state, "a")
    before = model["net"]["linear"].weight.detach().clone()
    diffadapt.adapters(model).merge()
    torch.testing.assert_close(model["net"]["linear"].weight.detach(), before + 1)
