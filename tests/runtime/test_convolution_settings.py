"""A convolution that pads, strides or dilates otherwise than when its adapter was loaded, as for pictures that tile."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import diffadapt
from diffadapt import AdapterError
from tests.support.cases import for_each

INPUT = torch.randn(2, 8, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
CONFIGS: dict[str, diffadapt.AdapterConfig] = {
    "lora": diffadapt.LoraConfig(rank=2, target_modules=["conv"], init=False),
    "dora": diffadapt.LoraConfig(rank=2, target_modules=["conv"], init=False, use_dora=True),
    "oft": diffadapt.OFTConfig(block_size=4, target_modules=["conv"], init=False),
}
SETTINGS: dict[str, dict[str, Any]] = {
    "tiles": {"padding_mode": "circular"},
    "dilated": {"dilation": (2, 2), "padding": (2, 2)},
    "strided": {"stride": (2, 2)},
}


class Model(nn.Module):
    """A convolution."""

    def __init__(self, kernel: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(8, 8, kernel, padding=kernel // 2)
        self.double().requires_grad_(False)

    def forward(self, input: Tensor) -> Tensor:
        return self.conv(input)


def tile_(conv: nn.Conv2d) -> None:
    """Let a convolution wrap around in one direction, as programs do for panoramas."""

    def forward(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        wrapped = F.pad(input, (conv.padding[1],) * 2 + (0, 0), mode="circular")
        return F.conv2d(wrapped, weight, bias, padding=(conv.padding[0], 0))

    conv._conv_forward = forward  # type: ignore[method-assign]


@torch.no_grad()
@for_each(
    case=[
        *((config, settings, slots, False) for config in CONFIGS for settings in SETTINGS for slots in (False, True)),
        *(("oft", "tiles", slots, True) for slots in (False, True)),
    ]
)
def test_an_adapter_convolves_as_its_layer_does_now(case: tuple[str, str, bool, bool], tmp_path: Path) -> None:
    config, settings, slots, compiles = case
    torch._dynamo.reset()
    trained, model = Model(), Model()
    diffadapt.add_adapter(trained, CONFIGS[config], name="a")
    diffadapt.adapters(trained).save("a", tmp_path / "a", format="peft")
    adapters = diffadapt.adapters(model)
    if slots:
        adapters.prepare_hotswap(tmp_path / "a")
    adapters.load(tmp_path / "a", "a")
    call = torch.compile(model, backend="eager") if compiles else model
    before, own = call(INPUT).clone(), dict(vars(model.conv))
    vars(model.conv).update(SETTINGS[settings])
    after = call(INPUT).clone()
    adapters.merge("a")
    torch.testing.assert_close(after, model(INPUT), rtol=1e-6, atol=1e-6)
    assert after.shape != before.shape or (after - before).abs().max() > 0.01
    adapters.unmerge()
    vars(model.conv).update({name: own[name] for name in SETTINGS[settings]})
    assert torch.equal(call(INPUT), before)


@torch.no_grad()
def test_an_adapter_on_a_convolution_with_a_function_of_its_own_is_refused_until_it_is_merged() -> None:
    model, small = Model(), Model(kernel=1)
    base = model(INPUT)
    for each in (model, small):
        diffadapt.add_adapter(each, CONFIGS["lora"], name="a")
    expected = small(INPUT)
    for each in (model, small):
        tile_(each.conv)
    adapters = diffadapt.adapters(model)
    with pytest.raises(AdapterError, match=r"conv carries an adapter, but convolves with a function of its own"):
        model(INPUT)
    with adapters.disabled():
        assert not torch.equal(model(INPUT), base)
    adapters.merge("a")
    model(INPUT)
    adapters.clear()
    del model.conv._conv_forward
    assert torch.equal(model(INPUT), base)
    # Nothing is padded for a kernel of one.
    torch.testing.assert_close(small(INPUT), expected)
