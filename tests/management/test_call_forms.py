"""What people type by instinct does what they mean, or raises a sentence of ours."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import diffadapt
from diffadapt import AdapterError, Linear
from tests.support import files, loras, models, spellings

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def sources() -> dict[str, Any]:
    pipe = models.sd15()
    return {
        name: spellings.peft_names(loras.parts_for(pipe, ("unet",), "to_q", rank))
        for name, rank in zip("abc", (2, 3, 4), strict=True)
    }


@pytest.fixture
def pipe(sources: dict[str, Any]) -> Any:
    pipe = models.sd15()
    for name in "ab":
        pipe.load_adapter(sources[name], name)
    return pipe


ACTIVATIONS: dict[str, tuple[Callable[[Any], object], dict[str, Any]]] = {
    "a name and a strength": (lambda found: found.activate("a", 0.5), {"a": 0.5}),
    "a name and a schedule": (lambda found: found.activate("a", Linear(0, 1)), {"a": Linear(0, 1)}),
    "a name and prefixes": (lambda found: found.activate("a", {"unet": 0.5}), {"a": {"unet": 0.5}}),
    "two lists": (lambda found: found.activate(["a", "b"], [0.5, 2.0]), {"a": 0.5, "b": 2.0}),
    "names and one strength": (lambda found: found.activate(["a", "b"], 0.5), {"a": 0.5, "b": 0.5}),
    "a loaded adapter": (lambda found: found.activate(found["b"]), {"b": 1.0}),
    "deactivate one": (lambda found: found.deactivate("a"), {"b": 1.0}),
    "deactivate a list": (lambda found: found.deactivate(["a", "b"]), {}),
    "deactivate": (lambda found: found.deactivate(), {}),
    "remove a list": (lambda found: found.remove(["a", "b"]), {}),
    "remove several": (lambda found: found.remove("a", "b"), {}),
    "del": (lambda found: found.__delitem__("a"), {"b": 1.0}),
    "scale": (lambda found: setattr(found["a"], "scale", 0.5), {"a": 0.5, "b": 1.0}),
    "a number of NumPy": (lambda found: found.activate({"a": np.float32(0.5)}), {"a": 0.5}),
    "an integer of NumPy": (lambda found: found.activate("a", np.int64(2)), {"a": 2.0}),
    "numbers of torch": (lambda found: found.activate(["a", "b"], torch.tensor([0.5, 2.0])), {"a": 0.5, "b": 2.0}),
    "prefixes of NumPy": (lambda found: found.activate({"a": {"unet": np.float32(0.5)}}), {"a": {"unet": 0.5}}),
    "scale of torch": (lambda found: setattr(found["a"], "scale", torch.tensor(0.5)), {"a": 0.5, "b": 1.0}),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_an_instinctive_form_does_what_is_meant(name: str, pipe: Any) -> None:
    do, expected = ACTIVATIONS[name]
    do(pipe.adapters)
    assert pipe.adapters.active == expected


def test_merging_takes_a_list_and_activated_takes_strengths(pipe: Any) -> None:
    with pipe.adapters.activated("a", 0.25):
        assert pipe.adapters.active == {"a": 0.25}
    pipe.adapters.merge(["a", "b"])
    assert pipe.adapters.merged == ["a", "b"]
    with pytest.raises(AdapterError, match="unmerge"):
        pipe.adapters["a"].scale = 0.5


def test_loading_takes_the_strength_by_position_and_the_name_in_the_words_of_diffusers(
    pipe: Any, sources: dict[str, Any]
) -> None:
    assert pipe.load_adapter(sources["c"], 0.8).name == "default_0"
    assert pipe.adapters.active["default_0"] == 0.8
    assert pipe.load_adapter(sources["c"], adapter_name="x").name == "x"
    assert pipe.load_adapter(sources["c"], 0.5, adapter_name="y").name == "y"
    assert pipe.load_adapter(sources["c"], "z", 0.25).name == "z"
    assert pipe.adapters["z"].scale == 0.25
    pipe.adapters.remove("z")
    assert pipe.load_adapter(sources["c"], "z", np.float32(0.25)).name == "z"
    assert pipe.adapters["y"].scale == 0.5
    model = models.unet_sd15()
    assert diffadapt.load_adapter(model, sources["c"], adapter_name="x", scale=0.5).name == "x"


REFUSED: dict[str, tuple[Callable[[Any], object], str]] = {
    "names as arguments": (lambda found: found.activate("a", "b"), r"several names as a list"),
    "too few strengths": (lambda found: found.activate(["a", "b"], [1.0]), "1 strengths for 2 adapters"),
    "no strength": (lambda found: found.activate("a", object()), "is no strength"),
    "strengths twice": (lambda found: found.activate({"a": 1.0}, 0.5), "in the mapping already"),
    "no name": (lambda found: found.activate(None), "no name of an adapter"),
    "a number": (lambda found: found.remove(3), "3 is no name of an adapter"),
    "nothing to remove": (lambda found: found.remove(), r"clear\(\)"),
    "one unknown among several": (lambda found: found.remove(["a", "z"]), "no adapter 'z'"),
    "text as strength": (lambda found: found.activate({"a": "0.5"}), "expected a finite number"),
    "an inactive adapter": (lambda found: (found.deactivate("a"), setattr(found["a"], "scale", 0.5)), "not active"),
    "a number as scheduler": (lambda found: found.scheduled("a", 0.5), "no scheduler"),
    "two names": (lambda found: found.load({}, "x", adapter_name="y"), "two names"),
    "two strengths": (lambda found: found.load({}, 0.5, scale=0.8), "two strengths"),
    "strengths in a merge": (lambda found: found.merge({"a": 0.5}), "takes no strengths; set those before"),
    "a strength in a merge": (lambda found: found.merge("a", 0.5), "0.5 is no name of an adapter.*takes no strengths"),
    "strengths to remove": (lambda found: found.remove({"a": 0.5}), "takes no strengths"),
    "one of two merged": (lambda found: (found.merge(), found.unmerge("a")), r"merged are a, b.*undone together"),
    "no source": (lambda found: found.load(None), "not a NoneType"),
    "several sources": (lambda found: found.load(["a", "b"]), "not a list; load several files one by one"),
    "a list as a name": (lambda found: found.load({}, ["x"]), "no name for an adapter"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_form_without_a_meaning_is_refused_in_a_sentence(name: str, pipe: Any) -> None:
    do, message = REFUSED[name]
    with pytest.raises(AdapterError, match=message):
        do(pipe.adapters)
    assert pipe.adapters.names == ["a", "b"]
    pipe.adapters.unmerge(pipe.adapters.merged)


def test_a_pipeline_is_no_model_to_add_an_adapter_to(pipe: Any) -> None:
    with pytest.raises(AdapterError, match=r"StableDiffusionPipeline.*pipe\.unet"):
        diffadapt.add_adapter(pipe, diffadapt.LoraConfig(rank=2, target_modules="to_q"))
    with pytest.raises(AdapterError, match="LoraConfig"):
        diffadapt.add_adapter(pipe.unet, {"rank": 2})
    with pytest.raises(AdapterError, match="target_modules is 5, expected names of layers"):
        diffadapt.LoraConfig(rank=2, target_modules=5)
    with pytest.raises(AdapterError, match="no name for an adapter"):
        diffadapt.add_adapter(pipe.unet, diffadapt.LoraConfig(rank=2, target_modules="to_q"), "a/b")


def test_a_plain_layer_name_is_taken_as_an_ending(pipe: Any) -> None:
    one = diffadapt.add_adapter(pipe.unet, diffadapt.LoraConfig(rank=2, target_modules="to_q"), "one")
    several = diffadapt.add_adapter(pipe.unet, diffadapt.LoraConfig(rank=2, target_modules=["to_q"]), "several")
    assert one.layers.keys() == several.layers.keys()


def test_reprs_are_one_short_line(pipe: Any, sources: dict[str, Any], tmp_path: Any) -> None:
    metadata = {f"key {number}": "x" * 100 for number in range(100)}
    file = files.write(tmp_path / "big.safetensors", sources["c"], metadata)
    planned = pipe.adapters.prefetch(file)
    pool = diffadapt.AdapterPool(pipe.adapters, 2**20)
    pool.add("c", file)
    report = pipe.load_adapter(file, scale={f"unet.{name}_blocks": 0.123456 for name in ("up", "down")})
    shown = (report, planned, pool, pipe.adapters, pipe.adapters["a"], pipe.adapters["a"].components["unet"])
    for value in shown:
        assert len(repr(value)) < 200, repr(value)
        assert "\n" not in repr(value)
    assert str(report).splitlines()[0] == "adapter    big"
    assert max(map(len, str(pipe.adapters).splitlines())) < 140
    assert len(str(pipe.adapters).splitlines()) == 4
    assert str(pool).splitlines()[1].split()[0] == "c"
