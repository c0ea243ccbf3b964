"""Slots: adapters that come, go and change on a compiled model without a recompile."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import diffadapt
from diffadapt.files.checkpoint import Location
from diffadapt.runtime.bank import bank_of
from tests.support import loras, models, spellings
from tests.support.compare import assert_differs, assert_same, assert_unchanged, snapshot
from tests.support.small_models import clip, flux, predict, unet
from tests.support.swaps import ATTENTION, CONFIGS, LORA, ON_CONVOLUTIONS, make
from tests.support.versions import needs

pytestmark = pytest.mark.slow


def alone(build: Callable[[], nn.Module], *sources: tuple[Path, Any]) -> Tensor:
    """Return the output of a new model without slots, with these adapters."""
    model = build()
    for number, (source, scale) in enumerate(sources):
        diffadapt.load_adapter(model, source, f"n{number}", scale=scale)
    return predict(model)


SOME = ("lora", "lora of a higher rank on more layers", "lora elsewhere", "dora", "lokr whole", "oft", "loha")

CASES: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "unet": (unet, "full"),
    "flux-by-block": (flux, "blocks"),
    "text-encoder": (clip, "full"),
}


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_every_type_swaps_without_a_recompile(case: str, counter: CompileCounterWithBackend, tmp_path: Path) -> None:
    build, how = CASES[case]
    if how != "full":
        needs("diffusers", "0.35", "compile_repeated_blocks")
    configs = CONFIGS | ON_CONVOLUTIONS if case == "unet" else {name: CONFIGS[name] for name in SOME}
    sources = {name: make(build, config, tmp_path / str(i)) for i, (name, config) in enumerate(configs.items())}
    model = build()
    base = predict(model)
    adapters = diffadapt.adapters(model)
    # Every slot is traced. One slot is enough where it has room for all types.
    slots = 1 if case == "unet" else 2
    adapters.prepare_hotswap(list(sources.values()), slots=slots)
    call: nn.Module = model
    if how == "full":
        call = torch.compile(model, backend=counter, fullgraph=True)  # type: ignore[assignment]
        assert torch.equal(predict(call), base)
    else:
        model.compile_repeated_blocks(backend=counter, fullgraph=True)  # type: ignore[operator]
        with torch._dynamo.config.patch(error_on_recompile=False):
            # Compile twice, since the first and the later blocks get inputs of different strides.
            for _ in range(2):
                predict(call)
    graphs = counter.frame_count
    first, *others = sources
    diffadapt.load_adapter(model, sources[first], "one")
    for name in others:
        before = predict(call)
        report = adapters.hotswap("one", sources[name])
        assert report.unused == []
        swapped = predict(call)
        assert_same(swapped, alone(build, (sources[name], 1.0)))
        assert_differs(swapped, before, 1e-3)
    if slots == 1:
        adapters.activate([])
    diffadapt.load_adapter(model, sources["dora"], "two", scale=0.5)
    last = float(slots == 2)
    assert_same(predict(call), alone(build, (sources[others[-1]], last), (sources["dora"], 0.5)))
    prefix = next(iter(adapters["two"].components.values())).layers
    block = next(iter(prefix)).split(".")[0]
    adapters.activate({**({"one": -0.5} if slots == 2 else {}), "two": {block: 2.0}})
    assert_same(predict(call), alone(build, (sources[others[-1]], -0.5 * last), (sources["dora"], {block: 2.0})))
    with adapters.disabled():
        assert torch.equal(predict(call), base)
    adapters.remove("one")
    assert_same(predict(call), alone(build, (sources["dora"], {block: 2.0})))
    adapters.merge("two")
    assert_same(predict(call), alone(build, (sources["dora"], {block: 2.0})), 3e-5)
    adapters.clear()
    assert torch.equal(predict(call), base)
    assert counter.frame_count == graphs
    assert graphs == 1 or how == "blocks"


@torch.no_grad()
def test_an_adapter_without_room_changes_nothing_and_is_told_what_to_do(
    counter: CompileCounterWithBackend, tmp_path: Path
) -> None:
    fits = make(unet, CONFIGS["lora"], tmp_path / "fits")
    too_much = {
        "rank 8 expected, slots for rank 4": LORA(rank=8, target_modules=ATTENTION, init=False),
        "no slots are reserved there$|no slots are reserved there\\.": LORA(
            rank=2, target_modules=["linear_1"], init=False
        ),
        "oft .* expected, no slots are reserved there for it": diffadapt.OFTConfig(
            block_size=4, target_modules=ATTENTION, init=False
        ),
        "ia3-lycoris .* expected, no slots": LORA(rank=2, use_dora=True, target_modules=ATTENTION, init=False),
    }
    model = unet()
    adapters = diffadapt.adapters(model)
    adapters.prepare_hotswap(fits)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    diffadapt.load_adapter(model, fits, "a", scale=0.5)
    output, before = predict(compiled), snapshot(model)
    assert_same(output, alone(unet, (fits, 0.5)))
    source = fits
    for number, (message, config) in enumerate(too_much.items()):
        source = make(unet, config, tmp_path / str(number), "peft")
        with pytest.raises(diffadapt.AdapterError, match=message) as caught:
            adapters.hotswap("a", source)
        assert "prepare_hotswap" in str(caught.value)
        with pytest.raises(diffadapt.AdapterError, match=message):
            diffadapt.load_adapter(model, source, "b")
        with pytest.raises(diffadapt.AdapterError, match=message):
            diffadapt.load_adapter(model, source, "b", activate=False)
        assert adapters.active == {"a": 0.5}
    assert_unchanged(model, before)
    assert torch.equal(predict(compiled), output)
    assert counter.frame_count == 1
    with torch._dynamo.config.patch(error_on_recompile=False):
        adapters.hotswap("a", source, allow_recompile=True)
        assert_same(predict(compiled), alone(unet, (source, 0.5)))
        assert_same(predict(model), alone(unet, (source, 0.5)))
        adapters.hotswap("a", fits)
        assert_same(predict(compiled), output)
    adapters.clear()
    adapters.release_slots()
    assert bank_of(model) is None


@torch.no_grad()
def test_more_adapters_than_slots_take_turns(tmp_path: Path) -> None:
    sources = [make(flux, LORA(rank=r, target_modules=ATTENTION, init=False), tmp_path / str(r)) for r in (2, 4, 3)]
    model = flux()
    base = predict(model)
    adapters = diffadapt.adapters(model)
    adapters.prepare_hotswap(sources, slots=2)
    for number, source in enumerate(sources):
        diffadapt.load_adapter(model, source, f"n{number}", activate=False)
    assert torch.equal(predict(model), base)
    for chosen in ({0: 1.0}, {2: 1.0}, {1: 0.5, 2: 2.0}, {0: 1.0, 1: 1.0}, {2: 1.0}):
        adapters.activate({f"n{number}": scale for number, scale in chosen.items()})
        assert_same(predict(model), alone(flux, *((sources[number], scale) for number, scale in chosen.items())))
    output = predict(model)
    with pytest.raises(
        diffadapt.AdapterError, match=r"rank \d expected, \d of 8 rows are free there; n.* took the others"
    ):
        adapters.activate(["n0", "n1", "n2"])
    assert adapters.active == {"n2": 1.0}
    assert torch.equal(predict(model), output)


@torch.no_grad()
@pytest.mark.parametrize("reverse", [False, True])
def test_the_order_of_the_tensors_in_a_file_does_not_matter(reverse: bool) -> None:
    """Every layer keeps its own gate, although alphas and strengths differ from layer to layer."""
    pipe = models.sd15()
    found = pipe.unet.named_modules()
    linears = [(path, module) for path, module in found if path.endswith(("to_q", "to_k", "to_out.0"))]
    tensors: dict[str, Tensor] = {}
    for number, (path, module) in enumerate(sorted(linears, reverse=reverse), 1):
        flat = f"lora_unet_{path.replace('.', '_')}"
        tensors[f"{flat}.lora_down.weight"] = torch.randn(2, module.in_features)
        tensors[f"{flat}.lora_up.weight"] = torch.randn(module.out_features, 2)
        tensors[f"{flat}.alpha"] = torch.tensor(float(number))
    scale = {"unet.up_blocks": 0.2, "unet.down_blocks": 1.5}
    plain = predict(pipe.unet)
    pipe.load_adapter(tensors, "a", scale=scale)
    expected = predict(pipe.unet)
    assert_differs(expected, plain)
    pipe.adapters.clear()
    pipe.adapters.prepare_hotswap([tensors])
    pipe.load_adapter(tensors, "a", scale=scale)
    assert_same(predict(pipe.unet), expected)
    pipe.adapters.hotswap("a", tensors)
    assert_same(predict(pipe.unet), expected)


@torch.no_grad()
def test_an_adapter_may_get_rows_that_are_not_adjacent(tmp_path: Path) -> None:
    ranks = {"a": 3, "b": 1, "c": 3, "d": 6}
    sources = {n: make(flux, LORA(rank=r, target_modules=["to_q"], init=False), tmp_path / n) for n, r in ranks.items()}
    model = flux()
    adapters = diffadapt.adapters(model)
    adapters.prepare_hotswap(list(sources.values()), slots=1, rank=7)
    for name in "abc":
        diffadapt.load_adapter(model, sources[name], name)
    for name in "ac":
        adapters.remove(name)
    diffadapt.load_adapter(model, sources["d"], "d")
    assert_same(predict(model), alone(flux, (sources["b"], 1.0), (sources["d"], 1.0)))
    adapters.clear()
    reservation = bank_of(model).reservation
    assert all(not parameter.any() for parameter in reservation.parameters())


@torch.no_grad()
def test_a_pipeline_with_text_encoders_swaps_adapters(tmp_path: Path) -> None:
    pipe, plain = models.sd15(), models.sd15()
    one = spellings.peft_names(loras.parts_for(pipe, rank=4))
    two = spellings.peft_names({"unet": loras.parts_for(pipe, rank=2)["unet"]})
    copies = {key: tensor.clone() for key, tensor in one.items()}
    base = models.draw(pipe)
    print(pipe.adapters.prepare_hotswap([one]))
    pipe.load_adapter(one, "a", scale={"unet": 0.5})
    plain.load_adapter(one, "a", scale={"unet": 0.5})
    assert_same(models.draw(pipe), models.draw(plain))
    assert_differs(models.draw(pipe), base)
    # The new adapter has no layer in the text encoder, and the user's scale is kept.
    pipe.adapters.hotswap("a", two)
    assert list(pipe.adapters["a"].components) == ["unet"]
    assert pipe.adapters.active == {"a": {"unet": 0.5}}
    plain.adapters.clear()
    plain.load_adapter(two, "a", scale=0.5)
    assert_same(models.draw(pipe), models.draw(plain))
    pipe.adapters.hotswap("a", one, scale=0.25)
    plain.adapters.hotswap("a", one, scale=0.25)
    assert_same(models.draw(pipe), models.draw(plain))
    halved = models.draw(pipe, cross_attention_kwargs={"scale": 0.5})
    pipe.adapters.activate({"a": 0.125})
    assert_same(halved, models.draw(pipe))
    assert all(torch.equal(tensor, copies[key]) for key, tensor in one.items())
    incomplete = {key: tensor for key, tensor in one.items() if not key.startswith("text_encoder") or "lora_A" in key}
    with pytest.raises(diffadapt.AdapterError):
        pipe.adapters.hotswap("a", incomplete)
    assert_same(halved, models.draw(pipe))
    pipe.adapters.save("a", tmp_path)
    plain.adapters.clear()
    plain.load_adapter(tmp_path, "a", scale=0.125)
    assert_same(halved, models.draw(plain))


@torch.no_grad()
def test_a_swap_installs_and_removes_tokens() -> None:
    pipe = models.sd15()
    vectors = [torch.randn(2, models.WIDTH, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]
    layers = spellings.peft_names({"unet": loras.parts_for(pipe)["unet"]})
    one, two = ({**layers, "bundle_emb.critter.clip_l": part} for part in vectors)
    pipe.adapters.prepare_hotswap([one])
    base = models.draw(pipe, prompt="a critter")
    drawn: list[Tensor] = []
    for source in (one, two, layers):
        if not drawn:
            pipe.load_adapter(source, "a")
        else:
            pipe.adapters.hotswap("a", source)
        drawn.append(models.draw(pipe, prompt="a critter"))
        assert ("critter_1" in pipe.tokenizer.get_vocab()) == (source is not layers)
    assert_differs(drawn[0], drawn[1], 1e-3)
    assert_differs(drawn[1], drawn[2], 1e-3)
    prefetched = pipe.adapters.prefetch(two)
    pipe.adapters.hotswap("a", prefetched)
    assert torch.equal(models.draw(pipe, prompt="a critter"), drawn[1])
    broken = dict(two)
    broken.pop(next(iter(layers)))
    with pytest.raises(diffadapt.AdapterError):
        pipe.adapters.hotswap("a", broken)
    assert torch.equal(models.draw(pipe, prompt="a critter"), drawn[1])
    pipe.adapters.clear()
    assert torch.equal(models.draw(pipe, prompt="a critter"), base)


@torch.no_grad()
def test_an_adapter_for_a_component_without_slots_is_refused() -> None:
    pipe = models.sd15()
    parts = loras.parts_for(pipe)
    pipe.adapters.prepare_hotswap(spellings.peft_names({"unet": parts["unet"]}))
    with pytest.raises(diffadapt.AdapterError, match="text_encoder: no slots are reserved there"):
        pipe.load_adapter(spellings.peft_names(parts), "a")
    assert pipe.adapters.names == []
    pipe.load_adapter(spellings.peft_names(parts), "a", components=["unet"])
    assert pipe.adapters.active == {"a": 1.0}


@torch.no_grad()
def test_loaded_adapters_get_slots(tmp_path: Path) -> None:
    sources = [make(unet, CONFIGS[name], tmp_path / name) for name in ("lora", "dora", "oft")]
    model = unet()
    before = snapshot(model)
    adapters = diffadapt.adapters(model)
    for number, source in enumerate(sources):
        diffadapt.load_adapter(model, source, f"n{number}", scale=0.5)
    adapters.activate({"n0": 0.5, "n2": 1.5})
    output = predict(model)
    reserved = adapters.prepare_hotswap()
    assert reserved.slots == 2
    assert reserved.bytes == sum(p.numel() * p.element_size() for p in bank_of(model).reservation.parameters())
    assert_same(predict(model), output)
    adapters.activate({"n1": 1.0})
    assert_same(predict(model), alone(unet, (sources[1], 1.0)))
    with pytest.raises(diffadapt.AdapterError, match="slots is 0, expected at least 1"):
        adapters.prepare_hotswap(slots=0)
    adapters.prepare_hotswap(slots=3)
    adapters.activate({"n0": 0.5, "n2": 1.5})
    assert_same(predict(model), output)
    adapters.release_slots()
    assert_same(predict(model), output)
    adapters.clear()
    assert_unchanged(model, before)


@torch.no_grad()
def test_slots_are_reserved_for_settings(tmp_path: Path) -> None:
    pipe = models.sd15()
    text = LORA(rank=4, target_modules=["q_proj", "v_proj"])
    reserved = pipe.adapters.prepare_hotswap([LORA(rank=8, target_modules="all-linear"), {"text_encoder": text}])
    assert set(reserved.layers) == {"unet", "text_encoder"}
    parts = loras.parts_for(pipe, rank=8)
    pipe.load_adapter(spellings.peft_names({"unet": parts["unet"]}), "a")
    assert_differs(models.draw(pipe), models.draw(models.sd15()))
    with pytest.raises(diffadapt.AdapterError, match="no component transformer"):
        pipe.adapters.prepare_hotswap({"transformer": text})
    with pytest.raises(diffadapt.AdapterError, match="nothing to reserve for"):
        models.sd15().adapters.prepare_hotswap()


@torch.no_grad()
def test_hotswap_works_without_slots_and_changes_nothing_if_it_fails(tmp_path: Path) -> None:
    one, two = (make(unet, CONFIGS[name], tmp_path / name) for name in ("lora", "loha"))
    model = unet()
    adapters = diffadapt.adapters(model)
    with pytest.raises(diffadapt.AdapterError, match="no adapter 'a'"):
        adapters.hotswap("a", one)
    diffadapt.load_adapter(model, one, "a", scale=0.5)
    adapters.hotswap("a", two)
    assert_same(predict(model), alone(unet, (two, 0.5)))
    with pytest.raises(diffadapt.AdapterError):
        adapters.hotswap("a", tmp_path / "nothing.safetensors", where=Location(local_files_only=True))
    assert_same(predict(model), alone(unet, (two, 0.5)))


@torch.no_grad()
def test_slots_survive_copies_other_dtypes_and_layerwise_casting(tmp_path: Path) -> None:
    source = make(unet, CONFIGS["dora"], tmp_path / "dora")
    model = unet()
    adapters = diffadapt.adapters(model)
    adapters.prepare_hotswap(source)
    diffadapt.load_adapter(model, source, "a", scale=0.5)
    output = predict(model)
    again = copy.deepcopy(model)
    adapters.activate({"a": 0.0})
    assert_same(predict(again), output)
    diffadapt.adapters(again).activate({"a": 0.25})
    assert_same(predict(again), alone(unet, (source, 0.25)))
    double = again.double()
    assert_same(
        double(torch.ones(1, 4, 8, 8).double(), 1, torch.ones(1, 4, models.WIDTH).double()).sample.float(),
        _at_ones(source, 0.25),
    )
    cast = unet()
    cast.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    plain = unet()
    plain.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    diffadapt.adapters(cast).prepare_hotswap(source)
    for casting in (cast, plain):
        diffadapt.load_adapter(casting, source, "a")
    assert_same(predict(cast), predict(plain))


def _at_ones(source: Path, scale: float) -> Tensor:
    model = unet()
    diffadapt.load_adapter(model, source, "a", scale=scale)
    return model(torch.ones(1, 4, 8, 8), 1, torch.ones(1, 4, models.WIDTH)).sample


@torch.no_grad()
def test_slots_compute_in_half_precision(tmp_path: Path) -> None:
    for name in ("oft on outputs", "dora", "lora with a bias"):
        source = make(unet, CONFIGS[name], tmp_path / name)
        outputs: list[Tensor] = []
        for prepared in (False, True):
            model = unet().to(torch.bfloat16)
            if prepared:
                diffadapt.adapters(model).prepare_hotswap(source)
            diffadapt.load_adapter(model, source, "a")
            ones = (torch.ones(shape, dtype=torch.bfloat16) for shape in ((1, 4, 8, 8), (1, 4, models.WIDTH)))
            outputs.append(model(next(ones), 1, next(ones)).sample)
        assert outputs[0].dtype == torch.bfloat16
        assert_same(outputs[1].float(), outputs[0].float(), 2e-2)


def test_a_component_that_refuses_to_let_the_old_adapter_go_leaves_all_of_it(tmp_path: Path) -> None:
    """While group offloading copies its weights, the denoiser cannot get its own inputs back."""
    pipe = models.flux_control()
    adapters = diffadapt.adapters(pipe)
    latents, hidden = pipe.transformer.x_embedder.in_features, pipe.transformer.x_embedder.out_features
    control = {
        "transformer.x_embedder.lora_A.weight": torch.randn(2, 2 * latents),
        "transformer.x_embedder.lora_B.weight": torch.randn(hidden, 2),
    }
    pipe.load_adapter(control, "a")
    old = adapters["a"].components["transformer"]
    pipe.transformer.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")
    hook = pipe.transformer.x_embedder._diffusers_hook.get_hook("group_offloading")
    offloading = hook.config if hasattr(hook, "config") else hook.group
    offloading.stream = object()
    path = next(path for path, _ in pipe.text_encoder.named_modules() if path.endswith("q_proj"))
    width = pipe.text_encoder.config.hidden_size
    text = {
        f"text_encoder.{path}.lora_{side}.weight": torch.randn(*shape)
        for side, shape in (("A", (2, width)), ("B", (width, 2)))
    }
    with pytest.raises(diffadapt.AdapterError, match="group offloading keeps a copy"):
        adapters.hotswap("a", text)
    assert adapters["a"].components == {"transformer": old}
    offloading.stream = None
    adapters.hotswap("a", text)
    assert set(adapters["a"].components) == {"text_encoder"}


@torch.no_grad()
def test_an_adapter_runs_outside_on_components_that_were_not_reserved() -> None:
    pipe = models.sd15()
    pipe.load_adapter(spellings.peft_names(loras.parts_for(pipe)), "a")
    drawn = models.draw(pipe)
    reserved = pipe.adapters.prepare_hotswap(components=["unet"])
    assert list(reserved.layers) == ["unet"]
    assert_same(models.draw(pipe), drawn)
    pipe.adapters.activate("a", 0.5)
    half = models.draw(pipe)
    pipe.adapters.prepare_hotswap()
    assert_same(models.draw(pipe), half)
    pipe.adapters.release_slots()
    assert_same(models.draw(pipe), half)
    pipe.adapters.activate("a")
    assert_same(models.draw(pipe), drawn)
