"""Properties of OFT and BOFT besides the contract of every adapter type."""

import math

import pytest
import torch
from torch import Tensor, nn

import diffadapt
from diffadapt import AdapterConfig, AdapterError
from diffadapt.runtime.adapter import Adapter
from diffadapt.runtime.adapter_layer import AdapterLayer
from diffadapt.runtime.attach import attach_
from diffadapt.types.boft import BOFT
from diffadapt.types.layer_spec import LayerSpec
from diffadapt.types.oft import OFT


def rotation(config: AdapterConfig, scale: float = 0.3) -> Tensor:
    """Return the merged weight of a layer whose weight is the identity: the rotation, or its inverse."""
    model = nn.Sequential(nn.Linear(16, 16, bias=False)).double()
    nn.init.eye_(model[0].weight)
    adapter = diffadapt.add_adapter(model, config).double().requires_grad_(False)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in adapter.named_parameters():
        if not name.endswith("boft_s"):
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    diffadapt.adapters(model).merge()
    return model[0].weight.detach()


@pytest.mark.parametrize(
    "config",
    [
        diffadapt.OFTConfig(block_size=4, neumann_terms=0, target_modules=["0"]),
        diffadapt.OFTConfig(block_size=4, side="output", target_modules=["0"]),
        diffadapt.BOFTConfig(block_size=4, target_modules=["0"]),
        diffadapt.BOFTConfig(block_size=4, butterfly_factors=2, target_modules=["0"]),
        diffadapt.BOFTConfig(block_size=4, side="output", target_modules=["0"]),
    ],
    ids=["oft", "oft on outputs", "boft", "boft of two factors", "boft on outputs"],
)
def test_rotations_are_orthogonal(config: AdapterConfig) -> None:
    matrix = rotation(config)
    identity = torch.eye(16, dtype=torch.float64)
    torch.testing.assert_close(matrix @ matrix.T, identity, rtol=0, atol=1e-12)
    assert (matrix - identity).abs().max() > 0.1


def test_one_butterfly_factor_separates_blocks_and_two_join_them() -> None:
    same_block = torch.block_diag(*[torch.ones(4, 4)] * 4).bool()
    one_factor = rotation(diffadapt.BOFTConfig(block_size=4, target_modules=["0"]))
    two_factors = rotation(diffadapt.BOFTConfig(block_size=4, butterfly_factors=2, target_modules=["0"]))
    assert one_factor[~same_block].abs().max() == 0
    assert two_factors[~same_block].abs().max() > 0.05


def test_the_neumann_series_approaches_the_inverse_of_the_exact_rotation() -> None:
    exact = rotation(diffadapt.OFTConfig(block_size=4, neumann_terms=0, target_modules=["0"]), 0.1)
    errors: list[float] = []
    for terms in (2, 3, 5, 8):
        series = rotation(diffadapt.OFTConfig(block_size=4, neumann_terms=terms, target_modules=["0"]), 0.1)
        errors.append(float((series - exact.T).abs().max()))
        assert (series - exact).abs().max() > 0.1
    assert errors == sorted(errors, reverse=True)
    assert errors[2] < 3e-3
    assert errors[3] < 1e-4


def test_a_boft_of_one_factor_is_an_exact_oft() -> None:
    """Except that PEFT's butterfly halves `A - A'`."""
    spec = LayerSpec("linear", 12, 16)
    blocks = torch.randn(4, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows, columns = torch.triu_indices(4, 4, 1)
    triangle = ((blocks - blocks.transpose(1, 2)) / 2)[:, rows, columns]
    outputs: list[Tensor] = []
    for adapter_type, tensors, settings in (
        (OFT, {"oft_R": triangle}, {"neumann_terms": 0.0}),
        (BOFT, {"boft_R": blocks.unsqueeze(0), "boft_s": torch.ones(12, 1).double()}, {}),
    ):
        model = nn.Sequential(nn.Linear(16, 12)).double()
        torch.manual_seed(0)
        nn.init.normal_(model[0].weight)
        nn.init.normal_(model[0].bias)
        layer = AdapterLayer(adapter_type, spec, adapter_type.fit(tensors, spec), settings=settings)
        adapter = Adapter({"0": layer})
        attach_(model, "a", adapter, {"0": model[0]})
        diffadapt.adapters(model).activate("a")
        outputs.append(model(torch.ones(2, 16).double() * torch.arange(16)))
    torch.testing.assert_close(*outputs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("radius", [1e-3, 0.2])
def test_constrained_blocks_stay_within_the_radius(radius: float) -> None:
    """The distance of the Cayley transform of a block of Frobenius norm r from the identity is at most 2 r."""
    matrix = rotation(diffadapt.OFTConfig(block_size=4, coft_eps=radius, target_modules=["0"]), 3.0)
    distance = (matrix - torch.eye(16).double()).norm()
    assert 0 < distance <= 2.2 * radius
    matrix = rotation(diffadapt.OFTConfig(block_size=4, side="output", constraint=radius, target_modules=["0"]), 3.0)
    assert 0 < (matrix - torch.eye(16).double()).norm() <= 2 * 16 * radius


def test_the_old_layout_of_peft_is_refused_by_name() -> None:
    with pytest.raises(AdapterError, match=r"oft_r is the layout of PEFT before 0\.14"):
        diffadapt.load_adapter(nn.Sequential(nn.Linear(16, 16)), {"base_model.model.0.oft_r": torch.zeros(4, 4, 4)})


FAULTS = {
    "blocks that cover too little": ({"oft_blocks": (3, 4, 4)}, r"oft_blocks has shape \(3, 4, 4\)"),
    "blocks that are not square": ({"oft_blocks": (4, 4, 3)}, r"oft_blocks has shape \(4, 4, 3\)"),
    "no triangle": ({"oft_R.weight": (4, 5)}, r"oft_R has shape \(4, 5\), expected \(blocks, b \(b - 1\) / 2\) for 16"),
    "triangles of another layer": ({"oft_R.weight": (3, 6)}, r"oft_R has shape \(3, 6\)"),
    "rescale of another layer": ({"oft_blocks": (4, 4, 4), "rescale": (15, 1)}, r"rescale has shape \(15, 1\)"),
    "rescale on inputs": ({"oft_R.weight": (4, 6), "rescale": (16, 1)}, "rescale has shape"),
    "rescale alone": ({"rescale": (16, 1)}, "no adapter type"),
    "both families": ({"oft_R.weight": (4, 6), "oft_blocks": (4, 4, 4)}, "one of oft_R, oft_blocks and oft_diag"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_tensors_that_do_not_fit_are_refused(name: str) -> None:
    shapes, reason = FAULTS[name]
    tensors = {f"base_model.model.0.{key}": torch.zeros(shape) for key, shape in shapes.items()}
    with pytest.raises(AdapterError, match=reason):
        diffadapt.load_adapter(nn.Sequential(nn.Linear(16, 16)), tensors)


def test_nan_is_refused() -> None:
    tensors = {"base_model.model.0.oft_blocks": torch.full((4, 4, 4), math.nan)}
    with pytest.raises(AdapterError, match="NaN"):
        diffadapt.load_adapter(nn.Sequential(nn.Linear(16, 16)), tensors)
