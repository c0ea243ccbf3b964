"""Layers that are replaced or given another class after adapters were attached: adapters follow, or say why not."""

from collections.abc import Callable
from copy import copy, deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import InternalTorchDynamoError

import diffadapt
from diffadapt.runtime.bank import bank_of
from tests.support.cases import for_each
from tests.support.compare import relative_error


class Model(nn.Module):
    """Two layers in a block."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.ModuleDict({"first": nn.Linear(8, 8), "second": nn.Linear(8, 8)})

    def forward(self, input: Tensor) -> Tensor:
        return self.block["second"](self.block["first"](input))


INPUT = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))


def model() -> Model:
    torch.manual_seed(0)
    return Model().requires_grad_(False)


def lora(seed: int = 0, layer: str = "block.first", dora: bool = False) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        f"{layer}.lora_A.weight": torch.randn(2, 8, generator=generator),
        f"{layer}.lora_B.weight": torch.randn(8, 2, generator=generator),
    }
    return {**tensors, f"{layer}.lora_magnitude_vector": torch.ones(8)} if dora else tensors


def successor(layer: nn.Module, change: float = 0.0) -> nn.Linear:
    new = nn.Linear(8, 8)
    new.load_state_dict({name: tensor + change for name, tensor in layer.state_dict().items()})
    return new.requires_grad_(False)


def replace_(target: Model, change: float = 0.0) -> None:
    target.block["first"] = successor(target.block["first"], change)


def replace_child_(target: Model) -> None:
    # As diffusers does for bitsandbytes.
    target.block._modules["first"] = successor(target.block["first"])


def replace_parent_(target: Model) -> None:
    target.block = nn.ModuleDict({name: successor(layer) for name, layer in target.block.items()})


def copy_layer_(target: Model) -> None:
    target.block["first"] = copy(target.block["first"])


@pytest.mark.parametrize("replace", [replace_, replace_child_, replace_parent_, copy_layer_])
@pytest.mark.parametrize("dora", [False, True])
def test_an_adapter_follows_to_the_new_layer(replace: Callable[[Model], None], dora: bool) -> None:
    target = model()
    base = target(INPUT)
    adapters = diffadapt.adapters(target)
    adapters.load(lora(dora=dora), "a")
    adapters.load(lora(1), "b", activate=False)
    expected, old = target(INPUT), target.block["first"]
    replace(target)
    assert torch.equal(target(INPUT), expected)
    adapters.activate({"b": 1.0})
    other = target(INPUT)
    assert relative_error(other, expected) > 0.1
    adapters.clear()
    assert torch.equal(target(INPUT), base)
    assert type(old) is nn.Linear
    assert type(target.block["first"]) is nn.Linear


def test_the_new_weight_counts() -> None:
    target, fresh = model(), model()
    diffadapt.load_adapter(target, lora(dora=True), "a")
    target(INPUT)
    for each in (target, fresh):
        replace_(each, change=0.5)
    diffadapt.load_adapter(fresh, lora(dora=True), "a")
    assert torch.equal(target(INPUT), fresh(INPUT))


ACTIONS: dict[str, Callable[[Any], Any]] = {
    "load": lambda adapters: adapters.load(lora(1), "b"),
    "merge": lambda adapters: (adapters.load(lora(1), "b"), adapters.merge("a", "b")),
    "hotswap": lambda adapters: (adapters.load(lora(1), "b"), adapters.hotswap("a", lora())),
    "activate": lambda adapters: (adapters.load(lora(1), "b"), adapters.activate(["a", "b"])),
    "slots": lambda adapters: (adapters.prepare_hotswap(lora(), slots=2), adapters.load(lora(1), "b")),
}


@pytest.mark.parametrize("action", ACTIONS)
def test_nothing_is_done_to_a_layer_that_was_replaced(action: str) -> None:
    target, fresh = model(), model()
    adapters = diffadapt.adapters(target)
    adapters.load(lora(), "a")
    old = target.block["first"]
    replace_(target)
    before = {name: tensor.clone() for name, tensor in old.state_dict().items()}
    ACTIONS[action](adapters)
    for name, seed in (("a", 0), ("b", 1)):
        diffadapt.load_adapter(fresh, lora(seed), name)
    torch.testing.assert_close(target(INPUT), fresh(INPUT))
    assert all(torch.equal(tensor, before[name]) for name, tensor in old.state_dict().items())
    assert type(old) is nn.Linear


@pytest.mark.parametrize(
    ("new", "found"),
    [
        (lambda: nn.Linear(8, 8 * 2), r"expected linear \(8, 8\), found linear \(16, 8\)"),
        (nn.Identity, "found no layer of a known kind"),
        (None, "there is no layer at its path"),
    ],
)
def test_a_layer_of_another_geometry_is_refused_by_name(new: Callable[[], nn.Module] | None, found: str) -> None:
    target = model()
    target.block["second"] = nn.Identity()
    adapters = diffadapt.adapters(target)
    adapters.load(lora(), "ink")
    target(INPUT)
    if new is None:
        del target.block["first"]
    else:
        target.block["first"] = new()
    for act in (lambda: target(INPUT), lambda: target(INPUT), lambda: adapters.load(lora(1, "block.first"), "b")):
        with pytest.raises((diffadapt.AdapterError, KeyError), match=rf"block.first.*'ink'.*{found}|block.first"):
            act()
    adapters.remove("ink")
    assert bank_of(target) is None
    if new is not None:
        target(INPUT)


def test_layers_inside_a_wrapper_are_where_they_were() -> None:
    target = model()
    diffadapt.load_adapter(target, lora(), "a")
    expected, layer = target(INPUT), target.block["first"]
    target.block["first"] = torch.compile(layer, backend="eager")  # type: ignore[assignment]
    assert torch.equal(target(INPUT), expected)
    diffadapt.adapters(target).clear()
    assert type(layer) is nn.Linear


def test_a_layer_that_stays_at_another_path_is_not_taken_for_gone() -> None:
    target = model()
    target.block["second"] = target.block["first"]
    diffadapt.load_adapter(target, lora(), "a")
    target.block["first"] = successor(target.block["first"])
    target.block["second"] = successor(target.block["first"])
    target(INPUT)
    target.block["third"] = target.block["first"]
    target.block["first"] = successor(target.block["first"])
    with pytest.raises(diffadapt.AdapterError, match=r"block.first: .*'a'.*still has the old layer at another path"):
        target(INPUT)


def test_a_merge_into_a_layer_that_was_replaced_is_not_undone() -> None:
    target = model()
    adapters = diffadapt.adapters(target)
    adapters.load(lora(), "a")
    adapters.merge("a")
    merged = target(INPUT)
    replace_(target)
    torch.testing.assert_close(target(INPUT), merged)
    for act in (adapters.unmerge, adapters.clear):
        with pytest.raises(diffadapt.AdapterError, match=r"block.first was replaced after 'a' was merged"):
            act()
    torch.testing.assert_close(target(INPUT), merged)


def test_a_prefetched_adapter_goes_to_the_new_layer() -> None:
    target, fresh = model(), model()
    adapters = diffadapt.adapters(target)
    planned = adapters.prefetch(lora())
    replace_(target)
    adapters.load(planned, "a")
    diffadapt.load_adapter(fresh, lora(), "a")
    assert torch.equal(target(INPUT), fresh(INPUT))


def test_slots_follow_with_the_norm_of_the_new_weight() -> None:
    target, fresh = model(), model()
    adapters = diffadapt.adapters(target)
    adapters.prepare_hotswap(lora(dora=True), slots=1)
    adapters.load(lora(dora=True), "a", scale=0.5)
    target(INPUT)
    for each in (target, fresh):
        replace_(each, change=0.5)
    diffadapt.load_adapter(fresh, lora(dora=True), "a", scale=0.5)
    torch.testing.assert_close(target(INPUT), fresh(INPUT))
    adapters.hotswap("a", lora(1, dora=True))
    diffadapt.adapters(fresh).hotswap("a", lora(1, dora=True))
    torch.testing.assert_close(target(INPUT), fresh(INPUT))


def test_a_copied_model_looks_for_its_own_layers() -> None:
    target = model()
    diffadapt.load_adapter(target, lora(), "a")
    expected = target(INPUT)
    twin = deepcopy(target)
    twin(INPUT)
    replace_(twin)
    assert torch.equal(twin(INPUT), expected)
    assert torch.equal(target(INPUT), expected)
    assert bank_of(twin).hosts["block.first"] is twin.block["first"]  # type: ignore[union-attr]
    assert bank_of(target).hosts["block.first"] is target.block["first"]  # type: ignore[union-attr]


def test_a_call_with_unchanged_layers_does_not_look_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    target = model()
    diffadapt.load_adapter(target, lora(), "a")
    target(INPUT)
    monkeypatch.setattr("diffadapt.runtime.bank.find_again_", lambda *_: pytest.fail("looked for layers"))
    target(INPUT)


def test_a_class_that_someone_else_gave_the_layer_stays() -> None:
    target = model()
    base = target(INPUT)
    adapters = diffadapt.adapters(target)
    adapters.load(lora(), "a")
    adapted, layer = target(INPUT), target.block["first"]

    class Doubled(type(layer)):  # type: ignore[misc]
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    layer.__class__ = Doubled
    adapters.clear()
    assert type(layer) is Doubled
    assert torch.equal(layer(INPUT), 2 * nn.functional.linear(INPUT, layer.weight, layer.bias))
    layer.__class__ = Doubled.__base__
    assert torch.equal(target(INPUT), base)
    adapters.load(lora(), "a")
    assert torch.equal(target(INPUT), adapted)


def test_an_unrelated_class_stays_and_the_adapter_is_not_lost_silently() -> None:
    target = model()
    base = target(INPUT)
    adapters = diffadapt.adapters(target)
    adapters.load(lora(), "a")
    expected, layer = target(INPUT), target.block["first"]

    class Other(nn.Linear):
        pass

    layer.__class__ = Other
    assert torch.equal(target(INPUT), expected)
    adapters.clear()
    assert type(layer) is Other
    assert torch.equal(target(INPUT), base)


def test_a_layer_is_replaced_in_a_compiled_block() -> None:
    target = nn.Sequential(model())
    diffadapt.load_adapter(target, lora(layer="0.block.first"), "a")
    target[0].compile(backend="eager", fullgraph=True)
    with torch.no_grad():
        expected = target(INPUT)
        replace_(target[0])  # type: ignore[arg-type]
        assert torch.equal(target(INPUT), expected)


def compiled(target: nn.Module, how: str, **options: Any) -> nn.Module:
    if how == "torch.compile":
        return torch.compile(target, backend="eager", **options)  # type: ignore[return-value]
    target.compile(backend="eager", **options)
    return target


@for_each(
    case=(
        ("torch.compile", "own model", True, replace_),
        ("torch.compile", "own model", False, replace_child_),
        ("torch.compile", "nn.Sequential", True, replace_),
        ("model.compile", "own model", True, replace_parent_),
        ("model.compile", "nn.Sequential", True, replace_),
    )
)
def test_a_layer_is_replaced_in_a_compiled_model(case: tuple[str, str, bool, Callable[[Model], None]]) -> None:
    how, kind, fullgraph, replace = case
    # torch compiles the hooks of a model of its own classes with the model, and those of other models apart from it.
    torch._dynamo.reset()
    target = model() if kind == "own model" else nn.Sequential(model())
    block = target if isinstance(target, Model) else target[0]
    adapters = diffadapt.adapters(target)
    adapters.load(lora(layer="block.first" if block is target else "0.block.first", dora=True), "ink")
    call = compiled(target, how, fullgraph=fullgraph)
    with torch.no_grad():
        expected = call(INPUT)
        with torch._dynamo.config.patch(error_on_recompile=True):
            adapters.activate({"ink": 0.5})
            assert relative_error(call(INPUT), expected) > 0.1
            adapters.activate({"ink": 1.0})
            assert torch.equal(call(INPUT), expected)
        replace(block)
        assert torch.equal(call(INPUT), expected)
        with torch._dynamo.config.patch(error_on_recompile=True):
            assert torch.equal(call(INPUT), expected)
        block.block["first"] = nn.Identity()
        # Where the check is part of the graph, torch reports the error in one of its own.
        error = (
            InternalTorchDynamoError if (how, kind) == ("torch.compile", "nn.Sequential") else diffadapt.AdapterError
        )
        with pytest.raises(error, match=r"block.first: this layer was replaced after adapter 'ink'"):
            call(INPUT)


@pytest.mark.filterwarnings("ignore")
def test_quanto_quantises_a_model_with_adapters() -> None:
    quanto = pytest.importorskip("optimum.quanto")
    target, plain = model(), model()
    for each in (target, plain):
        diffadapt.load_adapter(each, lora(), "a")
    quanto.quantize(target, weights=quanto.qint8)
    quanto.freeze(target)
    assert relative_error(target(INPUT), plain(INPUT)) < 0.02
    diffadapt.adapters(target).clear()
    assert type(target.block["first"]) is quanto.nn.QLinear
