"""LyCORIS files in kohya's names with LoHa, LoKr and LoRA together: loaded, compared with merged weights, saved."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import diffadapt
from tests.support import models
from tests.support.compare import assert_differs, assert_same
from tests.support.models import draw

LOHA, LOKR, WHOLE, LORA = "attn1.to_q", "attn2.to_v", "ff.net.2", "conv1"


def tensors_for(unet: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return a file, and the weight change of every layer in it."""
    generator = torch.Generator().manual_seed(5)

    def draw_one(*shape: int) -> Tensor:
        return 0.4 * torch.randn(shape, generator=generator)

    file: dict[str, Tensor] = {}
    deltas: dict[str, Tensor] = {}
    for path, module in unet.named_modules():
        out, columns = (module.weight.shape[0], module.weight[0].numel()) if hasattr(module, "weight") else (0, 0)
        if path.endswith(LOHA):
            parts = {"hada_w1_a": draw_one(out, 2), "hada_w1_b": draw_one(2, columns)}
            parts |= {"hada_w2_a": draw_one(out, 2), "hada_w2_b": draw_one(2, columns), "alpha": torch.tensor(3.0)}
            change = (parts["hada_w1_a"] @ parts["hada_w1_b"]) * (parts["hada_w2_a"] @ parts["hada_w2_b"]) * 3 / 2
        elif path.endswith(LOKR):
            parts = {"lokr_w1": draw_one(4, 4), "lokr_w2_a": draw_one(out // 4, 1), "alpha": torch.tensor(0.5)}
            parts |= {"lokr_w2_b": draw_one(1, columns // 4)}
            change = torch.kron(parts["lokr_w1"], parts["lokr_w2_a"] @ parts["lokr_w2_b"]) * 0.5
        elif path.endswith(WHOLE):
            # With two whole factors alpha has no meaning; some trainers write infinity.
            parts = {"lokr_w1": draw_one(4, 4), "lokr_w2": draw_one(out // 4, columns // 4)}
            parts |= {"alpha": torch.tensor(torch.inf)}
            change = torch.kron(parts["lokr_w1"], parts["lokr_w2"])
        elif path.endswith(LORA):
            parts = {"lora_down.weight": draw_one(2, *module.weight.shape[1:]), "alpha": torch.tensor(1.0)}
            parts |= {"lora_up.weight": draw_one(out, 2, 1, 1)}
            change = parts["lora_up.weight"].flatten(1) @ parts["lora_down.weight"].flatten(1) / 2
        else:
            continue
        file.update({f"lora_unet_{path.replace('.', '_')}.{name}": tensor for name, tensor in parts.items()})
        deltas[path] = change
    return file, deltas


@pytest.mark.slow
def test_mixed_types_equal_the_weights_with_the_changes_added() -> None:
    pipe, plain = models.sd15(), models.sd15()
    file, deltas = tensors_for(plain.unet)
    base = draw(pipe)
    report = pipe.load_adapter(file, "mixed")
    assert report.unused == []
    assert report.used == len(file)
    assert set(report.types) == {"lora", "loha", "lokr"}
    modules = dict(plain.unet.named_modules())
    with torch.no_grad():
        for path, delta in deltas.items():
            modules[path].weight += delta.view_as(modules[path].weight)
    assert_same(draw(pipe), draw(plain))
    assert_differs(draw(pipe), base)
    pipe.adapters.merge("mixed")
    assert_same(draw(pipe), draw(plain))
    pipe.adapters.clear()
    assert torch.equal(draw(pipe), base)


def test_the_saved_file_is_bit_identical_and_the_format_of_diffusers_is_refused(tmp_path: Path) -> None:
    pipe = models.sd15()
    file, _ = tensors_for(pipe.unet)
    pipe.load_adapter(file, "mixed")
    saved = load_file(pipe.adapters.save("mixed", tmp_path / "mixed.safetensors", format="kohya"))
    # An alpha without a meaning is written as 1.
    expected = {key: tensor if tensor.isfinite().all() else torch.ones(()) for key, tensor in file.items()}
    assert set(saved) == set(expected)
    assert all(torch.equal(tensor, expected[key]) for key, tensor in saved.items())
    with pytest.raises(diffadapt.AdapterError, match="format='kohya'"):
        pipe.adapters.save("mixed", tmp_path / "other.safetensors", format="diffusers")
    assert not (tmp_path / "other.safetensors").exists()


@pytest.mark.parametrize(
    ("name", "shape", "reason"),
    [
        ("hada_w1_a", None, "hada_w1_a missing"),
        ("hada_w2_b", (3, 4), r"hada_w2_b has shape \(3, 4\), expected"),
        ("lokr_w2_b", None, "lokr_w2, or lokr_w2_a and lokr_w2_b expected"),
        ("lokr_w1", (3, 4), "multiply to"),
    ],
)
def test_faults_are_reported_by_name(name: str, shape: tuple[int, ...] | None, reason: str) -> None:
    pipe = models.sd15()
    file, _ = tensors_for(pipe.unet)
    key = next(key for key in file if key.endswith(f".{name}"))
    if shape is None:
        del file[key]
    else:
        file[key] = torch.ones(shape)
    with pytest.raises(diffadapt.AdapterError, match=reason):
        pipe.load_adapter(file, "mixed")
    assert pipe.adapters.names == []
