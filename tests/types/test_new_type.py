"""A new adapter type is one file and one line: this is the file, and the fixture `registered` stands for the line."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

import diffadapt
from diffadapt import types
from diffadapt.errors import AdapterError
from diffadapt.formats import suffixes
from diffadapt.types.adapter_type import AdapterType, Tensors
from diffadapt.types.config import AdapterConfig
from diffadapt.types.layer_spec import LayerSpec
from diffadapt.types.tensor_ops import add, scaled, shape_of
from tests.support import models
from tests.support.compare import assert_differs, assert_same, assert_unchanged, snapshot
from tests.support.models import draw

# ---- types/outer.py ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class OuterConfig(AdapterConfig):
    """Settings of adapters whose change is the outer product of two vectors.

    Attributes:
        spread: The standard deviation of the first vector.
    """

    spread: float = 1.0


def fit(tensors: Tensors, spec: LayerSpec) -> dict[str, Tensor]:
    for name, size in (("outer_u", spec.out_features), ("outer_v", spec.fan_in)):
        if name not in tensors or tensors[name].numel() != size:
            found = shape_of(tensors[name]) if name in tensors else "nothing"
            raise AdapterError(f"{name} has shape {found}, expected ({size},)")
    return {name: tensor.reshape(-1) for name, tensor in tensors.items()}


def init(
    spec: LayerSpec, config: OuterConfig, *, generator: torch.Generator, weight: Callable[[], Tensor]
) -> dict[str, Tensor]:
    return {
        "outer_u": torch.randn(spec.out_features, generator=generator) * (0 if config.init else config.spread),
        "outer_v": torch.randn(spec.fan_in, generator=generator),
    }


def delta_weight(tensors: Tensors, spec: LayerSpec) -> Tensor:
    return torch.outer(tensors["outer_u"], tensors["outer_v"]).view(spec.weight_shape)


def delta_output(
    tensors: Tensors, spec: LayerSpec, *, input: Tensor, gate: Tensor, onto: Tensor | None = None
) -> Tensor:
    row = tensors["outer_v"].view(1, *spec.weight_shape[1:])
    product = spec.expand(scaled(spec.op(input, row), gate), tensors["outer_u"].view(-1, 1))
    return product if onto is None else add(product, onto)


OUTER = AdapterType(
    name="outer",
    tensors=("outer_u", "outer_v"),
    identified_by=frozenset({"outer_u", "outer_v"}),
    config=OuterConfig,
    fit=fit,
    init=init,
    delta_weight=delta_weight,
    delta_output=delta_output,
)

# ---- types/__init__.py: one line -----------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(types, "TYPES", (*types.TYPES, OUTER))
    # This table is made from the registry when the module is imported.
    for name in OUTER.tensors:
        monkeypatch.setitem(suffixes._SPELLINGS, name, name)


@pytest.mark.slow
def test_a_new_type_is_trained_saved_loaded_merged_and_removed(tmp_path: Path) -> None:
    pipe = models.sd15()
    base = draw(pipe)
    before = snapshot(pipe)
    config = OuterConfig(target_modules=["to_q", "conv1"])
    adapter = diffadapt.add_adapter(pipe.unet, config, "new")
    assert torch.equal(draw(pipe), base)
    optimizer = torch.optim.SGD(adapter.parameters(), lr=10.0)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for _ in range(3):
        optimizer.zero_grad()
        pipe.unet(noise, 1, torch.randn(1, 4, models.WIDTH)).sample.pow(2).mean().backward()
        optimizer.step()
    trained = draw(pipe)
    assert_differs(trained, base)
    file = pipe.adapters.save("new", tmp_path / "outer.safetensors", format="kohya")
    pipe.adapters.merge("new")
    assert_same(draw(pipe), trained)
    pipe.adapters.clear()
    report = pipe.load_adapter(file)
    assert report.types == {"outer": len(adapter.layers)}
    assert report.unused == []
    assert_same(draw(pipe), trained)
    pipe.adapters.clear()
    assert_unchanged(pipe, before)


def test_faults_of_a_new_type_are_reported_by_layer() -> None:
    pipe = models.sd15()
    path = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    with pytest.raises(AdapterError, match=r"attn1\.to_q: outer_v has shape \(3,\), expected \(8,\)"):
        pipe.load_adapter({f"{path}.outer_u": torch.randn(8), f"{path}.outer_v": torch.randn(3)})
    assert len(pipe.adapters) == 0
