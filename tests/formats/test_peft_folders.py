"""Adapters saved as PEFT folders, and loaded in PEFT and here."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import diffadapt
from diffadapt import AdapterConfig
from tests.support import models
from tests.support.compare import assert_differs, assert_same
from tests.support.models import draw


class Net(nn.Module):
    """A model with one layer of every kind that PEFT adapts."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 12)
        self.linear = nn.Linear(12, 24)
        self.conv1d = nn.Conv1d(24, 16, 3, padding=1)
        self.conv = nn.Conv2d(4, 16, 3, padding=1, stride=2)
        self.point = nn.Conv2d(16, 8, 1)

    def forward(self, ids: Tensor, picture: Tensor) -> Tensor:
        sequence = self.linear(self.embedding(ids)).transpose(1, 2)
        return self.conv1d(sequence).mean((1, 2)) + self.point(self.conv(picture)).mean((1, 2, 3))


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 11, (3, 7), generator=generator), torch.randn(3, 4, 8, 8, generator=generator)


EVERY, CONVS = ["linear", "conv", "point", "embedding"], ["linear", "conv1d", "conv", "point"]
CONFIGS: dict[str, AdapterConfig] = {
    "lora": diffadapt.LoraConfig(rank=3, alpha=5, target_modules=EVERY, init=False, rank_pattern={"conv": 2}),
    "lora bias": diffadapt.LoraConfig(rank=3, target_modules=["linear", "conv"], init=False, bias=True),
    "lora stabilised": diffadapt.LoraConfig(rank=3, rank_stabilized=True, target_modules=["linear"], init=False),
    "dora": diffadapt.LoraConfig(rank=3, alpha=2, target_modules=EVERY, init=False, use_dora=True),
    "loha": diffadapt.LoHaConfig(rank=2, alpha=3, target_modules=CONVS, init=False, alpha_pattern={"linear": 1}),
    "loha tucker": diffadapt.LoHaConfig(rank=2, target_modules=CONVS, init=False, use_tucker=True),
    "lokr": diffadapt.LoKrConfig(rank=1, alpha=3, target_modules=CONVS, init=False),
    "lokr factor": diffadapt.LoKrConfig(rank=1, factor=2, target_modules=["linear", "point"], init=False),
    "lokr both": diffadapt.LoKrConfig(rank=1, decompose_both=True, target_modules=CONVS, init=False),
    # On Conv1d, PEFT 0.21.2 has a different, unintended formula for a whole second factor, and fails with a core.
    "lokr tucker": diffadapt.LoKrConfig(rank=1, target_modules=["linear", "conv"], init=False, use_tucker=True),
    "lokr full": diffadapt.LoKrConfig(full_matrix=True, target_modules=["linear", "conv", "point"], init=False),
    "oft": diffadapt.OFTConfig(block_size=4, target_modules=["linear", "point"], init=False),
    "oft exact": diffadapt.OFTConfig(block_size=4, neumann_terms=0, target_modules=["linear"], init=False),
    "oft shared": diffadapt.OFTConfig(block_size=4, block_share=True, target_modules=["linear"], init=False),
    "oft constrained": diffadapt.OFTConfig(block_size=4, coft_eps=0.2, target_modules=["linear"], init=False),
}


@pytest.mark.parametrize("name", CONFIGS)
# peft mistakes a LoRA bias for a factor that lost a dimension.
@pytest.mark.filterwarnings("ignore:.*LoRA tensor.*have invalid shape:peft.utils.warning.PeftWarning")
def test_a_saved_folder_loads_in_peft_and_here(name: str, tmp_path: Path) -> None:
    model = net()
    base = model(*inputs())
    diffadapt.add_adapter(model, CONFIGS[name], "a")
    expected = model(*inputs())
    assert_differs(expected, base, 1e-3)
    diffadapt.adapters(model).save("a", tmp_path, format="peft")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    theirs = peft.PeftModel.from_pretrained(net(), tmp_path)
    with torch.no_grad():
        assert_same(theirs(*inputs()), expected, 2e-6)
    again = net()
    report = diffadapt.load_adapter(again, tmp_path, "b")
    assert report.format == "peft"
    assert report.unused == []
    assert_same(again(*inputs()), expected, 1e-6)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (diffadapt.OFTConfig(block_size=4, side="output", target_modules=["linear"]), "nothing like oft_blocks"),
        (diffadapt.LoraConfig(rank=2, use_tucker=True, target_modules=["conv"]), "nothing like lora_mid"),
        (diffadapt.LoHaConfig(rank=2, use_dora=True, target_modules=["linear"]), "no type like dora-loha"),
        (
            diffadapt.LoraConfig(rank=2, use_dora=True, dora_axis="input", target_modules=["linear"]),
            "one length per input",
        ),
    ],
)
def test_adapters_that_peft_cannot_express_are_refused_and_nothing_is_written(
    config: AdapterConfig, reason: str, tmp_path: Path
) -> None:
    model = net()
    diffadapt.add_adapter(model, config, "a")
    with pytest.raises(diffadapt.AdapterError, match=reason):
        diffadapt.adapters(model).save("a", tmp_path / "folder", format="peft")
    assert not (tmp_path / "folder").exists()


def test_rotations_of_one_block_are_saved_together_with_others_unless_shared(tmp_path: Path) -> None:
    """PEFT has one setting for all layers that says whether the blocks of a layer are shared."""

    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(12, 4), nn.Linear(4, 12), nn.Linear(12, 3))

    model, values = build(), torch.randn(5, 12)
    adapter = diffadapt.add_adapter(model, diffadapt.OFTConfig(block_size=4, target_modules=".*", init=False), "a")
    expected = model(values)
    assert_differs(expected, build()(values), 1e-3)
    diffadapt.adapters(model).save("a", tmp_path / "right", format="peft")
    with torch.no_grad():
        assert_same(peft.PeftModel.from_pretrained(build(), tmp_path / "right")(values), expected, 2e-6)
    again = build()
    diffadapt.load_adapter(again, tmp_path / "right")
    assert_same(again(values), expected, 1e-6)
    blocks = adapter.layers["0"]._parameters["oft_R"]
    assert blocks is not None
    adapter.layers["0"]._parameters["oft_R"] = nn.Parameter(blocks[:1])
    with pytest.raises(diffadapt.AdapterError, match="for all layers of an OFT; these differ"):
        diffadapt.adapters(model).save("a", tmp_path / "wrong", format="peft")
    assert not (tmp_path / "wrong").exists()


@pytest.mark.slow
def test_every_component_gets_its_own_folder(tmp_path: Path) -> None:
    pipe = models.sd15()
    base = draw(pipe)
    options: dict[str, Any] = {"rank": 2, "init": False, "target_modules": ["to_q", "q_proj"]}
    diffadapt.add_adapter(pipe.unet, diffadapt.LoraConfig(**{**options, "target_modules": ["to_q"]}), "a")
    diffadapt.add_adapter(pipe.text_encoder, diffadapt.LoraConfig(**{**options, "target_modules": ["q_proj"]}), "a")
    expected = draw(pipe)
    assert_differs(expected, base)
    pipe.adapters.save("a", tmp_path, format="peft")
    assert json.loads((tmp_path / "unet" / "adapter_config.json").read_text())["r"] == 2
    again = models.sd15()
    for component in ("unet", "text_encoder"):
        again.load_adapter(tmp_path, component, subfolder=component, components=[component])
    assert_same(draw(again), expected)
    whole = models.sd15()
    report = whole.load_adapter(tmp_path, "whole")
    assert report.components == {c: len(a.layers) for c, a in pipe.adapters["a"].components.items()}
    assert (report.format, report.unused) == ("peft", [])
    assert_same(draw(whole), expected)


def folder_of_two(folder: Path) -> Path:
    """Save an adapter with alphas that differ from the ranks, and from each other, as two PEFT folders."""
    pipe = models.sd15()
    for component, target, alpha in (("unet", "to_q", 8), ("text_encoder", "q_proj", 1)):
        config = diffadapt.LoraConfig(rank=2, alpha=alpha, init=False, target_modules=[target])
        diffadapt.add_adapter(getattr(pipe, component), config, "a")
    pipe.adapters.save("a", folder, format="peft")
    return folder


def test_a_folder_of_two_components_loads_with_the_config_of_each(tmp_path: Path) -> None:
    folder = folder_of_two(tmp_path / "ink.v2")
    report = diffadapt.inspect(folder)
    assert (report.name, set(report.components), report.unused) == ("ink.v2", {"unet", "text_encoder"}, [])
    pipe = models.sd15()
    pipe.load_adapter(folder)
    scales = {
        component: {layer.scale for layer in adapter.layers.values()}
        for component, adapter in pipe.adapters["ink.v2"].components.items()
    }
    assert scales == {"unet": {4.0}, "text_encoder": {0.5}}
    pipe.adapters.hotswap("ink.v2", folder)
    saved = pipe.adapters.save("ink.v2", tmp_path / "again", format="peft")
    assert diffadapt.inspect(saved, pipe).components == report.components


def test_parts_of_a_folder_that_the_pipeline_has_no_model_for(tmp_path: Path) -> None:
    folder = folder_of_two(tmp_path)
    pipe = models.sd15()
    pipe.register_modules(text_encoder=None)
    unused = pipe.load_adapter(folder, "a").unused
    assert {fault.reason for fault in unused} == {"the pipeline has no text_encoder loaded (it is None)"}
    assert all(fault.key.startswith("text_encoder/base_model.") for fault in unused)
    only = models.sd15().load_adapter(folder, "a", components=["unet"])
    assert {fault.reason for fault in only.unused} == {"component text_encoder was not asked for"}
    (folder / "text_encoder").rename(folder / "text_encoder_2")
    with pytest.raises(diffadapt.LoadError, match="there is no component 'text_encoder_2'"):
        models.sd15().load_adapter(folder)


def test_folders_that_are_named_after_no_component_are_listed(tmp_path: Path) -> None:
    folder = folder_of_two(tmp_path)
    (folder / "text_encoder").rename(folder / "style")
    with pytest.raises(diffadapt.AdapterError, match="adapters in the folders style, unet; pass subfolder="):
        models.sd15().load_adapter(folder)


# peft mistakes a LoRA bias for a factor that lost a dimension.
@pytest.mark.filterwarnings("ignore:.*LoRA tensor.*have invalid shape:peft.utils.warning.PeftWarning")
def test_layers_without_a_bias_get_zeros_if_others_have_one(tmp_path: Path) -> None:
    """PEFT has biases on all layers or on none."""
    model = net()
    adapter = diffadapt.add_adapter(
        model, diffadapt.LoraConfig(rank=2, target_modules=["linear", "conv"], init=False, bias=True), "a"
    )
    del adapter.layers["conv"]._parameters["lora_bias"]
    expected = model(*inputs())
    diffadapt.adapters(model).save("a", tmp_path, format="peft")
    with torch.no_grad():
        assert_same(peft.PeftModel.from_pretrained(net(), tmp_path)(*inputs()), expected, 2e-6)


def test_a_lokr_of_peft_with_whole_factors_on_a_conv1d_is_refused(tmp_path: Path) -> None:
    """PEFT trains and merges a different formula there, so its file cannot be right here."""
    config = peft.LoKrConfig(r=8, alpha=8, target_modules=["conv1d"], init_weights=False)
    peft.get_peft_model(net(), config).save_pretrained(tmp_path)
    model = net()
    with pytest.raises(diffadapt.AdapterError, match="unintended formula for a LoKr with whole factors on a Conv1d"):
        diffadapt.load_adapter(model, tmp_path)
    assert len(diffadapt.adapters(model)) == 0


@pytest.mark.parametrize("format", ["diffusers", "kohya", "peft"])
def test_an_adapter_of_a_single_model_loads_again(format: str, tmp_path: Path) -> None:
    unet = models.sd15().unet
    adapter = diffadapt.add_adapter(unet, diffadapt.LoraConfig(rank=2, target_modules=["to_q"], init=False), "a")
    diffadapt.adapters(unet).save("a", tmp_path, format=format)
    again = models.sd15().unet
    report = diffadapt.load_adapter(again, tmp_path, "b")
    assert report.types == {"lora": len(adapter.layers)}
    inputs = torch.randn(1, 4, 8, 8), 1, torch.randn(1, 4, models.WIDTH)
    assert_same(again(*inputs).sample, unet(*inputs).sample)
    pipe = models.sd15()
    assert pipe.load_adapter(tmp_path, "c").components == {"unet": len(adapter.layers)}


# The weight of an embedding that PEFT stores next to the factors


def folder_with_weight(folder: Path, change: float = 0.0) -> Tensor:
    """Save a LoRA of PEFT on an embedding with the weight of the embedding, and return the output with it."""
    model = net()
    config = peft.LoraConfig(r=2, target_modules=["embedding", "linear"], init_lora_weights=False)
    torch.manual_seed(3)
    adapted = peft.get_peft_model(model, config)
    adapted.save_pretrained(folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    key = "base_model.model.embedding.base_layer.weight"
    tensors[key] = net().embedding.weight.detach() + change
    save_file(tensors, folder / "adapter_model.safetensors")
    return adapted(*inputs()).detach()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_weight_that_peft_stores_next_to_a_lora_is_no_fault_if_the_model_has_it(tmp_path: Path) -> None:
    expected = folder_with_weight(tmp_path)
    model = net()
    report = diffadapt.load_adapter(model, tmp_path)
    assert [fault.reason for fault in report.unused] == ["a copy of the layer's own weight, which the model has, too"]
    assert_same(model(*inputs()).detach(), expected, 2e-6)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_lora_whose_stored_weight_is_another_one_is_for_another_model(tmp_path: Path) -> None:
    folder_with_weight(tmp_path, change=0.5)
    with pytest.raises(diffadapt.LoadError, match="embedding had another weight where the file was made"):
        diffadapt.load_adapter(net(), tmp_path)
    model = net()
    model.embedding = nn.Embedding(12, 12)
    with pytest.raises(diffadapt.LoadError, match=r"shape \(11, 12\) where the file was made, and \(12, 12\) here"):
        diffadapt.load_adapter(model, tmp_path)
