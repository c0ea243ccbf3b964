"""`to_lora`: any adapter as a plain LoRA with the same effect or the nearest possible one, and the report about it."""

from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

import diffadapt
from diffadapt.runtime.adapter import Adapter
from diffadapt.runtime.adapter_layer import AdapterLayer
from diffadapt.runtime.attach import attach_
from diffadapt.types import TYPES, named
from diffadapt.types.adapter_type import AdapterType
from diffadapt.types.layer_spec import LayerSpec, plain_spec
from tests.support import loras, models, spellings
from tests.support.compare import assert_differs, assert_same, assert_unchanged, snapshot
from tests.support.models import draw
from tests.support.variants import VARIANTS, Case, Variant, on_layers, variant_of

ATTENTION = ["to_q", "to_k", "to_v"]
ON_LAYERS = [
    "linear",
    "linear-no-bias",
    "transformers-conv1d",
    "conv2d",
    "conv2d-grouped",
    "conv2d-depthwise",
    "conv3d",
    "embedding",
    "embedding-scaled",
]


def weights_with(model: nn.Module, activation: Any) -> dict[str, Tensor]:
    """Return the weights of a model with these adapters merged."""
    adapters = diffadapt.adapters(model)
    adapters.activate(activation)
    adapters.merge()
    merged = {name: parameter.detach().clone() for name, parameter in model.state_dict().items()}
    adapters.unmerge()
    return merged


def matrices(layer: nn.Module, weight: Tensor) -> Tensor:
    """Return a weight in the shape (groups, out / groups, in / groups x kernel)."""
    spec = LayerSpec.of(layer) or pytest.fail("no adapter can sit here")
    return spec.to_stored(weight).reshape(spec.groups, -1, spec.fan_in)


def one_layer(tensors: dict[str, Tensor], adapter_type: str = "full", layer: nn.Module | None = None) -> nn.Module:
    """Return a model of one linear layer with the adapter "a"."""
    weight = tensors.get("diff")
    host = layer or nn.Linear(weight.shape[1], weight.shape[0], dtype=weight.dtype)
    root = nn.Sequential(host)
    spec = LayerSpec.of(host) or pytest.fail("no adapter can sit here")
    attach_(root, "a", Adapter({"0": AdapterLayer(named(adapter_type), spec, tensors)}), {"0": host})
    return root


def random(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def decaying(rows: int, columns: int, decay: float) -> Tensor:
    """Return a matrix with the singular values `n ** -decay`."""
    left, right = torch.linalg.qr(random(rows, rows)).Q, torch.linalg.qr(random(columns, columns, seed=4)).Q
    size = min(rows, columns)
    return left[:, :size] * torch.arange(1, size + 1).double().pow(-decay) @ right[:, :size].T


# The same effect


@on_layers(ON_LAYERS)
def test_every_type_on_every_layer_becomes_an_exact_lora(variant: Variant, layer: str) -> None:
    case = Case(variant, layer)
    case.attach(case.random())
    adapters = diffadapt.adapters(case.root)
    adapters.activate({"a": 0.75})
    output = case.root(case.input)
    expected = weights_with(case.root, {"a": 0.75})
    report = adapters.to_lora({"a": 0.75}, "b", energy=1.0)
    adapters.remove("a")
    assert adapters["b"].types == ("lora",)
    adapters.activate("b")
    torch.testing.assert_close(case.root(case.input), output, rtol=1e-10, atol=1e-10)
    for name, weight in weights_with(case.root, "b").items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-10, atol=1e-10)
    (row,) = report.layers
    assert (row.path, row.types, row.exact, report.exact) == ("model.0", (case.adapter_type.name,), True, True)
    assert row.error == report.error < 1e-12


@on_layers(["linear", "transformers-conv1d", "conv2d", "conv2d-grouped", "embedding"])
def test_the_reported_error_is_the_true_one_and_the_smallest_possible(variant: Variant, layer: str) -> None:
    case = Case(variant, layer)
    base = matrices(case.root[0], case.root[0].weight.detach().clone())
    case.attach(case.random())
    (row,) = diffadapt.adapters(case.root).to_lora("a", "b", rank=1).layers
    wanted = matrices(case.root[0], weights_with(case.root, "a")["0.weight"]) - base
    made = matrices(case.root[0], weights_with(case.root, "b")["0.weight"]) - base
    norm = torch.linalg.vector_norm(wanted)
    assert row.norm == pytest.approx(float(norm), rel=1e-9)
    assert row.error == pytest.approx(float(torch.linalg.vector_norm(made - wanted) / norm), rel=1e-6, abs=1e-12)
    least = torch.linalg.svdvals(wanted)[:, 1:].square().sum().sqrt() / norm
    assert row.error == pytest.approx(float(least), rel=1e-6, abs=1e-12)
    assert row.exact == (row.error < 1e-12)
    assert row.rank == 1


@pytest.mark.parametrize("types", [("lora", "lora"), ("lora", "oft"), ("dora", "oft"), ("ia3-lycoris", "glora")])
def test_the_lora_of_several_adapters_equals_them_all_active(types: tuple[str, str]) -> None:
    first, second = (variant_of(name) for name in types)
    case = Case(first, "linear")
    other = Case(second, "linear")
    case.attach(case.random(), "a")
    attach_(case.root, "b", Adapter({"0": other.layer(other.random())}), {"0": case.root[0]})
    adapters = diffadapt.adapters(case.root)
    adapters.activate({"a": 0.5, "b": -0.75})
    output = case.root(case.input)
    adapters.to_lora({"a": 0.5, "b": -0.75}, "c", energy=1.0)
    adapters.activate("c")
    torch.testing.assert_close(case.root(case.input), output, rtol=1e-10, atol=1e-10)


@pytest.mark.slow
def test_the_ranks_of_several_lora_add_up() -> None:
    pipe = models.sd15()
    pipe.load_adapter(spellings.peft_names(loras.parts_for(pipe)), "a", activate=False)
    ink = loras.parts_for(pipe, ("unet",), "to_q|conv1", rank=3, alpha=lambda index: 2.0)
    pipe.load_adapter(spellings.kohya_names(ink), "b", activate=False)
    report = pipe.adapters.to_lora(["a", "b"], "c")
    ranks = {row.path: row.rank for row in report.layers}
    assert report.exact
    assert ranks["unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"] == 7
    assert ranks["unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_k"] == 4
    assert ranks["unet.mid_block.resnets.0.conv1"] == 3
    assert all(layer.scale == 1 for part in pipe.adapters["c"].components.values() for layer in part.layers.values())
    pipe.adapters.activate(["a", "b"])
    picture = draw(pipe)
    pipe.adapters.activate("c")
    assert_same(draw(pipe), picture)


def options_for_unet(adapter_type: AdapterType) -> dict[str, Any]:
    """Return settings for a new adapter on the small UNet, whose projections have no bias."""
    options = next(options for other, options in VARIANTS if other is adapter_type)
    return {**options, **({"bias": False} if "bias" in options else {})}


LINEAR = [adapter_type for adapter_type in TYPES if "linear" in adapter_type.layers]


@pytest.mark.slow
@pytest.mark.parametrize("adapter_type", LINEAR, ids=lambda adapter_type: adapter_type.name)
def test_the_saved_lora_of_every_type_draws_the_same_picture(adapter_type: AdapterType, tmp_path: Any) -> None:
    pipe = models.sd15()
    base = draw(pipe)
    options = options_for_unet(adapter_type)
    if adapter_type.name not in ("osf", "tlora"):
        # Random numbers in the place of these two's singular vectors are so large that pictures amplify rounding.
        options["init"] = adapter_type.name == "started_lora" and options["init"]
    targets = [*ATTENTION, "conv1"] if "conv" in adapter_type.layers else [*ATTENTION]
    diffadapt.add_adapter(pipe.unet, adapter_type.config(target_modules=targets, **options), "a")
    with torch.no_grad():
        trained = (p for p in pipe.adapters["a"].components["unet"].parameters() if p.requires_grad)
        for parameter in trained:
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
        picture = draw(pipe)
    assert_differs(picture, base)
    if adapter_type.name == "ia3":
        # It scales the bias of `conv1`, and PEFT has no LoRA with biases on some layers only.
        targets.remove("conv1")
        pipe = models.sd15()
        diffadapt.add_adapter(pipe.unet, adapter_type.config(target_modules=targets, **options), "a")
        picture = draw(pipe)
    pipe.adapters.to_lora("a", "b", energy=1.0)
    pipe.adapters.remove("a")
    file = pipe.adapters.save("b", tmp_path / "b.safetensors")
    again = models.sd15()
    assert again.load_adapter(file).unused == []
    assert again.adapters["b"].types == ("lora",)
    # The sampler amplifies rounding; how far depends on the versions of torch and diffusers.
    assert (draw(again) - picture).abs().max() < 0.02 * (picture - base).abs().max()


@pytest.mark.slow
def test_strengths_by_prefix_are_followed_and_layers_of_strength_zero_left_out() -> None:
    pipe = models.sd15()
    pipe.load_adapter(spellings.peft_names(loras.parts_for(pipe)), "a")
    strengths = {"unet": 0.5, "unet.up_blocks": -0.2, "unet.mid_block": 0.0, "text_encoder": 0.0}
    pipe.adapters.activate({"a": strengths})
    picture = draw(pipe)
    report = pipe.adapters.to_lora({"a": strengths}, "b")
    assert list(pipe.adapters["b"].components) == ["unet"]
    assert not any("mid_block" in row.path or "text_encoder" in row.path for row in report.layers)
    assert pipe.adapters.active == {"a": strengths}
    assert torch.equal(draw(pipe), picture)
    pipe.adapters.activate("b")
    assert_same(draw(pipe), picture)


@pytest.mark.parametrize("name", ["lora", "dora", "oft", "ia3-lycoris"])
def test_merged_weights_are_not_mistaken_for_the_base(name: str) -> None:
    case = Case(variant_of(name), "linear")
    case.attach(case.random())
    adapters = diffadapt.adapters(case.root)
    adapters.activate("a")
    adapters.to_lora("a", "b", rank=3)
    adapters.merge("a")
    adapters.to_lora("a", "c", rank=3)
    adapters.unmerge()
    for key, tensor in adapters["b"].components["model"].state_dict().items():
        assert torch.equal(adapters["c"].components["model"].state_dict()[key], tensor)


def test_a_change_of_the_bias_alone_is_exact() -> None:
    bias = random(4)
    root = one_layer({"diff_b": bias}, layer=nn.Linear(3, 4, dtype=torch.float64))
    adapters = diffadapt.adapters(root)
    before = root[0].bias.detach().clone()
    adapters.to_lora({"a": 0.5}, "b")
    assert torch.equal(weights_with(root, "b")["0.bias"], before + 0.5 * bias)


# Ranks


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.99])
@pytest.mark.parametrize("as_factors", [True, False])
def test_energy_chooses_the_smallest_rank(energy: float, as_factors: bool) -> None:
    matrix = decaying(24, 30, 0.7)
    if as_factors:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        tensors = {"lora_up": u * s, "lora_down": vh}
        root = one_layer(tensors, "lora", nn.Linear(30, 24, dtype=torch.float64))
    else:
        root = one_layer({"diff": matrix})
    (row,) = diffadapt.adapters(root).to_lora("a", "b", energy=energy).layers
    kept = torch.linalg.svdvals(matrix).square().cumsum(0) / matrix.square().sum()
    assert 1 < row.rank < 24
    assert kept[row.rank - 1] >= energy > kept[row.rank - 2]
    assert 1 - row.error**2 >= energy
    capped = diffadapt.adapters(root).to_lora("a", "c", energy=energy, rank=row.rank - 1)
    assert capped.layers[0].rank == row.rank - 1


def test_energy_counts_all_groups_of_a_convolution_together() -> None:
    layer = nn.Conv2d(8, 12, 3, groups=2, dtype=torch.float64)
    root = one_layer({"diff": random(12, 4, 3, 3)}, layer=layer)
    (row,) = diffadapt.adapters(root).to_lora("a", "b", energy=0.8).layers
    squares = torch.linalg.svdvals(root.diffadapt.a.layers["0"].tensors["diff"].view(2, 6, 36)).square().sum(0)
    kept = squares.cumsum(0) / squares.sum()
    assert kept[row.rank - 1] >= 0.8 > kept[row.rank - 2]
    made = root.diffadapt.b.layers["0"].tensors
    assert made["lora_up"].shape == (12, row.rank)
    assert made["lora_down"].shape == (2 * row.rank, 4, 3, 3)


def test_factors_of_a_smaller_rank_are_left_alone() -> None:
    tensors = {"lora_up": random(12, 3), "lora_down": random(3, 10)}
    root = one_layer(tensors, "lora", nn.Linear(10, 12, dtype=torch.float64))
    diffadapt.adapters(root).to_lora("a", "b", rank=5)
    for name, tensor in root.diffadapt.b.layers["0"].tensors.items():
        assert torch.equal(tensor, tensors[name])


def test_factors_of_a_higher_rank_than_the_weight_are_reduced() -> None:
    root = one_layer(
        {"lora_up": random(6, 9), "lora_down": random(9, 10)}, "lora", nn.Linear(10, 6, dtype=torch.float64)
    )
    (row,) = diffadapt.adapters(root).to_lora("a", "b").layers
    assert (row.rank, row.exact) == (6, True)
    assert row.error < 1e-14


def test_the_low_rank_of_a_full_change_is_found() -> None:
    root = one_layer({"diff": random(40, 3) @ random(3, 50, seed=5)})
    (row,) = diffadapt.adapters(root).to_lora("a", "b").layers
    assert (row.rank, row.exact) == (3, True)


@pytest.mark.parametrize(("rows", "columns"), [(40, 50), (600, 640)])
def test_a_change_of_full_rank_needs_rank_or_energy(rows: int, columns: int) -> None:
    root = one_layer({"diff": random(rows, columns)})
    with pytest.raises(diffadapt.AdapterError, match=r"model\.0.*rank= or energy="):
        diffadapt.adapters(root).to_lora("a", "b")
    assert diffadapt.adapters(root).names == ["a"]


def test_a_lokr_of_low_rank_is_exact() -> None:
    config = diffadapt.LoKrConfig(target_modules=["0"], rank=2, factor=4, init=False)
    lokr, spec = named("lokr"), plain_spec(64, 48)
    tensors = lokr.init(spec, config, generator=torch.Generator().manual_seed(0), weight=lambda: torch.zeros(64, 48))
    tensors = {name: tensor.double() for name, tensor in tensors.items()}
    factors = lokr.as_low_rank(tensors, spec)
    assert factors is not None
    down, up = factors
    assert down.shape == (8, 48)
    torch.testing.assert_close(up @ down, lokr.delta_weight(tensors, spec))
    root = one_layer(tensors, "lokr", nn.Linear(48, 64, dtype=torch.float64))
    (row,) = diffadapt.adapters(root).to_lora("a", "b").layers
    assert (row.rank, row.exact) == (8, True)


def test_a_lokr_whose_lora_would_cost_more_than_its_blocks_has_no_low_rank_form() -> None:
    lokr, spec = named("lokr"), plain_spec(64, 64)
    generator = torch.Generator().manual_seed(0)
    for options in ({"rank": 3, "factor": 8}, {"full_matrix": True}):
        config = diffadapt.LoKrConfig(target_modules=["0"], init=False, **options)
        tensors = lokr.init(spec, config, generator=generator, weight=lambda: torch.zeros(64, 64))
        assert lokr.as_low_rank(tensors, spec) is None


# Large layers


@pytest.mark.parametrize("decay", [0.0, 0.5, 1.0, 3.0])
def test_the_lora_of_a_large_layer_is_nearly_the_best_possible(decay: float, monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = decaying(560, 600, decay)
    root = one_layer({"diff": matrix})
    whole = torch.linalg.svd
    monkeypatch.setattr(torch.linalg, "svd", lambda m, **options: whole(m, **options) if min(m.shape) < 100 else 1 / 0)
    (row,) = diffadapt.adapters(root).to_lora("a", "b", rank=16).layers
    tail = torch.linalg.svdvals(matrix)[16:].square().sum().sqrt() / torch.linalg.vector_norm(matrix)
    assert float(tail) * (1 - 1e-9) <= row.error <= 1.001 * float(tail)


def test_a_large_layer_gets_the_rank_that_its_energy_needs() -> None:
    matrix = decaying(560, 600, 0.8)
    kept = torch.linalg.svdvals(matrix).square().cumsum(0) / matrix.square().sum()
    root = one_layer({"diff": matrix})
    for energy in (0.5, 0.9, 0.99):
        (row,) = diffadapt.adapters(root).to_lora("a", f"b{energy:.0%}", energy=energy).layers
        least = int((kept < energy).sum()) + 1
        assert least <= row.rank <= least + max(1, least // 50)
        assert 1 - row.error**2 >= energy


def test_a_large_layer_of_low_rank_is_exact() -> None:
    root = one_layer({"diff": random(560, 90) @ random(90, 600, seed=5)})
    (row,) = diffadapt.adapters(root).to_lora("a", "b").layers
    assert (row.rank, row.exact) == (90, True)
    assert row.error < 1e-13


def test_the_result_is_reproducible_and_the_global_generator_untouched() -> None:
    root = one_layer({"diff": random(560, 600)})
    adapters = diffadapt.adapters(root)
    state = torch.random.get_rng_state()
    adapters.to_lora("a", "b", rank=4)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(99)
    adapters.to_lora("a", "c", rank=4)
    first, second = (adapters[name].components["model"].state_dict() for name in "bc")
    assert all(torch.equal(first[name], second[name]) for name in first)


# Numbers


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_error_includes_the_rounding_of_the_stored_tensors(dtype: torch.dtype) -> None:
    matrix = (random(20, 3) @ random(3, 30, seed=5)).to(dtype)
    root = one_layer({"diff": matrix})
    (row,) = diffadapt.adapters(root).to_lora("a", "b", energy=1.0).layers
    made = root.diffadapt.b.layers["0"].tensors
    assert {tensor.dtype for tensor in made.values()} == {dtype}
    product = made["lora_up"].double() @ made["lora_down"].double()
    true = torch.linalg.vector_norm(product - matrix.double()) / torch.linalg.vector_norm(matrix.double())
    assert row.error == pytest.approx(float(true), rel=1e-6)
    assert row.exact
    assert row.error < 4 * torch.finfo(dtype).eps


def test_values_outside_the_range_of_the_dtype_are_refused() -> None:
    root = one_layer({"diff_b": torch.full((4,), 6e4, dtype=torch.float16)}, layer=nn.Linear(3, 4).half())
    with pytest.raises(diffadapt.AdapterError, match=r"model\.0.*float16 cannot hold"):
        diffadapt.adapters(root).to_lora({"a": 2.0}, "b")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(value: float) -> None:
    diff = random(4, 3)
    diff[1, 2] = value
    root = one_layer({"diff": diff})
    with pytest.raises(diffadapt.AdapterError, match=r"model\.0.*NaN or infinite"):
        diffadapt.adapters(root).to_lora("a", "b", rank=1)


def test_a_layer_without_a_change_is_left_out() -> None:
    pipe = models.sd15()
    pipe.load_adapter(spellings.peft_names(loras.parts_for(pipe, ("unet",))), "a")
    path = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    with torch.no_grad():
        pipe.adapters["a"].components["unet"].layers[path].tensors["lora_up"].zero_()
    report = pipe.adapters.to_lora("a", "b")
    (row,) = [row for row in report.layers if row.rank == 0]
    assert (row.path, row.exact, row.error) == (f"unet.{path}", True, 0.0)
    assert path not in pipe.adapters["b"].components["unet"].layers
    assert "79 of 80 layers changed, 80 exact" in str(report)


@pytest.mark.parametrize("name", ["lora", "dora", "oft", "ia3-lycoris"])
def test_an_adapter_without_any_effect_is_refused(name: str) -> None:
    unet = models.unet_sd15()
    adapter_type, _ = variant_of(name)
    config = adapter_type.config(target_modules=["to_q"], **options_for_unet(adapter_type))
    diffadapt.add_adapter(unet, config, "a")
    with pytest.raises(diffadapt.AdapterError, match="change no layer"):
        diffadapt.adapters(unet).to_lora("a", "b", rank=2)


# All or nothing


def test_a_norm_layer_is_refused_by_its_path_and_can_be_left_out() -> None:
    pipe = models.sd15()
    targets = ["to_q", "mid_block.resnets.0.norm1"]
    diffadapt.add_adapter(pipe.unet, diffadapt.FullConfig(target_modules=targets, init=False), "a")
    assert pipe.adapters.names == ["a"]
    before = snapshot(pipe)
    with pytest.raises(diffadapt.AdapterError, match=r"unet\.mid_block\.resnets\.0\.norm1: a norm.*strength of 0"):
        pipe.adapters.to_lora("a", "b", rank=4)
    assert_unchanged(pipe, before)
    pipe.adapters.to_lora({"a": {"unet.mid_block.resnets.0.norm1": 0}}, "b", rank=4)
    assert "b" in pipe.adapters


def test_a_failure_at_the_last_component_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = models.sd15()
    pipe.load_adapter(spellings.peft_names(loras.parts_for(pipe)), "a")
    before, attached = snapshot(pipe), list[str]()

    def fail(model: nn.Module, *args: Any) -> None:
        if attached:
            raise RuntimeError("out of memory")
        attached.append("once")
        attach_(model, *args)

    monkeypatch.setattr("diffadapt.to_lora.derive.attach_", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        pipe.adapters.to_lora("a", "b")
    assert attached
    assert pipe.adapters.names == ["a"]
    assert_unchanged(pipe, before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"adapters": "oil"}, r"oil.*\ba\b"),
        ({"adapters": ["a", "oil"]}, r"oil.*\ba\b"),
        ({"adapters": []}, "no layer"),
        ({"adapters": {"a": 0.0}}, "no layer"),
        ({"adapters": {"a": float("nan")}}, "finite"),
        ({"adapters": {"a": {"unet.upblocks": 1.0}}}, r"unet\.up_blocks"),
        ({"name": "a"}, "exists already"),
        ({"name": "b/c"}, "no name"),
        ({"rank": 0}, "rank is 0"),
        ({"rank": 2.0}, "rank is 2.0"),
        ({"rank": True}, "rank is True"),
        ({"energy": 0.0}, "energy is 0.0"),
        ({"energy": 1.5}, "energy is 1.5"),
        ({"energy": float("nan")}, "energy is nan"),
    ],
)
def test_invalid_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    pipe = models.sd15()
    pipe.load_adapter(spellings.peft_names(loras.parts_for(pipe)), "a")
    before = snapshot(pipe)
    with pytest.raises(diffadapt.AdapterError, match=message):
        pipe.adapters.to_lora(**{"adapters": "a", "name": "b", **arguments})
    assert_unchanged(pipe, before)
    assert pipe.adapters.names == ["a"]


def pixel() -> DiffusionPipeline:
    pipe = models.sd15()
    pipe.load_adapter(spellings.peft_names(loras.parts_for(pipe)), "a")
    return pipe


@pytest.mark.slow
def test_the_new_lora_is_an_ordinary_adapter(tmp_path: Any) -> None:
    pipe = pixel()
    picture, before = draw(pipe), snapshot(pipe)
    pipe.adapters.to_lora({"a": 0.5}, "b")
    assert pipe.adapters.active == {"a": 1.0}
    assert torch.equal(draw(pipe), picture)
    pipe.adapters.activate({"b": 2.0})
    assert_same(draw(pipe), picture)
    pipe.adapters.save("b", tmp_path / "b.safetensors", format="kohya")
    pipe.adapters.merge("b")
    assert_same(draw(pipe), picture)
    pipe.adapters.unmerge()
    pipe.adapters.remove("b")
    pipe.adapters.activate("a")
    assert_unchanged(pipe, before)


def test_the_report_shows_the_worst_layers_and_the_total() -> None:
    pipe = pixel()
    report = pipe.adapters.to_lora("a", "b", rank=2)
    lines = str(report).splitlines()
    worst = max(report.layers, key=lambda row: row.error)
    assert lines[1].split() == [worst.path, "lora", "2", "no", f"{worst.error:.2%}"]
    assert lines[-1].startswith(f"b: 88 of 88 layers changed, 0 exact, keeps {1 - report.error**2:.2%} of the energy")
    missing = sum((row.error * row.norm) ** 2 for row in report.layers)
    assert report.error == pytest.approx((missing / sum(row.norm**2 for row in report.layers)) ** 0.5)
    assert 0 < report.error < worst.error
