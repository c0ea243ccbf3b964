"""What can be done with loaded adapters: activate, scale, disable, merge, save, remove. Undo restores every bit."""

from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

import diffadapt
from tests.support import loras, models, spellings
from tests.support.compare import assert_differs, assert_same, assert_unchanged, snapshot
from tests.support.models import draw

pytestmark = pytest.mark.slow

UNET = ("unet",)


@pytest.fixture
def pipe() -> DiffusionPipeline:
    """Two adapters of different ranks: "pixel" on both components, "ink" on convolutions and attention of the UNet."""
    pipe = models.sd15()
    pipe.load_adapter(spellings.peft_names(pixel(pipe)), "pixel")
    pipe.load_adapter(spellings.kohya_names(ink(pipe)), "ink", activate=False)
    return pipe


def pixel(pipe: DiffusionPipeline) -> dict[str, dict[str, loras.Factors]]:
    return loras.parts_for(pipe)


def ink(pipe: DiffusionPipeline) -> dict[str, dict[str, loras.Factors]]:
    return loras.parts_for(pipe, UNET, "to_q|conv1", rank=3, alpha=lambda index: 2.0)


def with_weights(*changes: tuple[Any, float]) -> Tensor:
    """Return what the pipeline draws with changes added to its weights."""
    pipe = models.sd15()
    for parts, strength in changes:
        loras.bake(pipe, parts(pipe) if callable(parts) else parts, strength)
    return draw(pipe)


# The collection


def test_adapters_are_a_collection_of_names(pipe: DiffusionPipeline) -> None:
    assert pipe.adapters.names == ["pixel", "ink"]
    assert list(pipe.adapters) == ["pixel", "ink"]
    assert len(pipe.adapters) == 2
    assert "pixel" in pipe.adapters
    assert "oil" not in pipe.adapters
    assert pipe.adapters.active == {"pixel": 1.0}
    assert pipe.adapters["ink"].name == "ink"


def test_the_table_shows_every_adapter(pipe: DiffusionPipeline) -> None:
    header, *rows = str(pipe.adapters).splitlines()
    for column in ("name", "types", "components", "rank", "dtype", "size", "active", "scale"):
        assert column in header
    assert len(rows) == 2
    for word in ("pixel", "lora", "unet", "text_encoder", "4", "float32"):
        assert word in rows[0]


def test_an_empty_collection_leaves_no_trace() -> None:
    pipe = models.sd15()
    before = snapshot(pipe)
    assert (pipe.adapters.names, pipe.adapters.active, len(pipe.adapters)) == ([], {}, 0)
    assert str(pipe.adapters)
    pipe.adapters.clear()
    pipe.adapters.activate({})
    assert_unchanged(pipe, before)


def test_the_adapters_of_a_model_are_those_of_the_pipeline(pipe: DiffusionPipeline) -> None:
    assert diffadapt.adapters(pipe).names == pipe.adapters.names
    assert diffadapt.adapters(pipe.unet).names == ["pixel", "ink"]
    assert diffadapt.adapters(pipe.text_encoder).names == ["pixel"]
    diffadapt.adapters(pipe.unet).activate({"ink": 1.0})
    expected = with_weights((ink, 1.0), ({"text_encoder": pixel(models.sd15())["text_encoder"]}, 1.0))
    assert_same(draw(pipe), expected)


@pytest.mark.parametrize(
    "use",
    [
        lambda adapters: adapters["oil"],
        lambda adapters: adapters.activate({"oil": 1.0}),
        lambda adapters: adapters.activate({"pixel": 1.0, "oil": 1.0}),
        lambda adapters: adapters.remove("oil"),
        lambda adapters: adapters.merge("oil"),
        lambda adapters: adapters.save("oil", "oil.safetensors"),
    ],
    ids=["getitem", "activate", "activate two", "remove", "merge", "save"],
)
def test_an_unknown_name_is_refused_and_the_known_ones_are_listed(pipe: DiffusionPipeline, use: Any) -> None:
    picture = draw(pipe)
    before = snapshot(pipe)
    with pytest.raises(diffadapt.AdapterError, match=r"oil.*pixel.*ink"):
        use(pipe.adapters)
    assert_unchanged(pipe, before)
    assert pipe.adapters.active == {"pixel": 1.0}
    assert torch.equal(draw(pipe), picture)


# Activation and scales


def test_activate_makes_exactly_these_active(pipe: DiffusionPipeline) -> None:
    pipe.adapters.activate({"ink": 0.5})
    assert pipe.adapters.active == {"ink": 0.5}
    assert_same(draw(pipe), with_weights((ink, 0.5)))
    pipe.adapters.activate({"pixel": 0.8, "ink": -0.3})
    assert_same(draw(pipe), with_weights((pixel, 0.8), (ink, -0.3)))
    pipe.adapters.activate({})
    assert pipe.adapters.active == {}
    assert torch.equal(draw(pipe), draw(models.sd15()))


def test_the_order_of_activation_does_not_matter(pipe: DiffusionPipeline) -> None:
    pipe.adapters.activate({"pixel": 0.8, "ink": 0.5})
    picture = draw(pipe)
    pipe.adapters.activate({"ink": 0.5, "pixel": 0.8})
    assert_same(draw(pipe), picture)


def test_a_scale_of_zero_is_the_base(pipe: DiffusionPipeline) -> None:
    pipe.adapters.activate({"pixel": 0.0})
    assert_same(draw(pipe), draw(models.sd15()), 1e-7)


def test_scales_can_be_given_by_component_and_prefix(pipe: DiffusionPipeline) -> None:
    scales = {"unet": 0.5, "unet.up_blocks": 0.2, "unet.up_blocks.1": 2.0, "text_encoder": 0.0}
    pipe.adapters.activate({"pixel": scales})
    changed = models.sd15()
    for path, factors in pixel(changed)["unet"].items():
        strength = 2.0 if path.startswith("up_blocks.1.") else 0.2 if path.startswith("up_blocks.") else 0.5
        loras.bake(changed, {"unet": {path: factors}}, strength)
    assert pipe.adapters.active == {"pixel": scales}
    assert_same(draw(pipe), draw(changed))
    assert_differs(draw(pipe), with_weights(({"unet": pixel(changed)["unet"]}, 0.5)), 1e-3)


def test_layers_without_a_prefix_have_the_scale_one(pipe: DiffusionPipeline) -> None:
    pipe.adapters.activate({"pixel": {"text_encoder": 0.0}})
    assert_same(draw(pipe), with_weights(({"unet": pixel(models.sd15())["unet"]}, 1.0)))


def test_the_order_of_prefixes_does_not_matter(pipe: DiffusionPipeline) -> None:
    prefixes = {"unet.up_blocks.1.attentions.0": 0.1, "unet": 0.5, "unet.up_blocks.1": 0.9}
    pipe.adapters.activate({"pixel": prefixes})
    picture = draw(pipe)
    pipe.adapters.activate({"pixel": dict(reversed(prefixes.items()))})
    assert torch.equal(draw(pipe), picture)


def test_a_prefix_can_be_the_path_of_a_layer(pipe: DiffusionPipeline) -> None:
    path = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    pipe.adapters.activate({"pixel": {"unet": 0.0, "text_encoder": 0.0, f"unet.{path}": 3.0}})
    assert_same(draw(pipe), with_weights(({"unet": {path: pixel(models.sd15())["unet"][path]}}, 3.0)))


def test_the_empty_prefix_is_for_all_other_layers(pipe: DiffusionPipeline) -> None:
    base = draw(pipe)
    pipe.adapters.activate({"pixel": {"unet": 0.5, "text_encoder": 0.25}})
    expected = draw(pipe)
    assert_differs(expected, base)
    for strength in ({"": 0.25, "unet": 0.5}, {"": 0.5, "text_encoder": 0.25}):
        pipe.adapters.activate({"pixel": strength})
        assert torch.equal(draw(pipe), expected)
    pipe.adapters.activate({"pixel": {"": 0.0}})
    assert_same(draw(pipe), draw(models.sd15()))


@pytest.mark.parametrize("prefix", ["unet.upblocks", "unet.up_block", "vae", "text_encoder_2", "unet.up_blocks.9"])
def test_a_prefix_that_matches_nothing_is_refused(pipe: DiffusionPipeline, prefix: str) -> None:
    picture = draw(pipe)
    with pytest.raises(diffadapt.AdapterError, match=r"unet\.up_blocks"):
        pipe.adapters.activate({"pixel": {prefix: 0.5}, "ink": 1.0})
    assert pipe.adapters.active == {"pixel": 1.0}
    assert torch.equal(draw(pipe), picture)


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), "0.5", None, True, {"unet": "0.5"}])
def test_a_scale_that_is_not_a_finite_number_is_refused(pipe: DiffusionPipeline, scale: Any) -> None:
    with pytest.raises(diffadapt.AdapterError, match="pixel"):
        pipe.adapters.activate({"pixel": scale})
    assert pipe.adapters.active == {"pixel": 1.0}


def test_adapters_of_different_dtypes_mix() -> None:
    pipe = models.sd15()
    first, second = loras.parts_for(pipe), loras.parts_for(pipe, UNET, rank=2)
    pipe.load_adapter(spellings.peft_names(first), "float32")
    pipe.load_adapter(spellings.peft_names(second), "bfloat16", dtype=torch.bfloat16)
    assert_same(draw(pipe), with_weights((first, 1.0), (second, 1.0)), 5e-2)


def test_disabled_is_the_base_and_restores_the_adapters(pipe: DiffusionPipeline) -> None:
    scales = {"unet": 0.5, "unet.up_blocks": 0.2}
    pipe.adapters.activate({"pixel": scales, "ink": 0.3})
    picture = draw(pipe)
    with pipe.adapters.disabled():
        assert torch.equal(draw(pipe), draw(models.sd15()))
    assert pipe.adapters.active == {"pixel": scales, "ink": 0.3}
    assert torch.equal(draw(pipe), picture)


def test_disabled_ends_with_an_exception_too(pipe: DiffusionPipeline) -> None:
    picture = draw(pipe)
    with pytest.raises(RuntimeError, match="stop"), pipe.adapters.disabled():
        raise RuntimeError("stop")
    assert torch.equal(draw(pipe), picture)


# Removal


@pytest.mark.parametrize("order", [["pixel", "ink"], ["ink", "pixel"]])
def test_removal_in_any_order_restores_everything(order: list[str]) -> None:
    pipe = models.sd15()
    base, before = draw(pipe), snapshot(pipe)
    pipe.load_adapter(spellings.peft_names(pixel(pipe)), "pixel")
    pipe.load_adapter(spellings.kohya_names(ink(pipe)), "ink")
    for name in order:
        assert_differs(draw(pipe), base)
        pipe.adapters.remove(name)
        assert name not in pipe.adapters
    assert_unchanged(pipe, before)
    assert torch.equal(draw(pipe), base)


def test_removal_leaves_the_other_adapter_alone(pipe: DiffusionPipeline) -> None:
    pipe.adapters.activate({"pixel": 1.0, "ink": 0.5})
    pipe.adapters.remove("pixel")
    assert pipe.adapters.active == {"ink": 0.5}
    assert_same(draw(pipe), with_weights((ink, 0.5)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_clear_is_bit_exact(dtype: torch.dtype) -> None:
    pipe = models.sd15().to(dtype)
    base, before = draw(pipe), snapshot(pipe)
    pipe.load_adapter(spellings.peft_names(pixel(pipe)), "pixel")
    pipe.load_adapter(spellings.kohya_names(ink(pipe)), "ink")
    assert_differs(draw(pipe), base)
    pipe.adapters.clear()
    assert_unchanged(pipe, before)
    assert torch.equal(draw(pipe), base)


def test_a_name_can_be_used_again_after_removal(pipe: DiffusionPipeline) -> None:
    pipe.adapters.remove("pixel")
    pipe.load_adapter(spellings.peft_names(ink(pipe)), "pixel", scale=0.5)
    assert pipe.adapters.names == ["ink", "pixel"]


# Merging


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_merge_equals_the_adapter_and_unmerge_is_bit_exact(dtype: torch.dtype) -> None:
    pipe = models.sd15().to(dtype)
    weights = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    base = draw(pipe)
    pipe.load_adapter(spellings.kohya_names(ink(pipe)), "ink", scale=0.7)
    picture = draw(pipe)
    assert_differs(picture, base)
    pipe.adapters.merge("ink")
    assert_same(draw(pipe), picture, 1e-5 if dtype == torch.float32 else 5e-2)
    changed = [name for name, value in pipe.unet.state_dict().items() if not torch.equal(value, weights[name])]
    assert {name.removesuffix(".weight") for name in changed} == set(ink(pipe)["unet"])
    pipe.adapters.unmerge()
    assert all(torch.equal(value, weights[name]) for name, value in pipe.unet.state_dict().items())
    assert torch.equal(draw(pipe), picture)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_merge_adds_in_float32_and_rounds_once(dtype: torch.dtype) -> None:
    pipe = models.sd15().to(dtype)
    parts, second = ink(pipe), loras.parts_for(pipe, UNET, "to_q", rank=2)
    weights = {path: pipe.unet.get_submodule(path).weight.clone() for path in parts["unet"]}
    pipe.load_adapter(spellings.kohya_names(parts), "one", dtype=torch.float32, scale=0.7)
    pipe.load_adapter(spellings.kohya_names(second), "two", dtype=torch.float32, scale=1e-3)
    pipe.adapters.merge("one", "two")
    for path, factors in parts["unet"].items():
        exact = weights[path].double() + 0.7 * factors.delta
        if path in second["unet"]:
            exact += 1e-3 * second["unet"][path].delta
        merged = pipe.unet.get_submodule(path).weight
        # Half a unit in the last place, and the rounding of float32.
        assert ((merged.double() - exact).abs() <= exact.abs() * torch.finfo(dtype).eps * 0.5001 + 1e-7).all()


def test_merging_in_turn_equals_merging_together(pipe: DiffusionPipeline) -> None:
    pipe.adapters.activate({"pixel": 1.0, "ink": 0.5})
    pipe.adapters.merge("pixel")
    pipe.adapters.merge("ink")
    weights = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    pipe.adapters.unmerge()
    pipe.adapters.merge("pixel", "ink")
    assert all(torch.equal(value, weights[name]) for name, value in pipe.unet.state_dict().items())
    assert_same(draw(pipe), with_weights((pixel, 1.0), (ink, 0.5)))


def test_merge_writes_in_place(pipe: DiffusionPipeline) -> None:
    parameters = {name: (id(p), p.data_ptr()) for name, p in pipe.unet.named_parameters()}
    pipe.adapters.merge("pixel")
    pipe.adapters.unmerge()
    assert {name: (id(p), p.data_ptr()) for name, p in pipe.unet.named_parameters()} == parameters


def works_or_raises(action: Any) -> bool:
    """Return whether `action` succeeded; it may only raise an `AdapterError`."""
    try:
        action()
    except diffadapt.AdapterError:
        return False
    return True


def test_merging_twice_merges_once(pipe: DiffusionPipeline) -> None:
    pipe.adapters.merge("pixel")
    works_or_raises(lambda: pipe.adapters.merge("pixel"))
    assert_same(draw(pipe), with_weights((pixel, 1.0)))
    pipe.adapters.unmerge()
    assert_same(draw(pipe), with_weights((pixel, 1.0)))


def test_activation_while_merged_never_corrupts_the_weights(pipe: DiffusionPipeline) -> None:
    pipe.adapters.merge("pixel")
    if works_or_raises(lambda: pipe.adapters.activate({"pixel": 0.5, "ink": 0.5})):
        assert_same(draw(pipe), with_weights((pixel, 0.5), (ink, 0.5)))
    else:
        assert_same(draw(pipe), with_weights((pixel, 1.0)))
    pipe.adapters.clear()
    assert torch.equal(draw(pipe), draw(models.sd15()))


def test_removal_of_a_merged_adapter_never_corrupts_the_weights(pipe: DiffusionPipeline) -> None:
    pipe.adapters.merge("pixel")
    if works_or_raises(lambda: pipe.adapters.remove("pixel")):
        assert torch.equal(draw(pipe), draw(models.sd15()))
    else:
        assert_same(draw(pipe), with_weights((pixel, 1.0)))
    pipe.adapters.clear()
    assert torch.equal(draw(pipe), draw(models.sd15()))


def test_an_adapter_can_be_loaded_while_another_is_merged(pipe: DiffusionPipeline) -> None:
    pipe.adapters.merge("pixel")
    parts = loras.parts_for(pipe, UNET, "to_k")
    pipe.load_adapter(spellings.peft_names(parts), "third", scale=0.5)
    assert_same(draw(pipe), with_weights((pixel, 1.0), (parts, 0.5)))
    pipe.adapters.unmerge()
    assert_same(draw(pipe), with_weights((pixel, 1.0), (parts, 0.5)))


def test_disabled_while_merged_is_the_base(pipe: DiffusionPipeline) -> None:
    pipe.adapters.merge("pixel")
    picture = draw(pipe)
    with pipe.adapters.disabled():
        assert torch.equal(draw(pipe), draw(models.sd15()))
    assert torch.equal(draw(pipe), picture)


def test_clear_while_merged_restores_everything() -> None:
    pipe = models.sd15()
    before = snapshot(pipe)
    pipe.load_adapter(spellings.peft_names(pixel(pipe)), "pixel")
    pipe.adapters.merge("pixel")
    pipe.adapters.clear()
    assert_unchanged(pipe, before)


def test_a_merge_that_overflows_is_refused_before_anything_is_written() -> None:
    pipe = models.sd15().to(torch.float16)
    parts = loras.parts_for(pipe, UNET, "to_q")
    last = list(parts["unet"])[-1]
    parts["unet"][last] = loras.Factors(parts["unet"][last].down, parts["unet"][last].up, alpha=1e6)
    pipe.load_adapter(spellings.kohya_names(parts), "huge", dtype=torch.float32)
    before = snapshot(pipe)
    with pytest.raises(diffadapt.AdapterError, match=last.split(".attn")[0]):
        pipe.adapters.merge("huge")
    assert_unchanged(pipe, before)
    assert pipe.adapters.active == {"huge": 1.0}


def test_an_inactive_adapter_is_merged_at_its_strength_or_refused(pipe: DiffusionPipeline) -> None:
    pipe.adapters.activate({})
    if works_or_raises(lambda: pipe.adapters.merge("ink")):
        assert_same(draw(pipe), with_weights((ink, 1.0)))
    pipe.adapters.clear()
    assert torch.equal(draw(pipe), draw(models.sd15()))


# Saving


@pytest.mark.parametrize("format", ["diffusers", "kohya"])
def test_a_saved_file_is_loaded_as_the_same_adapter(pipe: DiffusionPipeline, format: str, tmp_path: Any) -> None:
    pipe.adapters.activate({"pixel": 0.5, "ink": 1.0})
    expected = with_weights((pixel, 1.0), (ink, 1.0))
    again = models.sd15()
    for name in ("pixel", "ink"):
        pipe.adapters.save(name, tmp_path / f"{name}.safetensors", format=format)
        report = again.load_adapter(tmp_path / f"{name}.safetensors")
        assert (report.name, report.format, report.unused) == (name, format, [])
    assert {file.name for file in tmp_path.iterdir()} == {"pixel.safetensors", "ink.safetensors"}
    assert_same(draw(again), expected)


def test_an_unknown_format_is_refused_and_the_known_ones_are_listed(pipe: DiffusionPipeline, tmp_path: Any) -> None:
    with pytest.raises(diffadapt.AdapterError, match=r"gguf.*diffusers.*kohya"):
        pipe.adapters.save("pixel", tmp_path / "a.safetensors", format="gguf")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_save_leaves_the_old_file(
    pipe: DiffusionPipeline, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "pixel.safetensors"
    pipe.adapters.save("pixel", file)
    content = file.read_bytes()

    def fail(*args: Any, **options: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("diffadapt.files.write.raw_bytes", fail)
    with pytest.raises(OSError, match="disk full"):
        pipe.adapters.save("ink", file)
    assert [entry.name for entry in tmp_path.iterdir()] == ["pixel.safetensors"]
    assert file.read_bytes() == content
