"""Slots in a common form, which fit adapters of a type with blocks and factors of any size."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import diffadapt
from tests.support.compare import assert_differs, assert_same
from tests.support.small_models import predict, unet
from tests.support.swaps import SPATIAL, make

pytestmark = pytest.mark.slow

OFT, LOKR = diffadapt.OFTConfig, diffadapt.LoKrConfig
LAYERS = r".*\.to_[qv]"
ALL = rf"{LAYERS}|{SPATIAL}"
RESERVED = {
    "oft": OFT(block_size=4, target_modules=ALL, init=False),
    "oft on outputs": OFT(block_size=4, side="output", target_modules=LAYERS, init=False),
    "lokr": LOKR(rank=1, factor=2, target_modules=ALL, init=False),
}
OTHERS = {
    "oft of smaller blocks": OFT(block_size=2, target_modules=ALL, neumann_terms=0, init=False),
    "oft in one block": OFT(num_blocks=1, target_modules=LAYERS, init=False),
    "oft on outputs, rescaled": OFT(block_size=2, side="output", rescale=True, target_modules=LAYERS, init=False),
    "lokr of other factors": LOKR(rank=1, factor=4, decompose_both=True, target_modules=LAYERS, init=False),
    "lokr whole": LOKR(full_matrix=True, factor=8, target_modules=ALL, init=False),
    "lora": diffadapt.LoraConfig(rank=2, target_modules=LAYERS, init=False),
}


def exact() -> nn.Module:
    return unet().double()


def inputs(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        generator = torch.Generator().manual_seed(6)
        sample = torch.randn(2, 4, 8, 8, generator=generator, dtype=torch.float64)
        text = torch.randn(2, 4, model.config.cross_attention_dim, generator=generator, dtype=torch.float64)
        return model(sample, torch.tensor(7), text).sample


def test_another_block_size_or_factor_swaps_without_a_recompile(
    counter: CompileCounterWithBackend, tmp_path: Path
) -> None:
    known = {name: make(unet, config, tmp_path / f"known {name}") for name, config in RESERVED.items()}
    files = {
        name: make(unet, config, tmp_path / name, "kohya" if name == "oft in one block" else "")
        for name, config in OTHERS.items()
    }
    model, plain = exact(), exact()
    adapters = diffadapt.adapters(model)
    adapters.prepare_hotswap([*known.values(), files["lora"]], slots=2, samples=2, types=["oft", "lokr"])
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    base = inputs(compiled)

    def expected(*sources: tuple[str, float]) -> torch.Tensor:
        own = diffadapt.adapters(plain)
        own.clear()
        for name, scale in sources:
            diffadapt.load_adapter(plain, {**files, **known}[name], name, scale=scale)
        return inputs(plain)

    diffadapt.load_adapter(model, known["oft"], "a")
    assert_same(inputs(compiled), expected(("oft", 1.0)), 1e-10)
    for name, file in files.items():
        assert adapters.hotswap("a", file).unused == []
        adapters.activate({"a": 0.7})
        assert_same(inputs(compiled), expected((name, 0.7)), 1e-10)
        assert_differs(inputs(compiled), base, 1e-3)
    # Together, as without slots: maps of the input, of the output, and changes.
    names = ("oft of smaller blocks", "oft on outputs, rescaled"), ("oft in one block", "lokr whole")
    for first, second in names:
        adapters.clear()
        diffadapt.load_adapter(model, files[first], "a", scale=0.8)
        diffadapt.load_adapter(model, files[second], "b", scale=-0.5)
        assert_same(inputs(compiled), expected((first, 0.8), (second, -0.5)), 1e-10)
        with adapters.per_sample([{"a": 0.8, "b": -0.5}, {"b": 1.0}]):
            rows = inputs(compiled)
        assert_same(rows[:1], expected((first, 0.8), (second, -0.5))[:1], 1e-10)
        assert_same(rows[1:], expected((second, 1.0))[1:], 1e-10)
    adapters.clear()
    assert torch.equal(inputs(compiled), base)
    assert counter.frame_count == 1


def test_room_is_reserved_for_types_that_no_source_has(tmp_path: Path) -> None:
    lora = make(unet, diffadapt.LoraConfig(rank=2, target_modules=ALL, init=False), tmp_path / "lora")
    model, plain = unet(), unet()
    adapters = diffadapt.adapters(model)
    without = adapters.prepare_hotswap(lora)
    for name, config in (("oft", RESERVED["oft"]), ("lokr", OTHERS["lokr whole"])):
        file = make(unet, config, tmp_path / name)
        with pytest.raises(
            diffadapt.AdapterError, match=rf"{name} .* expected, no slots .* types=\['{name}'\].* MiB on this layer"
        ):
            diffadapt.load_adapter(model, file, "x")
    reserved = adapters.prepare_hotswap(lora, types=("oft", "lokr"))
    assert reserved.bytes > 2 * without.bytes
    for name in ("oft", "lokr"):
        diffadapt.load_adapter(model, tmp_path / name, "x")
        diffadapt.load_adapter(plain, tmp_path / name, "x")
        with torch.no_grad():
            assert_same(predict(model), predict(plain))
        adapters.clear()
        diffadapt.adapters(plain).clear()
    on_outputs = make(unet, RESERVED["oft on outputs"], tmp_path / "on outputs")
    with pytest.raises(diffadapt.AdapterError, match="no slots are reserved there for it"):
        diffadapt.load_adapter(model, on_outputs, "x")
    with pytest.raises(diffadapt.AdapterError, match=r"types: no 'otf', expected some of .*oft"):
        adapters.prepare_hotswap(lora, types="otf")
