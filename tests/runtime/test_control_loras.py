"""Control LoRAs for Flux.1: an input layer that gets more inputs and loses them again, and norms with new weights."""

import copy
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from diffusers import DiffusionPipeline, FluxControlPipeline, FluxTransformer2DModel
from safetensors.torch import load_file
from torch import Tensor, nn

import diffadapt
from diffadapt import AdapterError
from tests.support import files, models
from tests.support.compare import assert_differs, assert_same, assert_unchanged, snapshot

Tensors = dict[str, Tensor]
LATENT, WIDTH, HEAD = 16, models.WIDTH, 16
X = "x_embedder"
CPU = torch.device("cpu")
control_pipeline = models.flux_control


def draw(pipe: FluxControlPipeline) -> Tensor:
    image = torch.linspace(0, 1, 3 * 16 * 16).view(1, 3, 16, 16)
    return models.draw(pipe, control_image=image)


def predict(pipe: FluxControlPipeline) -> Tensor:
    """Return the output of the model for as many channels as its config says; unlike drawing, this leaves no traces."""
    generator = torch.Generator().manual_seed(7)
    model = pipe.transformer
    with torch.no_grad():
        return model(
            hidden_states=torch.randn(1, 4, 6 * LATENT, generator=generator)[..., : model.config.in_channels],
            encoder_hidden_states=torch.randn(1, 3, WIDTH, generator=generator),
            pooled_projections=torch.randn(1, WIDTH, generator=generator),
            timestep=torch.tensor([0.5]),
            img_ids=torch.zeros(4, 3),
            txt_ids=torch.zeros(3, 3),
        ).sample


def state(pipe: FluxControlPipeline) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a snapshot of the pipeline, and the config of its model."""
    return snapshot(pipe), dict(pipe.transformer.config)


def lora(stem: str, out: int, columns: int, seed: int, rank: int = 4) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {
        f"{stem}.lora_A.weight": torch.randn(rank, columns, generator=generator) * 0.3,
        f"{stem}.lora_B.weight": torch.randn(out, rank, generator=generator) * 0.3,
        f"{stem}.lora_B.bias": torch.randn(out, generator=generator) * 0.3,
    }


def control_lora(seed: int = 1, columns: int = 2 * LATENT) -> Tensors:
    """Return a file as Black Forest Labs write it."""
    generator = torch.Generator().manual_seed(seed)
    scale = [1 + torch.randn(HEAD, generator=generator) * 0.5 for _ in range(3)]
    return {
        **lora("img_in", WIDTH, columns, seed),
        **lora("double_blocks.0.img_attn.qkv", 3 * WIDTH, WIDTH, seed + 10),
        **lora("single_blocks.1.linear2", WIDTH, 5 * WIDTH, seed + 20),
        **lora("final_layer.adaLN_modulation.1", 2 * WIDTH, WIDTH, seed + 30),
        "double_blocks.0.img_attn.norm.query_norm.scale": scale[0],
        "double_blocks.1.txt_attn.norm.key_norm.scale": scale[1],
        "single_blocks.0.norm.key_norm.scale": scale[2],
    }


def style_lora(columns: int = LATENT, seed: int = 5) -> Tensors:
    """Return a file in diffusers' names, for the input layer and another layer."""
    layers = {X: columns, "transformer_blocks.0.attn.to_q": WIDTH}
    found: Tensors = {}
    for path, inputs in layers.items():
        tensors = lora(f"transformer.{path}", WIDTH, inputs, seed)
        found.update({key: tensor for key, tensor in tensors.items() if not key.endswith("bias")})
    return found


def bake(model: FluxTransformer2DModel, file: Tensors, strength: float = 1.0) -> None:
    """Add the control LoRA to the weights of a model that has its number of inputs."""

    def add(path: str, stem: str, rows: slice = slice(None)) -> None:
        layer = model.get_submodule(path)
        assert isinstance(layer, nn.Linear)
        layer.weight.data += strength * (file[f"{stem}.lora_B.weight"] @ file[f"{stem}.lora_A.weight"])[rows]
        layer.bias.data += strength * file[f"{stem}.lora_B.bias"][rows]

    def put(path: str, key: str) -> None:
        model.get_submodule(path).weight.data.lerp_(file[key], strength)

    add(X, "img_in")
    for number, name in enumerate(("to_q", "to_k", "to_v")):
        rows = slice(number * WIDTH, (number + 1) * WIDTH)
        add(f"transformer_blocks.0.attn.{name}", "double_blocks.0.img_attn.qkv", rows)
    add("single_transformer_blocks.1.proj_out", "single_blocks.1.linear2")
    stem = "final_layer.adaLN_modulation.1"
    halves = {f"{stem}.lora_A.weight": file[f"{stem}.lora_A.weight"]}
    for name in ("weight", "bias"):
        halves[f"{stem}.lora_B.{name}"] = torch.cat(file[f"{stem}.lora_B.{name}"].chunk(2)[::-1])
    file = {**file, **halves}
    add("norm_out.linear", stem)
    put("transformer_blocks.0.attn.norm_q", "double_blocks.0.img_attn.norm.query_norm.scale")
    put("transformer_blocks.1.attn.norm_added_k", "double_blocks.1.txt_attn.norm.key_norm.scale")
    put("single_transformer_blocks.0.attn.norm_k", "single_blocks.0.norm.key_norm.scale")


def with_more_inputs() -> FluxControlPipeline:
    """Return a pipeline whose model has twice the inputs, with weights of zero for the control image."""
    pipe = control_pipeline(in_channels=2 * LATENT, out_channels=LATENT)
    state = control_pipeline().transformer.state_dict()
    state[f"{X}.weight"] = torch.cat([state[f"{X}.weight"], torch.zeros(WIDTH, LATENT)], 1)
    pipe.transformer.load_state_dict(state)
    return pipe


@pytest.mark.slow
@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_a_control_lora_equals_changed_weights(strength: float) -> None:
    pipe, expected = control_pipeline(), with_more_inputs()
    file = control_lora()
    report = pipe.load_adapter(file, "canny", scale=strength)
    assert (report.format, report.unused, report.types) == ("bfl-control", [], {"lora": 6, "full": 3})
    base = draw(expected)
    bake(expected.transformer, file, strength)
    assert_same(draw(pipe), draw(expected))
    assert_differs(draw(pipe), base)
    pipe.adapters.merge()
    assert_same(draw(pipe), draw(expected))


def test_new_norm_weights_are_merged_exactly() -> None:
    pipe = control_pipeline()
    pipe.transformer.bfloat16()
    file = {key: tensor.bfloat16() for key, tensor in control_lora().items()}
    pipe.load_adapter(file, "canny")
    pipe.adapters.merge()
    norm = pipe.transformer.transformer_blocks[0].attn.norm_q
    assert torch.equal(norm.weight, file["double_blocks.0.img_attn.norm.query_norm.scale"])


def test_removal_restores_the_layer_and_the_config() -> None:
    pipe = control_pipeline()
    before, config = state(pipe)
    pipe.load_adapter(control_lora(), "canny")
    assert pipe.transformer.x_embedder.weight.shape == (WIDTH, 2 * LATENT)
    assert pipe.transformer.config.in_channels == pipe.transformer.x_embedder.in_features == 2 * LATENT
    assert pipe.transformer.config.out_channels == LATENT
    pipe.adapters.remove("canny")
    assert_unchanged(pipe, before)
    assert dict(pipe.transformer.config) == config
    assert pipe.transformer.x_embedder.in_features == LATENT


FILES = {"canny": control_lora(1), "depth": control_lora(2), "style": style_lora()}


@pytest.mark.parametrize("order", list(itertools.permutations(FILES)))
def test_control_loras_are_loaded_and_removed_in_any_order(order: tuple[str, ...]) -> None:
    pipe = control_pipeline()
    before, config = state(pipe)
    for name in FILES:
        pipe.load_adapter(FILES[name], name)
    together = predict(pipe)
    other = control_pipeline()
    for name in order:
        other.load_adapter(FILES[name], name)
    assert_same(predict(other), together)
    for name in order:
        pipe.adapters.remove(name)
        has_control = bool({"canny", "depth"} & set(pipe.adapters.names))
        assert pipe.transformer.x_embedder.in_features == (2 * LATENT if has_control else LATENT)
        alone = control_pipeline()
        for rest in pipe.adapters.names:
            alone.load_adapter(FILES[rest], rest)
        if has_control:
            assert_same(predict(pipe), predict(alone))
    assert_unchanged(pipe, before)
    assert dict(pipe.transformer.config) == config


@pytest.mark.parametrize("first", ["style", "canny"])
def test_an_adapter_for_fewer_inputs_is_saved_as_it_was(first: str, tmp_path: Path) -> None:
    pipe = control_pipeline()
    for name in sorted(("style", "canny"), key=lambda name: name != first):
        pipe.load_adapter(FILES[name], name)
    saved = load_file(pipe.adapters.save("style", tmp_path / "style.safetensors"))
    assert saved.keys() == FILES["style"].keys()
    assert all(torch.equal(saved[key], tensor) for key, tensor in FILES["style"].items())
    pipe.adapters.remove("canny")
    assert pipe.adapters["style"].components["transformer"].layers[X].tensors["lora_down"].shape == (4, LATENT)


def test_an_inactive_control_lora_is_the_base() -> None:
    pipe = control_pipeline()
    pipe.load_adapter(control_lora(), "canny", activate=False)
    assert_same(predict(pipe), predict(with_more_inputs()), 0.0)


def predict_with(name: str) -> Tensor:
    pipe = control_pipeline()
    pipe.load_adapter(FILES[name], name)
    return predict(pipe)


def test_a_model_that_has_more_inputs_itself_keeps_its_weight() -> None:
    pipe = control_pipeline(in_channels=2 * LATENT, out_channels=LATENT)
    (before, _), weight = state(pipe), pipe.transformer.x_embedder.weight
    expected = copy.deepcopy(pipe.transformer)
    pipe.load_adapter(control_lora(), "canny")
    assert pipe.transformer.x_embedder.weight is weight
    assert weight.shape == (WIDTH, 2 * LATENT)
    bake(expected, control_lora())
    pipe.adapters.merge()
    assert_same(weight, expected.x_embedder.weight)
    pipe.adapters.clear()
    pipe.load_adapter(style_lora(), "style")
    product = FILES["style"][f"transformer.{X}.lora_B.weight"] @ FILES["style"][f"transformer.{X}.lora_A.weight"]
    base = weight.clone()
    pipe.adapters.merge()
    assert_same(weight, base + torch.nn.functional.pad(product, (0, LATENT)))
    pipe.adapters.clear()
    assert_unchanged(pipe, before)


def test_a_control_lora_can_be_loaded_while_another_adapter_is_merged() -> None:
    pipe = control_pipeline()
    before, _ = state(pipe)
    pipe.load_adapter(style_lora(), "style")
    pipe.adapters.merge("style")
    pipe.load_adapter({key: t for key, t in control_lora().items() if not key.endswith("scale")}, "canny")
    alone = control_pipeline()
    for name, file in (("style", style_lora()), ("canny", control_lora())):
        alone.load_adapter({key: t for key, t in file.items() if not key.endswith("scale")}, name)
    assert_same(predict(pipe), predict(alone))
    pipe.adapters.remove("canny")
    pipe.adapters.clear()
    assert_unchanged(pipe, before)


def test_a_saved_model_with_more_inputs_loads_again(tmp_path: Path) -> None:
    pipe = control_pipeline()
    pipe.load_adapter(control_lora(), "canny", activate=False)
    pipe.transformer.save_pretrained(tmp_path)
    again = FluxTransformer2DModel.from_pretrained(tmp_path)
    assert again.config.in_channels == 2 * LATENT
    assert again.proj_out.out_features == LATENT
    assert torch.equal(again.x_embedder.weight, pipe.transformer.x_embedder.weight)


@pytest.mark.parametrize("format", ["diffusers", "kohya", "comfy"])
def test_a_saved_control_lora_is_loaded_as_the_same_adapter(format: str, tmp_path: Path) -> None:
    pipe = control_pipeline()
    pipe.load_adapter(control_lora(), "canny")
    drawn = predict(pipe)
    file = pipe.adapters.save("canny", tmp_path / "canny.safetensors", format)
    again = control_pipeline()
    report = again.load_adapter(file, "again")
    assert (report.format, report.unused) == (format, [])
    assert_same(predict(again), drawn)
    assert again.transformer.config.in_channels == 2 * LATENT


HOOKS: dict[str, Callable[[FluxTransformer2DModel], object]] = {
    "sequential cpu offload": lambda model: accelerate.cpu_offload(model, execution_device=CPU),
    "group offload": lambda model: model.enable_group_offload(CPU, offload_type="leaf_level"),
    "layerwise casting": lambda model: model.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32),
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("hook", HOOKS)
def test_a_control_lora_works_under_hooks_that_move_or_cast_weights(hook: str, when: str) -> None:
    """The hooks are installed before or after the control LoRA, which is removed while they are installed."""
    pipe, plain = control_pipeline(), control_pipeline()
    for other in (pipe, plain):
        if hook == "layerwise casting":
            HOOKS[hook](other.transformer)
    base = predict(plain)
    if when == "before" and hook != "layerwise casting":
        HOOKS[hook](pipe.transformer)
    for other in (pipe, plain):
        other.load_adapter(FILES["style"], "style")
        other.load_adapter(FILES["canny"], "canny")
    if when == "after" and hook != "layerwise casting":
        HOOKS[hook](pipe.transformer)
    assert_same(predict(pipe), predict(plain), 0.0)
    pipe.adapters.remove("canny")
    pipe.adapters.remove("style")
    assert_same(predict(pipe), base, 0.0)
    assert pipe.transformer.x_embedder.in_features == pipe.transformer.config.in_channels == LATENT


def test_offloading_that_keeps_copies_is_refused() -> None:
    pipe = control_pipeline()
    pipe.transformer.enable_group_offload(CPU, offload_type="leaf_level")
    hook = pipe.transformer.x_embedder._diffusers_hook.get_hook("group_offloading")
    if hasattr(hook, "config"):
        hook.config.offload_to_disk_path = "somewhere"
    else:
        # Before diffusers 0.35, the group says it.
        hook.group.stream = object()
    refused(pipe, control_lora(), "group offloading keeps a copy")


def test_a_quantised_layer_is_refused() -> None:
    pipe = control_pipeline()
    weight = pipe.transformer.x_embedder.weight
    pipe.transformer.x_embedder.weight = torch.nn.Parameter(weight.detach().to(torch.int8), requires_grad=False)
    refused(pipe, control_lora(), "x_embedder: its weight is quantised")


def test_a_quantised_layer_with_a_merged_adapter_is_refused() -> None:
    pipe = control_pipeline()
    layer = pipe.transformer.x_embedder
    layer.weight = torch.nn.Parameter((layer.weight.detach() * 100).to(torch.float8_e4m3fn), requires_grad=False)
    layer.register_buffer("weight_scale", torch.tensor([0.01]))
    pipe.load_adapter({"transformer.x_embedder.diff": torch.full(layer.weight.shape, 0.1)}, "a")
    before = layer.weight.detach().float()
    pipe.adapters.merge("a")
    refused(pipe, control_lora(), "x_embedder: adapters are merged into its quantised weight")
    pipe.adapters.unmerge()
    assert torch.equal(layer.weight.float(), before)


def test_a_copy_of_the_model_is_independent() -> None:
    pipe = control_pipeline()
    pipe.load_adapter(control_lora(), "canny")
    other = copy.deepcopy(pipe.transformer)
    diffadapt.adapters(other).clear()
    assert other.x_embedder.in_features == other.config.in_channels == LATENT
    assert pipe.transformer.x_embedder.in_features == pipe.transformer.config.in_channels == 2 * LATENT
    assert_same(predict(pipe), predict_with("canny"), 0.0)


# In diffusers


@pytest.mark.slow
def test_diffusers_reads_a_saved_control_lora(tmp_path: Path) -> None:
    pipe, theirs = control_pipeline(), control_pipeline()
    pipe.load_adapter(control_lora(), "canny")
    file = pipe.adapters.save("canny", tmp_path / "canny.safetensors", "diffusers")
    theirs.load_lora_weights(str(file))
    assert theirs.transformer.config.in_channels == 2 * LATENT
    assert_same(draw(pipe), draw(theirs))


@pytest.mark.slow
def test_a_file_of_the_trainer_in_diffusers_is_read() -> None:
    """It has norms under the names of their parameters, and before these the name of the component twice."""
    file = {
        **lora(f"transformer.{X}", WIDTH, 2 * LATENT, 3),
        **lora("transformer.single_transformer_blocks.0.attn.to_q", WIDTH, WIDTH, 4),
        "transformer.transformer_blocks.0.attn.norm_added_q.weight": torch.rand(HEAD) * 2,
    }
    pipe, theirs = control_pipeline(), control_pipeline()
    theirs.load_lora_weights(dict(file))
    report = pipe.load_adapter(file, "control")
    assert (report.format, report.unused) == ("diffusers", [])
    assert_same(draw(pipe), draw(theirs))
    twice = {
        key.replace("transformer.transformer_blocks", "transformer.transformer.transformer_blocks"): tensor
        for key, tensor in file.items()
    }
    assert twice.keys() != file.keys()
    again = control_pipeline()
    assert again.load_adapter(twice, "control").unused == []
    assert_same(draw(again), draw(pipe))


# Refusals


def refused(pipe: FluxControlPipeline, file: Tensors, match: str) -> None:
    before, config = state(pipe)
    with pytest.raises(AdapterError, match=match):
        pipe.load_adapter(file, "canny")
    assert_unchanged(pipe, before)
    assert dict(pipe.transformer.config) == config


@pytest.mark.parametrize("columns", [LATENT - 1, LATENT + 1, 9 * LATENT])
def test_a_number_of_inputs_that_no_model_has_is_refused(columns: int) -> None:
    refused(
        control_pipeline(),
        control_lora(columns=columns),
        r"x_embedder: lora_down has shape \(4, \d+\), expected \(4, 16\)",
    )


@pytest.mark.parametrize("make", [models.flux, models.flux_control])
def test_a_lora_for_fill_is_refused_by_name(make: Callable[[], DiffusionPipeline]) -> None:
    """Its layer reads a masked image and a mask next to the latents, which no pipeline feeds to this model."""
    pipe = make()
    refused(
        pipe, style_lora(6 * LATENT), r"x_embedder: the file is made for FLUX\.1 Fill: its layer has 96 inputs and that"
    )


@pytest.mark.parametrize("file", [style_lora(), style_lora(6 * LATENT)])
def test_a_model_with_the_inputs_of_fill_takes_its_loras_and_plain_ones(file: Tensors) -> None:
    pipe = control_pipeline(in_channels=6 * LATENT, out_channels=LATENT)
    weight = pipe.transformer.x_embedder.weight.clone()
    pipe.load_adapter(file, "a")
    pipe.adapters.merge("a")
    product = file[f"transformer.{X}.lora_B.weight"] @ file[f"transformer.{X}.lora_A.weight"]
    padded = torch.nn.functional.pad(product, (0, 6 * LATENT - product.shape[1]))
    assert_same(pipe.transformer.x_embedder.weight, weight + padded)


def test_a_control_lora_on_a_model_with_the_inputs_of_fill_is_refused() -> None:
    pipe = control_pipeline(in_channels=6 * LATENT, out_channels=LATENT)
    refused(pipe, style_lora(2 * LATENT), "x_embedder: the file is a control LoRA: its layer has 32 inputs and that")


def test_a_control_lora_on_a_pipeline_that_feeds_no_control_image_is_refused() -> None:
    refused(models.flux(), control_lora(), "reads a control image that this pipeline does not feed")


def test_other_layers_get_no_more_inputs() -> None:
    file = {**control_lora(), **lora("single_blocks.1.linear2", WIDTH, 6 * WIDTH, 3)}
    refused(control_pipeline(), file, "single_transformer_blocks.1.proj_out: lora_down has shape")


def test_an_adapter_that_cannot_get_more_inputs_prevents_loading() -> None:
    pipe = control_pipeline()
    lokr = {"lokr_w1": torch.randn(4, 4), "lokr_w2": torch.randn(WIDTH // 4, LATENT // 4)}
    pipe.load_adapter({f"diffusion_model.img_in.{name}": tensor for name, tensor in lokr.items()}, "kron")
    refused(pipe, control_lora(), r"x_embedder: .*\(lokr\) has 16 inputs and another needs 32")


def test_a_rotation_of_outputs_allows_more_inputs() -> None:
    pipe = control_pipeline()
    before, _ = state(pipe)
    blocks = torch.randn(2, WIDTH // 2, WIDTH // 2) * 0.3
    pipe.load_adapter({"diffusion_model.img_in.oft_blocks": blocks}, "rotation")
    pipe.load_adapter(control_lora(), "canny")
    output = predict(pipe)
    pipe.adapters.merge()
    assert_same(predict(pipe), output)
    pipe.adapters.clear()
    assert_unchanged(pipe, before)


def test_a_failure_in_another_component_takes_the_new_inputs_back(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = control_pipeline()
    encoder = {
        f"text_encoder.encoder.layers.0.self_attn.q_proj.lora_{side}.weight": torch.ones(shape)
        for side, shape in (("A", (2, WIDTH)), ("B", (WIDTH, 2)))
    }
    file = {**lora(f"transformer.{X}", WIDTH, 2 * LATENT, 3), **encoder}
    locked = pipe.text_encoder.get_submodule(models.CLIP_ROOT + "encoder.layers.0.self_attn.q_proj")

    class Locked(type(locked)):  # type: ignore[misc]
        def __setattr__(self, name: str, value: object) -> None:
            if name == "__class__" and value is not Locked:
                raise TypeError("locked")
            super().__setattr__(name, value)

    locked.__class__ = Locked
    refused(pipe, file, "locked")


def test_inspection_finds_every_layer_and_changes_nothing() -> None:
    with torch.device("meta"):
        model = FluxTransformer2DModel(guidance_embeds=True)
    before = snapshot(model)
    tensors = files.placeholders("bfl_control_flux")
    report = diffadapt.inspect(tensors, {"transformer": model})
    assert (report.used, report.unused) == (len(tensors), [])
    assert report.types == {"lora": 504, "full": 4 * 19 + 2 * 38}
    assert list(snapshot(model)) == list(before)
    assert model.x_embedder.in_features == 64


def test_a_control_lora_is_converted_without_a_model(tmp_path: Path) -> None:
    tensors = {
        key: torch.randn(t.shape) * 0.01
        for key, t in files.placeholders("bfl_control_flux").items()
        if key.startswith(("img_in", "double_blocks.0.img_attn", "double_blocks.0.img_mod", "single_blocks.0.norm"))
    }
    there = load_file(diffadapt.convert(tensors, tmp_path / "diffusers.safetensors", "diffusers"))
    assert torch.equal(there["transformer.x_embedder.lora_A.weight"], tensors["img_in.lora_A.weight"])
    norm = "double_blocks.0.img_attn.norm.query_norm"
    assert torch.equal(there["transformer.transformer_blocks.0.attn.norm_q.weight"], tensors[f"{norm}.scale"])
    comfy = load_file(diffadapt.convert(tensors, tmp_path / "comfy.safetensors", "comfy"))
    assert comfy["diffusion_model.img_in.reshape_weight"].tolist() == [3072, 128]
    assert torch.equal(comfy[f"diffusion_model.{norm}.scale.set_weight"], tensors[f"{norm}.scale"])
    assert torch.equal(comfy["diffusion_model.img_in.diff_b"], tensors["img_in.lora_B.bias"])
    back = load_file(diffadapt.convert(comfy, tmp_path / "back.safetensors", "diffusers"))
    assert back.keys() == there.keys()
    assert all(torch.equal(back[key], tensor) for key, tensor in there.items())
