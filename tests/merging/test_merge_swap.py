"""`hotswap` of a merged adapter: parameters and compiled graphs stay the same."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import diffadapt
from diffadapt.errors import AdapterError
from diffadapt.merging.undo_by_correction import UndoByCorrection
from diffadapt.runtime.bank import bank_of
from tests.support import loras, models, spellings
from tests.support.compare import assert_differs, assert_same, assert_unchanged, snapshot
from tests.support.small_models import predict, unet
from tests.support.swaps import CONFIGS, ON_CONVOLUTIONS, make

ALL = CONFIGS | ON_CONVOLUTIONS
NAMES = (
    "dora",
    "oft",
    "lokr whole",
    "lora elsewhere",
    "boft on outputs",
    "ia3",
    "conv loha",
    "loha",
    "conv oft",
    "lora",
)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("compact", [None, True, False])
def test_a_merged_adapter_of_any_type_replaces_any_other(
    compact: bool | None, dtype: torch.dtype, tmp_path: Path
) -> None:
    sources = {name: make(unet, ALL[name], tmp_path / name) for name in NAMES}
    model = unet().to(dtype)
    before = snapshot(model)
    diffadapt.load_adapter(model, sources["loha"], "other", scale=0.05)
    diffadapt.load_adapter(model, sources["lora"], "a", scale=0.1)
    adapters = diffadapt.adapters(model)
    adapters.merge(compact=compact)
    places = {path: (id(p), p.data_ptr()) for path, p in model.named_parameters() if "diffadapt" not in path}
    for name in NAMES:
        adapters.hotswap("a", sources[name])
        alone = unet().to(dtype)
        diffadapt.load_adapter(alone, sources["loha"], "other", scale=0.05)
        diffadapt.load_adapter(alone, sources[name], "a", scale=0.1)
        diffadapt.adapters(alone).merge()
        assert all(torch.equal(mine, its) for mine, its in zip(model.parameters(), alone.parameters(), strict=True))
        assert adapters.merged == ["other", "a"]
        assert adapters.active == {"other": 0.05, "a": 0.1}
    adapters.hotswap("a", sources["oft"], scale=0.2)
    assert adapters.active["a"] == 0.2
    assert {path: (id(p), p.data_ptr()) for path, p in model.named_parameters() if "diffadapt" not in path} == places
    is_compact = compact is True or (compact is None and dtype == torch.bfloat16)
    assert any(isinstance(way, UndoByCorrection) for way in bank_of(model).undo) == is_compact
    adapters.clear()
    assert_unchanged(model, before)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("prepared", [False, True])
def test_a_compiled_model_is_not_recompiled(prepared: bool, counter: CompileCounterWithBackend, tmp_path: Path) -> None:
    # Without slots, a layer that gets its first adapter changes its class.
    names = ("lokr whole", "oft", "dora", "lora", "lora elsewhere", *(("conv loha", "conv oft") if prepared else ()))
    sources = {name: make(unet, ALL[name], tmp_path / name) for name in names}
    model = unet()
    base = predict(model)
    adapters = diffadapt.adapters(model)
    if prepared:
        adapters.prepare_hotswap(list(sources.values()))
    diffadapt.load_adapter(model, sources[names[0]], "a", scale=0.5)
    adapters.merge()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    alone = model
    for name in names:
        last = predict(compiled)
        if name != names[0]:
            adapters.hotswap("a", sources[name])
            assert_differs(predict(compiled), last, 1e-4)
        alone = unet()
        diffadapt.load_adapter(alone, sources[name], "a", scale=0.5)
        assert_same(predict(compiled), predict(alone), 3e-5)
    if prepared:
        adapters.unmerge()
        assert_same(predict(compiled), predict(alone))
    adapters.clear() if prepared else adapters.unmerge()
    assert counter.frame_count == 1
    if prepared:
        assert torch.equal(predict(compiled), base)
        assert counter.frame_count == 1


@pytest.mark.slow
@torch.no_grad()
def test_a_merged_adapter_has_no_seat_and_gets_one_when_it_is_unmerged(
    counter: CompileCounterWithBackend, tmp_path: Path
) -> None:
    lora, dora, oft = (make(unet, CONFIGS[name], tmp_path / name) for name in ("lora", "dora", "oft"))
    model = unet()
    adapters = diffadapt.adapters(model)
    adapters.prepare_hotswap([lora, dora, oft], slots=1)
    diffadapt.load_adapter(model, dora, "a", scale=0.5)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    adapters.merge("a")
    adapters.hotswap("a", oft)
    assert bank_of(model).reservation.seated == {} or "a" not in bank_of(model).reservation.seated
    diffadapt.load_adapter(model, lora, "b", scale=0.5)
    both = predict(compiled)
    adapters.remove("b")
    alone = predict(compiled)
    assert_differs(both, alone, 1e-4)
    adapters.unmerge()
    assert "a" in bank_of(model).reservation.seated
    assert_same(predict(compiled), alone, 3e-5)
    assert counter.frame_count == 1


@torch.no_grad()
@pytest.mark.parametrize("compact", [True, False])
@pytest.mark.parametrize("fault", ["result", "attaching", "file", "mixture"])
def test_a_swap_that_fails_changes_nothing(
    fault: str, compact: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere, loha = (make(unet, CONFIGS[name], tmp_path / name) for name in ("lora elsewhere", "loha"))
    model = unet().to(torch.float16)
    clean = snapshot(model)
    diffadapt.load_adapter(model, elsewhere, "a", scale=0.05)
    adapters = diffadapt.adapters(model)
    adapters.merge("a", compact=compact)
    if fault == "mixture":
        # It multiplies weights that the first adapter does not change, but the second one would.
        oft = diffadapt.OFTConfig(block_size=4, target_modules=r".*\.to_q", init=False)
        diffadapt.load_adapter(model, make(unet, oft, tmp_path / "b"), "b")
    before, kept, old = snapshot(model), adapters.undo_bytes, adapters["a"].components["unet"]
    source = {"nonsense": torch.ones(1)} if fault == "file" else loha
    if fault == "attaching":
        monkeypatch.setattr("diffadapt.loading.attach_plan.install_", refuse_once())
    with pytest.raises(AdapterError):
        adapters.hotswap("a", source, scale=1e8 if fault == "result" else None)
    if fault != "attaching":
        assert_unchanged(model, before)
    assert all(torch.equal(value, before[f"model.state.{key}"]) for key, value in model.state_dict().items())
    assert (adapters.merged, adapters.undo_bytes) == (["a"], kept)
    assert adapters["a"].components["unet"] is old
    adapters.clear()
    assert_unchanged(model, clean)


def refuse_once() -> Callable[..., None]:
    calls: list[object] = []

    def install(*args: object) -> None:
        calls.append(args)
        if len(calls) == 1:
            raise AdapterError("somebody refuses")

    return install


@torch.no_grad()
def test_a_merged_adapter_may_be_swapped_for_one_on_other_components() -> None:
    pipe = models.sd15().to(torch.bfloat16)
    before = snapshot(pipe)
    unet_only = loras.parts_for(pipe, ("unet",), "to_q")
    text_only = loras.parts_for(pipe, ("text_encoder",), "q_proj")
    everything = {**loras.parts_for(pipe, ("unet",), "to_k"), **text_only}
    pipe.load_adapter(spellings.kohya_names(unet_only), "a", scale=0.5)
    pipe.adapters.merge("a")
    for parts in (text_only, everything, unet_only, text_only):
        pipe.adapters.hotswap("a", spellings.kohya_names(parts))
        assert set(pipe.adapters["a"].components) == set(parts)
        alone = models.sd15().to(torch.bfloat16)
        alone.load_adapter(spellings.kohya_names(parts), "a", scale=0.5)
        alone.adapters.merge("a")
        for component in ("unet", "text_encoder"):
            state, expected = (getattr(owner, component).state_dict() for owner in (pipe, alone))
            assert all(torch.equal(value, expected[key]) for key, value in state.items())
    pipe.adapters.clear()
    assert_unchanged(pipe, before)


def test_a_weight_that_two_layers_share_is_not_merged() -> None:
    """The first and the last layer of a language model share a weight: changing one would change the other."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Embedding(11, 8), nn.Linear(8, 11, bias=False)
            self.last.weight = self.first.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.last(torch.tanh(self.first(ids)))

    torch.manual_seed(0)
    model, ids = Tied().requires_grad_(False), torch.arange(11)
    base, weight = model(ids), model.first.weight.clone()
    for targets in (["first"], ["last"], ["first", "last"]):
        diffadapt.add_adapter(model, diffadapt.LoraConfig(rank=2, target_modules=targets, init=False), "a")
        expected = model(ids)
        assert_differs(expected, base)
        with pytest.raises(diffadapt.AdapterError, match="another layer has the same weight"):
            diffadapt.adapters(model).merge("a")
        assert torch.equal(model(ids), expected)
        assert torch.equal(model.first.weight, weight)
        diffadapt.adapters(model).clear()
