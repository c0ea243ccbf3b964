"""Merging into quantised weights: decoded, changed, encoded by the backend's own quantiser, undone bit for bit."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import diffadapt
from diffadapt import AdapterError, weights
from diffadapt.runtime.bank import bank_of
from tests.support import formulas
from tests.support.bases import BASES, INPUTS, OUT, Base, silenced
from tests.support.compare import relative_error

pytestmark = pytest.mark.filterwarnings("ignore")

VARIANTS = {
    "lora": formulas.added(formulas.lora_factors, 0.25, **formulas.alpha(1.0)),
    "dora": formulas.dora(formulas.added(formulas.lora_factors, 0.25, **formulas.alpha(1.0))),
    "lokr": formulas.added(formulas.lokr(""), 1.0, **formulas.alpha(float("inf"))),
    "oft": formulas.oft_of_lycoris(formulas.eight),
    "bias": formulas.full_bias_alone,
}
MERGING = [base for base in BASES if base.merges]
BY_NAME = {base.name: base for base in BASES}
FEW = [BY_NAME[name] for name in ("bitsandbytes nf4", "bitsandbytes int8", "torchao int8", "gguf Q4_K", "BFL float8")]


def model_of(base: Base, count: int = 1) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Sequential(base.layer(seed)) for seed in range(count))).eval()


@torch.no_grad()
def computed(layer: nn.Module) -> tuple[Tensor, Tensor]:
    """Return the weight and bias that a layer computes with, in float64, from unit vectors."""
    with silenced():
        bias = layer(torch.zeros(1, INPUTS)).double()
        return (layer(torch.eye(INPUTS)).double() - bias).T, bias[0]


def load(model: nn.Module, variant: str, name: str = "a", path: str = "0.0", **options: Any) -> formulas.Content:
    """Load an adapter onto a layer. Return what it should become at strength 1, from independently decoded numbers."""
    return load_values(model, variant, *computed(model.get_submodule(path)), name=name, path=path, **options)


def load_values(
    model: nn.Module,
    variant: str,
    weight: Tensor,
    bias: Tensor | None = None,
    name: str = "a",
    path: str = "0.0",
    **options: Any,
) -> formulas.Content:
    torch.manual_seed(sum(map(ord, name)))
    content = VARIANTS[variant](weight.double(), bias)
    assert content is not None
    tensors = {f"{path}.{key}": tensor.float() for key, tensor in content.tensors.items()}
    try:
        diffadapt.adapters(model).load(tensors, name, **options)
    except AdapterError as error:
        if "HQQLinear cannot carry an adapter" not in str(error):
            raise
        pytest.skip("HQQ's layers cannot carry adapters yet")
    return content


def bits(model: nn.Module) -> list[Tensor]:
    """Return copies of all parts of all weights and biases, as bytes."""
    found: list[Tensor] = []
    for layer in (module[0] for module in model.children() if isinstance(module, nn.Sequential)):
        try:
            parts = dict(weights.codec_of(layer, "weight").parts(layer, "weight"))
        except AdapterError:
            parts = dict(layer.state_dict())
        tensors = [*(part.detach() for part in parts.values()), layer.bias.detach()]
        found += [tensor.clone().contiguous().view(-1).view(torch.uint8) for tensor in tensors]
    return found


def assert_bits(model: nn.Module, before: list[Tensor]) -> None:
    found = bits(model)
    assert len(found) == len(before)
    assert all(map(torch.equal, found, before))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("base", MERGING, ids=lambda base: base.name)
def test_merged_is_what_runs_and_undoing_restores_every_bit(base: Base, variant: str) -> None:
    model = model_of(base)
    computed(model)  # bitsandbytes may change the layout at the first call
    unchanged, before = computed(model), bits(model)
    expected = load(model, variant)
    running = computed(model)
    adapters = diffadapt.adapters(model)
    adapters.merge("a")
    merged = computed(model)
    # Layers that quantise their input, too, are a little off their own weight.
    for (weight, bias), limit in ((running, 0.03), (merged, base.error + 0.03)):
        assert relative_error(weight, expected.weight) < limit
        assert expected.bias is not None
        assert relative_error(bias, expected.bias) < 0.03
    changed = 1 if variant == "bias" else 0
    assert relative_error(merged[changed], unchanged[changed]) > 0.5
    assert adapters.undo_bytes < 1.01 * sum(map(len, before))
    errors = adapters.requantisation_errors
    assert errors.keys() == (set() if variant == "bias" else {"model.0.0"})
    assert all(0 < error < 0.5 for error in errors.values())
    adapters.unmerge()
    assert_bits(model, before)
    assert adapters.undo_bytes == 0
    assert adapters.requantisation_errors == {}
    assert all(map(torch.equal, computed(model), running))
    adapters.clear()
    assert all(map(torch.equal, computed(model), unchanged))


@pytest.mark.parametrize("base", MERGING, ids=lambda base: base.name)
def test_a_layer_that_was_never_called_is_merged_and_undone(base: Base) -> None:
    model, untouched = model_of(base), model_of(base)
    before, weight = bits(model), weights.decoded(model[0][0], "weight")
    content = load_values(model, "lora", weight)
    diffadapt.adapters(model).merge("a")
    assert relative_error(computed(model)[0], content.weight) < base.error + 0.03
    diffadapt.adapters(model).unmerge()
    assert_bits(model, before)
    diffadapt.adapters(model).clear()
    assert all(map(torch.equal, computed(model), computed(untouched)))


@pytest.mark.parametrize("base", [base for base in BASES if not base.merges], ids=lambda base: base.name)
def test_what_cannot_be_encoded_is_refused_and_a_bias_is_merged_all_the_same(base: Base) -> None:
    model = model_of(base, 2)
    before = bits(model)
    load(model, "lora", "a", "1.0")
    with pytest.raises(AdapterError, match=r"model\.1\.0: its weight is quantised .* keep it unmerged"):
        diffadapt.adapters(model).merge("a")
    assert_bits(model, before)
    expected = load(model, "bias", "b")
    diffadapt.adapters(model).merge("b")
    assert expected.bias is not None
    assert relative_error(computed(model[0])[1], expected.bias) < 0.03
    diffadapt.adapters(model).clear()
    assert_bits(model, before)


@pytest.mark.parametrize("base", FEW, ids=lambda base: base.name)
def test_several_at_their_strengths_swapped_disabled_and_copied(base: Base) -> None:
    model = model_of(base, 2)
    for layer in model:
        computed(layer)
    before, plain = bits(model), computed(model[0])
    second = load(model, "oft", "b")
    adapters = diffadapt.adapters(model)
    adapters.activate({})
    first = load(model, "lora", "a", scale=0.5)
    adapters.activate({"a": 0.5, "b": 2.0})
    weight = (first.weight + 4 * second.weight - 3 * plain[0]) / 2
    adapters.merge("b")
    adapters.merge("a")
    assert relative_error(computed(model[0])[0], weight) < base.error + 0.03
    merged = bits(model)
    with adapters.disabled():
        assert all(map(torch.equal, computed(model[0]), plain))
    assert_bits(model, merged)
    # diffusers' GGUF parameters cannot be copied.
    copy = None if base.needs == "gguf" else deepcopy(model)
    torch.manual_seed(3)
    other = VARIANTS["oft"](*plain)
    assert other is not None
    adapters.hotswap("a", {f"1.0.{key}": tensor.float() for key, tensor in other.tensors.items()})
    assert relative_error(computed(model[0])[0], plain[0] + 2 * (second.weight - plain[0])) < base.error + 0.03
    assert set(adapters.requantisation_errors) == {"model.0.0", "model.1.0"}
    adapters.clear()
    assert_bits(model, before)
    if copy is not None:
        assert_bits(copy, merged)
        diffadapt.adapters(copy).unmerge()
        assert_bits(copy, before)


@pytest.mark.parametrize("base", MERGING, ids=lambda base: base.name)
def test_while_merged_the_original_weight_is_what_others_read(base: Base) -> None:
    model = model_of(base)
    weight, _ = computed(model)
    content = load(model, "dora")
    adapters = diffadapt.adapters(model)
    adapters.merge("a")
    merged = bits(model)
    adapters.to_lora("a", "b", rank=OUT)
    assert_bits(model, merged)
    adapters.unmerge()
    adapters.activate("b")
    assert relative_error(computed(model)[0], content.weight) < 0.03
    assert relative_error(content.weight, weight) > 0.5


@pytest.mark.parametrize("base", MERGING, ids=lambda base: base.name)
@pytest.mark.parametrize("merged_before", [False, True])
def test_a_merge_that_fails_halfway_is_taken_back(base: Base, merged_before: bool) -> None:
    model = model_of(base, 2)
    for layer in model:
        computed(layer)
    clean = bits(model)
    load(model, "lora", "a")
    load(model, "bias", "bias")
    adapters = diffadapt.adapters(model)
    if merged_before:
        adapters.merge("a")
    before, kept, errors = bits(model), adapters.undo_bytes, adapters.requantisation_errors
    load(model, "lokr", "b")
    load(model, "lora", "c", "1.0", scale=float(torch.finfo(torch.float32).max))
    with pytest.raises(AdapterError, match=r"model\.1\.0: .*nothing was written"):
        adapters.merge("b", "bias", "c")
    assert_bits(model, before)
    assert adapters.undo_bytes == kept
    assert adapters.requantisation_errors == errors
    adapters.clear()
    assert_bits(model, clean)


FOUR_BIT = [base for base in BASES if base.needs == "bitsandbytes" and "int8" not in base.name]


@pytest.mark.parametrize("base", FEW, ids=lambda base: base.name)
def test_compact_and_base_files_concern_plain_weights_only(base: Base, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Sequential(base.layer()), nn.Linear(OUT, 8)).requires_grad_(False).eval()
    save_file({"1.weight": model[1].weight}, tmp_path / "base.safetensors")
    computed(model[0])
    before, plain = bits(model), model[1].weight.clone()
    load(model, "lora")
    adapters = diffadapt.adapters(model)
    adapters.load({"1.diff": torch.ones(8, OUT)}, "b")
    for options in ({"base_files": tmp_path}, {"compact": True}, {"compact": False}):
        adapters.merge(**options)
        assert set(adapters.requantisation_errors) == {"model.0.0"}
        assert not torch.equal(model[1].weight, plain)
        kept = adapters.undo_bytes - sum(map(len, before[:-1]))
        assert (kept == plain.nbytes) if options == {"compact": False} else (kept == 0) == ("base_files" in options)
        adapters.unmerge()
        assert_bits(model, before)
        assert torch.equal(model[1].weight, plain)


def repack(layer: Any) -> None:
    """Do what bitsandbytes does at the first call in inference on a CPU with AVX512-BF16."""
    from bitsandbytes.functional import _convert_weight_packed_for_cpu

    if not getattr(layer.weight.quant_state, "packing_format_for_cpu", False):
        layer.weight.data, _ = _convert_weight_packed_for_cpu(layer.weight.data, layer.weight.quant_state)


@pytest.mark.parametrize("base", FOUR_BIT, ids=lambda base: base.name)
@pytest.mark.parametrize("when", ["before merging", "while merged", "put back while merged"])
@torch.no_grad()
def test_weights_that_bitsandbytes_repacks(base: Base, when: str) -> None:
    model = nn.Sequential(nn.Sequential(base.layer())).eval()
    layer: Any = model[0][0]
    original = weights.decoded(layer, "weight")
    content = load_values(model, "lora", original)
    adapters = diffadapt.adapters(model)
    if when != "while merged":
        repack(layer)
        # The scales are rounded to bfloat16 then.
        assert 0 < relative_error(weights.decoded(layer, "weight"), original) < 5e-3
    before, state = bits(model), dict(vars(layer.weight.quant_state))
    adapters.merge("a")
    if when == "while merged":
        repack(layer)
    elif when == "put back while merged":
        model.state_dict()
    if when != "put back while merged":  # what bitsandbytes puts back is another weight if its scales are not nested
        assert relative_error(weights.decoded(layer, "weight").double(), content.weight) < base.error
    adapters.unmerge()
    assert_bits(model, before)
    assert vars(layer.weight.quant_state).keys() == state.keys()
    if when == "while merged":
        assert torch.equal(weights.decoded(layer, "weight"), original)
    assert relative_error(weights.decoded(layer, "weight"), original) < 5e-3


@pytest.mark.parametrize("base", FOUR_BIT, ids=lambda base: base.name)
@torch.no_grad()
def test_a_repacked_weight_merges_to_the_same_bits(base: Base) -> None:
    found: list[list[Tensor]] = []
    for early in (True, False):
        model = nn.Sequential(nn.Sequential(base.layer()))
        layer = model[0][0]
        change = {"0.0.diff": torch.ones(OUT, INPUTS)}
        diffadapt.adapters(model).load(change, "a")
        diffadapt.adapters(model).merge("a")
        if early:
            diffadapt.adapters(model).unmerge()
            repack(layer)
            layer.weight.quant_state.absmax.zero_()  # only the change counts then
            diffadapt.adapters(model).merge("a")
        else:
            diffadapt.adapters(model).unmerge()
            layer.weight.quant_state.absmax.zero_()
            if layer.weight.quant_state.nested:
                layer.weight.quant_state.state2.absmax.zero_()
                layer.weight.quant_state.offset.zero_()
            diffadapt.adapters(model).merge("a")
            repack(layer)
        found.append(bits(model))
    assert all(map(torch.equal, *found))


def test_what_rounding_loses_of_a_small_change_is_said() -> None:
    """A change smaller than the steps of the storage is lost, whatever the quantiser."""
    model = model_of(BY_NAME["bitsandbytes nf4"], 5)
    adapters = diffadapt.adapters(model)
    torch.manual_seed(0)
    change = torch.randn(OUT, 4) @ torch.randn(4, INPUTS) * 3e-4
    # The change of the first layer is large enough.
    adapters.load({"0.0.diff": 300 * change, **{f"{number}.0.diff": change * number for number in range(1, 5)}}, "a")
    with pytest.warns(UserWarning, match=r"quantising again") as caught:
        adapters.merge("a")
    (message,) = [str(warning.message) for warning in caught if "quantising again" in str(warning.message)]
    assert "in 4 of 5 quantised layers" in message
    assert "more than 50% of their change" in message
    assert "model.0.0" not in message
    assert message.count("model.") == 3
    assert ", and 1 more; call unmerge() and keep the adapters unmerged" in message
    errors = adapters.requantisation_errors
    assert errors["model.0.0"] < 0.5
    worst = max(errors, key=lambda where: errors[where])
    merged = weights.decoded(model.get_submodule(worst.removeprefix("model.")), "weight")
    adapters.unmerge()
    wanted = change * int(worst.split(".")[1])
    rounded = merged - weights.decoded(model.get_submodule(worst.removeprefix("model.")), "weight")
    assert errors[worst] == pytest.approx(relative_error(rounded, wanted), rel=1e-3)
    left = float((rounded * wanted).sum() / wanted.square().sum())
    assert 0 <= left < 0.5
    assert f"{worst} (error {errors[worst]:.0%}, {left:.0%} of the change left)" in message


def test_a_merge_that_keeps_most_of_the_change_does_not_warn(recwarn: pytest.WarningsRecorder) -> None:
    model = model_of(BY_NAME["bitsandbytes nf4"])
    load(model, "lora")
    diffadapt.adapters(model).merge("a")
    assert [warning for warning in recwarn if "quantising again" in str(warning.message)] == []


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float16], ids=str)
def test_a_result_beyond_the_range_of_the_storage_is_refused(dtype: torch.dtype) -> None:
    from diffusers.hooks import apply_layerwise_casting

    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).requires_grad_(False)
    apply_layerwise_casting(model, storage_dtype=dtype, compute_dtype=torch.float32)
    before = [parameter.clone() for parameter in model.parameters()]
    adapters = diffadapt.adapters(model)
    for change in ({"1.diff": torch.full((8, 8), 1e6)}, {"1.diff_b": torch.full((8,), 1e6)}):
        adapters.load({"0.diff": torch.ones(8, 8), **change}, "a")
        with pytest.raises(AdapterError, match=rf"model\.1: merging gives values that {dtype} cannot hold"):
            adapters.merge("a")
        adapters.remove("a")
    for parameter, was in zip(model.parameters(), before, strict=False):
        assert torch.equal(parameter.float(), was.float())
    adapters.load({"0.diff": torch.ones(8, 8), "1.diff": torch.ones(8, 8)}, "a")
    x = torch.randn(3, 8)
    expected = model(x)
    adapters.merge("a")
    assert relative_error(model(x), expected) < 0.2
    adapters.clear()
    for parameter, was in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter.float(), was.float())


@pytest.mark.parametrize("kind", ["weight norm", "old weight norm", "spectral norm"])
def test_weights_that_are_computed_from_others_are_refused(kind: str) -> None:
    torch.manual_seed(0)
    make: Any = {
        "weight norm": nn.utils.parametrizations.weight_norm,
        "old weight norm": nn.utils.weight_norm,
        "spectral norm": nn.utils.spectral_norm,
    }[kind]
    model = nn.Sequential(make(nn.Linear(8, 8))).requires_grad_(False).eval()
    x = torch.randn(3, 8)
    model(x)
    adapters = diffadapt.adapters(model)
    adapters.load({"0.lora_A.weight": torch.randn(2, 8), "0.lora_B.weight": torch.randn(8, 2)}, "a")
    expected = model(x)
    with pytest.raises(AdapterError, match=r"model\.0: its weight is no parameter .* keep it unmerged"):
        adapters.merge("a")
    assert torch.equal(model(x), expected)
    assert bank_of(model).merged == ()


def test_a_sharded_weight_is_refused_for_what_it_is(tmp_path: Path) -> None:
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    model = nn.Sequential(nn.Linear(8, 8)).requires_grad_(False)
    adapters = diffadapt.adapters(model)
    adapters.load({"0.lora_A.weight": torch.randn(2, 8), "0.lora_B.weight": torch.randn(8, 2)}, "a")
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        sharded = distribute_tensor(model[0].weight, init_device_mesh("cpu", (1,)), [Shard(0)])
        model[0].weight = nn.Parameter(sharded, requires_grad=False)
        with pytest.raises(AdapterError, match=r"model\.0: its weight is spread over several devices \(DTensor\)"):
            adapters.merge("a")
    finally:
        distributed.destroy_process_group()


def test_a_layer_that_does_not_compute_with_its_weight_is_refused() -> None:
    class Tripled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) * 3

    model = nn.Sequential(Tripled(8, 8)).requires_grad_(False)
    adapters = diffadapt.adapters(model)
    adapters.load({"0.lora_A.weight": torch.randn(2, 8), "0.lora_B.weight": torch.randn(8, 2)}, "a")
    with pytest.raises(AdapterError, match=r"model\.0: its weight cannot be written: .*does not compute with"):
        adapters.merge("a")
