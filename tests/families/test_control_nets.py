"""Control-LoRAs on ControlNets, and the LoRA in the file of an IP-Adapter FaceID."""

import copy
from pathlib import Path

import pytest
import torch
from diffusers import ControlNetModel, DiffusionPipeline, StableDiffusionControlNetPipeline
from torch import Tensor, nn

import diffadapt
from diffadapt import AdapterError
from tests.support import files, loras, models
from tests.support.compare import assert_differs, assert_same, assert_unchanged, snapshot
from tests.support.versions import needs

Tensors = dict[str, Tensor]
NAMES: dict[str, str] = files.fixture("ldm_names_sd15")["names"]
OWN = {
    "controlnet_mid_block": "middle_block_out.0",
    "controlnet_cond_embedding.conv_in": "input_hint_block.0",
    **{f"controlnet_cond_embedding.blocks.{n}": f"input_hint_block.{2 * n + 2}" for n in range(6)},
    "controlnet_cond_embedding.conv_out": "input_hint_block.14",
    **{f"controlnet_down_blocks.{n}": f"zero_convs.{n}.0" for n in range(12)},
}
"""Path -> name in Stability AI's files and in the original ControlNets, for the layers that a UNet does not have."""


def controlnet() -> ControlNetModel:
    torch.manual_seed(3)
    return ControlNetModel.from_unet(models.sd15_full().unet).eval()


def control_lora(base: ControlNetModel) -> tuple[Tensors, ControlNetModel]:
    """Return a Control-LoRA, and the ControlNet that it represents."""
    generator = torch.Generator().manual_seed(4)

    def random(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator) * 0.3

    expected = copy.deepcopy(base)
    tensors: Tensors = {"lora_controlnet": torch.zeros(())}
    for path, layer in expected.named_modules():
        weight, bias = (getattr(layer, name, None) for name in ("weight", "bias"))
        if weight is None:
            continue
        stem = OWN.get(path) or NAMES[path]
        if isinstance(layer, nn.Linear | nn.Conv2d) and path not in OWN:
            down = torch.randn(2, *weight.shape[1:], generator=generator) * 0.3
            up = torch.randn(weight.shape[0], 2, *(1 for _ in weight.shape[2:]), generator=generator) * 0.3
            tensors[f"{stem}.down"], tensors[f"{stem}.up"] = down, up
            weight.data += (up.flatten(1) @ down.flatten(1)).view(weight.shape)
        else:
            tensors[f"{stem}.weight"] = weight.data = random(weight)
        if bias is not None:
            tensors[f"{stem}.bias"] = bias.data = random(bias)
    return tensors, expected


def run(model: ControlNetModel) -> Tensor:
    generator, dtype = torch.Generator().manual_seed(5), model.dtype
    with torch.no_grad():
        down, middle = model(
            torch.randn(1, 4, 8, 8, generator=generator).to(dtype),
            torch.tensor([7]),
            torch.randn(1, 3, models.WIDTH, generator=generator).to(dtype),
            torch.rand(1, 3, 64, 64, generator=generator).to(dtype),
            return_dict=False,
        )
    return torch.cat([sample.flatten() for sample in (*down, middle)])


def test_a_control_lora_becomes_the_control_net_that_it_represents() -> None:
    model = controlnet()
    before, base = snapshot(model), run(model)
    tensors, expected = control_lora(model)
    report = diffadapt.load_adapter(model, tensors, "canny")
    assert (report.format, report.family) == ("control-lora", "controlnet")
    assert [key for key, _ in report.unused] == ["lora_controlnet"]
    assert report.used == len(tensors) - 1
    assert_same(run(model), run(expected))
    assert_differs(run(model), base)
    adapters = diffadapt.adapters(model)
    adapters.merge()
    assert_same(run(model), run(expected))
    merged = dict(expected.named_parameters())
    assert all(torch.allclose(p, merged[name], atol=1e-6) for name, p in model.named_parameters() if name in merged)
    adapters.clear()
    assert_unchanged(model, before)


@pytest.mark.filterwarnings("ignore:While injecting the PEFT adapters:RuntimeWarning")
def test_a_control_lora_is_the_same_in_diffusers() -> None:
    """The new biases of low-rank layers are excluded, since diffusers 0.42.1 ignores them."""
    needs("diffusers", "0.37", "ControlNetModel.load_lora_adapter")
    model = controlnet().double()
    tensors, _ = control_lora(model)
    for path, layer in model.named_modules():
        if f"{NAMES.get(path)}.down" in tensors and layer.bias is not None:
            tensors[f"{NAMES[path]}.bias"] = layer.bias.detach()
    theirs = copy.deepcopy(model)
    theirs.load_lora_adapter({key: tensor.clone() for key, tensor in tensors.items()}, prefix=None)
    diffadapt.load_adapter(model, tensors)
    assert_same(run(model), run(theirs.double()))


def test_a_control_lora_in_a_pipeline_is_saved_and_loaded_again(tmp_path: Path) -> None:
    parts = {**models.sd15_full().components, "controlnet": controlnet()}
    pipe = StableDiffusionControlNetPipeline(**parts, requires_safety_checker=False)
    tensors, expected = control_lora(pipe.controlnet)
    report = pipe.load_adapter(tensors, "canny")
    assert list(report.components) == ["controlnet"]
    assert_same(run(pipe.controlnet), run(expected))
    assert diffadapt.inspect(tensors).components == report.components
    file = pipe.adapters.save("canny", tmp_path / "canny.safetensors", "kohya")
    pipe.adapters.remove("canny")
    assert diffadapt.load_adapter(pipe.controlnet, file).unused == []
    assert_same(run(pipe.controlnet), run(expected))


def test_a_control_lora_without_a_control_net_is_refused_with_a_hint() -> None:
    pipe = models.sd15_full()
    tensors, _ = control_lora(controlnet())
    with pytest.raises(AdapterError, match=r"Control-LoRA.*from_unet\(pipe\.unet\)"):
        pipe.load_adapter(tensors)


def test_a_whole_control_net_is_refused_by_name() -> None:
    with pytest.raises(AdapterError, match=r"whole ControlNet.*from_single_file"):
        diffadapt.load_adapter(controlnet(), {"input_hint_block.0.weight": torch.zeros(16, 3, 3, 3)})


def test_a_new_bias_has_to_fit_an_unmerged_bias_of_the_model() -> None:
    model = controlnet()
    tensors, _ = control_lora(model)
    refused = {
        "a layer that has none": {"input_blocks.1.1.transformer_blocks.0.attn1.to_q.bias": torch.zeros(8)},
        r"shape \(3,\), expected \(8,\)": {"zero_convs.0.0.bias": torch.zeros(3)},
    }
    before = snapshot(model)
    for reason, changed in refused.items():
        with pytest.raises(AdapterError, match=reason):
            diffadapt.load_adapter(model, {**tensors, **changed})
    assert_unchanged(model, before)
    diffadapt.load_adapter(model, tensors, "first")
    diffadapt.adapters(model).merge()
    with pytest.raises(AdapterError, match="first is merged"):
        diffadapt.load_adapter(model, tensors, "second")


# IP-Adapter FaceID


def faceid(pipe: DiffusionPipeline) -> tuple[dict[str, Tensors], dict[str, dict[str, loras.Factors]]]:
    """Return a file as published, a dictionary of two, and the LoRA in it by path.

    Layers are numbered in the order of diffusers' `attn_processors`.
    """
    adapter: Tensors = {}
    layers: dict[str, loras.Layer] = {}
    for number, name in enumerate(pipe.unet.attn_processors):
        owner = name.removesuffix(".processor")
        for part in ("to_q", "to_k", "to_v", "to_out.0"):
            layers[f"{owner}.{part}"] = pipe.unet.get_submodule(f"{owner}.{part}")
        adapter[f"{number}.to_k_ip.weight"] = torch.zeros(8, 4)
    factors = loras.factors_for(layers)
    for number, name in enumerate(pipe.unet.attn_processors):
        for part in ("to_q", "to_k", "to_v", "to_out.0"):
            own = factors[f"{name.removesuffix('.processor')}.{part}"]
            stem = f"{number}.{part.removesuffix('.0')}_lora"
            adapter[f"{stem}.down.weight"], adapter[f"{stem}.up.weight"] = own.down, own.up
    return {"image_proj": {"proj.0.weight": torch.zeros(4, 4)}, "ip_adapter": adapter}, {"unet": factors}


@pytest.mark.slow
@pytest.mark.parametrize("source", ["state dict", "pickle", "flat names"])
def test_the_lora_in_the_file_of_an_ip_adapter_is_loaded(source: str, tmp_path: Path) -> None:
    pipe = models.sd15()
    base = models.draw(pipe)
    content, parts = faceid(pipe)
    flat = {f"{outer}.{key}": tensor for outer, found in content.items() for key, tensor in found.items()}
    given = flat if source == "flat names" else content
    if source == "pickle":
        torch.save(content, tmp_path / "faceid.bin")
        given = diffadapt.read_pickle(tmp_path / "faceid.bin")
    report = pipe.load_adapter(given, "face")
    assert (report.format, report.types) == ("ip-adapter-faceid", {"lora": len(parts["unet"])})
    assert report.used == 2 * len(parts["unet"])
    assert all("load_ip_adapter" in reason for _, reason in report.unused)
    assert_same(models.draw(pipe), models.draw(loras.bake(models.sd15(), parts)))
    assert_differs(models.draw(pipe), base)


def test_the_layers_of_an_ip_adapter_are_numbered_as_in_diffusers() -> None:
    pipe = models.sd15()
    content, parts = faceid(pipe)
    theirs = pipe.unet._load_ip_adapter_loras([content])[0]
    paths = {
        key.replace(".processor.to_out_lora", ".to_out.0").replace(".processor.", ".").replace("_lora", "")
        for key in theirs
        if ".down." in key
    }
    assert paths == {f"unet.{path}.down.weight" for path in parts["unet"]}


def test_an_ip_adapter_for_a_larger_unet_is_refused() -> None:
    content, _ = faceid(models.sd15_full())
    with pytest.raises(AdapterError, match=r"attention layer \d+, and unet has \d+, counted from 0"):
        models.sd15().load_adapter(content)


def test_an_ip_adapter_without_a_lora_is_refused_by_name() -> None:
    content, _ = faceid(models.sd15())
    plain = {key: tensor for key, tensor in content["ip_adapter"].items() if "_ip" in key}
    with pytest.raises(AdapterError, match="this is an IP-Adapter"):
        models.sd15().load_adapter({"image_proj": content["image_proj"], "ip_adapter": plain})
