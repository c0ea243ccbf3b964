"""`combine`: every method against PEFT, on adapters that PEFT cannot combine, and what is refused."""

import copy
from typing import Any, get_args

import peft
import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

import diffadapt
from diffadapt.runtime.adapter import Adapter
from diffadapt.runtime.adapter_layer import AdapterLayer
from diffadapt.runtime.attach import attach_
from diffadapt.to_lora.combine import Method
from diffadapt.types import named
from diffadapt.types.layer_spec import LayerSpec
from tests.support import loras, models, spellings
from tests.support.cases import for_each
from tests.support.compare import assert_differs, assert_same, assert_unchanged, snapshot
from tests.support.models import draw
from tests.support.variants import Case, refuses, variant_of

OPTIONS: dict[str, dict[str, Any]] = {
    "linear": {},
    "cat": {},
    "svd": {},
    "ties": {"density": 0.6},
    "dare_linear": {"density": 0.6},
    "dare_ties": {"density": 0.6},
    "magnitude_prune": {"density": 0.6},
}
assert set(OPTIONS) == set(get_args(Method))


class Net(nn.Module):
    """One layer of each kind, named so that PEFT and this library visit them in the same order."""

    def __init__(self) -> None:
        super().__init__()
        self.a_linear = nn.Linear(12, 10)
        self.b_conv = nn.Conv2d(6, 8, 3)
        self.c_embedding = nn.Embedding(12, 10)


def peft_with(ranks: tuple[int, int] = (4, 4)) -> tuple[Any, nn.Module]:
    """Return a model with the adapters "x" and "y" of PEFT, and one with the same adapters of ours, "a" and "b"."""
    torch.manual_seed(3)
    ours = Net()
    targets = ["a_linear", "b_conv", "c_embedding"]
    first, second = (
        peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, init_lora_weights=False)
        for rank, alpha in zip(ranks, (2, 6), strict=True)
    )
    theirs = peft.get_peft_model(copy.deepcopy(ours), first, adapter_name="x")
    theirs.add_adapter("y", second)
    hosts = dict(ours.named_children())
    for name, theirs_name in zip("ab", "xy", strict=True):
        layers: dict[str, AdapterLayer] = {}
        for path, host in hosts.items():
            spec, peft_layer = LayerSpec.of(host), theirs.base_model.model.get_submodule(path)
            if path == "c_embedding":
                tensors = peft_layer.lora_embedding_A[theirs_name], peft_layer.lora_embedding_B[theirs_name]
            else:
                tensors = peft_layer.lora_A[theirs_name].weight, peft_layer.lora_B[theirs_name].weight.flatten(1)
            tensors = dict(zip(("lora_down", "lora_up"), (tensor.detach().clone() for tensor in tensors), strict=True))
            alpha = theirs.peft_config[theirs_name].lora_alpha
            layers[path] = AdapterLayer(named("lora"), spec, tensors, alpha)
        attach_(ours, name, Adapter(layers), hosts)
    return theirs, ours


def theirs_in(model: Any, name: str, path: str) -> Tensor:
    delta = model.base_model.model.get_submodule(path).get_delta_weight(name).detach()
    return delta.T if path == "c_embedding" else delta


def ours_in(model: nn.Module, name: str, path: str) -> Tensor:
    layer = diffadapt.adapters(model)[name].components["model"].layers[path]
    assert layer.scale == 1
    return layer.adapter_type.delta_weight(layer.tensors, layer.spec)


def assert_parity(theirs: Any, ours: nn.Module, paths: list[str]) -> None:
    for path in paths:
        expected = theirs_in(theirs, "c", path)
        assert expected.abs().max() > 0.02
        torch.testing.assert_close(ours_in(ours, "c", path), expected, rtol=1e-4, atol=1e-5)


def merge_with_peft(theirs: Any, weights: tuple[float, float], method: str, **options: Any) -> None:
    """Combine "x" and "y" with PEFT into "c", with random numbers from seed 5."""
    generator, draw = torch.Generator().manual_seed(5), torch.bernoulli
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "bernoulli", lambda chances: draw(chances, generator=generator))
        theirs.base_model.add_weighted_adapter(["x", "y"], list(weights), "c", method, **options)


PATHS = ["a_linear", "b_conv", "c_embedding"]
WEIGHTS = [(0.7, 0.5), (0.7, -0.3), (-1.5, 0.2)]


@pytest.mark.slow
@pytest.mark.parametrize("method", OPTIONS)
@for_each(weights=WEIGHTS, sign=["total", "frequency"])
def test_every_method_equals_that_of_peft(method: Any, weights: tuple[float, float], sign: Any) -> None:
    theirs, ours = peft_with()
    density = OPTIONS[method].get("density")
    merge_with_peft(theirs, weights, method, density=density, majority_sign_method=sign)
    options: dict[str, Any] = {"density": density, "sign": sign if "ties" in method else "total"}
    if "dare" in method:
        options["generator"] = torch.Generator().manual_seed(5)
    report = diffadapt.adapters(ours).combine(
        dict(zip("ab", weights, strict=True)), "c", method=method, **{k: v for k, v in options.items() if v is not None}
    )
    assert_parity(theirs, ours, PATHS)
    assert {row.rank for row in report.layers} == {8 if method == "cat" else 4}


@pytest.mark.slow
@pytest.mark.parametrize("method", [name for name in OPTIONS if "density" in OPTIONS[name]])
@for_each(weights=WEIGHTS, ranks=[(4, 4), (2, 5)])
def test_methods_on_weight_changes_equal_those_of_peft(
    method: Any, ranks: tuple[int, int], weights: tuple[float, float]
) -> None:
    theirs, ours = peft_with(ranks)
    merge_with_peft(theirs, weights, f"{method}_svd", density=0.6, svd_rank=3)
    generator = {"generator": torch.Generator().manual_seed(5)} if "dare" in method else {}
    diffadapt.adapters(ours).combine(
        dict(zip("ab", weights, strict=True)), "c", method=method, density=0.6, rank=3, **generator
    )
    # PEFT transposes the change of an embedding, so random numbers fall on other elements.
    assert_parity(theirs, ours, PATHS[:2] if "dare" in method else PATHS)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["cat", "svd"])
@for_each(weights=WEIGHTS)
def test_methods_for_unequal_ranks_equal_those_of_peft(method: Any, weights: tuple[float, float]) -> None:
    theirs, ours = peft_with((2, 5))
    merge_with_peft(theirs, weights, method)
    report = diffadapt.adapters(ours).combine(dict(zip("ab", weights, strict=True)), "c", method=method)
    assert_parity(theirs, ours, PATHS)
    assert {row.rank for row in report.layers} == {7 if method == "cat" else 5}


def test_the_default_for_unequal_ranks_is_the_largest() -> None:
    _, ours = peft_with((2, 5))
    report = diffadapt.adapters(ours).combine({"a": 1.0, "b": 1.0}, "c", method="ties", density=0.5)
    assert {row.rank for row in report.layers} == {5}
    with pytest.raises(diffadapt.AdapterError, match=r"model\.a_linear.*equal ranks, found 2, 5"):
        diffadapt.adapters(ours).combine({"a": 1.0, "b": 1.0}, "d", method="linear")


def test_the_error_is_measured_against_the_weighted_sum() -> None:
    _, ours = peft_with()
    for method in ("linear", "svd", "cat"):
        report = diffadapt.adapters(ours).combine({"a": 0.7, "b": -0.3}, method, method=method)
        for row in report.layers:
            path = row.path.removeprefix("model.")
            layers = [diffadapt.adapters(ours)[name].components["model"].layers[path] for name in "ab"]
            wanted = sum(
                weight * layer.scale * layer.adapter_type.delta_weight(layer.tensors, layer.spec).double()
                for weight, layer in zip((0.7, -0.3), layers, strict=True)
            )
            missing = ours_in(ours, method, path).double() - wanted
            true = float(torch.linalg.vector_norm(missing) / torch.linalg.vector_norm(wanted))
            assert row.error == pytest.approx(true, abs=1e-6)
            assert row.exact == (method == "cat")
            assert (row.error > 0.01) == (method != "cat")


# Any types


def two(types: tuple[str, str], layer: str = "linear") -> tuple[nn.Module, list[Tensor], list[Tensor]]:
    """Return a float64 model with adapters "a" and "b" of these types, and the changes of its weight and its bias."""
    cases = [Case(variant_of(name), layer) for name in types]
    root = cases[0].root
    for name, case in zip("ab", cases, strict=True):
        attach_(root, name, Adapter({"0": case.layer(case.random())}), {"0": root[0]})
    changes: list[list[Tensor]] = [[], []]
    for name in "ab":
        diffadapt.adapters(root).activate(name)
        before = [parameter.detach().clone() for parameter in root[0].parameters()]
        diffadapt.adapters(root).merge()
        for change, parameter, old in zip(changes, root[0].parameters(), before, strict=False):
            change.append(parameter.detach() - old)
        diffadapt.adapters(root).unmerge()
    diffadapt.adapters(root).activate({})
    return root, changes[0], changes[1]


@pytest.mark.parametrize(
    ("types", "layer"),
    [
        pytest.param(types, layer, id="-".join([*types, layer]))
        for types in [("lora", "loha"), ("lora", "full"), ("dora", "lokr"), ("oft", "ia3"), ("ia3", "boft")]
        for layer in ["linear", "conv2d", "conv2d-grouped", "embedding"]
        if not any(refuses(*variant_of(name), layer) for name in types)
    ],
)
def test_svd_of_any_types_is_the_weighted_sum(types: tuple[str, str], layer: str) -> None:
    root, weights, biases = two(types, layer)
    report = diffadapt.adapters(root).combine({"a": 0.7, "b": -0.3}, "c", energy=1.0)
    assert report.exact
    before = [parameter.detach().clone() for parameter in root[0].parameters()]
    diffadapt.adapters(root).activate("c")
    diffadapt.adapters(root).merge()
    for change, old, parameter in zip((weights, biases), before, root[0].parameters(), strict=False):
        expected = 0.7 * change[0] - 0.3 * change[1]
        torch.testing.assert_close(parameter.detach() - old, expected, rtol=1e-9, atol=1e-9)


def test_ties_of_any_types_elects_the_signs_of_the_changes() -> None:
    root, (first, second), _ = two(("oft", "dora"))
    diffadapt.adapters(root).combine({"a": 0.5, "b": 0.8}, "c", method="ties", density=1.0, energy=1.0)
    positive = (first + second) >= 0
    agree = torch.stack([(first > 0) == positive, (second > 0) == positive])
    expected = (agree * torch.stack([0.5 * first, 0.8 * second])).sum(0) / agree.sum(0)
    torch.testing.assert_close(ours_in(root, "c", "0"), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("linear", r"model\.0.*needs LoRA, found oft"),
        ("cat", r"model\.0: this oft has no factors.*'svd'"),
        ("svd", r"model\.0.*pass rank= or energy="),
    ],
)
def test_a_method_that_needs_factors_says_what_to_do_without_them(method: Any, message: str) -> None:
    root, _, _ = two(("lora", "oft"))
    with pytest.raises(diffadapt.AdapterError, match=message):
        diffadapt.adapters(root).combine({"a": 1.0, "b": 1.0}, "c", method=method)
    assert diffadapt.adapters(root).names == ["a", "b"]


# On a pipeline


@pytest.fixture
def pipe() -> DiffusionPipeline:
    """Two LoRA of rank 4: "a" on the attention of both components, "b" on convolutions and queries of the UNet."""
    pipe = models.sd15()
    pipe.load_adapter(spellings.peft_names(loras.parts_for(pipe)), "a", activate=False)
    parts = loras.parts_for(pipe, ("unet",), "to_q|conv1", alpha=lambda index: 2.0)
    pipe.load_adapter(spellings.kohya_names(parts), "b", activate=False)
    return pipe


@pytest.mark.slow
@pytest.mark.parametrize(
    "weights",
    [
        {"a": 0.7, "b": -0.3},
        {"a": {"unet": 0.2, "unet.up_blocks": -0.5, "text_encoder": 0.0}, "b": {"unet.mid_block": 0.0}},
    ],
    ids=["numbers", "prefixes"],
)
@pytest.mark.parametrize("method", ["cat", "svd"])
def test_the_combined_adapter_equals_all_of_them_active(pipe: DiffusionPipeline, weights: Any, method: Any) -> None:
    pipe.adapters.activate(weights)
    picture = draw(pipe)
    pipe.adapters.activate({})
    base = draw(pipe)
    pipe.adapters.combine(weights, "c", method=method, **({"energy": 1.0} if method == "svd" else {}))
    assert pipe.adapters.active == {}
    assert torch.equal(draw(pipe), base)
    for name in "ab":
        pipe.adapters.remove(name)
    pipe.adapters.activate("c")
    assert_same(draw(pipe), picture)
    assert_differs(picture, base)


def test_the_combined_adapter_has_the_layers_of_all(pipe: DiffusionPipeline) -> None:
    layers = [
        {f"{component}.{path}" for component, part in pipe.adapters[name].components.items() for path in part.layers}
        for name in "ab"
    ]
    report = pipe.adapters.combine({"a": 1.0, "b": 1.0}, "c", method="cat")
    ranks = {row.path: row.rank for row in report.layers}
    assert set(ranks) == layers[0] | layers[1]
    assert {path for path, rank in ranks.items() if rank == 8} == layers[0] & layers[1]


@pytest.mark.slow
def test_every_method_has_a_different_effect(pipe: DiffusionPipeline, tmp_path: Any) -> None:
    pictures = {"base": draw(pipe)}
    for method, options in OPTIONS.items():
        pipe.adapters.combine({"a": 1.0, "b": 0.8}, method, method=method, **options)
        pipe.adapters.activate(method)
        pictures[method] = draw(pipe)
        again = models.sd15()
        again.load_adapter(pipe.adapters.save(method, tmp_path / f"{method}.safetensors"))
        assert_same(draw(again), pictures[method])
        assert pipe.adapters[method].types == ("lora",)
    names = list(pictures)
    for index, name in enumerate(names):
        for other in names[:index]:
            assert_differs(pictures[name], pictures[other], 1e-3)


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_random_numbers_are_seeded_and_the_global_generator_is_left_alone(pipe: DiffusionPipeline, method: Any) -> None:
    state = torch.random.get_rng_state()
    weights = {"a": 1.0, "b": 1.0}
    pipe.adapters.combine(weights, "one", method=method, density=0.5)
    pipe.adapters.combine(weights, "two", method=method, density=0.5, generator=torch.Generator().manual_seed(0))
    pipe.adapters.combine(weights, "three", method=method, density=0.5, generator=torch.Generator().manual_seed(1))
    assert torch.equal(torch.random.get_rng_state(), state)
    one, two, three = (
        torch.cat([p.flatten() for p in pipe.adapters[name].components["unet"].parameters()])
        for name in ("one", "two", "three")
    )
    assert torch.equal(one, two)
    assert not torch.equal(one, three)


def test_dare_keeps_the_expected_value() -> None:
    _, ours = peft_with()
    generator, total = torch.Generator().manual_seed(0), torch.zeros(10, 12)
    for _ in range(400):
        diffadapt.adapters(ours).combine(
            {"a": 1.0, "b": 0.5}, "c", method="dare_linear", density=0.5, energy=1.0, generator=generator
        )
        total += ours_in(ours, "c", "a_linear") / 400
        diffadapt.adapters(ours).remove("c")
    diffadapt.adapters(ours).combine({"a": 1.0, "b": 0.5}, "c", method="cat")
    expected = ours_in(ours, "c", "a_linear")
    assert (total - expected).abs().max() < 0.25 * expected.abs().max()


def test_adapters_that_cancel_out_are_refused(pipe: DiffusionPipeline) -> None:
    pipe.load_adapter(spellings.peft_names(loras.parts_for(pipe)), "again", activate=False)
    for method in ("linear", "cat", "svd"):
        with pytest.raises(diffadapt.AdapterError, match="change no layer"):
            pipe.adapters.combine({"a": 0.7, "again": -0.7}, "c", method=method)


# Refusals


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "slerp"}, "slerp.*linear, cat, svd, ties, dare_linear, dare_ties, magnitude_prune"),
        ({"adapters": {"a": 1.0, "oil": 1.0}}, r"oil.*\ba, b"),
        ({"adapters": {}}, "no layer"),
        ({"adapters": {"a": float("inf")}}, "finite"),
        ({"adapters": {"b": {"text_encoder": 0.5}}}, r"text_encoder.*unet\."),
        ({"name": "a"}, "exists already"),
        ({"method": "ties"}, "needs density="),
        ({"method": "ties", "density": 0.0}, "density is 0.0"),
        ({"method": "ties", "density": 1.1}, "density is 1.1"),
        ({"method": "ties", "density": float("nan")}, "density is nan"),
        ({"method": "ties", "density": 0.5, "sign": "most"}, "sign is 'most'.*total, frequency"),
        ({"method": "ties", "density": 0.5, "generator": torch.Generator()}, "generator has no effect"),
        ({"method": "dare_linear", "density": 0.5, "sign": "frequency"}, "sign has no effect"),
        ({"method": "svd", "density": 0.5}, "density has no effect"),
        ({"method": "linear", "rank": 4}, "rank has no effect"),
        ({"method": "cat", "energy": 0.9}, "energy has no effect"),
        ({"method": "svd", "rank": 0}, "rank is 0"),
        ({"method": "svd", "energy": -1.0}, "energy is -1.0"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_invalid_arguments_are_refused(pipe: DiffusionPipeline, arguments: dict[str, Any], message: str) -> None:
    before = snapshot(pipe)
    with pytest.raises(diffadapt.AdapterError, match=message):
        pipe.adapters.combine(**{"adapters": {"a": 1.0, "b": 0.5}, "name": "c", **arguments})
    assert_unchanged(pipe, before)
    assert pipe.adapters.names == ["a", "b"]
