"""BOFT, (IA)^3, GLoRA and full changes against PEFT and LyCORIS: weights, outputs, gradients, files."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.boft import layer as peft_boft
from peft.utils import ModulesToSaveWrapper
from safetensors.torch import load_file
from torch import Tensor, nn

import diffadapt
from diffadapt import AdapterError, BOFTConfig, FullConfig, GLoRAConfig, IA3Config, LoraConfig
from diffadapt.merging.merge import merge_, unmerge_
from diffadapt.runtime.adapter import Adapter
from diffadapt.runtime.adapter_layer import AdapterLayer
from diffadapt.runtime.attach import attach_, refresh_
from diffadapt.runtime.dropout import Dropout
from diffadapt.types import identify
from diffadapt.types.adapter_type import AdapterType
from diffadapt.types.boft import BOFT
from diffadapt.types.full import FULL
from diffadapt.types.glora import GLORA
from diffadapt.types.ia3 import IA3
from diffadapt.types.layer_spec import LayerSpec
from tests.support import models
from tests.support.cases import for_each
from tests.support.compare import assert_differs, assert_same
from tests.support.models import draw
from tests.support.versions import needs

lycoris = pytest.importorskip("lycoris.modules")

PEFT_IA3, LYCORIS_IA3 = IA3
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(24, 16), (3, 5, 24)),
    "conv 1x1": (lambda: nn.Conv2d(24, 16, 1), (2, 24, 7, 7)),
    "conv 3x3": (lambda: nn.Conv2d(24, 16, 3, padding=1), (2, 24, 7, 7)),
    "conv strided": (lambda: nn.Conv2d(24, 16, 3, stride=2, padding=1), (2, 24, 9, 9)),
}


def made(layer: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(1)
    build, shape = LAYERS[layer]
    return build().eval(), torch.randn(shape)


def with_adapter(
    module: nn.Module,
    adapter_type: AdapterType,
    tensors: dict[str, Tensor],
    alpha: float | None = None,
    **settings: float,
) -> tuple[nn.Sequential, Adapter]:
    """Return a model of one layer with an adapter of these tensors, which are named and shaped as in a file."""
    spec = LayerSpec.of(module)
    assert spec is not None
    fitted = {name: tensor.detach().clone() for name, tensor in adapter_type.fit(tensors, spec).items()}
    adapter = Adapter({"0": AdapterLayer(adapter_type, spec, fitted, alpha, settings=settings, trainable=True)})
    root = nn.Sequential(module)
    attach_(root, "a", adapter, {"0": module})
    adapter.active = True
    refresh_(root)
    return root, adapter


def assert_close_to_change(actual: Tensor, expected: Tensor, base: Tensor) -> None:
    """Assert equality within 1e-5 of the change from `base`, and that this change is not small."""
    change = (expected - base).norm()
    assert change > 0.05 * base.norm()
    assert (actual - expected).norm() <= 1e-5 * change


def assert_weight_and_output(root: nn.Sequential, input: Tensor, weight: Tensor) -> None:
    """Assert that the layer computes with this weight and its own bias, unmerged and merged."""
    module = root[0]
    spec = LayerSpec.of(module)
    assert spec is not None
    own, own_bias = module.weight.detach().clone(), module.bias.detach().clone()
    with torch.no_grad():
        forward = root(input).clone()
        module.weight.copy_(weight)
        expected = type(module).forward(module, input)
        module.weight.copy_(own)
        base = type(module).forward(module, input)
    assert_close_to_change(forward, expected, base)
    merge_({"model": root}, ["a"])
    assert_close_to_change(module.weight, weight, own)
    assert torch.equal(module.bias, own_bias)
    unmerge_(root)


def dense_boft(blocks: Tensor, size: int) -> Tensor:
    """Return PEFT's butterfly matrix, computed with its own permutations and Cayley transform."""
    total = torch.eye(size)
    factors, number, width, _ = blocks.shape
    for i in range(factors):
        rotations = peft_boft.BOFTLayer.cayley_batch(None, blocks[i])
        order = peft_boft.BOFTLayer.block_butterfly_perm(None, size, number // 2**i, width // 2, factors - 1)
        matrix = peft_boft.BOFTLayer.perm2mat(None, order)
        total = matrix @ torch.block_diag(*rotations) @ matrix.T @ total
    return total


# Weights, by each library's own formula


@pytest.mark.parametrize("factors", [1, 2, 3])
@for_each(layer=LAYERS)
def test_a_boft_of_peft_equals_dense_butterflies(layer: str, factors: int) -> None:
    module, input = made(layer)
    columns = module.weight[0].numel()
    tensors = {"boft_R": torch.randn(factors, columns // 4, 4, 4), "boft_s": 1 + 0.3 * torch.randn(16, 1)}
    if columns // 4 % 2 ** (factors - 1):
        tensors["boft_R"] = torch.randn(factors, columns // 6, 6, 6)
    rotation = dense_boft(tensors["boft_R"], columns)
    flat = module.weight.detach().flatten(1)
    weight = (flat @ rotation.T * tensors["boft_s"]).view_as(module.weight)
    wrong = (flat @ rotation * tensors["boft_s"]).view_as(module.weight)
    root, adapter = with_adapter(module, BOFT, tensors)
    assert_weight_and_output(root, input, weight)
    with pytest.raises(AssertionError):
        assert_weight_and_output(root, input, wrong)
    # Rotation and scale are interpolated separately.
    adapter.set_strengths([0.25])
    scale = 1 + 0.25 * (tensors["boft_s"] - 1)
    assert_weight_and_output(root, input, ((flat + 0.25 * (flat @ rotation.T - flat)) * scale).view_as(weight))


@pytest.mark.parametrize(("size", "rescaled", "constraint"), [(4, False, 0.0), (2, True, 0.0), (8, True, 0.05)])
@for_each(layer=LAYERS)
def test_a_boft_of_lycoris_is_equal(layer: str, size: int, rescaled: bool, constraint: float) -> None:
    needs("lycoris-lora", "4.0", "a BOFT module that computes its weight")
    module, input = made(layer)
    theirs = lycoris.ButterflyOFTModule("x", module, lora_dim=size, rescaled=rescaled, constraint=constraint)
    nn.init.normal_(theirs.oft_blocks)
    if rescaled:
        nn.init.normal_(theirs.rescale, 1, 0.3)
    weight = theirs.get_merged_weight()[0].detach()
    state = {name: tensor.detach() for name, tensor in theirs.state_dict().items() if name in BOFT.tensors}
    assert state["oft_blocks"].shape[:2] == {4: (3, 4), 2: (4, 8), 8: (2, 2)}[size]
    assert identify(state) is BOFT
    root, adapter = with_adapter(module, BOFT, state, constraint=constraint)
    assert_weight_and_output(root, input, weight)
    own = module.weight.detach()
    adapter.set_strengths([0.25])
    assert_weight_and_output(root, input, own + 0.25 * (weight - own))
    adapter.set_strengths([1.0])
    flipped, _ = with_adapter(
        made(layer)[0], BOFT, {**state, "oft_blocks": state["oft_blocks"].mT}, constraint=constraint
    )
    with pytest.raises(AssertionError):
        assert_weight_and_output(flipped, input, weight)


@pytest.mark.parametrize("on_input", [False, True])
@for_each(layer=LAYERS)
def test_an_ia3_of_lycoris_is_equal(layer: str, on_input: bool) -> None:
    module, input = made(layer)
    theirs = lycoris.IA3Module("x", module, train_on_input=on_input)
    nn.init.normal_(theirs.weight)
    weight = theirs.get_merged_weight()[0].detach()
    file = theirs.state_dict()
    root, _ = with_adapter(module, LYCORIS_IA3, {"ia3_w": file["weight"], "on_input": file["on_input"]})
    assert_weight_and_output(root, input, weight)
    with pytest.raises(AssertionError):
        assert_weight_and_output(root, input, 2 * module.weight.detach() - weight)


def old_glora(file: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the same tensors in the layout of LyCORIS 1."""
    return {"glora_a1": file["glora_a2"], "glora_a2": file["glora_a1"]} | {
        "glora_b1": file["glora_b2"],
        "glora_b2": file["glora_b1"],
    }


@pytest.mark.parametrize("layout", ["new", "old"])
@for_each(layer=LAYERS)
def test_a_glora_of_lycoris_is_equal(layer: str, layout: str) -> None:
    module, input = made(layer)
    theirs = lycoris.GLoRAModule("x", module, lora_dim=4, alpha=3.0)
    for part in (theirs.a1, theirs.a2, theirs.b1, theirs.b2):
        nn.init.normal_(part.weight, std=0.3)
    weight = theirs.get_merged_weight()[0].detach()
    file = {f"glora_{name}": getattr(theirs, name).weight.detach() for name in ("a1", "a2", "b1", "b2")}
    root, adapter = with_adapter(module, GLORA, file if layout == "new" else old_glora(file), alpha=3.0)
    assert adapter.layers["0"].scale == 0.75
    assert_weight_and_output(root, input, weight)
    mixed = {**file, "glora_a1": file["glora_a2"].transpose(0, 1), "glora_a2": file["glora_a1"].transpose(0, 1)}
    wrong, _ = with_adapter(made(layer)[0], GLORA, mixed, alpha=3.0)
    with pytest.raises(AssertionError):
        assert_weight_and_output(wrong, input, weight)


def test_the_forward_pass_of_glora_builds_no_weight_change(monkeypatch: pytest.MonkeyPatch) -> None:
    module, input = made("conv 3x3")
    names = {"glora_a1": (24, 2), "glora_a2": (2, 24), "glora_b1": (16, 2), "glora_b2": (2, 24, 3, 3)}
    root, _ = with_adapter(module, GLORA, {name: torch.randn(shape) for name, shape in names.items()})
    monkeypatch.setattr(LayerSpec, "product", lambda *_: pytest.fail("the forward built the product"))
    root(input)


@pytest.mark.parametrize("names", [("diff", "diff_b"), ("diff",), ("diff_b",)])
@for_each(layer=LAYERS)
def test_full_changes_of_lycoris_are_equal(layer: str, names: tuple[str, ...]) -> None:
    needs("lycoris-lora", "4.0", "a full module with a bias that computes its weight")
    module, input = made(layer)
    theirs = lycoris.FullModule("x", module)
    nn.init.normal_(theirs.weight)
    nn.init.normal_(theirs.bias)
    weight, bias = (tensor.detach() for tensor in theirs.get_merged_weight())
    file = {"diff": theirs.weight.detach(), "diff_b": theirs.bias.detach()}
    root, _ = with_adapter(module, FULL, {name: file[name] for name in names})
    own, own_bias = module.weight.detach().clone(), module.bias.detach().clone()
    with torch.no_grad():
        forward = root(input).clone()
        base = type(module).forward(module, input)
        merge_({"model": root}, ["a"])
        merged = root(input).clone()
        unmerge_(root)
        module.weight.copy_(weight if "diff" in names else own)
        module.bias.copy_(bias if "diff_b" in names else own_bias)
        expected = type(module).forward(module, input)
    assert_close_to_change(forward, expected, base)
    assert_close_to_change(merged, expected, base)


@pytest.mark.parametrize(
    ("norm", "shape"),
    [
        (lambda: nn.LayerNorm(16), (2, 5, 16)),
        (lambda: nn.GroupNorm(4, 16), (2, 16, 5, 7)),
        (lambda: nn.GroupNorm(4, 16), (2, 16, 7)),
    ],
    ids=["layer", "group 2d", "group 1d"],
)
def test_changes_of_norms_by_lycoris_are_equal(norm: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    torch.manual_seed(1)
    module, input = norm(), torch.randn(shape)
    theirs = lycoris.NormModule("x", module)
    nn.init.normal_(theirs.w_norm)
    nn.init.normal_(theirs.b_norm)
    theirs.org_forward = module.forward
    expected = theirs(input).detach()
    root, _ = with_adapter(module, FULL, {"diff": theirs.w_norm.detach(), "diff_b": theirs.b_norm.detach()})
    base = module.forward(input).detach()
    assert_close_to_change(root(input).detach(), expected, base)
    merge_({"model": root}, ["a"])
    assert_close_to_change(root(input).detach(), expected, base)


# Outputs and gradients, with PEFT's own modules


class Net(nn.Module):
    """A linear layer and two convolutions in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 8)
        self.conv = nn.Conv2d(8, 8, 3, stride=2, padding=1)
        self.point = nn.Conv2d(8, 12, 1)

    def forward(self, input: Tensor) -> Tensor:
        return self.point(self.conv(self.linear(input).movedim(-1, 1)))


class BlockDiagonal:
    """PEFT's CUDA extension in PyTorch; without the extension, PEFT falls back to a single factor."""

    def forward(self, blocks: Tensor) -> tuple[Tensor, ...]:
        return (torch.stack([torch.block_diag(*part) for part in blocks]),)

    def backward(self, gradient: Tensor, blocks: Tensor) -> tuple[Tensor, ...]:
        number, size = blocks.shape[1:3]
        parts = gradient.unflatten(2, (number, size)).unflatten(1, (number, size))
        return (parts.diagonal(dim1=1, dim2=3).movedim(-1, 1).contiguous(),)


@pytest.fixture
def butterflies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peft_boft, "_FBD_CUDA", BlockDiagonal())


def net() -> tuple[Net, Tensor]:
    torch.manual_seed(2)
    return Net(), torch.randn(2, 8, 8, 12)


EVERY = ["linear", "conv", "point"]
PEFT_CONFIGS: dict[str, Callable[[], Any]] = {
    "boft": lambda: peft.BOFTConfig(target_modules=EVERY, boft_block_size=4, init_weights=False),
    "boft blocks": lambda: peft.BOFTConfig(
        target_modules=EVERY, boft_block_size=0, boft_block_num=2, init_weights=False
    ),
    "boft butterflies": lambda: peft.BOFTConfig(
        target_modules=EVERY, boft_block_size=2, boft_n_butterfly_factor=2, init_weights=False
    ),
    "boft three factors": lambda: peft.BOFTConfig(
        target_modules=["conv", "point"], boft_block_size=2, boft_n_butterfly_factor=3, init_weights=False
    ),
    "ia3": lambda: peft.IA3Config(target_modules=EVERY, feedforward_modules=[], init_ia3_weights=False),
    "ia3 feed-forward": lambda: peft.IA3Config(
        target_modules=EVERY, feedforward_modules=["linear", "conv"], init_ia3_weights=False
    ),
    "ia3 regular expression": lambda: peft.IA3Config(
        target_modules="linear|conv|point", feedforward_modules="con.|point", init_ia3_weights=False
    ),
}


def saved_by_peft(name: str, folder: Path) -> tuple[Any, Tensor, Tensor]:
    """Save an adapter of PEFT, and return its model, an input, and the output without the adapter."""
    model, input = net()
    base = model(input).detach()
    theirs = peft.get_peft_model(model, PEFT_CONFIGS[name]())
    assert not any(isinstance(module, ModulesToSaveWrapper) for module in theirs.modules())
    theirs.save_pretrained(folder)
    return theirs, input, base


@pytest.mark.usefixtures("butterflies")
@pytest.mark.parametrize("name", PEFT_CONFIGS)
def test_a_folder_of_peft_has_the_same_outputs_and_gradients(name: str, tmp_path: Path) -> None:
    theirs, input, base = saved_by_peft(name, tmp_path)
    ours, _ = net()
    report = diffadapt.load_adapter(ours, tmp_path, "a")
    assert report.unused == []
    expected = theirs(input)
    assert_close_to_change(ours(input).detach(), expected.detach(), base)
    adapter = diffadapt.adapters(ours)["a"].components["model"]
    adapter.requires_grad_()
    ours(input).pow(2).sum().backward()
    expected.pow(2).sum().backward()
    compared = 0
    for path, layer in adapter.layers.items():
        for tensor_name, tensor in layer.tensors.items():
            reference = getattr(theirs.get_submodule(f"base_model.model.{path}"), tensor_name)["default"].grad
            assert (tensor.grad.flatten() - reference.flatten()).norm() <= 2e-5 * reference.norm()
            assert reference.norm() > 0
            compared += 1
    assert compared == report.used
    diffadapt.adapters(ours).merge()
    theirs.merge_adapter()
    assert_close_to_change(ours(input).detach(), expected.detach(), base)
    assert_close_to_change(theirs(input).detach(), expected.detach(), base)


def test_the_config_decides_whether_a_square_convolution_is_scaled_by_input(tmp_path: Path) -> None:
    """Without the config, the same tensors scale the outputs."""
    theirs, input, _ = saved_by_peft("ia3 feed-forward", tmp_path)
    ours, _ = net()
    diffadapt.load_adapter(ours, load_file(tmp_path / "adapter_model.safetensors"), "a")
    assert_differs(ours(input), theirs(input))
    adapter = diffadapt.adapters(ours)["a"].components["model"]
    assert {path: layer.stages for path, layer in adapter.layers.items()} == {
        "linear": ("input",),
        "conv": ("gain",),
        "point": ("gain",),
    }


@pytest.mark.parametrize("modules", ["(", 3, [1]])
def test_unusable_feedforward_modules_are_named(modules: Any, tmp_path: Path) -> None:
    saved_by_peft("ia3", tmp_path)
    config = tmp_path / "adapter_config.json"
    text = config.read_text()
    found = '"feedforward_modules": []'
    assert found in text
    config.write_text(text.replace(found, f'"feedforward_modules": {modules!r}'.replace("'", '"')))
    with pytest.raises(AdapterError, match="feedforward_modules in the file's metadata"):
        diffadapt.load_adapter(net()[0], tmp_path, "a")


@pytest.mark.slow
@pytest.mark.usefixtures("butterflies")
@pytest.mark.parametrize("name", ["boft", "ia3"])
def test_a_folder_of_peft_for_a_unet_draws_the_same(name: str, tmp_path: Path) -> None:
    targets = ["to_q", "to_v", "proj_in", "conv2"]
    config = (
        peft.BOFTConfig(target_modules=targets, boft_block_size=4, init_weights=False)
        if name == "boft"
        else peft.IA3Config(target_modules=targets, feedforward_modules=["conv2", "to_v"], init_ia3_weights=False)
    )
    torch.manual_seed(3)
    theirs, ours = models.sd15(), models.sd15()
    base = draw(ours)
    peft.get_peft_model(theirs.unet, config).save_pretrained(tmp_path)
    expected = draw(theirs)
    report = ours.load_adapter(tmp_path, "a")
    assert set(report.types) == {name}
    assert_differs(expected, base)
    assert_same(draw(ours), expected)
    ours.adapters.merge("a")
    assert_same(draw(ours), expected)
    with pytest.raises(AdapterError, match="no place for"):
        ours.adapters.save("a", tmp_path / "a.safetensors", format="kohya")


# Files in kohya's naming


def lycoris_modules(unet: nn.Module) -> dict[str, Any]:
    """Return LyCORIS modules with random tensors: one algorithm for each name of layers in the UNet."""
    torch.manual_seed(4)
    found: dict[str, Any] = {}
    builders: dict[str, Callable[[str, nn.Module], Any]] = {
        "attn1.to_q": lambda name, m: lycoris.ButterflyOFTModule(name, m, lora_dim=4, rescaled=True, constraint=0.1),
        "conv_shortcut": lambda name, m: lycoris.ButterflyOFTModule(name, m, lora_dim=4, rescaled=True),
        "attn1.to_k": lambda name, m: lycoris.IA3Module(name, m, train_on_input=True),
        "attn1.to_v": lambda name, m: lycoris.IA3Module(name, m, train_on_input=False),
        "proj_in": lambda name, m: lycoris.IA3Module(name, m, train_on_input=True),
        "proj_out": lambda name, m: lycoris.IA3Module(name, m, train_on_input=False),
        "attn2.to_q": lambda name, m: lycoris.GLoRAModule(name, m, lora_dim=2, alpha=1.0),
        "conv1": lambda name, m: lycoris.GLoRAModule(name, m, lora_dim=2, alpha=3.0),
        "conv2": lambda name, m: lycoris.FullModule(name, m),
        "attn2.to_v": lambda name, m: lycoris.FullModule(name, m),
        "norm1": lambda name, m: lycoris.NormModule(name, m),
        "norm3": lambda name, m: lycoris.NormModule(name, m),
    }
    for path, module in unet.named_modules():
        for ending, build in builders.items():
            if path.endswith(f".{ending}"):
                found[path] = build(f"lora_unet_{path.replace('.', '_')}", module)
                for parameter in found[path].parameters():
                    with torch.no_grad():
                        parameter.add_(torch.randn(parameter.shape), alpha=0.3)
    return found


def file_of(modules: dict[str, Any]) -> dict[str, Tensor]:
    file: dict[str, Tensor] = {}
    for module in modules.values():
        tensors = module.state_dict()
        if isinstance(module, lycoris.FullModule):
            # Its own state dict is right only after it was applied.
            tensors = {"diff": module.weight} | ({} if module.bias is None else {"diff_b": module.bias})
        file.update({f"{module.lora_name}.{name}": tensor.detach().clone() for name, tensor in tensors.items()})
    return file


@pytest.mark.slow
def test_a_kohya_file_of_every_type_equals_the_weights_of_lycoris(tmp_path: Path) -> None:
    needs("lycoris-lora", "4.0", "a BOFT module that computes its weight")
    pipe, plain = models.sd15(), models.sd15()
    modules = lycoris_modules(plain.unet)
    file = file_of(modules)
    base = draw(pipe)
    report = pipe.load_adapter(file, "mixed")
    assert report.unused == []
    assert set(report.types) == {"boft", "ia3-lycoris", "glora", "full"}
    with torch.no_grad():
        for path, module in modules.items():
            weight, bias = (tensor.clone() if tensor is not None else None for tensor in module.get_merged_weight())
            layer = plain.unet.get_submodule(path)
            layer.weight.copy_(weight)
            if bias is not None:
                layer.bias.copy_(bias)
    expected = draw(plain)
    assert_differs(expected, base)
    assert_same(draw(pipe), expected)
    pipe.adapters.merge("mixed")
    assert_same(draw(pipe), expected)
    pipe.adapters.unmerge()
    again = models.sd15()
    saved = pipe.adapters.save("mixed", tmp_path / "mixed.safetensors", format="kohya")
    written = load_file(saved)
    assert set(written) == set(file)
    assert all(torch.equal(tensor, file[key]) for key, tensor in written.items())
    assert again.load_adapter(saved, "mixed").unused == []
    assert torch.equal(draw(again), draw(pipe))
    pipe.adapters.clear()
    assert torch.equal(draw(pipe), base)
    assert set(diffadapt.inspect(saved).types) == {"boft", "ia3-lycoris", "glora", "full"}


def test_a_plain_weight_is_an_adapter_only_with_its_flag() -> None:
    pipe = models.sd15()
    module, dotted = "lora_unet_mid_block_attentions_0_proj_in", "mid_block.attentions.0.proj_in"
    factors = torch.ones(1, 16, 1, 1)
    with pytest.raises(AdapterError, match="not the name of an adapter tensor"):
        pipe.load_adapter({f"{module}.weight": factors}, "a")
    for prefix in ("", "unet."):
        with pytest.raises(AdapterError, match=r"known format|not the name of an adapter tensor"):
            pipe.load_adapter({f"{prefix}{dotted}.weight": factors}, "a")
    report = pipe.load_adapter({f"{module}.weight": factors, f"{module}.on_input": torch.tensor(True)}, "a")
    assert report.types == {"ia3-lycoris": 1}
    with pytest.raises(AdapterError, match=r"dtype torch\.int64, expected a floating-point one"):
        pipe.load_adapter({f"{module}.weight": factors.long(), f"{module}.on_input": torch.tensor(1)}, "b")


# Invalid input


def linear() -> LayerSpec:
    return LayerSpec("linear", 16, 24)


def zeros(**shapes: tuple[int, ...]) -> dict[str, Tensor]:
    return {name: torch.zeros(shape) for name, shape in shapes.items()}


GLORA_SHAPES = {"glora_a1": (24, 2), "glora_a2": (2, 24), "glora_b1": (16, 2), "glora_b2": (2, 24)}


@pytest.mark.parametrize(
    ("adapter_type", "tensors", "reason"),
    [
        (BOFT, zeros(boft_R=(1, 6, 4, 4)), "boft_R and boft_s, .* boft_R found"),
        (BOFT, zeros(boft_s=(16, 1)), "boft_s found"),
        (BOFT, zeros(boft_R=(1, 6, 4, 4), boft_s=(16, 1), rescale=(16,)), "found"),
        (BOFT, zeros(boft_R=(1, 5, 4, 4), boft_s=(16, 1)), r"boft_R has shape \(1, 5, 4, 4\), expected .* 24 channels"),
        (BOFT, zeros(boft_R=(6, 4, 4), boft_s=(16, 1)), r"boft_R has shape \(6, 4, 4\)"),
        (BOFT, zeros(boft_R=(1, 6, 4, 4), boft_s=(15, 1)), r"boft_s has shape \(15, 1\), expected \(16, 1\)"),
        (BOFT, zeros(boft_R=(3, 6, 4, 4), boft_s=(16, 1)), "3 butterfly factors of 6 blocks, expected a multiple of 4"),
        (BOFT, zeros(boft_R=(2, 8, 3, 3), boft_s=(16, 1)), "blocks of 3 channels have no halves"),
        (BOFT, zeros(oft_blocks=(1, 6, 4, 4)), "oft_blocks has shape .* for 16 channels"),
        (BOFT, zeros(oft_blocks=(1, 4, 4, 4), rescale=(24,)), r"rescale has shape \(24,\), expected \(16, 1\)"),
        (PEFT_IA3, zeros(ia3_l=(17, 1)), r"shape \(17, 1\), expected 24 numbers, one per input"),
        (PEFT_IA3, zeros(ia3_l_feedforward=(1, 16)), r"shape \(1, 16\), expected 24 numbers, one per input"),
        (PEFT_IA3, zeros(ia3_l_feedforward=(1, 24), ia3_l=(16, 1)), "ia3_l expected, .* found"),
        (LYCORIS_IA3, zeros(on_input=()), "ia3_w expected, on_input found"),
        (LYCORIS_IA3, zeros(ia3_w=(16,)), r"on_input is missing beside a weight of shape \(16,\)"),
        (LYCORIS_IA3, zeros(ia3_w=(24,), on_input=()), r"shape \(24,\), expected 16 numbers, one per output"),
        (LYCORIS_IA3, zeros(ia3_w=(4, 4), on_input=()), r"shape \(4, 4\), expected 16 numbers"),
        (LYCORIS_IA3, zeros(ia3_w=(16,), on_input=(2,)), r"on_input has shape \(2,\), expected a single number"),
        (GLORA, zeros(glora_a1=(24, 2)), "glora_a2, glora_b1, glora_b2 missing, only glora_a1 found"),
        (GLORA, zeros(**GLORA_SHAPES | {"glora_b1": (16, 3), "glora_b2": (3, 24)}), "expected those of one rank"),
        (GLORA, zeros(**GLORA_SHAPES | {"glora_b1": (15, 2)}), r"glora_b1 \(15, 2\), .* expected .* \(16, 24\)"),
        (GLORA, zeros(**{name: (0, 0) for name in GLORA_SHAPES}), "expected those of one rank"),
        (FULL, zeros(diff=(24, 16)), r"diff has shape \(24, 16\), expected \(16, 24\)"),
        (FULL, zeros(diff=()), r"diff has shape \(\), expected \(16, 24\)"),
        (FULL, zeros(diff=(16, 24), diff_b=(24,)), r"diff_b has shape \(24,\), expected \(16,\)"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    adapter_type: AdapterType, tensors: dict[str, Tensor], reason: str
) -> None:
    assert identify(tensors) in (adapter_type, None) or "found" in reason
    with pytest.raises(AdapterError, match=reason):
        adapter_type.fit(tensors, linear())


@pytest.mark.parametrize("adapter_type", [BOFT, *IA3, GLORA, FULL], ids=lambda adapter_type: adapter_type.name)
def test_layers_on_which_a_type_has_no_meaning_are_refused(adapter_type: AdapterType) -> None:
    embedding, grouped = LayerSpec("embedding", 8, 24), LayerSpec("conv", 8, 24, (1,), (1,), (0,), (1,), groups=2)
    ranks = {"glora_a1": (24, 2), "glora_a2": (2, 24), "glora_b1": (8, 2), "glora_b2": (2, 24)}
    bad: dict[str, list[tuple[LayerSpec, dict[str, Tensor]]]] = {
        "boft": [(layer, zeros(boft_R=(1, 6, 4, 4), boft_s=(8, 1))) for layer in (embedding, grouped)],
        "ia3": [(embedding, zeros(ia3_l=(1, 24)))],
        "ia3-lycoris": [(embedding, zeros(ia3_w=(1, 24)))],
        "glora": [(layer, zeros(**ranks)) for layer in (embedding, grouped)],
        "full": [(embedding, zeros(diff_b=(8,)))],
    }
    for layer, tensors in bad[adapter_type.name]:
        with pytest.raises(AdapterError, match=r"an embedding has no|the layer has 2 groups"):
            adapter_type.fit(tensors, layer)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: BOFTConfig(target_modules="x"), "expected exactly one of them"),
        (lambda: BOFTConfig(target_modules="x", block_size=2, num_blocks=2), "expected exactly one of them"),
        (lambda: BOFTConfig(target_modules="x", block_size=2, side="both"), "expected 'input' or 'output'"),
        (lambda: BOFTConfig(target_modules="x", block_size=2, butterfly_factors=0), "expected at least 1"),
        (lambda: BOFTConfig(target_modules="x", block_size=2, constraint=1), "no effect with side='input'"),
        (lambda: BOFTConfig(target_modules="x", block_size=2, rescale=True), "no effect with side='input'"),
        (lambda: BOFTConfig(target_modules="x", block_size=2, side="output", constraint=-1), "expected at least 0"),
        (lambda: IA3Config(target_modules="x", side="both"), "expected 'output' or 'input'"),
        (lambda: IA3Config(target_modules="x", side="input", scale_bias=True), "no effect with side='input'"),
        (lambda: IA3Config(target_modules="x", dropout=0.1), "dropout has no effect"),
        (lambda: GLoRAConfig(target_modules="x", rank=2, use_dora=True), "no DoRA of GLoRA"),
        (lambda: GLoRAConfig(target_modules="x", rank=0), "expected at least 1"),
    ],
)
def test_settings_without_a_meaning_are_refused(make: Callable[[], Any], reason: str) -> None:
    with pytest.raises(AdapterError, match=reason):
        make()


@pytest.mark.parametrize(
    ("config", "layer", "reason"),
    [
        (BOFTConfig(target_modules="x", block_size=5), "linear", "block_size is 5, which does not divide the 24"),
        (BOFTConfig(target_modules="x", num_blocks=24), "linear", "blocks of one channel"),
        (BOFTConfig(target_modules="x", block_size=4, butterfly_factors=4), "linear", "4 butterfly factors of 6"),
        (BOFTConfig(target_modules="x", num_blocks=8, butterfly_factors=2), "linear", "blocks of 3 channels"),
    ],
)
def test_settings_that_do_not_fit_a_layer_are_refused(config: BOFTConfig, layer: str, reason: str) -> None:
    with pytest.raises(AdapterError, match=reason):
        diffadapt.add_adapter(nn.ModuleDict({"x": LAYERS[layer][0]()}), config)


# New adapters


def test_norm_layers_train_with_full_changes_only() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.GroupNorm(2, 8))
    with pytest.raises(AdapterError, match="'1' matches no layer"):
        diffadapt.add_adapter(model, LoraConfig(target_modules=["1"], rank=2))
    input = torch.randn(3, 4)
    base = model(input)
    adapter = diffadapt.add_adapter(model, FullConfig(target_modules=["1", "2"], bias=True))
    assert torch.equal(model(input), base)
    optimiser = torch.optim.SGD(adapter.parameters(), lr=0.1)
    model(input).pow(2).sum().backward()
    optimiser.step()
    assert_differs(model(input), base)


def test_boft_on_outputs_has_as_many_factors_as_possible() -> None:
    layer = LayerSpec("linear", 24, 6)
    config = BOFTConfig(target_modules="x", block_size=2, side="output")
    tensors = BOFT.init(layer, config, generator=torch.Generator(), weight=lambda: torch.zeros(24, 6))
    assert tensors["oft_blocks"].shape == (3, 12, 2, 2)


@pytest.mark.parametrize("side", ["input", "output"])
def test_dropout_of_boft_replaces_blocks_by_the_identity(side: Any) -> None:
    module, input = made("linear")
    config = BOFTConfig(target_modules=["0"], block_size=4, butterfly_factors=2, side=side, init=False)
    spec = LayerSpec.of(module)
    assert spec is not None
    tensors = BOFT.init(spec, config, generator=torch.Generator().manual_seed(0), weight=lambda: module.weight)
    if side == "input":
        tensors["boft_s"].fill_(1.0)
    adapter = Adapter({"0": AdapterLayer(BOFT, spec, tensors, dropout=Dropout(input=0.5))})
    base = module(input).detach()
    root = nn.Sequential(module)
    attach_(root, "a", adapter, {"0": module})
    adapter.active = True
    refresh_(root)
    whole = root.eval()(input).detach()
    adapter.train()
    torch.manual_seed(0)
    outputs = [root(input).detach() for _ in range(8)]
    assert all((output - base).norm() < (whole - base).norm() * 1.5 for output in outputs)
    assert len({float(output.sum()) for output in outputs}) > 1
    for layer in adapter.layers.values():
        layer.__dict__["dropout"] = Dropout(input=1 - 1e-12)
    torch.testing.assert_close(root(input), base)


def test_ia3_of_peft_scales_the_bias_and_ia3_of_lycoris_does_not() -> None:
    module, input = made("linear")
    outputs: list[Tensor] = []
    for adapter_type, name, start in ((PEFT_IA3, "ia3_l", 3.0), (LYCORIS_IA3, "ia3_w", 2.0)):
        root, _ = with_adapter(made("linear")[0], adapter_type, {name: torch.full((16, 1), start)})
        outputs.append(root(input).detach())
    plain = module(input).detach()
    torch.testing.assert_close(outputs[0], 3 * plain)
    torch.testing.assert_close(outputs[1], 3 * plain - 2 * module.bias.detach())


SAVED: dict[str, Any] = {
    "boft": BOFTConfig(target_modules=EVERY, block_size=4, init=False),
    "boft blocks": BOFTConfig(target_modules=EVERY, num_blocks=2, init=False),
    "boft butterflies": BOFTConfig(target_modules=["linear", "conv"], block_size=2, butterfly_factors=2, init=False),
    "ia3": IA3Config(target_modules=EVERY, scale_bias=True, init=False),
}


@pytest.mark.usefixtures("butterflies")
@pytest.mark.parametrize("name", SAVED)
def test_a_folder_saved_here_loads_in_peft(name: str, tmp_path: Path) -> None:
    ours, input = net()
    base = ours(input).detach()
    diffadapt.add_adapter(ours, SAVED[name], "a")
    expected = ours(input).detach()
    diffadapt.adapters(ours).save("a", tmp_path, format="peft")
    theirs = peft.PeftModel.from_pretrained(net()[0], tmp_path)
    assert_close_to_change(theirs(input).detach(), expected, base)
    again, _ = net()
    assert diffadapt.load_adapter(again, tmp_path, "b").unused == []
    assert_same(again(input), expected, 1e-6)


def test_feedforward_layers_of_a_loaded_ia3_are_saved_as_such(tmp_path: Path) -> None:
    theirs, input, base = saved_by_peft("ia3 feed-forward", tmp_path / "theirs")
    ours, _ = net()
    diffadapt.load_adapter(ours, tmp_path / "theirs", "a")
    diffadapt.adapters(ours).save("a", tmp_path / "ours", format="peft")
    again = peft.PeftModel.from_pretrained(net()[0], tmp_path / "ours")
    assert_close_to_change(again(input).detach(), theirs(input).detach(), base)
