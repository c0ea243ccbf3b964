"""Every adapter type against the peer libraries PEFT and LyCORIS: equal tensors, outputs, weights and gradients.

Errors are relative to the largest change that the adapter makes. Every comparison is repeated at a strength of 1.001,
where it has to fail.
"""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

import diffadapt
from diffadapt.runtime.adapter import Adapter
from diffadapt.types.config import AdapterConfig
from tests.support.parity import assert_equal_and_sensitive, error

modules = pytest.importorskip("lycoris.modules")
LoConModule, LohaModule, LokrModule = modules.LoConModule, modules.LohaModule, modules.LokrModule
DiagOFTModule = modules.DiagOFTModule

CONVOLUTIONS = ("conv", "point", "conv1d")
NAMES = {
    "lora_A": "lora_down",
    "lora_B": "lora_up",
    "lora_embedding_A": "lora_down",
    "lora_embedding_B": "lora_up",
    "lora_magnitude_vector": "dora_scale",
    "oft_embedding_R": "oft_R",
}
"""PEFT's name of a parameter -> ours; the other names are the same."""


class Layers(nn.Module):
    """One layer of every kind, each with its own input."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.linear = nn.Linear(30, 36)
        self.conv = nn.Conv2d(30, 36, 3, stride=2, padding=1)
        self.point = nn.Conv2d(30, 36, 1)
        self.conv1d = nn.Conv1d(30, 36, 3, padding=1)
        self.embedding = nn.Embedding(16, 30)
        self.inputs = {
            "linear": torch.randn(3, 5, 30),
            "conv": torch.randn(2, 30, 7, 7),
            "point": torch.randn(2, 30, 4, 4),
            "conv1d": torch.randn(2, 30, 9),
            "embedding": torch.randint(0, 16, (3, 7)),
        }

    def forward(self, *names: str) -> dict[str, Tensor]:
        return {name: getattr(self, name)(self.inputs[name]) for name in names}


def randomise(parameters: dict[str, Tensor], deviation: float) -> None:
    """Set random values such that no term of a formula is nearly neutral; magnitudes keep their size."""
    with torch.no_grad():
        for name, parameter in parameters.items():
            if "magnitude" in name or "dora_scale" in name or "rescale" in name:
                parameter.mul_(1 + 0.3 * torch.randn_like(parameter))
            else:
                parameter.normal_(std=deviation)


def adapter_of(model: nn.Module) -> Adapter:
    adapters = diffadapt.adapters(model)
    return adapters[adapters.names[0]].components["model"]


def assert_gradients(
    model: Layers,
    parameters: dict[str, dict[str, Tensor]],
    expected: dict[str, Tensor],
    excluded: tuple[str, ...] = (),
) -> None:
    """Assert that the gradients of all tensors are those of the peer's parameters.

    Args:
        parameters: Layer -> our name of a tensor -> parameter of the peer.
        excluded: Names of tensors that are not compared.
    """
    adapter = adapter_of(model).requires_grad_(True)
    outputs = model(*expected)
    for name, theirs in parameters.items():
        ours = adapter.layers[name].tensors
        assert set(ours) == set(theirs)
        gradients = torch.autograd.grad(outputs[name].pow(3).sum(), list(ours.values()))
        references = torch.autograd.grad(expected[name].pow(3).sum(), [theirs[key] for key in ours])
        for key, gradient, reference in zip(ours, gradients, references, strict=True):
            if key in excluded:
                continue
            assert reference.abs().max() > 1e-2, key
            difference = (gradient - reference.reshape(gradient.shape)).abs().max()
            assert difference < 1e-5 * reference.abs().max(), (name, key)


# PEFT: folders written by `save_pretrained`

LINEAR, ALL = ("linear",), ("linear", *CONVOLUTIONS, "embedding")
KRONECKER = ("linear", *CONVOLUTIONS)
OFT = ("linear", "conv", "point", "embedding")
BY_LAYER = {"rank_pattern": {"point": 3, "^conv": 4}, "alpha_pattern": {"point": 5, "linear": 1}}

PEFT_CASES: dict[str, tuple[Callable[..., peft.PeftConfig], dict[str, Any], tuple[str, ...]]] = {
    "dora": (peft.LoraConfig, {"r": 4, "lora_alpha": 6, "use_dora": True}, ALL),
    "dora-rank-stabilised": (peft.LoraConfig, {"r": 4, "use_dora": True, "use_rslora": True}, ALL),
    "loha": (peft.LoHaConfig, {"r": 3, "alpha": 2}, KRONECKER),
    "loha-tucker": (peft.LoHaConfig, {"r": 3, "alpha": 2, "use_effective_conv2d": True}, KRONECKER),
    "loha-patterns": (peft.LoHaConfig, {"r": 2, "alpha": 2, **BY_LAYER}, KRONECKER),
    "lokr": (peft.LoKrConfig, {"r": 2, "alpha": 3}, KRONECKER),
    "lokr-tucker": (peft.LoKrConfig, {"r": 2, "alpha": 3, "use_effective_conv2d": True}, KRONECKER),
    "lokr-decompose-both": (peft.LoKrConfig, {"r": 2, "alpha": 3, "decompose_both": True}, KRONECKER),
    "lokr-decompose-both-tucker": (
        peft.LoKrConfig,
        {"r": 2, "alpha": 3, "decompose_both": True, "use_effective_conv2d": True},
        KRONECKER,
    ),
    "lokr-factor": (peft.LoKrConfig, {"r": 2, "alpha": 3, "decompose_factor": 3}, KRONECKER),
    "lokr-larger-factor-first": (peft.LoKrConfig, {"r": 1, "alpha": 3, "decompose_factor": 12}, LINEAR),
    "lokr-patterns": (peft.LoKrConfig, {"r": 2, "alpha": 2, **BY_LAYER}, ("linear", "conv", "point")),
    "lokr-whole": (peft.LoKrConfig, {"r": 8, "alpha": 2}, ("linear", "conv", "point")),
    "oft": (peft.OFTConfig, {"oft_block_size": 5, "use_cayley_neumann": True}, OFT),
    **{
        f"oft-{terms}-terms": (
            peft.OFTConfig,
            {"oft_block_size": 5, "use_cayley_neumann": True, "num_cayley_neumann_terms": terms},
            OFT,
        )
        for terms in (2, 3, 4, 6, 8)
    },
    "oft-exact": (peft.OFTConfig, {"oft_block_size": 5, "use_cayley_neumann": False}, OFT),
    "oft-number-of-blocks": (peft.OFTConfig, {"oft_block_size": 0, "r": 6}, OFT),
    "oft-shared": (peft.OFTConfig, {"oft_block_size": 5, "block_share": True}, OFT),
    "coft": (peft.OFTConfig, {"oft_block_size": 5, "coft": True, "eps": 2.0}, OFT),
    "coft-exact-shared": (
        peft.OFTConfig,
        {"oft_block_size": 5, "coft": True, "eps": 0.7, "block_share": True, "use_cayley_neumann": False},
        OFT,
    ),
}


def adapted_by_peft(case: str, model: nn.Module) -> Any:
    config, options, targets = PEFT_CASES[case]
    init = "init_lora_weights" if config is peft.LoraConfig else "init_weights"
    adapted = peft.get_peft_model(model, config(target_modules=list(targets), **{init: False}, **options)).eval()
    trained = {name: parameter for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    randomise(trained, 0.3 if "oft" in case else 0.5)
    return adapted


def outputs_of_peft(adapted: Any, names: tuple[str, ...]) -> dict[str, Tensor]:
    outputs: dict[str, Tensor] = {}
    for name in names:
        layer, input = getattr(adapted.base_model.model, name), adapted.base_model.model.inputs[name]
        if name == "conv" and hasattr(layer, "oft_R"):
            # PEFT's forward pass sums rotations of overlapping patches; its merged weight is the definition.
            host = layer.base_layer
            weight = (layer.get_delta_weight("default") @ host.weight.flatten(1).t()).t().view_as(host.weight)
            outputs[name] = F.conv2d(input, weight, host.bias, host.stride, host.padding)
        else:
            outputs[name] = layer(input)
    return outputs


def parameters_of_peft(adapted: Any) -> dict[str, dict[str, Tensor]]:
    found: dict[str, dict[str, Tensor]] = {}
    for path, parameter in adapted.base_model.model.named_parameters():
        if parameter.requires_grad:
            layer, name, *_ = path.split(".")
            found.setdefault(layer, {})[NAMES.get(name, name)] = parameter
    return found


@pytest.mark.parametrize("case", PEFT_CASES)
def test_a_folder_of_peft_is_equal(case: str, tmp_path: Path) -> None:
    names = PEFT_CASES[case][2]
    adapted = adapted_by_peft(case, Layers())
    # PEFT's constrained OFT changes its own parameters in a forward pass; save what was trained.
    adapted.save_pretrained(tmp_path)
    model = Layers()
    report = diffadapt.load_adapter(model, tmp_path)
    assert report.unused == []
    assert report.components == {"model": len(names)}
    expected = outputs_of_peft(adapted, names)
    assert_equal_and_sensitive(model, expected)
    if "coft" not in case:
        # PEFT's hand-written backward pass for Tucker cores uses the wrong one of two products for these.
        wrong = ("hada_w1_a", "hada_w2_a") if case == "loha-tucker" else ()
        assert_gradients(model, parameters_of_peft(adapted), expected, wrong)
    merged = adapted.merge_and_unload()(*names)
    base = Layers()(*names)
    assert all(error(merged[name], expected[name], base[name]) < 1e-5 for name in names)


@pytest.mark.parametrize(
    ("case", "option", "value"),
    [
        ("dora", "lora_alpha", 5),
        ("dora-rank-stabilised", "use_rslora", False),
        ("loha-patterns", "alpha_pattern", {}),
        ("lokr-whole", "alpha", 3),
        ("lokr-whole", "r", 9),
        ("oft", "use_cayley_neumann", False),
        ("oft", "num_cayley_neumann_terms", 4),
        ("coft", "coft", False),
        ("coft", "eps", 1.9),
    ],
)
def test_every_setting_in_the_config_of_peft_has_an_effect(case: str, option: str, value: Any, tmp_path: Path) -> None:
    names = PEFT_CASES[case][2]
    adapted = adapted_by_peft(case, Layers())
    adapted.save_pretrained(tmp_path)
    expected = outputs_of_peft(adapted, names)
    file = tmp_path / "adapter_config.json"
    config = json.loads(file.read_text())
    assert config[option] != value
    file.write_text(json.dumps({**config, option: value}))
    model = Layers()
    diffadapt.load_adapter(model, tmp_path)
    outputs, base = model(*names), Layers()(*names)
    assert max(error(outputs[name], expected[name], base[name]) for name in names) > 1e-3


def test_a_lokr_with_whole_factors_on_conv1d_is_not_written_for_peft(tmp_path: Path) -> None:
    """PEFT multiplies (1, o1, i1) with (o2, i2, kernel) there; LyCORIS and this library do not."""
    config = peft.LoKrConfig(target_modules=["conv1d"], init_weights=False, r=8, alpha=8)
    adapted: Any = peft.get_peft_model(Layers(), config)
    layer = adapted.base_model.model.conv1d
    w1, w2 = layer.lokr_w1["default"], layer.lokr_w2["default"]
    theirs = torch.kron(w1[None], w2).view(layer.weight.shape)
    torch.testing.assert_close(layer.get_delta_weight("default"), theirs)
    assert (torch.kron(w1[..., None], w2) - theirs).norm() > theirs.norm()
    model = Layers()
    diffadapt.add_adapter(model, diffadapt.LoKrConfig(target_modules=["conv1d"], full_matrix=True), "whole")
    with pytest.raises(diffadapt.AdapterError, match="1-d convolution"):
        diffadapt.adapters(model).save("whole", tmp_path, format="peft")


def test_a_tucker_lokr_of_rank_1_merges() -> None:
    """`torch.kron` refuses the strides of such a factor, as it still does in PEFT and LyCORIS."""
    model, input = nn.Sequential(nn.Conv2d(12, 20, (3, 1))), torch.randn(1, 12, 5, 5)
    base = model(input)
    config = diffadapt.LoKrConfig(target_modules="all-conv", rank=1, use_tucker=True, init=False)
    diffadapt.add_adapter(model, config)
    forward = model(input)
    diffadapt.adapters(model).merge()
    assert error(model(input), forward, base) < 1e-5


# LyCORIS: files with the tensors of its modules

BOTH_AXES = {"output": {"wd_on_out": True}, "input": {"wd_on_out": False}}
LYCORIS_BASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "locon": (LoConModule, {"lora_dim": 4, "alpha": 3}),
    "locon-tucker": (LoConModule, {"lora_dim": 4, "alpha": 3, "use_tucker": True}),
    "loha": (LohaModule, {"lora_dim": 3, "alpha": 2}),
    "loha-tucker": (LohaModule, {"lora_dim": 3, "alpha": 2, "use_tucker": True}),
    "lokr": (LokrModule, {"lora_dim": 2, "alpha": 3}),
    "lokr-decompose-both": (LokrModule, {"lora_dim": 2, "alpha": 3, "decompose_both": True}),
    "lokr-tucker": (LokrModule, {"lora_dim": 2, "alpha": 3, "use_tucker": True}),
    "lokr-whole": (LokrModule, {"lora_dim": 2, "alpha": 3, "full_matrix": True}),
}
LYCORIS_CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    **{
        f"{name}-dora-per-{axis}": (module, {**options, "weight_decompose": True, **choice})
        for name, (module, options) in LYCORIS_BASES.items()
        for axis, choice in BOTH_AXES.items()
    },
    "diag-oft": (DiagOFTModule, {"lora_dim": 4}),
    "diag-oft-rescaled": (DiagOFTModule, {"lora_dim": 4, "rescaled": True}),
    "diag-oft-constrained": (DiagOFTModule, {"lora_dim": 6, "constraint": 0.05}),
    "diag-oft-constrained-rescaled": (DiagOFTModule, {"lora_dim": 6, "constraint": 0.05, "rescaled": True}),
}


def merged_by_lycoris(module: Any) -> Tensor:
    if isinstance(module, (LohaModule, LokrModule)):
        # Their `get_merged_weight` applies alpha / rank twice; the forward pass does not.
        return module.apply_weight_decompose(module.org_weight + module.get_weight(module.shape))
    return module.get_merged_weight()[0]


@pytest.mark.parametrize("case", LYCORIS_CASES)
def test_a_file_of_lycoris_is_equal(case: str) -> None:
    module_class, options = LYCORIS_CASES[case]
    plain, model = Layers(), Layers()
    peers = {name: module_class(name, getattr(plain, name), **options).eval() for name in KRONECKER}
    for peer in peers.values():
        randomise(dict(peer.named_parameters()), 0.4)
    file = {f"lora_unet_{name}.{key}": tensor for name in peers for key, tensor in peers[name].state_dict().items()}
    report = diffadapt.load_adapter(model, file, component="unet")
    assert report.unused == []
    expected = {name: peer(plain.inputs[name]) for name, peer in peers.items()}
    assert_equal_and_sensitive(model, expected)
    if module_class is DiagOFTModule:
        # LyCORIS computes a gradient for the norm of a DoRA; the paper, PEFT and this library exclude it.
        parameters = {name: dict(peer.named_parameters()) for name, peer in peers.items()}
        assert_gradients(model, parameters, expected)
    diffadapt.adapters(model).merge()
    for name, peer in peers.items():
        weight, base = getattr(model, name).weight, getattr(plain, name).weight
        assert error(weight, merged_by_lycoris(peer), base) < 1e-5, name


def test_the_axis_of_a_dora_makes_a_difference() -> None:
    plain, model = nn.Linear(24, 24), nn.Sequential(nn.Linear(24, 24))
    model[0].load_state_dict(plain.state_dict())
    peer = LoConModule("", plain, lora_dim=4, alpha=4, weight_decompose=True, wd_on_out=False)
    randomise(dict(peer.named_parameters()), 0.4)
    input = torch.randn(5, 24)
    file = {f"lora_unet_0.{key}": value for key, value in peer.state_dict().items()}
    diffadapt.load_adapter(model, file, "input", component="unet")
    assert error(model(input), peer(input), plain(input)) < 1e-5
    diffadapt.adapters(model).remove("input")
    file["lora_unet_0.dora_scale"] = file["lora_unet_0.dora_scale"].t()
    diffadapt.load_adapter(model, file, "output", component="unet")
    assert error(model(input), peer(input), plain(input)) > 0.1


def test_an_old_file_of_lycoris_contains_rotations() -> None:
    plain, model = Layers(), Layers()
    names = KRONECKER
    rotations = {name: torch.linalg.qr(torch.randn(9, 4, 4))[0] for name in names}
    file = {f"lora_unet_{name}.oft_diag": rotation for name, rotation in rotations.items()}
    diffadapt.load_adapter(model, file, component="unet")
    with torch.no_grad():
        for name, rotation in rotations.items():
            weight = getattr(plain, name).weight
            weight.copy_((torch.block_diag(*rotation).t() @ weight.flatten(1)).view_as(weight))
    assert_equal_and_sensitive(model, plain(*names))


# Adapters trained here and loaded in LyCORIS

TRAINED: dict[str, tuple[AdapterConfig, Any, dict[str, Any]]] = {
    "lora": (diffadapt.LoraConfig(target_modules=KRONECKER, rank=4, alpha=6), LoConModule, {}),
    "lora-tucker": (diffadapt.LoraConfig(target_modules=KRONECKER, rank=4, use_tucker=True), LoConModule, {}),
    "dora": (diffadapt.LoraConfig(target_modules=KRONECKER, rank=4, alpha=6, use_dora=True), LoConModule, {}),
    "dora-per-input": (
        diffadapt.LoraConfig(target_modules=KRONECKER, rank=4, alpha=6, use_dora=True, dora_axis="input"),
        LoConModule,
        {"lora_dim": 4, "alpha": 6, "weight_decompose": True, "wd_on_out": False},
    ),
    "loha": (diffadapt.LoHaConfig(target_modules=KRONECKER, rank=3, alpha=2), LohaModule, {}),
    "loha-tucker": (diffadapt.LoHaConfig(target_modules=KRONECKER, rank=3, use_tucker=True), LohaModule, {}),
    "lokr": (diffadapt.LoKrConfig(target_modules=KRONECKER, rank=2, alpha=3), LokrModule, {}),
    "lokr-whole": (diffadapt.LoKrConfig(target_modules=KRONECKER, full_matrix=True), LokrModule, {}),
    "lokr-whole-dora": (
        diffadapt.LoKrConfig(target_modules=KRONECKER, full_matrix=True, use_dora=True),
        LokrModule,
        {},
    ),
    "oft": (diffadapt.OFTConfig(target_modules=KRONECKER, block_size=4, side="output"), DiagOFTModule, {}),
    "oft-constrained-rescaled": (
        diffadapt.OFTConfig(target_modules=KRONECKER, block_size=4, side="output", constraint=0.02, rescale=True),
        DiagOFTModule,
        {},
    ),
}


def train(model: Layers, names: tuple[str, ...], steps: int = 6) -> None:
    """Train towards random outputs, with steps whose size does not depend on the scale of the adapter type."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    targets = {name: torch.randn_like(output) for name, output in model(*names).items()}
    for _ in range(steps):
        loss = torch.stack([F.mse_loss(output, targets[name]) for name, output in model(*names).items()]).sum()
        for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            parameter.data -= 0.1 * gradient / (gradient.norm() + 1e-12) * parameter.numel() ** 0.5


@pytest.mark.parametrize("case", TRAINED)
def test_a_trained_adapter_is_equal_in_lycoris(case: str, tmp_path: Path) -> None:
    config, module_class, options = TRAINED[case]
    plain, model = Layers().requires_grad_(False), Layers().requires_grad_(False)
    diffadapt.add_adapter(model, config, "mine")
    train(model, KRONECKER)
    file = load_file(diffadapt.adapters(model).save("mine", tmp_path / "mine.safetensors", format="kohya"))
    expected: dict[str, Tensor] = {}
    for name in KRONECKER:
        prefix, layer = f"lora_unet_{name}", getattr(plain, name)
        if options:
            # LyCORIS' own loader assumes that every `dora_scale` is per output.
            peer = module_class(name, layer, **options)
        else:
            with torch.no_grad():
                state = module_class.extract_state_dict(file, prefix)
                peer = module_class.make_module_from_state_dict(name, layer, *state)
        peer.load_state_dict({key.partition(".")[2]: tensor for key, tensor in file.items() if f"{prefix}." in key})
        expected[name] = peer(plain.inputs[name])
    assert_equal_and_sensitive(model, expected)


# Half precision

HALF: dict[str, tuple[Callable[..., peft.PeftConfig], dict[str, Any]]] = {
    "lora": (peft.LoraConfig, {"r": 8, "lora_alpha": 12}),
    "dora": (peft.LoraConfig, {"r": 8, "lora_alpha": 12, "use_dora": True}),
    "loha": (peft.LoHaConfig, {"r": 4, "alpha": 3}),
    "loha-dense": (peft.LoHaConfig, {"r": 8, "alpha": 6}),
    "lokr": (peft.LoKrConfig, {"r": 3, "alpha": 4}),
    "lokr-whole": (peft.LoKrConfig, {"r": 8, "alpha": 8}),
    "oft": (peft.OFTConfig, {"oft_block_size": 8}),
    "oft-exact": (peft.OFTConfig, {"oft_block_size": 8, "use_cayley_neumann": False}),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16 adapter", "float32 adapter"])
@pytest.mark.parametrize("case", HALF)
def test_the_error_in_half_precision_is_no_larger_than_in_peft(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    config, options = HALF[case]
    init = "init_lora_weights" if config is peft.LoraConfig else "init_weights"
    plain = nn.Sequential(nn.Linear(64, 96)).bfloat16()
    input = torch.randn(256, 64).bfloat16()
    theirs = peft.get_peft_model(
        copy.deepcopy(plain), config(target_modules=["0"], **{init: False}, **options), autocast_adapter_dtype=False
    )
    trained = {name: parameter for name, parameter in theirs.named_parameters() if parameter.requires_grad}
    randomise(trained, 0.1 if "oft" in case else 0.3)
    theirs.bfloat16().save_pretrained(tmp_path)
    for parameter in trained.values():
        parameter.data = parameter.to(dtype)
    ours = copy.deepcopy(plain)
    diffadapt.load_adapter(ours, tmp_path, dtype=dtype)
    with torch.no_grad():
        half = {"ours": ours(input), "peft": theirs(input)}
        exact = theirs.double()(input.double())
    assert error(half["ours"].double(), exact, plain(input).double()) < 0.05
    decibels = {name: 20 * torch.log10((output - exact).norm() / exact.norm()) for name, output in half.items()}
    assert decibels["ours"] < decibels["peft"] + 0.5
