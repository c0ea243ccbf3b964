"""Every adapter type from its settings: a new adapter changes nothing, trains, is saved, and is loaded unchanged."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import diffadapt
from diffadapt import AdapterConfig
from diffadapt.types import TYPES, for_config
from tests.support.compare import assert_differs, assert_same
from tests.support.variants import TESTED_APART

MOST = ["linear", "conv", "point"]
CONFIGS: dict[str, tuple[AdapterConfig, tuple[str, ...]]] = {
    "lora": (diffadapt.LoraConfig(rank=2, alpha=3, target_modules=MOST), ("diffusers", "kohya", "peft")),
    "dora": (diffadapt.LoraConfig(rank=2, alpha=1, target_modules=MOST, use_dora=True), ("diffusers", "kohya", "peft")),
    "dora by input": (
        diffadapt.LoraConfig(rank=2, target_modules=MOST, use_dora=True, dora_axis="input"),
        ("kohya",),
    ),
    "loha": (diffadapt.LoHaConfig(rank=2, alpha=1, target_modules=MOST), ("kohya", "peft")),
    "dora-loha": (diffadapt.LoHaConfig(rank=2, target_modules=MOST, use_dora=True), ("kohya",)),
    "lokr": (diffadapt.LoKrConfig(rank=1, alpha=2, target_modules=MOST), ("kohya", "peft")),
    "lokr full": (diffadapt.LoKrConfig(full_matrix=True, target_modules=MOST), ("kohya", "peft")),
    "dora-lokr": (diffadapt.LoKrConfig(rank=1, target_modules=MOST, use_dora=True), ("kohya",)),
    "oft": (diffadapt.OFTConfig(block_size=4, target_modules=["linear", "point"]), ("peft", "kohya")),
    "oft exact": (diffadapt.OFTConfig(block_size=4, neumann_terms=0, target_modules=["linear", "point"]), ("peft",)),
    "oft on outputs": (
        diffadapt.OFTConfig(block_size=4, side="output", rescale=True, target_modules=MOST),
        ("kohya",),
    ),
    "boft": (diffadapt.BOFTConfig(block_size=4, target_modules=MOST), ("peft",)),
    "boft on outputs": (diffadapt.BOFTConfig(block_size=4, side="output", target_modules=MOST), ("kohya",)),
    "ia3": (diffadapt.IA3Config(target_modules=MOST, scale_bias=True), ("peft",)),
    "ia3-lycoris": (diffadapt.IA3Config(target_modules=MOST), ("kohya",)),
    "glora": (diffadapt.GLoRAConfig(rank=2, alpha=1, target_modules=MOST), ("kohya",)),
    "full": (diffadapt.FullConfig(bias=True, target_modules=[*MOST, "norm"]), ("kohya",)),
}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(8, 16), nn.LayerNorm(16)
        self.conv, self.point = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 4, 1)

    def forward(self, vectors: Tensor, picture: Tensor) -> Tensor:
        return self.norm(self.linear(vectors)).sum() * 0.1 + self.point(self.conv(picture)).flatten(1)


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def given() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(3, 8, generator=generator), torch.randn(3, 4, 6, 6, generator=generator)


def test_every_type_in_the_registry_is_tested() -> None:
    found = {for_config(config).name for config, _ in CONFIGS.values()}
    assert found | TESTED_APART == {adapter_type.name for adapter_type in TYPES}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_new_adapter_is_trained_saved_and_loaded(name: str, tmp_path: Path) -> None:
    config, formats = CONFIGS[name]
    model = net()
    base = model(*given()).detach()
    adapter = diffadapt.add_adapter(model, config, "a")
    assert_same(model(*given()), base, 1e-6)
    optimizer = torch.optim.Adam(adapter.parameters(), lr=3e-2)
    losses: list[float] = []
    for _ in range(12):
        loss = (model(*given()) - 1).pow(2).mean()
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.95 * losses[0]
    trained = model(*given()).detach()
    assert_differs(trained, base)
    for format in formats:
        diffadapt.adapters(model).save("a", tmp_path / format, format=format)
        again = net()
        report = diffadapt.load_adapter(again, tmp_path / format, "b")
        assert set(report.types) == {for_config(config).name}
        assert report.unused == []
        assert_same(again(*given()), trained, 2e-6)
