"""Layers of a file that are several layers of the model, or one layer with reordered outputs, for every adapter type.

The model is Flux, the files are in the layout of Black Forest Labs. The expected weights are computed here: the plain
formula is applied to the joined weight, and the result is split.
"""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

import diffadapt
from diffadapt.runtime.adapter_layer import AdapterLayer
from diffadapt.types.adapter_type import AdapterType
from diffadapt.types.full import FULL
from diffadapt.types.layer_spec import LayerSpec, plain_spec
from diffadapt.types.loha import LOHA
from diffadapt.types.lokr import LOKR
from diffadapt.types.lora import LORA
from diffadapt.types.oft import OFT
from diffadapt.types.tensor_ops import take_rows
from tests.support import files, models, small_models
from tests.support.cases import for_each
from tests.support.compare import assert_differs, assert_same
from tests.support.dialects import KOHYA, Layer
from tests.support.formulas import (
    VARIANTS,
    Content,
    Variant,
    added,
    alpha,
    block_diagonal,
    boft_of_lycoris,
    dora,
    eight,
    loha_factors,
    lokr,
    lokr_factors,
    lora_factors,
    normal,
    oft_of_lycoris,
)
from tests.support.models import draw


def layer_of_flux(name: str, *parts: str, swapped: bool = False) -> Layer:
    return Layer(name, "transformer", parts, swapped)


DOUBLE, SINGLE = "transformer_blocks.0.attn", "single_transformer_blocks.0"
LAYERS = {
    "image qkv": layer_of_flux("double_blocks.0.img_attn.qkv", *(f"{DOUBLE}.to_{part}" for part in "qkv")),
    "text qkv": layer_of_flux("double_blocks.0.txt_attn.qkv", *(f"{DOUBLE}.add_{part}_proj" for part in "qkv")),
    "linear1": layer_of_flux(
        "single_blocks.0.linear1", *(f"{SINGLE}.attn.to_{part}" for part in "qkv"), f"{SINGLE}.proj_mlp"
    ),
    "swapped": layer_of_flux("final_layer.adaLN_modulation.1", "norm_out.linear", swapped=True),
    "linear2": layer_of_flux("single_blocks.0.linear2", f"{SINGLE}.proj_out"),
}
FUSED = [name for name, layer in LAYERS.items() if len(layer.parts) > 1]


def unaligned(out: int) -> int:
    """Return a number of rows for a second factor or a block that no boundary between the parts is a multiple of."""
    return out if out == 64 else out // 2


JOINT: dict[str, tuple[str, Variant]] = {
    "dora-input": ("dora", dora(added(lora_factors, 0.25, **alpha(1.0)), by_input=True)),
    "dora-input-block-diagonal": ("dora", dora(block_diagonal, by_input=True)),
    "dora-input-loha": ("dora-loha", dora(added(loha_factors, 0.5, **alpha(2.0)), by_input=True)),
    "dora-input-lokr": ("dora-lokr", dora(added(lokr("2"), 0.5, **alpha(1.0)), by_input=True)),
}
"""Name -> adapter type, formula. The length of a column is that over the rows of all parts."""

DORA_OF_LOKR: dict[str, tuple[str, Variant]] = {
    f"dora{'-input' if by_input else ''} of lokr {low_rank or 'whole'}": (
        "dora" if low_rank == "2" else "dora-lokr",
        dora(added(lokr(low_rank, unaligned), scale, **given), by_input=by_input),
    )
    for low_rank, scale, given in (("", 1.0, alpha(8.0)), ("1", 4.0, alpha(8.0)), ("2", 0.5, alpha(1.0)))
    for by_input in (False, True)
}
"""Name -> type of the parts, formula. The factors cannot be cut, so the change inside becomes a plain one."""

LIMITED: dict[str, tuple[str, Variant]] = {"oft-constraint": ("oft", oft_of_lycoris(eight, constraint=0.01))}
"""Name -> adapter type, formula. The limit is over the blocks of all parts together."""

REFUSED: dict[str, tuple[Variant, str]] = {
    "oft": (oft_of_lycoris(unaligned), "its oft joins outputs that are in different layers of the model"),
    "boft": (boft_of_lycoris(unaligned, 1), "its boft joins outputs that are in different layers"),
}


def flux() -> nn.Module:
    return small_models.flux(blocks=1).double()


def content_for(model: nn.Module, layer: Layer, variant: Variant) -> Content:
    hosts = [model.get_submodule(path) for path in layer.parts]
    content = variant(
        *(layer.joined([getattr(host, name).detach().double() for host in hosts]) for name in ("weight", "bias"))
    )
    assert content is not None
    return content


def spelled(layer: Layer, tensors: dict[str, Tensor], style: str) -> dict[str, Tensor]:
    if style == "kohya":
        stem = f"lora_unet_{layer.stem.replace('.', '_')}"
        return {f"{stem}.{KOHYA.get(name, name)}": tensor for name, tensor in tensors.items()}
    return {f"{layer.stem}.{name}": tensor for name, tensor in tensors.items()}


def headers(file: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor if tensor.numel() == 1 else tensor.to("meta") for key, tensor in file.items()}


def adapter_layers(model: nn.Module, name: str = "a") -> dict[str, AdapterLayer]:
    (adapter,) = diffadapt.adapters(model)[name].components.values()
    return dict(adapter.layers)


def assert_becomes(model: nn.Module, layer: Layer, content: Content, tolerance: float = 1e-9) -> None:
    """Assert that the adapter makes the outputs and, merged, the weights of `content`, and changes nothing else."""
    hosts = [model.get_submodule(path) for path in layer.parts]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    sizes = [host.out_features for host in hosts]
    weights, biases = layer.split(content.weight, sizes), layer.split(content.bias, sizes)
    own = torch.cat([torch.cat((host.weight, host.bias.unsqueeze(1)), 1) for host in hosts])
    assert_differs(torch.cat([torch.cat((w, b.unsqueeze(1)), 1) for w, b in zip(weights, biases, strict=True)]), own)
    x = torch.randn(3, hosts[0].in_features, dtype=torch.float64)
    with torch.no_grad():
        for host, weight, bias in zip(hosts, weights, biases, strict=True):
            assert_same(host(x), F.linear(x, weight, bias), tolerance)
    diffadapt.adapters(model).merge()
    for host, weight, bias in zip(hosts, weights, biases, strict=True):
        assert_same(host.weight, weight, tolerance)
        assert_same(host.bias, bias, tolerance)
    others = {name for name in before if name.rpartition(".")[0] not in layer.parts}
    assert len(others) == len(before) - 2 * len(layer.parts)
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in others)


@pytest.mark.parametrize("name", {**VARIANTS, **JOINT, **LIMITED})
@for_each(where=LAYERS, style=["kohya", "dotted"])
def test_every_type_becomes_its_parts(name: str, where: str, style: str) -> None:
    adapter_type, variant = {**VARIANTS, **JOINT, **LIMITED}[name]
    model, layer = flux(), LAYERS[where]
    content = content_for(model, layer, variant)
    file = spelled(layer, content.tensors, style)
    expected = {adapter_type: len(layer.parts)}
    inspected = diffadapt.inspect(headers(file), {"transformer": model})
    assert (inspected.used, inspected.unused, inspected.types) == (len(file), [], expected)
    report = diffadapt.load_adapter(model, file, name="a")
    assert (report.used, report.unused, report.types, report.family) == (len(file), [], expected, "flux")
    # The scale of a layer, 4 / 12 or 4 / 28, and the limit are stored in single precision.
    assert_becomes(model, layer, content, 1e-7 if name.endswith(("block-diagonal", "constraint")) else 1e-9)


@pytest.mark.parametrize("name", REFUSED)
@for_each(where=FUSED)
def test_a_type_that_joins_the_outputs_of_several_layers_is_refused(name: str, where: str) -> None:
    variant, reason = REFUSED[name]
    model, layer = flux(), LAYERS[where]
    file = spelled(layer, content_for(model, layer, variant).tensors, "dotted")
    with pytest.raises(diffadapt.AdapterError, match=reason):
        diffadapt.load_adapter(model, file, name="a")
    assert diffadapt.adapters(model).names == []
    # The other layers of the file can be used.
    other = LAYERS["linear2"]
    content = content_for(model, other, added(lora_factors, 1.0))
    file |= spelled(other, content.tensors, "dotted")
    report = diffadapt.load_adapter(model, file, name="a", strict=False)
    assert {key.startswith(layer.stem) for key, _ in report.unused} == {True}
    assert_becomes(model, other, content)


@pytest.mark.parametrize(
    ("variant", "reason"),
    [
        *(REFUSED[name] for name in ("oft", "boft")),
        # Blocks of eight fit into a half, but the fourth factor pairs one half with the other.
        (boft_of_lycoris(eight, 4), "its boft joins outputs"),
    ],
)
def test_blocks_across_swapped_halves_are_refused(variant: Variant, reason: str) -> None:
    model, layer = flux(), LAYERS["swapped"]
    with pytest.raises(diffadapt.AdapterError, match=reason):
        diffadapt.load_adapter(model, spelled(layer, content_for(model, layer, variant).tensors, "dotted"))


# Saving


@pytest.mark.parametrize(
    "name", [name for name in {**VARIANTS, **JOINT} if name not in ("ia3", "ia3-input", "boft-peft")]
)
@for_each(where=LAYERS)
def test_parts_are_saved_as_the_layer_of_the_file_that_they_came_from(name: str, where: str, tmp_path: Path) -> None:
    model, layer = flux(), LAYERS[where]
    file = spelled(layer, content_for(model, layer, {**VARIANTS, **JOINT}[name][1]).tensors, "kohya")
    diffadapt.load_adapter(model, file, name="a")
    saved = load_file(diffadapt.adapters(model).save("a", tmp_path / "saved.safetensors", format="kohya"))
    again = flux()
    diffadapt.load_adapter(again, saved, name="a")
    for path, adapter_layer in adapter_layers(model).items():
        other = adapter_layers(again)[path]
        assert (other.adapter_type.name, other.scale) == (adapter_layer.adapter_type.name, adapter_layer.scale)
        assert all(torch.equal(other.tensors[key], tensor) for key, tensor in adapter_layer.tensors.items())
    if "block-diagonal" in name or name == "dora-peft":
        return
    for key, tensor in file.items():
        if not key.endswith(".alpha"):
            assert torch.equal(saved[key].flatten(), tensor.flatten()), key


def test_constrained_rotations_of_separate_layers_are_not_joined(tmp_path: Path) -> None:
    """One constraint on all blocks together differs from a constraint on each part."""
    model, layer = flux(), LAYERS["image qkv"]
    tensors = {"oft_blocks": normal(4, 8, 8), **alpha(0.01)}
    file = {
        f"lora_unet_{path.replace('.', '_')}.{key}": t.clone() for path in layer.parts for key, t in tensors.items()
    }
    diffadapt.load_adapter(model, file, name="a")
    with pytest.raises(diffadapt.AdapterError, match="oft of 3 layers cannot become the one layer"):
        diffadapt.adapters(model).save("a", tmp_path / "saved.safetensors", format="kohya")


# LoKr whose factors cannot be split by rows


@pytest.mark.parametrize(
    ("low_rank", "scale", "given", "adapter_type"),
    [
        ("", 1.0, {}, "full"),
        ("", 1.0, alpha(float("inf")), "full"),
        ("1", 1.0, alpha(2.0), "full"),
        ("1", 4.0, alpha(8.0), "full"),
        ("2", 0.5, alpha(1.0), "lora"),
        ("12", 2.0, alpha(4.0), "lora"),
        ("12", 1.0, {}, "lora"),
    ],
)
@for_each(where=[*FUSED, "swapped"])
def test_a_lokr_that_cannot_be_split_becomes_a_plain_change(
    where: str, low_rank: str, scale: float, given: dict[str, Tensor], adapter_type: str
) -> None:
    model, layer = flux(), LAYERS[where]
    content = content_for(model, layer, added(lokr(low_rank, unaligned), scale, **given))
    file = spelled(layer, content.tensors, "dotted")
    expected = {adapter_type: len(layer.parts)}
    assert diffadapt.inspect(headers(file), {"transformer": model}).types == expected
    assert diffadapt.load_adapter(model, file, name="a").types == expected
    if adapter_type == "lora":
        assert all(one.rank is not None and one.rank <= 8 for one in adapter_layers(model).values())
    assert_becomes(model, layer, content)


@pytest.mark.parametrize("name", DORA_OF_LOKR)
@for_each(where=FUSED)
def test_the_lokr_in_a_dora_that_cannot_be_split_becomes_a_plain_change(name: str, where: str, tmp_path: Path) -> None:
    adapter_type, variant = DORA_OF_LOKR[name]
    model, layer = flux(), LAYERS[where]
    content = content_for(model, layer, variant)
    file = spelled(layer, content.tensors, "dotted")
    assert diffadapt.inspect(headers(file), {"transformer": model}).types == {adapter_type: len(layer.parts)}
    assert diffadapt.load_adapter(model, file, name="a").types == {adapter_type: len(layer.parts)}
    saved = diffadapt.adapters(model).save("a", tmp_path / "saved.safetensors", format="kohya")
    again = flux()
    diffadapt.load_adapter(again, saved, name="a")
    for each in (model, again):
        assert_becomes(each, layer, content, 1e-7)


def test_the_plain_change_is_computed_in_float32_and_stored_in_the_dtype_of_the_adapter() -> None:
    model, layer = flux().bfloat16(), LAYERS["image qkv"]
    tensors = {name: tensor.bfloat16() for name, tensor in lokr_factors(96, 32, o2=48, low_rank="1")[0].items()}
    diffadapt.load_adapter(model, spelled(layer, {**tensors, **alpha(1.5)}, "dotted"), name="a")
    a, b, w2 = (tensors[name].float() for name in ("lokr_w1_a", "lokr_w1_b", "lokr_w2"))
    change = 0.75 * torch.kron(a @ b, w2)
    for path, expected in zip(layer.parts, change.split(32), strict=True):
        assert torch.equal(adapter_layers(model)[path].tensors["diff"], expected.bfloat16())


def test_the_scale_of_a_lokr_with_whole_factors_comes_from_the_config_of_a_peft_folder(tmp_path: Path) -> None:
    model, layer = flux(), LAYERS["image qkv"]
    content = content_for(model, layer, added(lokr("", unaligned), 0.5))
    names = {f"base_model.model.{key}": t for key, t in spelled(layer, content.tensors, "dotted").items()}
    files.write(tmp_path / "adapter_model.safetensors", names)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LOKR", "r": 4, "alpha": 2}))
    assert diffadapt.load_adapter(model, tmp_path, name="a").types == {"full": 3}
    assert_becomes(model, layer, content)


# Ranks and scales


@pytest.mark.parametrize(("given", "scale"), [({}, 1.0), (alpha(4.0), 1 / 3), (alpha(12.0), 1.0), (alpha(1.0), 1 / 12)])
@pytest.mark.parametrize("magnitude", [False, True])
def test_the_parts_of_a_block_diagonal_lora_have_the_rank_of_one_block(
    given: dict[str, Tensor], scale: float, magnitude: bool
) -> None:
    model, layer = flux(), LAYERS["image qkv"]

    def make(weight: Tensor, bias: Tensor) -> Content:
        tensors = {name: t for name, t in block_diagonal(weight, bias).tensors.items() if name != "alpha"}
        change = scale * tensors["lora_B.weight"] @ tensors["lora_A.weight"]
        return Content({**tensors, **given}, weight + change, bias)

    content = content_for(model, layer, dora(make) if magnitude else make)
    diffadapt.load_adapter(model, spelled(layer, content.tensors, "kohya"), name="a")
    for adapter_layer in adapter_layers(model).values():
        assert adapter_layer.rank == 4
        size = sum(tensor.numel() for tensor in adapter_layer.tensors.values())
        assert size == 4 * (32 + 32) + (32 if magnitude else 0)
        assert adapter_layer.scale == pytest.approx(scale)
    assert_becomes(model, layer, content, 1e-6)


def test_a_part_without_a_change_keeps_the_whole_rank() -> None:
    """Rows of zeros do not show which ranks they would use."""
    model, layer = flux(), LAYERS["image qkv"]
    content = content_for(model, layer, added(lora_factors, 1.0))
    up, down = content.tensors["lora_B.weight"], content.tensors["lora_A.weight"]
    up[32:64] = 0
    own = layer.joined([model.get_submodule(path).weight.detach() for path in layer.parts])
    diffadapt.load_adapter(model, spelled(layer, content.tensors, "dotted"), name="a")
    assert [adapter_layer.rank for adapter_layer in adapter_layers(model).values()] == [4, 4, 4]
    assert_becomes(model, layer, Content({}, own + up @ down, content.bias))


def test_the_metadata_can_hold_the_alpha_of_a_fused_layer(tmp_path: Path) -> None:
    model, layer = flux(), LAYERS["linear1"]
    content = content_for(model, layer, added(lora_factors, 2.0))
    metadata = {"lora_adapter_metadata": json.dumps({"r": 4, "lora_alpha": 1, "alpha_pattern": {r"^single.*": 8}})}
    file = files.write(tmp_path / "a.safetensors", spelled(layer, content.tensors, "dotted"), metadata)
    diffadapt.load_adapter(model, file, name="a")
    assert_becomes(model, layer, content)


# Parameters


@pytest.mark.parametrize("name", ["lora", "loha", "lokr-low-rank", "oft-peft-shared", "glora", "dora", "full", "boft"])
def test_every_part_has_its_own_parameters(name: str) -> None:
    """A tensor that the parts have in common must not be shared by three parameters: training would step it thrice."""
    model, layer = flux(), LAYERS["image qkv"]
    content = content_for(model, layer, VARIANTS[name][1])
    file = spelled(layer, content.tensors, "kohya")
    diffadapt.load_adapter(model, file, name="a")
    loaded = adapter_layers(model)
    first, *others = (loaded[path] for path in layer.parts)
    before = [{key: tensor.clone() for key, tensor in other.tensors.items()} for other in others]
    with torch.no_grad():
        for tensor in first.tensors.values():
            tensor.add_(1.0)
    for other, tensors in zip(others, before, strict=True):
        assert all(torch.equal(tensor, tensors[key]) for key, tensor in other.tensors.items())


def test_training_one_part_leaves_the_others_alone() -> None:
    model, layer = flux(), LAYERS["image qkv"]
    content = content_for(model, layer, added(lora_factors, 1.0))
    diffadapt.load_adapter(model, spelled(layer, content.tensors, "dotted"), name="a")
    loaded = list(adapter_layers(model).values())
    for adapter_layer in loaded:
        adapter_layer.requires_grad_()
    before = [adapter_layer.tensors["lora_down"].detach().clone() for adapter_layer in loaded]
    x = torch.randn(5, 32, dtype=torch.float64)
    parameters = [parameter for adapter_layer in loaded for parameter in adapter_layer.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    model.get_submodule(layer.parts[0])(x).square().sum().backward()
    optimizer.step()
    after = [adapter_layer.tensors["lora_down"] for adapter_layer in loaded]
    assert [torch.equal(old, new) for old, new in zip(before, after, strict=True)].count(False) == 1


# Lengths of columns over the rows of all parts


def by_input(model: nn.Module, where: str = "linear1") -> tuple[Layer, Content, dict[str, Tensor]]:
    layer = LAYERS[where]
    content = content_for(model, layer, JOINT["dora-input"][1])
    return layer, content, spelled(layer, content.tensors, "dotted")


def test_the_lengths_follow_the_weights_of_all_parts() -> None:
    model = flux()
    layer, content, file = by_input(model)
    diffadapt.load_adapter(model, file, name="a")
    first, *_, last = (model.get_submodule(path) for path in layer.parts)
    x = torch.randn(3, 32, dtype=torch.float64)
    with torch.no_grad():
        before = first(x)
        last.weight.mul_(2.0)
        weight = layer.joined([model.get_submodule(path).weight for path in layer.parts])
        change = weight + content.tensors["lora_B.weight"] @ content.tensors["lora_A.weight"] / 4
        expected = change[:32] * content.tensors["dora_scale"] / torch.linalg.vector_norm(change, dim=0)
        after = first(x)
        assert_differs(after, before)
        assert_same(after, F.linear(x, expected, first.bias))
        assert torch.equal(first(x), after)


def test_parts_with_common_lengths_run_in_slots_in_copies_and_as_a_lora() -> None:
    model = flux()
    layer, content, file = by_input(model)
    adapters = diffadapt.adapters(model)
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    diffadapt.load_adapter(model, file, name="a")
    again = copy.deepcopy(model)
    adapters.clear()
    other = spelled(layer, content_for(model, layer, VARIANTS["lora"][1]).tensors, "dotted")
    adapters.prepare_hotswap([file, other], slots=1)
    adapters.load(other, "a")
    adapters.merge("a")
    # The weights of all parts are merged now, and the lengths are those over the original ones.
    adapters.hotswap("a", file)
    adapters.unmerge()
    assert all(torch.equal(tensor, base[name]) for name, tensor in model.state_dict().items())
    assert_becomes(model, layer, content, 1e-6)
    assert_becomes(again, layer, content)
    third = flux()
    diffadapt.load_adapter(third, file, name="a")
    diffadapt.adapters(third).to_lora("a", "lora", rank=32)
    diffadapt.adapters(third).activate("lora")
    assert_becomes(third, layer, content, 1e-6)


def test_separate_lengths_are_not_joined_and_common_ones_not_separated(tmp_path: Path) -> None:
    model = flux()
    layer, _, file = by_input(model, "image qkv")
    diffadapt.load_adapter(model, file, name="common")
    adapters = diffadapt.adapters(model)
    for format in ("onetrainer", "diffusers", "peft"):
        with pytest.raises(diffadapt.AdapterError, match="format='kohya'"):
            adapters.save("common", tmp_path / format, format=format)
    loaded = adapter_layers(model, "common")
    loaded[layer.parts[0]].tensors["dora_scale"].data.mul_(2.0)
    with pytest.raises(diffadapt.AdapterError, match="in common, but were trained apart"):
        adapters.save("common", tmp_path / "kohya.safetensors", format="kohya")
    tensors = {
        name: tensor[:32] if name == "lora_B.weight" else tensor for name, tensor in by_input(model)[1].tensors.items()
    }
    alone = {f"{path}.{name}": tensor.clone() for path in layer.parts for name, tensor in tensors.items()}
    diffadapt.load_adapter(model, alone, name="separate")
    adapters.save("separate", tmp_path / "separate.safetensors", format="onetrainer")
    with pytest.raises(diffadapt.AdapterError, match="DoRAs can be joined only if"):
        adapters.save("separate", tmp_path / "separate.safetensors", format="kohya")


# Files


def test_fused_and_split_names_of_one_layer_are_refused() -> None:
    model, layer = flux(), LAYERS["image qkv"]
    file = spelled(layer, lora_factors(96, 32)[0], "dotted")
    file |= {f"{layer.parts[1]}.{name}": tensor for name, tensor in lora_factors(32, 32)[0].items()}
    with pytest.raises(diffadapt.AdapterError, match=r"attn\.to_k has tensors under another name already"):
        diffadapt.load_adapter(model, file, name="a")
    assert diffadapt.adapters(model).names == []


def test_two_names_of_a_swapped_layer_are_refused() -> None:
    model, layer = flux(), LAYERS["swapped"]
    file = spelled(layer, lora_factors(64, 32)[0], "dotted")
    file |= {f"norm_out.linear.{name}": tensor for name, tensor in lora_factors(64, 32)[0].items()}
    with pytest.raises(diffadapt.AdapterError, match=r"norm_out\.linear has tensors under another name already"):
        diffadapt.load_adapter(model, file, name="a")


@pytest.mark.parametrize(("out", "columns"), [(64, 32), (96, 16)])
def test_a_wrong_shape_is_reported_with_the_shape_of_the_fused_layer(out: int, columns: int) -> None:
    model, layer = flux(), LAYERS["image qkv"]
    with pytest.raises(diffadapt.AdapterError, match=r"lora_(up|down) has shape .* expected \((96, 4|4, 32)\)"):
        diffadapt.load_adapter(model, spelled(layer, lora_factors(out, columns)[0], "kohya"))


def everywhere(pipe: Any, variant: Variant) -> tuple[dict[str, Tensor], list[tuple[Layer, Content]]]:
    """Return a file with all five layers, in float32, and the content of each layer."""
    contents = [(layer, content_for(pipe.transformer, layer, variant)) for layer in LAYERS.values()]
    file: dict[str, Tensor] = {}
    for layer, content in contents:
        file |= {key: t.float().clone() for key, t in spelled(layer, content.tensors, "kohya").items()}
    return file, contents


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lora", "lora-bias", "lora-block-diagonal", "dora-alpha"])
def test_a_pipeline_draws_the_same_from_the_file_from_changed_weights_and_from_the_saved_file(
    name: str, tmp_path: Path
) -> None:
    pipe, changed = models.flux(), models.flux()
    base = draw(pipe)
    file, contents = everywhere(pipe, VARIANTS[name][1])
    for layer, content in contents:
        hosts = [changed.transformer.get_submodule(path) for path in layer.parts]
        sizes = [host.out_features for host in hosts]
        with torch.no_grad():
            for host, weight in zip(hosts, layer.split(content.weight, sizes), strict=True):
                host.weight.copy_(weight)
            for host, bias in zip(hosts, layer.split(content.bias, sizes), strict=True):
                host.bias.copy_(bias)
    report = pipe.load_adapter(files.write(tmp_path / "fused.safetensors", file), "a")
    assert (report.used, report.unused) == (len(file), [])
    picture = draw(pipe)
    assert_differs(picture, base)
    assert_same(picture, draw(changed), 1e-4)
    saved = pipe.adapters.save("a", tmp_path / "saved.safetensors", format="diffusers")
    again = models.flux()
    again.load_adapter(saved, "a")
    assert_same(draw(again), picture, 1e-6)
    pipe.adapters.clear()
    assert torch.equal(draw(pipe), base)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["loha", "lokr-low-rank", "oft", "ia3-lycoris", "glora"])
def test_a_pipeline_draws_the_same_from_the_file_and_merged(name: str) -> None:
    pipe = models.flux()
    base = draw(pipe)
    file, _ = everywhere(pipe, VARIANTS[name][1])
    pipe.load_adapter(file, "a")
    picture = draw(pipe)
    assert_differs(picture, base)
    pipe.adapters.merge()
    assert_same(draw(pipe), picture, 1e-4)


# Kinds of layers that no family fuses yet


def test_rows_of_full_changes_are_taken_in_order() -> None:
    rows = (range(4, 6), range(0, 3))
    order = torch.tensor([4, 5, 0, 1, 2])
    norm = LayerSpec("norm", 6, 6)
    tensors = {"diff": torch.randn(6), "diff_b": torch.randn(6)}
    found = FULL.rows(tensors, norm, rows)
    assert found is not None
    assert all(torch.equal(found[name], tensor[order]) for name, tensor in tensors.items())
    for spec in (LayerSpec("embedding", 6, 10, transposed=True), LayerSpec("linear", 6, 10, transposed=True)):
        stored = torch.randn(10, 6)
        found = FULL.rows({"diff": stored}, spec, rows)
        assert found is not None
        assert torch.equal(found["diff"], stored[:, order])


@pytest.mark.parametrize(
    ("adapter_type", "shapes"),
    [
        (LORA, {"lora_down": (2, 6), "lora_mid": (2, 2, 3, 3), "lora_up": (16, 2)}),
        (
            LOHA,
            {
                **{f"hada_w{n}_{side}": (2, 16 if side == "a" else 6) for n in "12" for side in "ab"},
                **{f"hada_t{n}": (2, 2, 3, 3) for n in "12"},
            },
        ),
        (LOKR, {"lokr_w1": (4, 2), "lokr_w2_a": (2, 4), "lokr_w2_b": (2, 3), "lokr_t2": (2, 2, 3, 3)}),
        (LOKR, {"lokr_w1": (4, 2), "lokr_w2": (4, 3, 3, 3)}),
    ],
)
def test_rows_of_convolutions_with_cores_make_the_rows_of_the_change(
    adapter_type: AdapterType, shapes: dict[str, tuple[int, ...]]
) -> None:
    rows = (range(8, 16), range(0, 4))
    whole, part = plain_spec(16, 6, (3, 3)), plain_spec(12, 6, (3, 3))
    fitted = adapter_type.fit({name: torch.randn(shape) for name, shape in shapes.items()}, whole)
    found = adapter_type.rows(fitted, whole, rows)
    assert found is not None
    change = adapter_type.delta_weight(adapter_type.fit(found, part), part)
    torch.testing.assert_close(change, take_rows(adapter_type.delta_weight(fitted, whole), rows))


def test_rows_of_a_rotated_embedding_are_whole_blocks() -> None:
    """On an embedding `oft_R`, which elsewhere rotates the inputs, rotates the outputs."""
    spec = LayerSpec("embedding", 12, 10, transposed=True)
    blocks = torch.randn(3, 6)
    found = OFT.rows({"oft_R": blocks}, spec, (range(8, 12), range(0, 4)))
    assert found is not None
    assert torch.equal(found["oft_R"], blocks[[2, 0]])
    shared = OFT.rows({"oft_R": blocks[:1]}, spec, (range(4, 12),))
    assert shared is not None
    assert torch.equal(shared["oft_R"], blocks[:1])
    assert OFT.rows({"oft_R": blocks}, spec, (range(2, 6),)) is None
