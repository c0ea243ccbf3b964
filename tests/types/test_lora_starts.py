"""LoRAs that start with a part of the base weight, against PEFT, which takes that part out of the weight."""

from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import diffadapt
from diffadapt import AdapterError, LoraConfig
from tests.support.cases import for_each
from tests.support.compare import assert_same, relative_error

RANK, ALPHA = 4, 6.0


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict({"q": nn.Linear(24, 16), "k": nn.Linear(24, 16)}).requires_grad_(False)


class Called(nn.Module):
    """A model that PEFT can wrap."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = model()

    def forward(self, x: Tensor) -> Tensor:
        return self.layers["q"](x) * self.layers["k"](x)


def trained_(parameter: Tensor, seed: int) -> None:
    with torch.no_grad():
        parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))


@for_each(init=["pissa", "olora", "orthogonal"])
def test_training_from_the_start_is_that_of_peft(init: str, tmp_path: Path) -> None:
    ours, theirs, x = Called(), Called(), torch.randn(5, 24)
    base = ours(x)
    torch.manual_seed(1)
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["q", "k"], init_lora_weights=init)
    wrapped = peft.get_peft_model(theirs, config)
    weights = {path: ours.layers[path].weight.clone() for path in "qk"}
    settings = LoraConfig(rank=RANK, alpha=ALPHA, target_modules=["q", "k"], init=init)
    adapter = diffadapt.add_adapter(ours, settings, "style")
    assert_same(ours(x), base, 1e-6)
    for number, path in enumerate("qk"):
        layer, host = adapter.layers[f"layers.{path}"], theirs.layers[path]
        pairs = (
            (layer.get_parameter("lora_down"), host.lora_A["default"].weight),
            (layer.get_parameter("lora_up"), host.lora_B["default"].weight),
        )
        for half, (own, other) in enumerate(pairs):
            if init == "orthogonal":
                # Random in both.
                own.data.copy_(other)
            else:
                torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-5)
            trained_(own, 2 * number + half)
            trained_(other, 2 * number + half)
    assert_same(ours(x), wrapped(x), 1e-5)
    assert relative_error(ours(x).detach(), base) > 0.05
    # The base is untouched, and the file is a plain LoRA, which anyone reads with the right result.
    assert all(torch.equal(ours.layers[path].weight, weight) for path, weight in weights.items())
    diffadapt.adapters(ours).save("style", tmp_path / "style", format="peft")
    plain = peft.PeftModel.from_pretrained(Called(), tmp_path / "style")
    assert_same(plain(x), wrapped(x), 1e-5)
    again = Called()
    diffadapt.load_adapter(again, tmp_path / "style", "style")
    assert_same(again(x), wrapped(x), 1e-5)
    rank = RANK if init == "orthogonal" else 2 * RANK
    down = load_file(tmp_path / "style" / "adapter_model.safetensors")["base_model.model.layers.q.lora_A.weight"]
    assert down.shape == (rank, 24)


def test_only_the_factors_are_trained_and_several_share_a_layer() -> None:
    host, x = Called(), torch.randn(3, 24)
    base = host(x)
    settings = LoraConfig(rank=RANK, target_modules=["q"], init="pissa")
    one, other = (diffadapt.add_adapter(host, settings, name) for name in ("one", "other"))
    assert torch.equal(host(x), base)
    names = {name.rpartition(".")[2] for name, parameter in one.named_parameters() if parameter.requires_grad}
    assert names == {"lora_down", "lora_up"}
    host(x).square().sum().backward()
    gradients = [parameter.grad for parameter in one.parameters() if parameter.requires_grad]
    assert all(gradient is not None and gradient.any() for gradient in gradients)
    trained_(other.layers["layers.q"].get_parameter("lora_up"), 0)
    diffadapt.adapters(host).merge()
    merged = host(x)
    diffadapt.adapters(host).unmerge()
    assert_same(merged, host(x), 1e-5)
    diffadapt.adapters(host).clear()
    assert torch.equal(host(x), base)


def test_subspace_iterations_approach_the_singular_vectors() -> None:
    host = model()
    products: dict[str, Tensor] = {}
    for init in ("pissa", "pissa_niter_1", "pissa_niter_16"):
        layer = diffadapt.add_adapter(host, LoraConfig(rank=RANK, target_modules=["q"], init=init), init).layers["q"]
        products[init] = (layer.get_parameter("lora_up") @ layer.get_parameter("lora_down")).detach()
    assert relative_error(products["pissa_niter_16"], products["pissa"]) < 0.05
    assert relative_error(products["pissa_niter_1"], products["pissa"]) > relative_error(
        products["pissa_niter_16"], products["pissa"]
    )
    values = torch.linalg.svdvals(host["q"].weight)
    assert float(products["pissa"].norm()) == pytest.approx(float(values[:RANK].norm()), rel=1e-4)


@for_each(
    case=[
        ({"init": "pissa", "rank": 17}, r"rank is 17, expected at most 16, the rank of the weight"),
        ({"init": "pissa", "use_dora": True}, "use_dora has no meaning with init='pissa'"),
        ({"init": "olora", "rank_dropout": 0.1}, "rank_dropout has no meaning with init='olora'"),
        ({"init": "pissa", "alpha": -1.0}, "expected a positive number with init='pissa'"),
        ({"init": "orthogonal", "rank": 3}, "init='orthogonal' needs an even rank"),
        ({"init": "pissa_niter_0"}, "init is 'pissa_niter_0'; LoraConfig knows"),
    ]
)
def test_settings_without_a_meaning(case: tuple[dict[str, object], str]) -> None:
    options, message = case
    host = model()
    with pytest.raises(AdapterError, match=message):
        diffadapt.add_adapter(host, LoraConfig(**{"rank": RANK, "target_modules": ["q"], **options}))
