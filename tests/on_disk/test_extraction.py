"""The adapter between two models."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

import diffadapt
from diffadapt import AdapterError, extract
from diffadapt.cli import main
from diffadapt.types.layer_spec import LayerSpec
from tests.support.cases import for_each
from tests.support.compare import relative_error
from tests.support.denoisers import SMALL
from tests.support.original_layout import in_original_layout

TINY = Path(__file__).parents[2] / "examples" / "tiny_pipeline"
RANK = 3


def layers_of(model: nn.Module) -> Iterator[tuple[str, nn.Module, LayerSpec]]:
    for path, module in model.named_modules():
        spec = LayerSpec.of(module)
        if spec is not None and getattr(module, "weight", None) is not None:
            yield path, module, spec


@torch.no_grad()
def tune_(model: nn.Module) -> None:
    """Change every weight by a random matrix of rank `RANK`, and norms and biases by random numbers."""
    for _, module, spec in layers_of(model):
        weight, bias = module._parameters["weight"], module._parameters.get("bias")
        assert weight is not None
        if spec.kind == "norm":
            weight += 0.1 * torch.randn_like(weight)
        else:
            rows, columns = weight.shape[0], weight[0].numel()
            weight += (0.1 * torch.randn(rows, RANK) @ torch.randn(RANK, columns)).view_as(weight)
        if bias is not None:
            bias += 0.1 * torch.randn_like(bias)


def check(base: nn.Module, tuned: nn.Module, extraction: Mapping[str, Tensor], component: str) -> None:
    """Check that merging the extraction into the base gives the tuned model."""
    wanted = {path: module.weight.clone() for path, module, _ in layers_of(tuned)}
    before = {path: module.weight.clone() for path, module, _ in layers_of(base)}
    diffadapt.load_adapter(base, dict(extraction), "extracted", component=component)
    diffadapt.adapters(base).merge("extracted")
    for path, module, _ in layers_of(base):
        assert relative_error(module.weight, wanted[path]) < 1e-5, path
        assert relative_error(before[path], wanted[path]) > 1e-2, path


@for_each(family=SMALL)
def test_every_family_in_its_original_layout_against_diffusers(family: str) -> None:
    component = next(iter(SMALL[family].components))
    base = SMALL[family].build()[component].float()
    tuned = SMALL[family].build()[component].float()
    tune_(tuned)
    single = in_original_layout(tuned, "model.diffusion_model.")
    extraction = extract(base, single, rank=RANK)
    assert extraction.error < 1e-5
    assert all(layer.rank == RANK or layer.rank < 8 for layer in extraction.layers)
    check(base, tuned, extraction, component)


def test_a_text_encoder_of_open_clip() -> None:
    config = CLIPTextConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=64,
        projection_dim=32,
    )
    torch.manual_seed(0)
    base, tuned = CLIPTextModelWithProjection(config), CLIPTextModelWithProjection(config)
    tuned.load_state_dict(base.requires_grad_(False).state_dict())
    tune_(tuned.requires_grad_(False))
    prefix = "conditioner.embedders.1.model."
    state = {key.removeprefix("text_model."): tensor for key, tensor in tuned.state_dict().items()}
    single: dict[str, Tensor] = {
        f"{prefix}token_embedding.weight": state["embeddings.token_embedding.weight"],
        f"{prefix}positional_embedding": state["embeddings.position_embedding.weight"],
        f"{prefix}text_projection": state["text_projection.weight"].t().contiguous(),
        f"{prefix}ln_final.weight": state["final_layer_norm.weight"],
        f"{prefix}ln_final.bias": state["final_layer_norm.bias"],
    }
    for number in range(2):
        block, ours = f"{prefix}transformer.resblocks.{number}.", f"encoder.layers.{number}."
        for kind in ("weight", "bias"):
            projections = [state[f"{ours}self_attn.{letter}_proj.{kind}"] for letter in "qkv"]
            single[f"{block}attn.in_proj_{kind}"] = torch.cat(projections)
            for theirs, name in {
                "attn.out_proj": "self_attn.out_proj",
                "ln_1": "layer_norm1",
                "ln_2": "layer_norm2",
                "mlp.c_fc": "mlp.fc1",
                "mlp.c_proj": "mlp.fc2",
            }.items():
                single[f"{block}{theirs}.{kind}"] = state[f"{ours}{name}.{kind}"]
    # diffusers reads this layout in the same way.
    with torch.no_grad():
        read = convert_open_clip_checkpoint(tuned, dict(single), prefix=prefix)
    for key, tensor in read.items():
        torch.testing.assert_close(tensor, tuned.state_dict().get(key, tensor))
    extraction = extract(base, single, rank=RANK, family="sdxl")
    assert not extraction.left_out
    assert any("text_projection" in key for key in extraction)
    check(base, tuned, extraction, "text_encoder_2")


def test_dtypes_and_what_an_adapter_cannot_hold(tmp_path: Path) -> None:
    base, tuned = nn.Module(), nn.Module()
    for model in (base, tuned):
        model.add_module("layer", nn.Linear(16, 12))
        model.add_module("same", nn.Linear(16, 12))
        model.register_parameter("table", nn.Parameter(torch.ones(4)))
    tuned.load_state_dict(base.state_dict())
    tune_(tuned.layer)
    with torch.no_grad():
        tuned.table[0] = 2
    files = {
        name: {f"{key}": value for key, value in model.state_dict().items()}
        for name, model in (("base", base), ("tuned", tuned))
    }
    save_file({key: value.bfloat16() for key, value in files["base"].items()}, tmp_path / "base.safetensors")
    scale = files["tuned"]["layer.weight"].abs().max() / 448
    save_file(
        {
            **{key: value.bfloat16() for key, value in files["tuned"].items()},
            "layer.weight": (files["tuned"]["layer.weight"] / scale).to(torch.float8_e4m3fn),
            "layer.scale_weight": scale,
        },
        tmp_path / "tuned.safetensors",
    )
    extraction = extract(
        tmp_path / "base.safetensors", tmp_path / "tuned.safetensors", rank=12, models={"transformer": base}
    )
    assert {key.rsplit(".lora", 1)[0] for key in extraction} == {"transformer.layer"}
    assert extraction["transformer.layer.lora_A.weight"].dtype == torch.float32
    change = (
        extraction["transformer.layer.lora_B.weight"].float() @ extraction["transformer.layer.lora_A.weight"].float()
    )
    rounded = (files["tuned"]["layer.weight"] / scale).to(torch.float8_e4m3fn).float() * scale
    assert relative_error(change, rounded - files["base"]["layer.weight"].bfloat16().float()) < 1e-5
    assert [(fault.key, fault.reason.split(",")[0]) for fault in extraction.left_out] == [("table", "differs")]
    assert "left out: table" in str(extraction)


def test_energy_takes_the_rank_that_it_needs() -> None:
    torch.manual_seed(0)
    base = nn.Module()
    base.add_module("layer", nn.Linear(32, 32, bias=False))
    u, _ = torch.linalg.qr(torch.randn(32, 2))
    tuned = {"layer.weight": base.layer.weight.detach() + (u * torch.tensor([3.0, 1.0])) @ u.t()}
    models = {"transformer": base}
    kept = extract(base.state_dict(), tuned, energy=0.85, models=models)
    assert [layer.rank for layer in kept.layers] == [1]
    assert kept.error == pytest.approx((1 / 10) ** 0.5, rel=1e-3)
    assert [layer.rank for layer in extract(base.state_dict(), tuned, energy=0.95, models=models).layers] == [2]


def test_what_is_refused(tmp_path: Path) -> None:
    base = nn.Module()
    base.add_module("layer", nn.Linear(8, 8))
    state, models = base.state_dict(), {"transformer": base}
    with pytest.raises(AdapterError, match="pass rank=, the largest rank of a layer, or energy="):
        extract(state, state, models=models)
    with pytest.raises(AdapterError, match="does not differ from the state dict in any layer"):
        extract(state, state, rank=4, models=models)
    with pytest.raises(AdapterError, match=r"layer.weight has shape \(8, 4\), expected \(8, 8\)"):
        extract(state, {"layer.weight": torch.zeros(8, 4)}, rank=4, models=models)
    with pytest.raises(AdapterError, match=r"layer.weight is torch.uint8, a quantised weight"):
        extract(state, {"layer.weight": torch.zeros(8, 8, dtype=torch.uint8)}, rank=4, models=models)
    with pytest.raises(AdapterError, match="do not tell which model it is; pass family= or models="):
        extract(state, state, rank=4)
    with pytest.raises(AdapterError, match="no such file or folder"):
        extract(tmp_path / "none", state, rank=4)
    (tmp_path / "model.bin").touch()
    with pytest.raises(AdapterError, match=r"only model\.bin, a pickle; save it as safetensors"):
        extract(tmp_path, state, rank=4)
    diffadapt.add_adapter(base, diffadapt.LoraConfig(rank=2, target_modules=["layer"]), "style")
    with pytest.raises(AdapterError, match="style acts on its model but is not in its weights; merge or remove it"):
        extract(base, state, rank=4)


def test_a_pipeline_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pixel = TINY / "adapters" / "pixel.safetensors"
    merged, file = tmp_path / "merged", tmp_path / "pixel.safetensors"
    assert main(["merge", str(TINY), f"{pixel}:0.5", str(merged)]) == 0
    assert main(["extract", str(TINY), str(merged), str(file), "--rank", "8"]) == 0
    assert "the extracted LoRA: 119 of 119 layers changed" in capsys.readouterr().out
    wanted, found = (_change(path) for path in (pixel, file))
    assert wanted.keys() == found.keys()
    for path, change in wanted.items():
        # The file of the base has float16 weights, so that merging rounds.
        assert relative_error(found[path], 0.5 * change) < 0.3, path


def _change(file: Path) -> dict[str, Tensor]:
    """Return the change of the UNet's linear layers that an adapter file makes, by path."""
    plan = diffadapt.adapters(UNet2DConditionModel.from_pretrained(TINY / "unet")).prefetch(file)
    return {
        path: layer.adapter_type.delta_weight(layer.tensors, layer.spec) * layer.scale
        for path, layer in plan.layers["unet"].items()
    }
