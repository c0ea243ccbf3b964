"""Adapters that need the values of a base weight are refused at load where nobody can decode them."""

import pytest
import torch
from torch import Tensor, nn

import diffadapt
from tests.support.bases import BASES, INPUTS, OUT, Base, silenced, values
from tests.support.compare import relative_error

pytestmark = pytest.mark.filterwarnings("ignore")

DORA = {
    "0.lora_A.weight": torch.randn(4, INPUTS, generator=torch.Generator().manual_seed(2)) / 4,
    "0.lora_B.weight": torch.randn(OUT, 4, generator=torch.Generator().manual_seed(3)) / 16,
    "0.lora_magnitude_vector": torch.rand(OUT, generator=torch.Generator().manual_seed(4)) + 0.5,
}


@pytest.mark.parametrize("base", BASES, ids=lambda base: base.name)
def test_dora_has_the_magnitude_it_says_on_every_base(base: Base) -> None:
    layer = base.layer()
    model = nn.Sequential(layer)
    decoded = diffadapt.weights.decoded(layer, "weight").double()
    diffadapt.load_adapter(model, DORA)
    direction = decoded + (DORA["0.lora_B.weight"] @ DORA["0.lora_A.weight"]).double()
    wanted = direction / direction.norm(dim=1, keepdim=True) * DORA["0.lora_magnitude_vector"].double().unsqueeze(1)
    input = torch.randn(8, INPUTS, generator=torch.Generator().manual_seed(5))
    with torch.no_grad(), silenced():
        found = model(input).double() - values()[1].double()
    assert relative_error(found, input.double() @ wanted.T) < 0.05


class Unknown(nn.Module):
    """A layer that keeps its weight to itself and cannot be run alone."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features, self.out_features = INPUTS, OUT
        self.weight = nn.Parameter(torch.zeros(OUT, INPUTS // 2, dtype=torch.uint8), requires_grad=False)

    def forward(self, input: Tensor, scale: Tensor) -> Tensor:
        return input[:, :OUT] * scale


class Tripled(nn.Linear):
    """A layer that computes with something else than its weight."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 3


@pytest.mark.parametrize("layer", [Unknown(), Tripled(INPUTS, OUT)], ids=["unknown storage", "another weight"])
def test_a_weight_that_cannot_be_decoded_is_refused_at_load_by_path(layer: nn.Module) -> None:
    model = nn.Sequential(layer)
    with pytest.raises(diffadapt.LoadError, match=r"0: a dora needs the values of the layer's weight"):
        diffadapt.load_adapter(model, DORA)
    assert diffadapt.adapters(model).names == []
    lora = {key: tensor for key, tensor in DORA.items() if "magnitude" not in key}
    assert diffadapt.load_adapter(model, lora).used == 2
