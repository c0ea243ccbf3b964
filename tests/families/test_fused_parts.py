"""Layers of a file that are several layers of the model, or one with its outputs in another order, for every type.

Flux in the layout of Black Forest Labs: what is loaded has to be the weight that the file's layer would have, computed
here from the formula on the joined weight, and cut at the end.
"""

import json
from dataclasses import dataclass
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
from diffadapt.types.layer_spec import LayerSpec, layer_of
from diffadapt.types.loha import LOHA
from diffadapt.types.lokr import LOKR
from diffadapt.types.lora import LORA
from diffadapt.types.oft import OFT
from diffadapt.types.tensor_ops import pick
from tests.support import files, models
from tests.support.compare import assert_differs, assert_same
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


@dataclass(frozen=True)
class Layer:
    """A layer of a file: its name there, and the model's layers it consists of."""

    name: str
    parts: tuple[str, ...]
    swapped: bool = False

    @property
    def kohya(self) -> str:
        return f"lora_unet_{self.name.replace('.', '_')}"

    @property
    def is_cut(self) -> bool:
        return len(self.parts) > 1

    def joined(self, tensors: list[Tensor]) -> Tensor:
        whole = torch.cat(tensors)
        return torch.cat(whole.chunk(2)[::-1]) if self.swapped else whole

    def cut(self, whole: Tensor, sizes: list[int]) -> list[Tensor]:
        return list((torch.cat(whole.chunk(2)[::-1]) if self.swapped else whole).split(sizes))


DOUBLE, SINGLE = "transformer_blocks.0.attn", "single_transformer_blocks.0"
LAYERS = {
    "image qkv": Layer("double_blocks.0.img_attn.qkv", tuple(f"{DOUBLE}.to_{part}" for part in "qkv")),
    "text qkv": Layer("double_blocks.0.txt_attn.qkv", tuple(f"{DOUBLE}.add_{part}_proj" for part in "qkv")),
    "linear1": Layer(
        "single_blocks.0.linear1", (*(f"{SINGLE}.attn.to_{part}" for part in "qkv"), f"{SINGLE}.proj_mlp")
    ),
    "swapped": Layer("final_layer.adaLN_modulation.1", ("norm_out.linear",), swapped=True),
    "linear2": Layer("single_blocks.0.linear2", (f"{SINGLE}.proj_out",)),
}
CUT = [name for name, layer in LAYERS.items() if layer.is_cut]

KOHYA_NAMES = {
    "lora_A.weight": "lora_down.weight",
    "lora_B.weight": "lora_up.weight",
    "lora_B.bias": "lora_up.bias",
    "ia3_w": "weight",
}


def unaligned(out: int) -> int:
    """Rows of a second factor, or a block, that no boundary between the pieces is a multiple of."""
    return out if out == 64 else out // 2


WHOLE_ONLY: dict[str, tuple[str, Variant, str]] = {
    "dora-input": ("dora", dora(added(lora_factors, 0.25, **alpha(1.0)), by_input=True), "a length for every input"),
    "dora-input-loha": (
        "dora-loha",
        dora(added(loha_factors, 0.5, **alpha(2.0)), by_input=True),
        "a length for every input",
    ),
    "oft-constraint": ("oft", oft_of_lycoris(eight, constraint=0.01), "its constraint is over all outputs"),
}
"""Exact where the file's layer is one layer of the model, in whatever order. On several: refused, and why."""

REFUSED: dict[str, tuple[Variant, str]] = {
    **{name: (variant, reason) for name, (_, variant, reason) in WHOLE_ONLY.items()},
    "oft": (oft_of_lycoris(unaligned), "its oft joins outputs that are in different layers of the model"),
    "boft": (boft_of_lycoris(unaligned, 1), "its boft joins outputs that are in different layers"),
    "dora-lokr": (dora(added(lokr("2", unaligned), 1.0)), "its dora-lokr joins outputs that are in different layers"),
}


def flux() -> nn.Module:
    torch.manual_seed(0)
    return models.flux_transformer(1).double()


def content_for(model: nn.Module, layer: Layer, variant: Variant) -> Content:
    hosts = [model.get_submodule(path) for path in layer.parts]
    content = variant(
        *(layer.joined([getattr(host, name).detach().double() for host in hosts]) for name in ("weight", "bias"))
    )
    assert content is not None
    return content


def spelled(layer: Layer, tensors: dict[str, Tensor], style: str) -> dict[str, Tensor]:
    if style == "kohya":
        return {f"{layer.kohya}.{KOHYA_NAMES.get(name, name)}": tensor for name, tensor in tensors.items()}
    return {f"{layer.name}.{name}": tensor for name, tensor in tensors.items()}


def headers(file: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor if tensor.numel() == 1 else tensor.to("meta") for key, tensor in file.items()}


def adapter_layers(model: nn.Module, name: str = "a") -> dict[str, AdapterLayer]:
    (adapter,) = diffadapt.adapters(model)[name].components.values()
    return dict(adapter.layers)


def assert_becomes(model: nn.Module, layer: Layer, content: Content, tolerance: float = 1e-9) -> None:
    """The loaded adapter gives the outputs and, merged, the weights that `content` says; and nothing else changes."""
    hosts = [model.get_submodule(path) for path in layer.parts]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    sizes = [host.out_features for host in hosts]
    weights, biases = layer.cut(content.weight, sizes), layer.cut(content.bias, sizes)
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


@pytest.mark.parametrize("style", ["kohya", "dotted"])
@pytest.mark.parametrize("where", LAYERS)
@pytest.mark.parametrize("name", VARIANTS)
def test_every_type_cut(name: str, where: str, style: str) -> None:
    kind, variant = VARIANTS[name]
    model, layer = flux(), LAYERS[where]
    content = content_for(model, layer, variant)
    file = spelled(layer, content.tensors, style)
    expected = {kind: len(layer.parts)}
    inspected = diffadapt.inspect(headers(file), {"transformer": model})
    assert (inspected.used, inspected.unused, inspected.types) == (len(file), [], expected)
    report = diffadapt.load_adapter(model, file, name="a")
    assert (report.used, report.unused, report.types, report.family) == (len(file), [], expected, "flux")
    # The scale of a layer, 4 / 12 or 4 / 28, is kept in single precision.
    assert_becomes(model, layer, content, 1e-7 if name.endswith("block-diagonal") else 1e-9)


@pytest.mark.parametrize("name", WHOLE_ONLY)
@pytest.mark.parametrize("where", ["swapped", "linear2"])
def test_what_joins_all_outputs_is_exact_on_one_layer(name: str, where: str) -> None:
    kind, variant, _ = WHOLE_ONLY[name]
    model, layer = flux(), LAYERS[where]
    content = content_for(model, layer, variant)
    assert diffadapt.load_adapter(model, spelled(layer, content.tensors, "kohya"), name="a").types == {kind: 1}
    assert_becomes(model, layer, content, 1e-7)


@pytest.mark.parametrize("where", CUT)
@pytest.mark.parametrize("name", REFUSED)
def test_what_joins_outputs_of_several_layers_is_refused(name: str, where: str) -> None:
    variant, reason = REFUSED[name]
    model, layer = flux(), LAYERS[where]
    file = spelled(layer, content_for(model, layer, variant).tensors, "dotted")
    with pytest.raises(diffadapt.AdapterError, match=reason):
        diffadapt.load_adapter(model, file, name="a")
    assert diffadapt.adapters(model).names == []
    # What can be used still can be.
    other = LAYERS["linear2"]
    content = content_for(model, other, added(lora_factors, 1.0))
    file |= spelled(other, content.tensors, "dotted")
    report = diffadapt.load_adapter(model, file, name="a", strict=False)
    assert {key.startswith(layer.name) for key, _ in report.unused} == {True}
    assert_becomes(model, other, content)


@pytest.mark.parametrize(
    ("variant", "reason"),
    [
        *(REFUSED[name] for name in ("oft", "boft", "dora-lokr")),
        # Blocks of eight fit into a half, and the fourth factor pairs one half with the other.
        (boft_of_lycoris(eight, 4), "its boft joins outputs"),
    ],
)
def test_blocks_across_swapped_halves_are_refused(variant: Variant, reason: str) -> None:
    model, layer = flux(), LAYERS["swapped"]
    with pytest.raises(diffadapt.AdapterError, match=reason):
        diffadapt.load_adapter(model, spelled(layer, content_for(model, layer, variant).tensors, "dotted"))


# And back


@pytest.mark.parametrize("where", LAYERS)
@pytest.mark.parametrize("name", [name for name in VARIANTS if name not in ("ia3", "ia3-input", "boft-peft")])
def test_what_was_cut_is_saved_as_it_was(name: str, where: str, tmp_path: Path) -> None:
    model, layer = flux(), LAYERS[where]
    file = spelled(layer, content_for(model, layer, VARIANTS[name][1]).tensors, "kohya")
    diffadapt.load_adapter(model, file, name="a")
    saved = load_file(diffadapt.adapters(model).save("a", tmp_path / "saved.safetensors", format="kohya"))
    again = flux()
    diffadapt.load_adapter(again, saved, name="a")
    for path, part in adapter_layers(model).items():
        other = adapter_layers(again)[path]
        assert (other.adapter_type.name, other.scale) == (part.adapter_type.name, part.scale)
        assert all(torch.equal(other.tensors[key], tensor) for key, tensor in part.tensors.items())
    if "block-diagonal" in name or name == "dora-peft":
        return
    for key, tensor in file.items():
        if not key.endswith(".alpha"):
            assert torch.equal(saved[key].flatten(), tensor.flatten()), key


def test_limited_rotations_trained_one_by_one_are_not_joined(tmp_path: Path) -> None:
    """A limit of all blocks together is another one than that of each part."""
    model, layer = flux(), LAYERS["image qkv"]
    tensors = {"oft_blocks": normal(4, 8, 8), **alpha(0.01)}
    file = {
        f"lora_unet_{path.replace('.', '_')}.{key}": t.clone() for path in layer.parts for key, t in tensors.items()
    }
    diffadapt.load_adapter(model, file, name="a")
    with pytest.raises(diffadapt.AdapterError, match="oft of 3 layers cannot become the one layer"):
        diffadapt.adapters(model).save("a", tmp_path / "saved.safetensors", format="kohya")


# LoKr of which no rows of a factor are a piece


@pytest.mark.parametrize("where", [*CUT, "swapped"])
@pytest.mark.parametrize(
    ("low_rank", "scale", "given", "kind"),
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
def test_lokr_that_cannot_be_cut_is_a_plain_change(
    where: str, low_rank: str, scale: float, given: dict[str, Tensor], kind: str
) -> None:
    model, layer = flux(), LAYERS[where]
    content = content_for(model, layer, added(lokr(low_rank, unaligned), scale, **given))
    file = spelled(layer, content.tensors, "dotted")
    expected = {kind: len(layer.parts)}
    assert diffadapt.inspect(headers(file), {"transformer": model}).types == expected
    assert diffadapt.load_adapter(model, file, name="a").types == expected
    if kind == "lora":
        assert all(one.rank is not None and one.rank <= 8 for one in adapter_layers(model).values())
    assert_becomes(model, layer, content)


def test_plain_change_is_computed_in_single_precision_and_kept_in_the_adapters() -> None:
    model, layer = flux().bfloat16(), LAYERS["image qkv"]
    tensors = {name: tensor.bfloat16() for name, tensor in lokr_factors(96, 32, o2=48, low_rank="1")[0].items()}
    diffadapt.load_adapter(model, spelled(layer, {**tensors, **alpha(1.5)}, "dotted"), name="a")
    a, b, w2 = (tensors[name].float() for name in ("lokr_w1_a", "lokr_w1_b", "lokr_w2"))
    change = 0.75 * torch.kron(a @ b, w2)
    for path, part in zip(layer.parts, change.split(32), strict=True):
        assert torch.equal(adapter_layers(model)[path].tensors["diff"], part.bfloat16())


def test_scale_of_a_whole_lokr_in_a_folder_of_peft(tmp_path: Path) -> None:
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
def test_block_diagonal_lora_has_the_rank_of_one_block(given: dict[str, Tensor], scale: float, magnitude: bool) -> None:
    model, layer = flux(), LAYERS["image qkv"]

    def make(weight: Tensor, bias: Tensor) -> Content:
        tensors = {name: t for name, t in block_diagonal(weight, bias).tensors.items() if name != "alpha"}
        change = scale * tensors["lora_B.weight"] @ tensors["lora_A.weight"]
        return Content({**tensors, **given}, weight + change, bias)

    content = content_for(model, layer, dora(make) if magnitude else make)
    diffadapt.load_adapter(model, spelled(layer, content.tensors, "kohya"), name="a")
    for part in adapter_layers(model).values():
        assert part.rank == 4
        assert sum(tensor.numel() for tensor in part.tensors.values()) == 4 * (32 + 32) + (32 if magnitude else 0)
        assert part.scale == pytest.approx(scale)
    assert_becomes(model, layer, content, 1e-6)


def test_piece_without_a_change_keeps_its_rank() -> None:
    """Rows of zeros say nothing of which ranks they would use."""
    model, layer = flux(), LAYERS["image qkv"]
    content = content_for(model, layer, added(lora_factors, 1.0))
    up, down = content.tensors["lora_B.weight"], content.tensors["lora_A.weight"]
    up[32:64] = 0
    own = layer.joined([model.get_submodule(path).weight.detach() for path in layer.parts])
    diffadapt.load_adapter(model, spelled(layer, content.tensors, "dotted"), name="a")
    assert [part.rank for part in adapter_layers(model).values()] == [4, 4, 4]
    assert_becomes(model, layer, Content({}, own + up @ down, content.bias))


def test_alpha_of_a_fused_layer_in_metadata(tmp_path: Path) -> None:
    model, layer = flux(), LAYERS["linear1"]
    content = content_for(model, layer, added(lora_factors, 2.0))
    metadata = {"lora_adapter_metadata": json.dumps({"r": 4, "lora_alpha": 1, "alpha_pattern": {r"^single.*": 8}})}
    file = files.write(tmp_path / "a.safetensors", spelled(layer, content.tensors, "dotted"), metadata)
    diffadapt.load_adapter(model, file, name="a")
    assert_becomes(model, layer, content)


# Parameters


@pytest.mark.parametrize("name", ["lora", "loha", "lokr-low-rank", "oft-peft-shared", "glora", "dora", "full", "boft"])
def test_pieces_have_parameters_of_their_own(name: str) -> None:
    """What the pieces have in common must not become one tensor in three parameters: training would step it thrice."""
    model, layer = flux(), LAYERS["image qkv"]
    content = content_for(model, layer, VARIANTS[name][1])
    file = spelled(layer, content.tensors, "kohya")
    diffadapt.load_adapter(model, file, name="a")
    parts = adapter_layers(model)
    first, *others = (parts[path] for path in layer.parts)
    kept = [{key: tensor.clone() for key, tensor in part.tensors.items()} for part in others]
    with torch.no_grad():
        for tensor in first.tensors.values():
            tensor.add_(1.0)
    for part, was in zip(others, kept, strict=True):
        assert all(torch.equal(tensor, was[key]) for key, tensor in part.tensors.items())


def test_training_one_piece_leaves_the_others_alone() -> None:
    model, layer = flux(), LAYERS["image qkv"]
    content = content_for(model, layer, added(lora_factors, 1.0))
    diffadapt.load_adapter(model, spelled(layer, content.tensors, "dotted"), name="a")
    parts = list(adapter_layers(model).values())
    for part in parts:
        part.requires_grad_()
    before = [part.tensors["lora_down"].detach().clone() for part in parts]
    x = torch.randn(5, 32, dtype=torch.float64)
    optimizer = torch.optim.SGD([parameter for part in parts for parameter in part.parameters()], lr=0.1)
    model.get_submodule(layer.parts[0])(x).square().sum().backward()
    optimizer.step()
    stepped = [not torch.equal(part.tensors["lora_down"], was) for part, was in zip(parts, before, strict=True)]
    assert stepped.count(True) == 1


# Files


def test_fused_and_split_names_of_one_layer_are_refused() -> None:
    model, layer = flux(), LAYERS["image qkv"]
    file = spelled(layer, lora_factors(96, 32)[0], "dotted")
    file |= {f"{layer.parts[1]}.{name}": tensor for name, tensor in lora_factors(32, 32)[0].items()}
    with pytest.raises(diffadapt.AdapterError, match=r"attn\.to_k has tensors under another name already"):
        diffadapt.load_adapter(model, file, name="a")
    assert diffadapt.adapters(model).names == []


def test_both_names_of_a_swapped_layer_are_refused() -> None:
    model, layer = flux(), LAYERS["swapped"]
    file = spelled(layer, lora_factors(64, 32)[0], "dotted")
    file |= {f"norm_out.linear.{name}": tensor for name, tensor in lora_factors(64, 32)[0].items()}
    with pytest.raises(diffadapt.AdapterError, match=r"norm_out\.linear has tensors under another name already"):
        diffadapt.load_adapter(model, file, name="a")


@pytest.mark.parametrize(("out", "columns"), [(64, 32), (96, 16)])
def test_wrong_shape_is_named_with_that_of_the_joined_layer(out: int, columns: int) -> None:
    model, layer = flux(), LAYERS["image qkv"]
    with pytest.raises(diffadapt.AdapterError, match=r"lora_(up|down) has shape .* expected \((96, 4|4, 32)\)"):
        diffadapt.load_adapter(model, spelled(layer, lora_factors(out, columns)[0], "kohya"))


def everywhere(pipe: Any, variant: Variant) -> tuple[dict[str, Tensor], list[tuple[Layer, Content]]]:
    """A file with all five layers, in single precision."""
    contents = [(layer, content_for(pipe.transformer, layer, variant)) for layer in LAYERS.values()]
    file: dict[str, Tensor] = {}
    for layer, content in contents:
        file |= {key: t.float().clone() for key, t in spelled(layer, content.tensors, "kohya").items()}
    return file, contents


@pytest.mark.parametrize("name", ["lora", "lora-bias", "lora-block-diagonal", "dora-alpha"])
def test_pipeline_draws_the_same_from_the_file_from_weights_and_after_saving(name: str, tmp_path: Path) -> None:
    pipe, changed = models.flux(), models.flux()
    base = draw(pipe)
    file, contents = everywhere(pipe, VARIANTS[name][1])
    for layer, content in contents:
        hosts = [changed.transformer.get_submodule(path) for path in layer.parts]
        sizes = [host.out_features for host in hosts]
        with torch.no_grad():
            for host, weight in zip(hosts, layer.cut(content.weight, sizes), strict=True):
                host.weight.copy_(weight)
            for host, bias in zip(hosts, layer.cut(content.bias, sizes), strict=True):
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


@pytest.mark.parametrize("name", ["loha", "lokr-low-rank", "oft", "ia3-lycoris", "glora"])
def test_pipeline_draws_the_same_from_the_file_and_merged(name: str) -> None:
    pipe = models.flux()
    base = draw(pipe)
    file, _ = everywhere(pipe, VARIANTS[name][1])
    pipe.load_adapter(file, "a")
    picture = draw(pipe)
    assert_differs(picture, base)
    pipe.adapters.merge()
    assert_same(draw(pipe), picture, 1e-4)


# Layers that no family has in pieces yet


def test_whole_changes_of_norms_embeddings_and_transposed_layers() -> None:
    rows = (range(4, 6), range(0, 3))
    order = torch.tensor([4, 5, 0, 1, 2])
    norm = LayerSpec("norm", 6, 6)
    tensors = {"diff": torch.randn(6), "diff_b": torch.randn(6)}
    cut = FULL.rows(tensors, norm, rows)
    assert cut is not None
    assert all(torch.equal(cut[name], tensor[order]) for name, tensor in tensors.items())
    for spec in (LayerSpec("embedding", 6, 10, transposed=True), LayerSpec("linear", 6, 10, transposed=True)):
        stored = torch.randn(10, 6)
        cut = FULL.rows({"diff": stored}, spec, rows)
        assert cut is not None
        assert torch.equal(cut["diff"], stored[:, order])


@pytest.mark.parametrize(
    ("kind", "shapes"),
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
def test_rows_of_convolutions_with_cores(kind: AdapterType, shapes: dict[str, tuple[int, ...]]) -> None:
    rows = (range(8, 16), range(0, 4))
    whole, part = layer_of(16, 6, (3, 3)), layer_of(12, 6, (3, 3))
    fitted = kind.fit({name: torch.randn(shape) for name, shape in shapes.items()}, whole)
    cut = kind.rows(fitted, whole, rows)
    assert cut is not None
    change = kind.delta_weight(kind.fit(cut, part), part)
    torch.testing.assert_close(change, pick(kind.delta_weight(fitted, whole), rows))


def test_rows_of_a_rotated_embedding() -> None:
    """Its outputs are rotated even by what rotates inputs elsewhere."""
    spec = LayerSpec("embedding", 12, 10, transposed=True)
    blocks = torch.randn(3, 6)
    cut = OFT.rows({"oft_R": blocks}, spec, (range(8, 12), range(0, 4)))
    assert cut is not None
    assert torch.equal(cut["oft_R"], blocks[[2, 0]])
    shared = OFT.rows({"oft_R": blocks[:1]}, spec, (range(4, 12),))
    assert shared is not None
    assert torch.equal(shared["oft_R"], blocks[:1])
    assert OFT.rows({"oft_R": blocks}, spec, (range(2, 6),)) is None
