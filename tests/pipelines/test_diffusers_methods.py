"""diffusers' own adapter methods on a pipeline with our adapters, and adapters of peft in the same models."""

import inspect
from typing import Any

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, DiffusionPipeline, StableDiffusionImg2ImgPipeline
from diffusers.loaders.lora_base import LoraBaseMixin
from diffusers.loaders.peft import PeftAdapterMixin
from torch import Tensor, nn

import diffadapt
from tests.support import loras, models, spellings
from tests.support.compare import assert_differs, assert_same, assert_unchanged, snapshot

pytestmark = pytest.mark.slow

LAYERS = r"to_[qv]|conv1|proj_in"


def file_for(pipe: DiffusionPipeline, rank: int) -> dict[str, Tensor]:
    """Return a file with convolutions, as diffusers writes it."""
    return spellings.peft_names(loras.parts_for(pipe, ("unet",), LAYERS, rank))


def with_peft(pipe: DiffusionPipeline, rank: int, name: str = "theirs") -> None:
    pipe.load_lora_weights(dict(file_for(pipe, rank)), adapter_name=name)


@pytest.fixture
def pipe() -> Any:
    return models.sd15()


def test_peft_finds_no_layer_of_an_adapter_and_both_act(pipe: Any) -> None:
    base = models.draw(pipe)
    pipe.load_adapter(file_for(pipe, 4), "a")
    ours = models.draw(pipe)
    second = file_for(pipe, 2)
    pipe.load_adapter(second, "b")
    both = models.draw(pipe)
    assert_differs(both, ours, 1e-3)
    pipe.adapters.remove("b")
    with_peft(pipe, 2)
    assert_same(models.draw(pipe), both, 1e-4)
    with pytest.raises(diffadapt.AdapterError, match=r"peft has an adapter here.*unload_lora_weights"):
        pipe.load_adapter(second, "b")
    with pytest.raises(diffadapt.AdapterError, match="peft has an adapter here"):
        diffadapt.add_adapter(pipe.unet, diffadapt.LoraConfig(rank=2, target_modules=["to_q"]))
    with pytest.raises(diffadapt.AdapterError, match="peft has an adapter here"):
        pipe.adapters.prepare_hotswap()
    assert_same(models.draw(pipe), both, 1e-4)
    pipe.adapters.clear()
    theirs = models.draw(pipe)
    assert_differs(theirs, both, 1e-3)
    pipe.unload_lora_weights()
    assert torch.equal(models.draw(pipe), base)


def test_walkers_find_no_layer_of_an_adapter_by_the_name_of_a_layer() -> None:
    model = models.unet_sd15()
    names = {name for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))}
    endings = {name.rpartition(".")[2] for name in names}
    adapter = diffadapt.add_adapter(model, diffadapt.LoraConfig(rank=2, target_modules="all-linear"), "mine")
    for name, parameter in model.named_parameters():
        assert model.get_parameter(name) is parameter
    diffadapt.adapters(model).prepare_hotswap(slots=2)
    added = {name for name, _ in model.named_modules() if name.startswith("diffadapt") or "_diffadapt" in name}
    assert len(added) > len(adapter.layers)
    assert not {name for name in added if name.rpartition(".")[2] in endings or name.endswith(tuple(names))}
    assert {id(parameter) for parameter in adapter.parameters()} <= {id(parameter) for parameter in model.parameters()}


def test_diffusers_methods_serve_adapters_of_this_library(pipe: Any) -> None:
    base, before = models.draw(pipe), snapshot(pipe)
    pipe.load_adapter(file_for(pipe, 4), "a")
    pipe.load_adapter(file_for(pipe, 2), "b", activate=False)
    assert pipe.get_active_adapters() == ["a"]
    assert pipe.get_list_adapters() == {"unet": ["a", "b"]}
    pipe.set_adapters(["a", "b"], [0.5, {"unet": 0.25}])
    assert pipe.adapters.active == {"a": 0.5, "b": {"unet": 0.25}}
    mixed = models.draw(pipe)
    pipe.disable_lora()
    assert torch.equal(models.draw(pipe), base)
    pipe.disable_lora()
    pipe.enable_lora()
    assert torch.equal(models.draw(pipe), mixed)
    pipe.set_adapters("b")
    assert pipe.adapters.active == {"b": 1.0}
    alone = models.draw(pipe)
    pipe.fuse_lora()
    assert pipe.adapters.merged == ["b"]
    assert_same(models.draw(pipe), alone, 1e-4)
    pipe.unfuse_lora()
    assert torch.equal(models.draw(pipe), alone)
    with pytest.raises(diffadapt.AdapterError, match="activate"):
        pipe.fuse_lora(lora_scale=0.5)
    with pytest.raises(diffadapt.AdapterError, match="prefixes of module paths"):
        pipe.set_adapters("a", {"unet": {"down": 0.5}})
    with pytest.raises(diffadapt.AdapterError, match="no adapter 'c'"):
        pipe.set_adapters(["a", "c"])
    with pytest.raises(diffadapt.AdapterError, match="2 weights for 1"):
        pipe.set_adapters("a", [0.5, 0.5])
    pipe.delete_adapters("a")
    assert pipe.adapters.names == ["b"]
    pipe.unload_lora_weights()
    assert pipe.adapters.names == []
    assert_unchanged(pipe, before)
    assert not {"set_adapters", "unload_lora_weights"} & set(vars(pipe))


def test_names_of_both_libraries_can_be_mixed(pipe: Any) -> None:
    pipe.load_adapter(file_for(pipe, 4), "a")
    with_peft(pipe, 2)
    assert sorted(pipe.get_active_adapters()) == ["a", "theirs"]
    assert sorted(pipe.get_list_adapters()["unet"]) == ["a", "theirs"]
    both = models.draw(pipe)
    pipe.set_adapters(["a", "theirs"], [0.0, 1.0])
    alone = models.draw(pipe)
    assert_differs(alone, both, 1e-3)
    pipe.disable_lora()
    base = models.draw(pipe)
    assert_differs(base, alone, 1e-3)
    pipe.enable_lora()
    assert_same(models.draw(pipe), alone, 1e-5)
    pipe.delete_adapters(["a", "theirs"])
    assert_same(models.draw(pipe), base, 1e-5)


def test_a_pipeline_without_adapters_keeps_its_methods(pipe: Any) -> None:
    assert pipe.adapters.names == []
    assert not {"set_adapters", "unload_lora_weights", "encode_prompt"} & set(vars(pipe))
    with_peft(pipe, 2)
    assert pipe.get_active_adapters() == ["theirs"]


def test_pipelines_that_share_an_adapted_model_serve_its_adapters(pipe: Any) -> None:
    """Whether they were made before or after, and although nobody asked for their `adapters`."""
    earlier = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    pipe.load_adapter(file_for(pipe, 4), "a")
    later = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    adapted = models.draw(pipe)
    for other in (earlier, later):
        assert other.get_active_adapters() == ["a"]
        assert list(inspect.signature(other.set_adapters).parameters) == ["adapter_names", "adapter_weights"]
        other.disable_lora()
        assert pipe.adapters.active == {}
        assert_differs(models.draw(pipe), adapted, 1e-3)
        other.enable_lora()
        other.set_adapters("a", 0.5)
        assert pipe.adapters.active == {"a": 0.5}
    earlier.unload_lora_weights()
    assert pipe.adapters.names == []
    assert type(later).set_adapters is LoraBaseMixin.set_adapters
    later.unload_lora_weights()


def test_pipelines_without_lora_in_diffusers_do_not_get_its_methods() -> None:
    model = models.unet_sd15()
    pipe = DDPMPipeline(model, DDPMScheduler())
    diffadapt.add_adapter(model, diffadapt.LoraConfig(rank=2, target_modules=["to_q"]), "a")
    assert pipe.adapters.names == ["a"]
    assert not hasattr(pipe, "set_adapters")
    assert not hasattr(DiffusionPipeline, "set_adapters")


def test_the_methods_of_a_model_serve_adapters_of_this_library(pipe: Any) -> None:
    """Those of diffusers on the UNet, and those of transformers on the text encoder."""
    unet, encoder, base = pipe.unet, pipe.text_encoder, models.draw(pipe)
    before = snapshot(pipe)
    with pytest.raises(ValueError, match="No adapter loaded"):
        unet.disable_adapters()
    pipe.load_adapter(spellings.peft_names(loras.parts_for(pipe, ("unet", "text_encoder"), r"to_[qv]|q_proj")), "a")
    pipe.load_adapter(file_for(pipe, 2), "b", activate=False)
    drawn = models.draw(pipe)
    assert unet.active_adapters() == encoder.active_adapters() == ["a"]
    unet.disable_adapters()
    encoder.disable_adapters()
    assert torch.equal(models.draw(pipe), base)
    encoder.enable_adapters()
    assert_differs(models.draw(pipe), base, 1e-3)
    unet.enable_lora()
    assert torch.equal(models.draw(pipe), drawn)
    unet.disable_lora()
    unet.enable_adapters()
    unet.set_adapters(["a", "b"], [0.5, None])
    assert diffadapt.adapters(unet).active == {"a": 0.5, "b": 1.0}
    assert encoder.active_adapters() == ["a"]
    unet.set_adapter("a")
    assert diffadapt.adapters(unet).active == {"a": 0.5}
    half = models.draw(pipe)
    unet.fuse_lora()
    assert diffadapt.adapters(unet).merged == ["a"]
    assert_same(models.draw(pipe), half, 1e-4)
    unet.unfuse_lora()
    assert torch.equal(models.draw(pipe), half)
    for refused in (
        lambda: unet.fuse_lora(lora_scale=0.5),
        lambda: unet.fuse_lora(adapter_names=["c"]),
        lambda: unet.set_adapters("c"),
        lambda: encoder.set_adapter("c"),
        lambda: unet.delete_adapters(["c"]),
        lambda: unet.set_adapters("a", {"down": {"block_1": 0.5}}),
        lambda: unet.save_lora_adapter("somewhere"),
        lambda: encoder.get_adapter_state_dict("a"),
    ):
        with pytest.raises(diffadapt.AdapterError):
            refused()
    assert torch.equal(models.draw(pipe), half)
    unet.delete_adapters("b")
    assert diffadapt.adapters(unet).names == ["a"]
    unet.unload_lora()
    diffadapt.adapters(encoder).clear()
    assert torch.equal(models.draw(pipe), base)
    assert pipe.adapters.names == []
    assert_unchanged(pipe, before)


def test_the_methods_of_a_model_take_names_of_both_libraries(pipe: Any) -> None:
    unet, encoder = pipe.unet, pipe.text_encoder
    pipe.load_adapter(spellings.peft_names(loras.parts_for(pipe, ("unet", "text_encoder"), r"to_[qv]|q_proj")), "a")
    pipe.load_lora_weights(spellings.peft_names(loras.parts_for(pipe, ("unet", "text_encoder"), r"to_k|k_proj")))
    theirs = next(iter(unet.peft_config))
    both = models.draw(pipe)
    # Loading with peft has not switched ours off.
    assert diffadapt.adapters(unet).active == diffadapt.adapters(encoder).active == {"a": 1.0}
    pipe.set_adapters(["a", theirs], [0.5, 1.0])
    assert diffadapt.adapters(unet).active == {"a": 0.5}
    unet.set_adapters([theirs], [0.0])
    assert diffadapt.adapters(unet).active == {"a": 0.5}
    assert_differs(models.draw(pipe), both, 1e-3)
    unet.set_adapters(["a", theirs], [1.0, 1.0])
    encoder.set_adapter(theirs)
    pipe.set_adapters(["a", theirs])
    assert_same(models.draw(pipe), both, 1e-5)
    unet.disable_adapters()
    unet.enable_adapters()
    assert_same(models.draw(pipe), both, 1e-5)
    unet.delete_adapters(["a", theirs])
    assert diffadapt.adapters(unet).names == []
    assert theirs not in (getattr(unet, "peft_config", None) or {})


def test_a_model_without_adapters_keeps_its_methods() -> None:
    unet = models.unet_sd15()
    diffadapt.adapters(unet)
    assert unet.set_adapters.__func__ is vars(PeftAdapterMixin)["set_adapters"]
    assert not hasattr(models.sd15().text_encoder, "unload_lora")
