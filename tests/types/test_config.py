"""Settings of new adapters: what they mean for each layer, and which are refused."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import diffadapt
from diffadapt import AdapterConfig, AdapterError
from diffadapt.types import patterns
from tests.support.compare import assert_differs

LORA, LOHA, LOKR, OFT = diffadapt.LoraConfig, diffadapt.LoHaConfig, diffadapt.LoKrConfig, diffadapt.OFTConfig


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.foo, self.foobar, self.barfoo = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, input: Tensor) -> Tensor:
        return self.barfoo(self.foobar(self.foo(input)))


class Nested(nn.Module):
    """A model with the names of PEFT's examples for patterns."""

    def __init__(self) -> None:
        super().__init__()
        self.foo = nn.Linear(8, 8)
        self.module = Block()
        self.module.module = Block()

    def forward(self, input: Tensor) -> Tensor:
        return self.module.module(self.module(self.foo(input)))


def nested() -> Nested:
    torch.manual_seed(0)
    return Nested()


def given() -> Tensor:
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("given_patterns", "expected"),
    [
        ({"foo": 5}, {"foo": 5, "module.foo": 5, "module.module.foo": 5}),
        ({"^foo": 5}, {"foo": 5}),
        ({"^module.foo": 5}, {"module.foo": 5}),
        ({"module.foo": 5}, {"module.foo": 5, "module.module.foo": 5}),
        ({"^foo": 5, "^module.module.foo": 6}, {"foo": 5, "module.module.foo": 6}),
        ({"module.*": 5, "foo": 6}, {"module.foo": 5, "module.module.foo": 5, "foo": 6}),
        ({"foo": 6, "module.*": 5}, {"foo": 6, "module.foo": 6, "module.module.foo": 6}),
        ({"bar": 5}, {}),
        ({"fo": 5}, {}),
        ({r"module\.(module\.)?foo": 7}, {"module.foo": 7, "module.module.foo": 7}),
    ],
)
def test_patterns_match_whole_names_at_the_end_of_paths(
    given_patterns: dict[str, int], expected: dict[str, int]
) -> None:
    paths = ("foo", "module.foo", "module.module.foo")
    found = {path: patterns.value(given_patterns, path) for path in paths}
    assert {path: value for path, value in found.items() if value is not None} == expected


@pytest.mark.parametrize(("config_class", "down"), [(LORA, "lora_down"), (LOHA, "hada_w1_b")])
def test_ranks_and_alphas_follow_patterns(config_class: Any, down: str) -> None:
    config = config_class(
        rank=2, alpha=4, target_modules=["foo"], rank_pattern={"^foo": 1, "module.foo": 3}, alpha_pattern={"^foo": 5}
    )
    adapter = diffadapt.add_adapter(nested(), config)
    assert {path: layer.rank for path, layer in adapter.layers.items()} == {
        "foo": 1,
        "module.foo": 3,
        "module.module.foo": 3,
    }
    assert {path: layer.scale for path, layer in adapter.layers.items()} == {
        "foo": 5.0,
        "module.foo": pytest.approx(4 / 3),
        "module.module.foo": pytest.approx(4 / 3),
    }
    assert adapter.layers["foo"].tensors[down].shape[0] == 1


def test_a_rank_stabilized_scale_follows_the_pattern() -> None:
    config = LORA(rank=4, alpha=8, rank_stabilized=True, target_modules=["foo"], rank_pattern={"^foo": 8})
    adapter = diffadapt.add_adapter(nested(), config)
    assert adapter.layers["foo"].scale == pytest.approx(8 / 8**0.5)
    assert adapter.layers["module.foo"].scale == pytest.approx(8 / 4**0.5)


@pytest.mark.parametrize(
    ("wanted", "excluded", "expected"),
    [
        (["foo"], [], {"foo", "module.foo", "module.module.foo"}),
        (["foo"], ["module.module.foo"], {"foo", "module.foo"}),
        ([r"foo", "barfoo"], r"module\..*", {"foo"}),
        (r"module\.(foo|barfoo)", [], {"module.foo", "module.barfoo"}),
        ("all-linear", r".*bar.*", {"foo", "module.foo", "module.module.foo"}),
    ],
)
def test_target_modules_and_exclude_modules_choose_the_layers(wanted: Any, excluded: Any, expected: set[str]) -> None:
    config = LORA(rank=2, target_modules=wanted, exclude_modules=excluded)
    model = nested()
    assert set(diffadapt.add_adapter(model, config, "a").layers) == expected
    # A second adapter finds the same layers, and none inside the first.
    assert set(diffadapt.add_adapter(model, config, "b").layers) == expected


REFUSED: dict[str, tuple[Callable[[], AdapterConfig], str]] = {
    "rank of zero": (lambda: LORA(rank=0, target_modules=["foo"]), "rank is 0, expected at least 1"),
    "rank below zero in a pattern": (
        lambda: LOHA(rank=2, target_modules=["foo"], rank_pattern={"foo": -1}),
        "rank is -1",
    ),
    "no rank": (lambda: LOKR(target_modules=["foo"]), "rank is 0"),
    "alpha of zero": (lambda: LOKR(rank=2, alpha=0, target_modules=["foo"]), "alpha is 0"),
    "alpha of zero in a pattern": (
        lambda: LORA(rank=2, target_modules=["foo"], alpha_pattern={"foo": 0.0}),
        "alpha is 0",
    ),
    "dropout of one": (lambda: LORA(rank=2, dropout=1.0, target_modules=["foo"]), "dropout is 1.0"),
    "rank dropout": (lambda: LORA(rank=2, rank_dropout=-0.1, target_modules=["foo"]), "rank_dropout is -0.1"),
    "init": (lambda: LOHA(rank=2, init="gaussian", target_modules=["foo"]), "init is 'gaussian'"),
    "axis without DoRA": (
        lambda: LORA(rank=2, dora_axis="input", target_modules=["foo"]),
        "no effect without use_dora",
    ),
    "axis": (lambda: LORA(rank=2, use_dora=True, dora_axis="rows", target_modules=["foo"]), "dora_axis is 'rows'"),
    "rank of whole factors": (lambda: LOKR(rank=2, full_matrix=True, target_modules=["foo"]), "rank has no effect"),
    "alpha of whole factors": (lambda: LOKR(alpha=2, full_matrix=True, target_modules=["foo"]), "alpha has no effect"),
    "whole and decomposed": (
        lambda: LOKR(full_matrix=True, decompose_both=True, target_modules=["foo"]),
        "excludes decompose_both",
    ),
    "factor": (lambda: LOKR(rank=2, factor=0, target_modules=["foo"]), "factor is 0"),
    "no blocks": (lambda: OFT(target_modules=["foo"]), "expected exactly one"),
    "blocks twice": (lambda: OFT(block_size=2, num_blocks=4, target_modules=["foo"]), "expected exactly one"),
    "side": (lambda: OFT(block_size=2, side="left", target_modules=["foo"]), "side is 'left'"),
    "output option on inputs": (
        lambda: OFT(block_size=2, rescale=True, target_modules=["foo"]),
        "rescale has no effect",
    ),
    "input option on outputs": (
        lambda: OFT(block_size=2, side="output", block_share=True, target_modules=["foo"]),
        "block_share has no effect",
    ),
    "one term": (lambda: OFT(block_size=2, neumann_terms=1, target_modules=["foo"]), "neumann_terms is 1"),
    "radius": (lambda: OFT(block_size=2, coft_eps=-1.0, target_modules=["foo"]), "coft_eps is -1.0"),
    # Settings that do not fit the layers
    "rank pattern that names nothing": (
        lambda: LORA(rank=2, target_modules=["foo"], rank_pattern={"fo": 3}),
        "rank_pattern: 'fo' names none of the 3",
    ),
    "alpha pattern that names nothing": (
        lambda: LOHA(rank=2, target_modules=["foo"], alpha_pattern={"barfoo": 3}),
        "alpha_pattern: 'barfoo'",
    ),
    "bad expression": (lambda: LORA(rank=2, target_modules=["foo"], rank_pattern={"(": 3}), "no regular expression"),
    "blocks that do not divide": (
        lambda: OFT(block_size=3, target_modules=["foo"]),
        "foo: block_size is 3, which does not",
    ),
    "blocks that do not divide, by number": (
        lambda: OFT(num_blocks=5, side="output", target_modules=["foo"]),
        "foo: num_blocks is 5",
    ),
    "blocks of one": (lambda: OFT(block_size=1, target_modules=["foo"]), "blocks of one channel"),
    "no layer": (lambda: LORA(rank=2, target_modules=["nothing"]), "'nothing' matches no layer"),
    "core without a kernel": (
        lambda: LORA(rank=2, use_tucker=True, target_modules=["foo"]),
        "use_tucker has no effect",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_settings_change_nothing(name: str) -> None:
    make, reason = REFUSED[name]
    model = nested()
    before = {path: (type(module), sorted(vars(module))) for path, module in model.named_modules()}
    with pytest.raises(AdapterError, match=re.escape(reason)):
        diffadapt.add_adapter(model, make())
    assert {path: (type(module), sorted(vars(module))) for path, module in model.named_modules()} == before


def test_unknown_options_and_the_base_class_are_refused() -> None:
    with pytest.raises(TypeError):
        LORA(rank=2, target_modules=["foo"], lora_alpha=3)  # type: ignore[call-arg]
    with pytest.raises(AdapterError, match="AdapterConfig belongs to no adapter type"):
        diffadapt.add_adapter(nested(), AdapterConfig(target_modules=["foo"]))


@pytest.mark.parametrize("init", [True, "gaussian", False])
def test_init_of_a_lora_decides_its_first_values(init: bool | str) -> None:
    model = nested()
    base = model(given())
    adapter = diffadapt.add_adapter(model, LORA(rank=8, target_modules=["foo"], init=init))
    down = torch.cat([layer.tensors["lora_down"].flatten() for layer in adapter.layers.values()])
    if init == "gaussian":
        assert float(down.detach().std()) == pytest.approx(1 / 8, rel=0.2)
    else:
        assert float(down.detach().abs().max()) <= 8**-0.5
    assert torch.equal(model(given()), base) == bool(init)


def test_the_default_generator_is_seeded_and_the_global_one_untouched() -> None:
    models = [nested() for _ in range(3)]
    state = torch.get_rng_state()
    first, second = (diffadapt.add_adapter(model, LORA(rank=2, target_modules=["foo"])) for model in models[:2])
    generator = torch.Generator().manual_seed(9)
    other = diffadapt.add_adapter(models[2], LORA(rank=2, target_modules=["foo"], generator=generator))
    assert torch.equal(torch.get_rng_state(), state)
    tensors = [adapter.layers["foo"].tensors["lora_down"] for adapter in (first, second, other)]
    assert torch.equal(tensors[0], tensors[1])
    assert not torch.equal(tensors[0], tensors[2])


# Dropout

DROPOUTS: dict[str, AdapterConfig] = {
    "lora input": LORA(rank=4, target_modules=["foo"], init=False, dropout=0.5),
    "lora rank": LORA(rank=4, target_modules=["foo"], init=False, rank_dropout=0.5),
    "lora module": LORA(rank=4, target_modules=["foo"], init=False, module_dropout=0.5),
    "loha rank": LOHA(rank=4, target_modules=["foo"], init=False, rank_dropout=0.5),
    "lokr rank": LOKR(rank=1, target_modules=["foo"], init=False, rank_dropout=0.5),
    "dora rank": LORA(rank=4, target_modules=["foo"], init=False, rank_dropout=0.5, use_dora=True),
    "oft blocks": OFT(block_size=2, target_modules=["foo"], init=False, dropout=0.5),
    "oft module": OFT(block_size=2, side="output", target_modules=["foo"], init=False, module_dropout=0.5),
}


@pytest.mark.parametrize("name", DROPOUTS)
def test_dropout_acts_in_training_only(name: str) -> None:
    model = nested()
    diffadapt.add_adapter(model, DROPOUTS[name])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        trained = [model.train()(given()).detach() for _ in range(12)]
        calm = [model.eval()(given()).detach() for _ in range(2)]
    assert any(not torch.equal(trained[0], other) for other in trained[1:])
    assert torch.equal(*calm)


def test_input_and_rank_dropout_keep_the_mean() -> None:
    for option in ("dropout", "rank_dropout", "module_dropout"):
        model = nn.Sequential(nn.Linear(8, 8))
        base = model(given()).detach()
        adapter = diffadapt.add_adapter(model, LORA(rank=8, target_modules=["0"], init=False, **{option: 0.5}))
        full = model.eval()(given()).detach() - base
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model.train()
            mean = torch.stack([model(given()).detach() - base for _ in range(2000)]).mean(0)
        # Module dropout does not rescale the remaining changes, as in LyCORIS.
        expected = full * 0.5 if option == "module_dropout" else full
        assert (mean - expected).abs().max() < 0.15 * full.abs().max(), option
        assert adapter.layers["0"].training


def test_block_dropout_leaves_the_other_blocks_rotated() -> None:
    model = nn.Sequential(nn.Linear(8, 8, bias=False))
    diffadapt.add_adapter(model, OFT(block_size=2, target_modules=["0"], init=False, dropout=0.5))
    base, full = model[0].weight.detach(), model.eval()(torch.eye(8)).T.detach()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        trained = model.train()(torch.eye(8)).T.detach()
    seen: set[str] = set()
    for start in range(0, 8, 2):
        block = slice(start, start + 2)
        is_rotated = torch.allclose(trained[:, block], full[:, block], atol=1e-6)
        assert is_rotated or torch.allclose(trained[:, block], base[:, block], atol=1e-6)
        seen.add("rotated" if is_rotated else "dropped")
    assert seen == {"rotated", "dropped"}
    assert_differs(full, base)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 1.5}, "rank is 1.5, expected a whole number, at least 1"),
        ({"rank": "a"}, "rank is 'a', expected a whole number, at least 1"),
        ({"rank": True}, "rank is True, expected a whole number"),
        ({"rank": 100_000}, r"foo: rank is 100000, expected at most 8 for a weight of shape \(8, 8\)"),
        ({"rank": 4, "rank_pattern": {"foo": 2.5}}, "rank is 2.5, expected a whole number"),
        ({"rank": 4, "alpha": float("nan")}, "alpha is nan, expected a finite number"),
        ({"rank": 4, "alpha": "8"}, "alpha is '8', expected a finite number"),
        ({"rank": 4, "dropout": "a"}, "dropout is 'a', expected 0 <= dropout < 1"),
    ],
)
def test_numbers_that_cannot_mean_anything_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(diffadapt.AdapterError, match=message):
        diffadapt.add_adapter(nested(), LORA(target_modules=["foo"], **options))


def test_a_rank_that_suits_the_model_is_taken_by_its_tiny_layers_too() -> None:
    model = nn.Sequential(nn.Linear(2, 1), nn.Linear(1, 64))
    adapter = diffadapt.add_adapter(model, LORA(target_modules="all-linear", rank=16))
    assert {layer.rank for layer in adapter.layers.values()} == {16}
    with pytest.raises(diffadapt.AdapterError, match="1: rank is 65, expected at most 64"):
        diffadapt.add_adapter(model, LORA(target_modules="all-linear", rank=65), "b")
