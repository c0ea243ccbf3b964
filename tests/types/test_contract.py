"""The contract of every adapter type in the registry, on every kind of layer, in float64.

A new type is tested as soon as it is in the registry. A test is one variant of a type; its cases are the layers.
"""

import pytest
import torch
from torch import Tensor

from diffadapt.errors import AdapterError
from diffadapt.management.reserving import needs_of, reserve_all_
from diffadapt.management.seating import arrange
from diffadapt.merging.merge import merge_, unmerge_
from diffadapt.runtime import compose
from diffadapt.runtime.attach import detach_, refresh_, unreserve_
from diffadapt.runtime.bank import bank_of
from diffadapt.runtime.targets import Targets
from diffadapt.types import for_config, identify
from tests.support.cases import for_each
from tests.support.variants import LAYERS, VARIANTS, Case, Variant, on_layers

DETACHED = ("dora", "dora-loha", "dora-lokr", "osf")
"""Types that exclude a part of their formula from autograd, as their papers specify."""
DIFFERENTIABLE = [variant for variant in VARIANTS if variant[0].name not in DETACHED]

INPUTS = {layer: draw(torch.Generator()) for layer, (_, draw) in LAYERS.items()}
BATCHED = [layer for layer, input in INPUTS.items() if input.ndim > 1]
ON_VECTORS = [layer for layer, input in INPUTS.items() if input.is_floating_point()]

everywhere = on_layers(LAYERS)


@on_layers(LAYERS, refused=True)
def test_layers_on_which_a_type_has_no_meaning_are_refused(variant: Variant, layer: str) -> None:
    case = Case(variant, layer)
    if case.spec.kind in case.adapter_type.layers:
        with pytest.raises(AdapterError):
            case.initial()
    else:
        with pytest.raises(AdapterError, match="cannot carry this adapter"):
            Targets(case.root).spec("0", case.adapter_type.layers)


@everywhere
def test_a_new_adapter_changes_nothing(variant: Variant, layer: str) -> None:
    case = Case(variant, layer)
    base = case.root(case.input)
    initial = case.initial()
    case.attach(initial)
    if case.config.init == "peft":
        # The start of the other library, which has an effect.
        return
    # Reflections in pairs cancel up to rounding.
    close = {"rtol": 1e-12, "atol": 1e-12} if case.adapter_type.name == "hra" else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(case.root(case.input), base, **close)


@everywhere
@for_each(autograd=[True, False])
def test_the_forward_pass_equals_the_merged_weight_and_has_an_effect(
    variant: Variant, layer: str, autograd: bool
) -> None:
    case = Case(variant, layer)
    weights = {name: tensor.clone() for name, tensor in case.root.state_dict().items()}
    with torch.set_grad_enabled(autograd):
        base = case.root(case.input).clone()
        case.attach(case.random())
        forward = case.root(case.input).clone()
        merge_({"model": case.root}, ["a"])
        merged = case.root(case.input).clone()
    torch.testing.assert_close(forward, merged, **case.close)
    assert (forward - base).abs().max() > 0.01
    unmerge_(case.root)
    detach_(case.root, "a")
    assert all(torch.equal(tensor, weights[name]) for name, tensor in case.root.state_dict().items())


@everywhere
def test_strength_interpolates_between_the_base_and_the_adapter(variant: Variant, layer: str) -> None:
    case = Case(variant, layer)
    base = case.root(case.input)
    adapter = case.attach(case.random(), strength=1.0)
    stages = adapter.layers["0"].stages
    if "gain" in stages and ("input" in stages or "patch" in stages):
        # Map and gain are interpolated separately, which test_parity_more_types checks.
        return
    full = case.root(case.input)
    adapter.set_strengths([0.25])
    torch.testing.assert_close(case.root(case.input), base + 0.25 * (full - base), **case.close)


@everywhere
def test_the_order_of_two_adapters_does_not_matter(variant: Variant, layer: str) -> None:
    case = Case(variant, layer)
    first, second = case.random(), case.random()
    outputs: list[Tensor] = []
    for order in ((first, second), (second, first)):
        case.attach(order[0], "a")
        case.attach(order[1], "b")
        outputs.append(case.root(case.input).clone())
        merge_({"model": case.root}, ["a", "b"])
        outputs.append(case.root(case.input).clone())
        unmerge_(case.root)
        detach_(case.root, "a")
        outputs.append(case.root(case.input).clone())
        detach_(case.root, "b")
    for output in (outputs[1], outputs[3], outputs[4]):
        torch.testing.assert_close(output, outputs[0], **case.close)
    assert (outputs[2] - outputs[0]).abs().max() > 0.01


@everywhere
def test_slots_compute_the_same(variant: Variant, layer: str) -> None:
    case = Case(variant, layer)
    models = {"model": case.root}
    with torch.no_grad():
        base = case.root(case.input).clone()
        adapters = {name: case.attach(case.random(), name) for name in ("a", "b")}
        both = case.root(case.input).clone()
        wanted = [{"model": adapter.layers} for adapter in adapters.values()]
        reserve_all_(models, needs_of(models, wanted), slots=2)
        for name, adapter in adapters.items():
            for arrangement in arrange(models, {name: {"model": adapter.layers}}, adapters).values():
                arrangement.carry_out()
        refresh_(case.root)
        torch.testing.assert_close(case.root(case.input), both, **case.close)
        adapters["a"].active = adapters["b"].active = False
        refresh_(case.root)
        torch.testing.assert_close(case.root(case.input), base, rtol=0, atol=0)
        detach_(case.root, "a")
        adapters["b"].active = True
        refresh_(case.root)
        one = case.root(case.input).clone()
        unreserve_(case.root)
        torch.testing.assert_close(case.root(case.input), one, **case.close)
    assert (one - both).abs().max() > 0.005
    assert (one - base).abs().max() > 0.005


@on_layers(BATCHED)
@for_each(slots=[False, True])
def test_every_sample_of_a_batch_has_its_own_strengths(variant: Variant, layer: str, slots: bool) -> None:
    case = Case(variant, layer)
    models, strengths = {"model": case.root}, {"a": (0.5, 0.0, -1.0), "b": (0.0, 0.25, 1.0)}
    # Guidance doubles the batch, and every sample has two images.
    samples = [torch.roll(case.input, number, 0)[:1] for number in range(3)]
    batch = torch.cat([samples[number] for _ in range(2) for number in range(3) for _ in range(2)])
    with torch.no_grad():
        adapters = {name: case.attach(case.random(), name) for name in ("a", "b")}
        if slots:
            wanted = [{"model": adapter.layers} for adapter in adapters.values()]
            reserve_all_(models, needs_of(models, wanted), slots=2, samples=3)
            for arrangement in arrange(models, {n: {"model": a.layers} for n, a in adapters.items()}, ()).values():
                arrangement.carry_out()
        alone: list[Tensor] = []
        for number, sample in enumerate(samples):
            for name, adapter in adapters.items():
                adapter.set_strengths(strengths[name][number])
            refresh_(case.root)
            alone.append(case.root(sample))
        for name, adapter in adapters.items():
            adapter.set_strengths([[strength] for strength in strengths[name]])
        refresh_(case.root)
        bank = bank_of(case.root)
        bank.call.samples, bank.call.images = 3, 2
        together = case.root(batch)
        with pytest.raises(AdapterError, match="no multiple of 3 x 2 images"):
            case.root(batch[:-1])
    expected = torch.cat([alone[number] for _ in range(2) for number in range(3) for _ in range(2)])
    torch.testing.assert_close(together, expected, **case.close)
    assert (together[0] - together[2]).abs().max() > 0.005


@everywhere
def test_gradients_are_those_of_the_merged_weight(variant: Variant, layer: str) -> None:
    case = Case(variant, layer)
    adapter = case.attach(case.random(), strength=0.75)
    adapter_layer = adapter.layers["0"]
    gradients: list[list[Tensor]] = []
    for merged in (False, True):
        if merged:
            base = case.spec.to_stored(case.root[0].weight.detach())
            ready = [compose.prepare_for_weight(adapter_layer, base)]
            output = case.spec.op(case.input, compose.weight(ready, base))
            if getattr(case.root[0], "bias", None) is not None:
                bias = compose.bias(ready, case.root[0].bias.detach())
                is_group_norm = case.spec.norm_groups > 0
                output = output + (bias.view(-1, 1, 1) if is_group_norm else case.spec.along_channels(bias))
        else:
            output = case.root(case.input)
        adapter.zero_grad()
        output.pow(2).sum().backward()
        gradients.append([p.grad.clone() for p in adapter.parameters() if p.requires_grad])
    for ours, reference in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, reference, **case.close)
        assert reference.abs().max() > 0


@on_layers(LAYERS, variants=DIFFERENTIABLE)
def test_gradients_are_those_of_finite_differences(variant: Variant, layer: str) -> None:
    case = Case(variant, layer)
    content = case.random()
    names, tensors = zip(*((n, t) for n, t in content.items() if n not in case.adapter_type.fixed), strict=True)
    adapter_layer = case.attach(content, strength=0.75).layers["0"]

    def output(*values: Tensor) -> Tensor:
        parameters = {f"diffadapt.a.0/.{name}": value for name, value in zip(names, values, strict=True)}
        return torch.func.functional_call(case.root, parameters, (case.input,))

    assert len(adapter_layer.tensors) == len(content)
    assert torch.autograd.gradcheck(output, [tensor.clone().requires_grad_() for tensor in tensors], fast_mode=True)


@on_layers(ON_VECTORS)
def test_the_gradient_reaches_the_input(variant: Variant, layer: str) -> None:
    case = Case(variant, layer)
    case.attach(case.random())
    merged = Case(variant, layer)
    merged.attach(merged.random())
    merge_({"model": merged.root}, ["a"])
    gradients: list[Tensor] = []
    for model in (case, merged):
        input = model.input.clone().requires_grad_()
        model.root(input).pow(2).sum().backward()
        assert input.grad is not None
        gradients.append(input.grad)
    torch.testing.assert_close(*gradients, **case.close)


@everywhere
def test_tensor_names_config_and_rank_identify_the_type(variant: Variant, layer: str) -> None:
    case = Case(variant, layer)
    tensors = case.random()
    assert set(tensors) <= set(case.adapter_type.tensors)
    assert identify(tensors) is case.adapter_type
    assert for_config(case.config) is case.adapter_type
    config = case.config.at("0")
    assert case.adapter_type.rank(tensors) in (getattr(config, "rank", None), config.alpha_of(), None)


@everywhere
def test_a_loaded_state_dict_restores_the_output(variant: Variant, layer: str) -> None:
    case = Case(variant, layer)
    adapter = case.attach(case.random())
    output = case.root(case.input)
    state = {name: tensor.clone() for name, tensor in adapter.state_dict().items()}
    assert sorted(state) == sorted(f"0/.{name}" for name in adapter.layers["0"].tensors)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.zero_()
    assert not torch.equal(case.root(case.input), output)
    adapter.load_state_dict(state)
    assert torch.equal(case.root(case.input), output)


@everywhere
def test_fitted_tensors_fit_again(variant: Variant, layer: str) -> None:
    case = Case(variant, layer)
    tensors = case.adapter_type.fit(case.random(), case.spec)
    again = case.adapter_type.fit(tensors, case.spec)
    assert {name: tensor.shape for name, tensor in again.items()} == {n: t.shape for n, t in tensors.items()}


@everywhere
@for_each(dtype=[torch.bfloat16, torch.float16])
def test_the_error_in_half_precision_is_small(variant: Variant, layer: str, dtype: torch.dtype) -> None:
    case = Case(variant, layer)
    adapter = case.attach(case.random(), strength=0.7)
    with torch.no_grad():
        exact = case.root(case.input.clone())
        case.root.to(dtype)
        input = case.input.to(dtype) if case.input.is_floating_point() else case.input
        half = case.root(input).clone()
        merge_({"model": case.root}, ["a"])
        merged = case.root(input)
    assert all(parameter.dtype == dtype for parameter in adapter.parameters())
    for output in (half, merged):
        error = 10 * torch.log10(exact.pow(2).sum() / (output.double() - exact).pow(2).sum())
        assert error > (33 if dtype == torch.bfloat16 else 50)
