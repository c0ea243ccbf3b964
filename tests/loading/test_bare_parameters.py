"""Changes of parameters that are no layer's weight: the modulation of Wan, and the gates of HiDream's experts."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import diffadapt
from diffadapt import AdapterError
from tests.support.calls import CALLS, output
from tests.support.compare import assert_differs, assert_same
from tests.support.denoisers import SMALL

GATE = "double_stream_blocks.0.block.ff_i.gate"


def model(family: str, changes: dict[str, Tensor] | None = None) -> nn.Module:
    """Return the small denoiser of a family in float64, with changes added to its parameters."""
    built = SMALL[family].build()["transformer"].double()
    for name, change in (changes or {}).items():
        built.get_parameter(name).data.add_(change)
    return built


def modulations() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return a file with changes of the modulation of a block and of the head, and the changes by parameter."""
    block, head = torch.randn(1, 6, 32).double(), torch.randn(1, 2, 32).double()
    file = {"diffusion_model.blocks.0.diff_m": block, "diffusion_model.head.diff_m": head}
    return file, {"blocks.0.scale_shift_table": block, "scale_shift_table": head}


def scaled(changes: dict[str, Tensor], strength: float) -> dict[str, Tensor]:
    return {name: strength * change for name, change in changes.items()}


def test_the_modulation_of_blocks_and_head_is_changed_while_the_model_runs() -> None:
    call, (file, changes) = CALLS["wan"](2), modulations()
    adapted, base = model("wan"), output(model("wan"), call)
    report = diffadapt.load_adapter(adapted, file, name="a", scale=0.5)
    assert (report.used, report.unused, report.types) == (2, [], {"full": 2})
    found = output(adapted, call)
    assert_differs(found, base, 1e-2)
    assert_same(found, output(model("wan", scaled(changes, 0.5)), call))
    assert_same(
        output(adapted, {**call, "attention_kwargs": {"scale": 0.5}}), output(model("wan", scaled(changes, 0.25)), call)
    )
    assert adapted.state_dict().keys() == model("wan").state_dict().keys()
    adapters = diffadapt.adapters(adapted)
    adapters.merge()
    assert_same(output(adapted, call), found)
    adapters.clear()
    assert torch.equal(output(adapted, call), base)
    assert type(adapted) is type(model("wan"))


@pytest.mark.parametrize("format", ["comfy", "kohya", "onetrainer"])
def test_the_modulation_is_saved_and_loaded_again(format: str, tmp_path: Path) -> None:
    call, (file, changes) = CALLS["wan"](2), modulations()
    adapted, again = model("wan"), model("wan")
    diffadapt.load_adapter(adapted, file, name="a")
    diffadapt.load_adapter(again, diffadapt.adapters(adapted).save("a", tmp_path / "a.safetensors", format), name="a")
    assert_same(output(again, call), output(model("wan", changes), call))


@pytest.mark.parametrize(
    "stem", [f"diffusion_model.{GATE}", f"transformer.{GATE}", f"lycoris_{GATE.replace('.', '_')}"]
)
def test_the_gate_of_a_mixture_of_experts_is_changed(stem: str, tmp_path: Path) -> None:
    call = CALLS["hidream"](2)
    experts, width = model("hidream").get_parameter(f"{GATE}.weight").shape
    down, up = torch.randn(2, width).double(), torch.randn(experts, 2).double()
    files = {
        "full": {f"{stem}.diff": up @ down / 2},
        "lora-parameter": {
            f"{stem}.lora_down.weight": down,
            f"{stem}.lora_up.weight": up,
            f"{stem}.alpha": torch.tensor(1.0),
        },
    }
    expected = output(model("hidream", {f"{GATE}.weight": up @ down / 2}), call)
    assert_differs(expected, output(model("hidream"), call), 1e-3)
    for adapter_type, file in files.items():
        adapted, again = model("hidream"), model("hidream")
        assert diffadapt.load_adapter(adapted, file, name="a").types == {adapter_type: 1}
        assert_same(output(adapted, call), expected)
        saved = diffadapt.adapters(adapted).save("a", tmp_path / "a.safetensors", "comfy")
        diffadapt.load_adapter(again, saved, name="a")
        assert_same(output(again, call), expected)


def test_a_table_of_another_shape_or_a_new_one_is_refused() -> None:
    for tensors in ({"diff": torch.ones(1, 4, 32)}, {"set_weight": torch.ones(1, 6, 32)}):
        file = {f"diffusion_model.blocks.0.modulation.{name}": tensor for name, tensor in tensors.items()}
        with pytest.raises(AdapterError, match=r"blocks\.0\.scale_shift_table: .*expected"):
            diffadapt.load_adapter(model("wan"), file)
