"""Many threads share one pipeline: each request is drawn as if it were alone, whatever the others do meanwhile."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import Event
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

import diffadapt
from tests.support import loras, models, spellings
from tests.support.compare import assert_differs, assert_unchanged, snapshot
from tests.support.small_models import unet

pytestmark = pytest.mark.slow

THREADS = 16
PROMPTS = ["a red circle", "a blue hill", "two stars"]


def built(prepared: bool) -> tuple[DiffusionPipeline, list[dict[str, Tensor]], dict[str, Any]]:
    """Return a pipeline with three adapters, their files and one more, and what it was without them."""
    pipe = models.sd15()
    pipe.unet = unet()
    files = [
        spellings.peft_names(loras.parts_for(pipe, ("unet", "text_encoder"), r"to_[qv]|q_proj", rank))
        for rank in (1, 2, 3, 4)
    ]
    drawn(pipe, 1, 0)
    bare = snapshot(pipe)
    if prepared:
        pipe.adapters.prepare_hotswap(files, slots=4, samples=3)
    for name, file in zip("abc", files, strict=False):
        pipe.load_adapter(file, name, activate=False)
    return pipe, files, bare


def drawn(pipe: DiffusionPipeline, prompts: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    options: dict[str, Any] = {"num_inference_steps": 2, "height": 16, "width": 16, "output_type": "latent"}
    with torch.no_grad():
        return pipe(PROMPTS[:prompts], generator=generator, guidance_scale=3.0, **options).images


def requests(pipe: DiffusionPipeline, files: list[dict[str, Tensor]]) -> list[Callable[[], Tensor]]:
    """Return requests of every kind, each of which draws under its own state."""
    adapters = pipe.adapters

    def one(number: int) -> Tensor:
        with adapters.activated({"abc"[number % 3]: number / 8}):
            return drawn(pipe, 1, number)

    def mixed(number: int) -> Tensor:
        ramp = diffadapt.Linear(1.0, number / 8)
        with adapters.per_sample([{"a": 1.0}, {}, {"b": ramp, "c": -0.5}][: 1 + number % 3]):
            return drawn(pipe, 1 + number % 3, number)

    def begun(number: int) -> Tensor:
        with adapters.activated({"a": 0.5}):
            adapters.begin(files[3], f"begun {number}", at_step=1, scale=0.7).wait(60)
            try:
                return drawn(pipe, 1, number)
            finally:
                adapters.remove(f"begun {number}")

    def changed(number: int) -> Tensor:
        """Load, swap and merge as one request."""
        with adapters.exclusive():
            adapters.load(files[3], f"own {number}")
            adapters.activate({f"own {number}": 0.5, "c": 0.2})
            picture = drawn(pipe, 1, number)
            adapters.remove(f"own {number}")
            adapters.deactivate()
            return picture

    kinds = one, mixed, begun, changed
    return [partial(kinds[number % 4], number) for number in range(THREADS)]


@pytest.mark.parametrize("prepared", [False, True], ids=["plain", "prepared"])
def test_mixed_requests_of_many_threads_equal_serial_ones(prepared: bool) -> None:
    pipe, files, bare = built(prepared)
    todo = requests(pipe, files)
    serial = [request() for request in todo]
    for picture, other in zip(serial, serial[4:], strict=False):
        assert picture.shape != other.shape or not torch.equal(picture, other)
    stop = Event()

    def disturb(number: int) -> int:
        """Do what a server does besides drawing, in a thread that draws nothing."""
        rounds = 0
        while not stop.is_set():
            name = f"other {number}"
            ready = pipe.adapters.prefetch(files[3])
            assert {"a", "b", "c"} <= set(pipe.adapters.names)
            assert str(pipe.adapters)
            if number:
                pipe.adapters.load(ready, name, activate=False, allow_recompile=True)
                pipe.adapters.remove(name)
            rounds += 1
        return rounds

    with ThreadPoolExecutor(THREADS) as pool, ThreadPoolExecutor(2) as others:
        disturbing = [others.submit(disturb, number) for number in range(2)]
        try:
            threaded = [future.result(300) for future in [pool.submit(request) for request in todo]]
        finally:
            stop.set()
        assert all(future.result(300) > 0 for future in disturbing)
    for number, (left, right) in enumerate(zip(threaded, serial, strict=True)):
        assert torch.equal(left, right), number
    assert pipe.adapters.active == {}
    assert pipe.adapters.names == ["a", "b", "c"]
    pipe.adapters.clear()
    pipe.adapters.release_slots()
    assert_unchanged(pipe, bare)


def test_exclusive_holds_the_models_and_changes_nothing() -> None:
    pipe, files, _ = built(prepared=False)
    pipe.adapters.activate({"a": 0.5})
    expected = drawn(pipe, 1, 0)
    inside, leave = Event(), Event()

    def hold() -> Tensor:
        with pipe.adapters.exclusive():
            inside.set()
            assert leave.wait(60)
            return drawn(pipe, 1, 0)

    with ThreadPoolExecutor(2) as pool:
        holding = pool.submit(hold)
        assert inside.wait(60)
        with pytest.raises(diffadapt.AdapterError, match=r"another thread .* pipe.adapters.exclusive\(\)"):
            drawn(pipe, 1, 0)
        # Reading and prefetching wait for nobody.
        ready = pipe.adapters.prefetch(files[3])
        assert pipe.adapters.active == {"a": 0.5}
        upcoming = pool.submit(pipe.adapters.begin, ready, "d", at_step=1)
        changing = pool.submit(pipe.adapters.activate, {"b": 1.0})
        leave.set()
        assert torch.equal(holding.result(60), expected)
        upcoming.result(60).cancel()
        changing.result(60)
    assert pipe.adapters.active == {"b": 1.0}
    assert_differs(drawn(pipe, 1, 0), expected, 1e-4)


def test_a_mix_is_resolved_against_the_adapters_of_its_turn() -> None:
    """While a request waits for its turn, the adapter of a name may become another one."""
    pipe, files, _ = built(prepared=False)
    inside, waiting = Event(), Event()
    few = {name: tensor for name, tensor in files[3].items() if "to_q" in name and "down_blocks" in name}

    def change() -> None:
        with pipe.adapters.exclusive():
            inside.set()
            assert waiting.wait(60)
            pipe.adapters.hotswap("a", few)

    def request() -> Tensor:
        with pipe.adapters.per_sample([{"a": {"unet": 0.5}}, {}]):
            return drawn(pipe, 2, 1)

    with ThreadPoolExecutor(2) as pool:
        changing = pool.submit(change)
        assert inside.wait(60)
        requested = pool.submit(request)
        # Let it reach the models first, where it waits.
        time.sleep(0.2)
        waiting.set()
        changing.result(60)
        found = requested.result(60)
    assert torch.equal(found, request())
