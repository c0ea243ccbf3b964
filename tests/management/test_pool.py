"""Hundreds of adapters for one pipeline, in a fixed amount of memory."""

import gc
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor, nn

import diffadapt
from diffadapt import AdapterPool
from diffadapt.loading.plan import Plan
from tests.support import files, loras, models, spellings
from tests.support.compare import assert_differs, assert_same, assert_unchanged, snapshot

pytestmark = pytest.mark.slow


@pytest.fixture
def pipe() -> StableDiffusionPipeline:
    return models.sd15()


@pytest.fixture
def sources(pipe: StableDiffusionPipeline, tmp_path: Path) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for rank in range(1, 6):
        tensors = spellings.peft_names(loras.parts_for(pipe, rank=4))
        mine = {key: tensor * rank / 3 for key, tensor in tensors.items()}
        found[f"s{rank}"] = files.write(tmp_path / f"s{rank}.safetensors", mine)
    return found


def filled(pipe: StableDiffusionPipeline, sources: dict[str, Path], budget: float, loaded: int = 1) -> AdapterPool:
    size = sum(tensor.nbytes for tensor in spellings.peft_names(loras.parts_for(pipe, rank=4)).values())
    pool = AdapterPool(pipe.adapters, int(budget * size), loaded)
    for name, source in sources.items():
        pool.add(name, source)
    return pool


def drawn_alone(source: Path, scale: float) -> Tensor:
    pipe = models.sd15()
    pipe.load_adapter(source, "x", scale=scale)
    return models.draw(pipe)


@pytest.mark.parametrize("prepared", [False, True], ids=["plain", "slots"])
def test_adapters_are_loaded_on_demand_and_the_oldest_are_dropped(
    pipe: StableDiffusionPipeline, sources: dict[str, Path], prepared: bool
) -> None:
    base = models.draw(pipe)
    if prepared:
        pipe.adapters.prepare_hotswap([next(iter(sources.values()))], slots=2)
    before = snapshot(pipe)
    pool = filled(pipe, sources, budget=2.5)
    assert list(pool) == list(sources)
    assert pool.bytes == 0
    for name, scale in (("s1", 1.0), ("s2", 0.5), ("s3", -1.0), ("s1", 2.0)):
        with pool.activated({name: scale}):
            assert pipe.adapters.active == {name: scale}
            drawn = models.draw(pipe)
        assert_same(drawn, drawn_alone(sources[name], scale))
        assert_differs(drawn, base, 1e-3)
        assert torch.equal(models.draw(pipe), base)
        assert pipe.adapters.names == [name]
        assert 0 < pool.bytes <= pool.budget
    assert pool.ready == ["s3", "s1"]
    with pool.activated(["s4", "s5"]):
        assert set(pipe.adapters.active) == {"s4", "s5"}
    if not prepared:
        with pool.per_sample([{"s1": 1.0}]):
            assert_same(models.draw(pipe), drawn_alone(sources["s1"], 1.0))
    pool.discard("s1")
    with pytest.raises(diffadapt.AdapterError, match="no adapter 's1'"), pool.activated("s1"):
        pass
    pool.close()
    assert pipe.adapters.names == []
    assert torch.equal(models.draw(pipe), base)
    assert_unchanged(pipe, before)


def test_files_are_read_in_the_background_and_broken_ones_reported(
    pipe: StableDiffusionPipeline, sources: dict[str, Path], tmp_path: Path
) -> None:
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"nothing")
    pool = filled(pipe, {**sources, "broken": broken}, budget=10)
    pool.prefetch(*pool)
    with pool.activated("s1"):
        pass
    for _ in range(2):
        with pytest.raises(diffadapt.AdapterError, match="broken"), pool.activated("broken"):
            pass
    with pytest.raises(diffadapt.AdapterError, match="is taken"):
        pool.add("s1", broken)
    with pytest.raises(diffadapt.AdapterError, match="budget is 0"):
        AdapterPool(pipe.adapters, 0)
    with pool.activated("s2"):
        assert set(pool.ready) <= set(sources)
    pool.close()


def test_what_is_read_in_the_background_counts_towards_the_budget(
    pipe: StableDiffusionPipeline, sources: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = filled(pipe, sources, budget=2.5)
    read: list[weakref.ref[nn.Module]] = []
    prefetch = pipe.adapters.prefetch

    def watched(source: Path) -> Plan:
        plan = prefetch(source)
        read.extend(map(weakref.ref, plan.adapters.values()))
        return plan

    monkeypatch.setattr(pool._adapters, "prefetch", watched)
    pool.prefetch(*pool)
    pool._worker.submit(gc.collect).result(60)
    assert pool.ready == ["s4", "s5"]
    assert [reference() is not None for reference in read] == [False] * 6 + [True] * 4
    with pool.activated("s1"):
        assert_same(models.draw(pipe), drawn_alone(sources["s1"], 1.0))
    pool.close()


def test_many_threads_draw_what_one_draws(pipe: StableDiffusionPipeline, sources: dict[str, Path]) -> None:
    pipe.adapters.prepare_hotswap([next(iter(sources.values()))], slots=1)
    pool = filled(pipe, sources, budget=2.5)
    serial: dict[str, Tensor] = {}
    for name in sources:
        with pool.activated(name):
            serial[name] = models.draw(pipe)

    def request(number: int) -> bool:
        name = f"s{number % 5 + 1}"
        with pool.activated(name):
            return torch.equal(models.draw(pipe), serial[name])

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(request, range(24)))
    pool.close()


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))


@pytest.mark.parametrize("prepared", [False, True], ids=["plain", "slots"])
def test_hundreds_of_swaps_leave_no_tensor_behind(net: nn.Module, prepared: bool) -> None:
    adapters = diffadapt.adapters(net)
    generator = torch.Generator().manual_seed(0)
    sources = [
        {
            f"{layer}.lora_{side}.weight": torch.randn(2, 2, generator=generator).repeat(*shape)
            for layer in "01"
            for side, shape in (("A", (1, 2)), ("B", (2, 1)))
        }
        for _ in range(3)
    ]
    if prepared:
        adapters.prepare_hotswap(sources)

    def tensors() -> int:
        gc.collect()
        return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())

    def cycles(count: int) -> None:
        for number in range(count):
            diffadapt.load_adapter(net, sources[number % 3], "a")
            adapters.hotswap("a", sources[(number + 1) % 3])
            adapters.remove("a")

    # Garbage of earlier tests may be collected only now.
    cycles(20)
    tensors()
    cycles(20)
    before = tensors()
    cycles(100)
    assert tensors() == before


def test_a_name_given_to_another_source_while_the_first_is_read_is_read_anew(
    pipe: StableDiffusionPipeline, sources: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = filled(pipe, {"x": sources["s1"]}, budget=3)
    started, proceed = Event(), Event()
    read = pipe.adapters.prefetch

    def slow(source: Path, **options: object) -> object:
        if source == sources["s1"]:
            started.set()
            proceed.wait(60)
        return read(source, **options)

    monkeypatch.setattr(pool._adapters, "prefetch", slow)

    def request() -> Tensor:
        with pool.activated({"x": 1.0}):
            return models.draw(pipe)

    with ThreadPoolExecutor(1) as requests:
        waiting = requests.submit(request)
        started.wait(60)
        pool.discard("x")
        pool.add("x", sources["s5"])
        proceed.set()
        drawn = waiting.result(60)
    assert_same(drawn, drawn_alone(sources["s5"], 1.0), 1e-5)
    with pool.activated({"x": 1.0}):
        assert_same(models.draw(pipe), drawn_alone(sources["s5"], 1.0), 1e-5)
