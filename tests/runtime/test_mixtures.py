"""Adapters of several types on the same layers: one formula for every order and mode."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import diffadapt
from diffadapt import AdapterConfig, AdapterError
from diffadapt.runtime import compose
from diffadapt.runtime.bank import bank_of
from diffadapt.runtime.prepared_layer import PreparedLayer
from diffadapt.types.layer_spec import LayerSpec
from tests.support import models
from tests.support.compare import assert_differs, assert_same
from tests.support.models import draw

TARGETS = ["0", "2"]
CONFIGS: dict[str, AdapterConfig] = {
    "lora": diffadapt.LoraConfig(rank=2, alpha=3, target_modules=TARGETS, init=False),
    "dora": diffadapt.LoraConfig(rank=2, target_modules=TARGETS, init=False, use_dora=True),
    "dora by input": diffadapt.LoraConfig(rank=2, target_modules=TARGETS, init=False, use_dora=True, dora_axis="input"),
    "loha": diffadapt.LoHaConfig(rank=2, target_modules=TARGETS, init=False),
    "lokr": diffadapt.LoKrConfig(rank=1, target_modules=TARGETS, init=False),
    "oft": diffadapt.OFTConfig(block_size=4, target_modules=TARGETS, init=False),
    "oft on outputs": diffadapt.OFTConfig(
        block_size=2, side="output", rescale=True, target_modules=TARGETS, init=False
    ),
}
MIXTURES = [
    ("lora", "oft", "dora"),
    ("dora", "dora by input", "oft on outputs"),
    ("loha", "oft", "oft on outputs"),
    ("lora", "lokr", "loha"),
]


def linear_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 8)).double()


def conv_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.Tanh(), nn.Conv2d(8, 4, 1)).double()


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (linear_net, (3, 8)),
    "conv": (conv_net, (2, 4, 6, 6)),
}


def attached(net: str, names: tuple[str, ...], dtypes: tuple[torch.dtype, ...] = (torch.float64,)) -> nn.Module:
    """Return a model with these adapters, whose tensors do not depend on the order."""
    model = NETS[net][0]()
    for name, dtype in zip(names, itertools.cycle(dtypes), strict=False):
        adapter = diffadapt.add_adapter(model, CONFIGS[name], name)
        adapter.to(dtype).requires_grad_(False)
    strengths = {name: 0.4 + 0.3 * sorted(names).index(name) for name in names}
    diffadapt.adapters(model).activate(strengths)
    return model


def given(net: str) -> Tensor:
    return torch.randn(NETS[net][1], generator=torch.Generator().manual_seed(5), dtype=torch.float64)


@pytest.mark.slow
@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("names", MIXTURES, ids="+".join)
def test_adapters_have_the_same_effect_in_every_order_compiled_and_merged(net: str, names: tuple[str, ...]) -> None:
    input = given(net)
    base = NETS[net][0]()(input)
    expected = attached(net, names)(input)
    assert_differs(expected, base)
    for order in itertools.permutations(names):
        model = attached(net, order)
        torch.testing.assert_close(model(input), expected, rtol=1e-10, atol=1e-10)
        if order == names:
            compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
            torch.testing.assert_close(compiled(input), expected, rtol=1e-10, atol=1e-10)
        diffadapt.adapters(model).merge()
        torch.testing.assert_close(model(input), expected, rtol=1e-10, atol=1e-10)
        diffadapt.adapters(model).clear()
        assert torch.equal(model(input), base)


@pytest.mark.parametrize("names", MIXTURES, ids="+".join)
def test_the_output_follows_the_formula(names: tuple[str, ...]) -> None:
    """The weight W' is computed from the matrices of the maps."""
    model = attached("linear", names)
    bank = bank_of(model)
    assert bank is not None
    weight = model[0].weight.detach()
    out, columns = weight.shape
    inside, outside, gain, change = torch.eye(columns).double(), torch.eye(out).double(), torch.ones(out).double(), 0
    for adapter in bank.adapters.values():
        prepared = compose.prepare_for_weight(adapter.layers["0"], weight)
        adapter_type, spec, stages = prepared.layer.adapter_type, prepared.layer.spec, prepared.layer.stages

        def change_by_map(size: int, prepared: PreparedLayer = prepared) -> Tensor:
            # The rows are the images of unit vectors: the transpose of the matrix.
            vectors, layer, one = torch.eye(size).double(), prepared.layer, torch.ones(())
            images = layer.adapter_type.apply_map(prepared.tensors, layer.spec, vectors=vectors, axis=1, gate=one)
            return prepared.gate * images.T

        if "input" in stages:
            inside = inside + change_by_map(columns)
        if "output" in stages:
            outside = outside + change_by_map(out)
        if "gain" in stages:
            gain = gain + prepared.gate * adapter_type.gain(prepared.tensors)
        if "add" in stages:
            change = change + prepared.gate * adapter_type.delta_weight(prepared.tensors, spec)
    expected = gain[:, None] * (outside @ (weight @ inside)) + change
    input = given("linear")
    torch.testing.assert_close(model[0](input), input @ expected.T + model[0].bias.detach(), rtol=1e-10, atol=1e-10)


def test_adapters_of_different_dtypes_mix() -> None:
    names = ("lora", "oft", "dora", "loha")
    input = given("linear")
    exact = attached("linear", names)(input)
    mixed = attached("linear", names, (torch.bfloat16, torch.float32, torch.float64, torch.float16))
    output = mixed(input)
    assert output.dtype == torch.float64
    error = 10 * torch.log10(exact.pow(2).sum() / (output - exact).pow(2).sum())
    assert 30 < error < 80
    diffadapt.adapters(mixed).merge()
    merged = 10 * torch.log10(exact.pow(2).sum() / (mixed(input) - exact).pow(2).sum())
    assert merged > 30


@pytest.mark.parametrize("count", [2, 8])
def test_low_rank_adapters_share_one_product(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = linear_net()
    for number in range(count):
        config = diffadapt.LoraConfig(
            rank=2, target_modules=TARGETS, init=False, generator=torch.Generator().manual_seed(number)
        )
        diffadapt.add_adapter(model, config, f"a{number}").double().requires_grad_(False)
    diffadapt.adapters(model).activate({f"a{number}": 0.1 * (number + 1) for number in range(count)})
    calls: list[int] = []
    low_rank = LayerSpec.low_rank
    monkeypatch.setattr(
        LayerSpec,
        "low_rank",
        lambda self, input, down, *rest: (calls.append(down.shape[0]), low_rank(self, input, down, *rest))[1],
    )
    with torch.no_grad():
        output = model(given("linear"))
        assert calls == [2 * count, 2 * count]
        diffadapt.adapters(model).merge()
        torch.testing.assert_close(model(given("linear")), output, rtol=1e-10, atol=1e-10)


def test_merging_before_an_adapter_that_multiplies_the_weight_is_refused() -> None:
    model = attached("linear", ("lora", "oft"))
    input = given("linear")
    expected, adapters = model(input), diffadapt.adapters(model)
    with pytest.raises(AdapterError, match=r"'oft' \(oft\) multiplies the weight.*'lora' changes"):
        adapters.merge("lora")
    assert adapters.merged == []
    torch.testing.assert_close(model(input), expected, rtol=0, atol=0)
    adapters.merge("oft")
    torch.testing.assert_close(model(input), expected, rtol=1e-10, atol=1e-10)
    adapters.merge("lora")
    torch.testing.assert_close(model(input), expected, rtol=1e-10, atol=1e-10)


def test_loading_an_adapter_that_multiplies_a_merged_weight_is_refused() -> None:
    model = attached("linear", ("lora",))
    diffadapt.adapters(model).merge()
    output = model(given("linear"))
    rotation = {"base_model.model.0.oft_R.weight": torch.randn(2, 6)}
    with pytest.raises(AdapterError, match="merge both in one call"):
        diffadapt.load_adapter(model, rotation, "r")
    assert diffadapt.adapters(model).names == ["lora"]
    assert torch.equal(model(given("linear")), output)


# A prepared layer is cached until anything that it was computed from changes.


CHANGES: dict[str, Callable[[nn.Module], Any]] = {
    "a tensor of the adapter": lambda m: (
        next(iter(diffadapt.adapters(m)["dora"].components.values())).layers["0"].lora_up.mul_(2)
    ),
    "the weight": lambda m: m[0].weight.mul_(3),
    "a weight loaded": lambda m: m.load_state_dict({key: 2 * value for key, value in m.state_dict().items()}),
    "dtype": lambda m: m.float().double(),
    "the weight replaced": lambda m: setattr(m[0], "weight", nn.Parameter(m[0].weight * 2)),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["dora", "dora by input"])
def test_a_cached_norm_follows_every_change(change: str, name: str) -> None:
    configs = {**CONFIGS, "dora": CONFIGS[name]}
    model = linear_net()
    diffadapt.add_adapter(model, configs["dora"], "dora").double().requires_grad_(False)
    input = given("linear")
    with torch.no_grad():
        before = model(input)
        assert torch.equal(model(input), before)
        CHANGES[change](model)
        after = model(input)
        for adapter in diffadapt.adapters(model)["dora"].components.values():
            for layer in adapter.layers.values():
                layer.__dict__["_cache"] = None
        assert torch.equal(model(input), after)
        if change != "dtype":
            assert_differs(after, before, 1e-3)


def test_the_norm_is_cached_in_inference_and_not_in_training(monkeypatch: pytest.MonkeyPatch) -> None:
    model = linear_net()
    adapter = diffadapt.add_adapter(model, CONFIGS["dora"], "dora").double()
    norms: list[int] = []
    vector_norm = torch.linalg.vector_norm
    monkeypatch.setattr(torch.linalg, "vector_norm", lambda *a, **k: (norms.append(1), vector_norm(*a, **k))[1])
    for _ in range(3):
        model(given("linear"))
    assert len(norms) == 6
    adapter.requires_grad_(False)
    for strength in (1.0, 0.5, 0.2):
        diffadapt.adapters(model).activate({"dora": strength})
        model(given("linear"))
    assert len(norms) == 8


def test_a_step_of_the_optimizer_changes_the_output() -> None:
    model = linear_net()
    adapter = diffadapt.add_adapter(model, CONFIGS["dora"], "dora").double()
    optimizer = torch.optim.SGD(adapter.parameters(), lr=1e-2)
    losses: list[float] = []
    for _ in range(20):
        with torch.no_grad():
            losses.append(float(model(given("linear")).pow(2).sum()))
        loss = model(given("linear")).pow(2).sum()
        assert float(loss.detach()) == pytest.approx(losses[-1], rel=1e-12)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    assert math.isfinite(losses[-1])


@pytest.mark.slow
def test_dora_and_oft_work_on_weights_stored_in_float8() -> None:
    """The norm of a DoRA needs the weight, which is converted from float8 only during a call."""
    pipe = models.sd15()
    for component in (pipe.unet,):
        config = diffadapt.LoraConfig(rank=2, target_modules=["to_q", "conv1"], init=False, use_dora=True)
        diffadapt.add_adapter(component, config, "a").requires_grad_(False)
        diffadapt.add_adapter(
            component, diffadapt.OFTConfig(block_size=2, target_modules=["to_k", "conv2"], init=False), "b"
        ).requires_grad_(False)
    expected = draw(pipe)
    pipe.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    cast = draw(pipe)
    with pipe.adapters.disabled():
        bare = draw(pipe)
    assert_differs(cast, bare)
    assert (cast - expected).abs().mean() < 0.5 * (cast - bare).abs().mean()
    assert_same(draw(pipe), cast, 0)
