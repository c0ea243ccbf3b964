"""`examples/serving/engine.py`: requests that are drawn together are what each of them is alone."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file

import diffadapt
from examples.serving.adapters import AdapterFolder, NameTaken, UnknownAdapter
from examples.serving.engine import Abandoned, Engine, Request
from tests.support.serving import TINY, folder_of_adapters

if TYPE_CHECKING:
    from torch._dynamo.testing import CompileCounterWithBackend

pytestmark = pytest.mark.slow
STEPS = 3
MIXES: list[dict[str, Any]] = [
    {"ink": 1.0},
    {"pixel": 0.8, "critter": {"unet.up_blocks": 0.5, "": 1.0}},
    {},
    {"critter": diffadapt.Linear(1.0, 0.0)},
]
PROMPTS = ("a red circle", "a green star on the left", "a blue heart", "a sks critter on a white background")


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    engine = Engine(TINY, folder_of_adapters(tmp_path), slots=3, samples=3)
    yield engine
    engine.close()


def requests() -> list[Request]:
    """One request for every mix."""
    pairs = zip(PROMPTS, MIXES, strict=True)
    return [Request(prompt, mix, seed, STEPS) for seed, (prompt, mix) in enumerate(pairs)]


def values(picture: Image.Image | Exception) -> np.ndarray[Any, Any]:
    """The values of a picture, in 0..255."""
    assert isinstance(picture, Image.Image), picture
    return np.asarray(picture, int)


def assert_same(found: Image.Image | Exception, expected: Any) -> None:
    """Batches of another number of rows are rounded otherwise, which shows in few values, and by 1 of 255."""
    difference = np.abs(values(found) - np.asarray(expected, int))
    assert difference.max() <= 1
    assert (difference > 0).mean() < 1e-3


def test_rows_are_what_the_plain_pipeline_draws_with_their_adapters(engine: Engine) -> None:
    drawn = engine.draw([*requests(), Request(PROMPTS[0], {"ink": 1.0}, 0, STEPS, (96, 64), 1.0)])
    pipe: Any = StableDiffusionPipeline.from_pretrained(TINY, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    for name in ("critter", "ink", "pixel"):
        pipe.load_adapter(TINY / "adapters" / f"{name}.safetensors", name, activate=False)
    for request, picture in zip(requests(), drawn, strict=False):
        seed = torch.Generator().manual_seed(request.seed)
        with pipe.adapters.activated(request.adapters):
            expected = pipe(request.prompt, generator=seed, num_inference_steps=STEPS, guidance_scale=3.0).images[0]
        assert_same(picture, expected)
    base = engine.draw([Request(PROMPTS[0], {}, 0, STEPS)])[0]
    assert np.abs(values(base) - values(drawn[0])).max() > 20
    assert values(drawn[-1]).shape == (64, 96, 3)


def test_a_compiled_pipeline_keeps_its_graph(tmp_path: Path, counter: "CompileCounterWithBackend") -> None:
    engine = Engine(TINY, folder_of_adapters(tmp_path), slots=3, samples=2, compiled=counter)
    first, second, third, _ = requests()
    for pair in ((first, second), (third, first), (second, third)):
        assert all(isinstance(picture, Image.Image) for picture in engine.draw(pair))
    assert counter.frame_count == 1
    engine.close()


def test_empty_rows_change_nothing_and_new_types_get_slots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.nn.Module, "compile", lambda model, **options: None)
    engine = Engine(TINY, folder_of_adapters(tmp_path), slots=3, samples=3, compiled=True)
    first, second, third, _ = requests()
    together, moved = engine.draw([first, second]), engine.draw([third, second, first])
    assert np.array_equal(values(moved[2]), values(together[0]))
    assert np.array_equal(values(moved[1]), values(together[1]))
    shutil.copy(TINY.parent / "hotswap" / "pixel_oft.safetensors", engine.folder.folder)
    new, again = engine.draw([Request(first.prompt, {"pixel_oft": 1.0}, 0, STEPS), first])
    assert np.abs(values(new) - values(again)).max() > 20
    assert_same(again, values(together[0]))
    engine.close()


def test_an_error_stays_in_its_own_place(engine: Engine) -> None:
    first, second, *_ = requests()
    bad = [
        Request("x", {"inkk": 1.0}, steps=STEPS),
        Request("x", {"ink": {"unet.nowhere": 1.0}}, steps=STEPS),
        Request("x", {"a": 1.0, "ink": 1.0, "pixel": 1.0, "critter": 1.0}, steps=STEPS),
        Request("x", {"ink": 1e30}, steps=STEPS),
    ]
    shutil.copy(TINY / "adapters" / "ink.safetensors", engine.folder.folder / "a.safetensors")
    results = engine.draw([first, *bad, second])
    assert isinstance(results[1], UnknownAdapter)
    for result, words in zip(results[1:5], ("similar names: ink", "unet.nowhere", "at most 3", "finite"), strict=True):
        assert isinstance(result, diffadapt.AdapterError)
        assert words in str(result)
    assert_same(results[0], values(engine.draw([first])[0]))
    assert_same(results[5], values(engine.draw([second])[0]))


def test_drawing_ends_when_nobody_wants_the_pictures(engine: Engine) -> None:
    asked: list[int] = []

    def is_wanted() -> bool:
        asked.append(0)
        return len(asked) < 3

    long = [Request("x", mix, 0, 50) for mix in MIXES[:2]]
    results = engine.draw([*long, Request("x", {"inkk": 1.0})], is_wanted)
    assert [type(result) for result in results] == [Abandoned, Abandoned, UnknownAdapter]
    assert len(asked) == 3
    assert engine.pipe.adapters.active == {}
    first = requests()[0]
    assert_same(engine.draw([first], lambda: True)[0], values(engine.draw([first])[0]))


def test_what_the_pipeline_and_the_pool_have_no_room_for_is_refused(engine: Engine) -> None:
    assert (engine.multiple, engine.native_size) == (8, (64, 64))
    (result,) = engine.draw([Request("x", size=(60, 64), steps=1)])
    assert isinstance(result, diffadapt.AdapterError)
    assert "cannot draw 60x64" in str(result)
    sizes = [engine.pipe.adapters.prefetch(engine.folder.path(name)).bytes for name in engine.folder.names()]
    engine.pool.budget = 5 * sum(sizes)
    assert engine.capacity() == 15
    engine.pool.budget = 10**6
    assert engine.capacity() == 1
    small, large = engine.draw([Request("x", mix, steps=1) for mix in ({"ink": 1.0}, {"ink": 1.0, "pixel": 1.0})])
    values(small)
    assert "the pool has 1000000; mix fewer or smaller ones" in str(large)
    for name in engine.folder.names():
        engine.folder.remove(name)
    assert engine.capacity() == 256


def test_another_file_of_the_same_name_is_another_adapter(engine: Engine, tmp_path: Path) -> None:
    request, other = Request("a red circle", {"ink": 1.0}, 1, STEPS), Request("a red circle", {"pixel": 1.0}, 1, STEPS)
    before = engine.draw([request])[0]
    engine.folder.remove("ink")
    assert isinstance(engine.draw([request])[0], UnknownAdapter)
    assert "ink" not in engine.pool.ready
    pixel = tmp_path / "new"
    shutil.copyfile(engine.folder.path("pixel"), pixel)
    engine.prefetch(["ink", "pixel"])
    with pytest.raises(NameTaken):
        engine.folder.publish(pixel, "critter")
    os.utime(pixel, (1, 1))
    engine.folder.publish(pixel, "ink")
    engine.prefetch(["ink"])
    after, expected = engine.draw([request])[0], engine.draw([other])[0]
    assert np.array_equal(values(after), values(expected))
    assert not np.array_equal(values(after), values(before))


def test_an_adapter_is_tried_on_without_a_trace(engine: Engine, tmp_path: Path) -> None:
    engine.try_on(TINY.parent / "hotswap" / "ink_lokr.safetensors")
    tensors = load_file(TINY / "adapters" / "ink.safetensors")
    key = next(key for key in tensors if key.endswith("lora_A.weight"))
    for wrong in (tensors[key].repeat(1, *[2] * (tensors[key].ndim - 1)), torch.full_like(tensors[key], torch.nan)):
        save_file({**tensors, key: wrong}, tmp_path / "wrong.safetensors")
        with pytest.raises(diffadapt.AdapterError, match=key.split(".")[1]):
            engine.try_on(tmp_path / "wrong.safetensors")
    engine.pool.budget = 1000
    with pytest.raises(diffadapt.AdapterError, match="the pool has 1000"):
        engine.try_on(TINY / "adapters" / "ink.safetensors")
    assert list(engine.pipe.adapters) == []


def test_names_in_the_folder(tmp_path: Path) -> None:
    folder = AdapterFolder(tmp_path / "new" / "folder")
    for name in (".hidden", "a b", "ok-1.0_x", "x" * 70):
        (folder.folder / f"{name}.safetensors").touch()
    assert folder.names() == ["ok-1.0_x"]
    for name in ("../ok", "", "a/b", "OK-1.0_y", "a b"):
        with pytest.raises(UnknownAdapter):
            folder.path(name)
    with pytest.raises(UnknownAdapter, match=r"similar names: ok-1\.0_x"):
        folder.remove("OK-1.0_y")
