"""Starts of a LoRA that follow from data."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.multiprocessing
from safetensors.torch import save_file
from torch import Tensor, nn

import diffadapt
from diffadapt import AdapterError, LoraConfig, calibrated
from tests.support.cases import for_each
from tests.support.compare import relative_error

RANK = 3


class Model(nn.Module):
    """Two linear layers and a convolution, whose inputs vary in few directions, one, and many."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.few, self.one = nn.Linear(16, 12), nn.Linear(16, 12)
        self.patches = nn.Conv2d(3, 8, 3, stride=2, padding=1)

    def forward(self, few: Tensor, one: Tensor, pictures: Tensor) -> Tensor:
        return self.few(few).tanh().sum() + self.one(one).tanh().sum() + self.patches(pictures).tanh().sum()


def batches() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    few, one = (torch.linalg.qr(torch.randn(16, size, generator=generator)).Q.mT for size in (5, 1))
    return [
        {
            "few": torch.randn(7, 5, generator=generator) @ few + 1,
            "one": torch.randn(2, 4, 1, generator=generator) @ one - 2,
            "pictures": torch.randn(2, 3, 6, 6, generator=generator),
        }
        for _ in range(6)
    ]


def principal(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return the principal directions of rows, and the share of the variance that each explains."""
    centred = (rows - rows.mean(0)).double()
    _, values, right = torch.linalg.svd(centred, full_matrices=False)
    return right, values.square() / values.square().sum()


def rows_of(name: str) -> Tensor:
    found = torch.cat([batch[name].reshape(-1, batch[name].shape[-1]) for batch in batches()])
    if name != "pictures":
        return found
    pictures = torch.cat([batch[name] for batch in batches()])
    return nn.functional.unfold(pictures, 3, 1, 1, 2).transpose(1, 2).reshape(-1, 27)


def test_eva_starts_with_the_principal_directions_of_the_inputs() -> None:
    model, config = Model(), LoraConfig(rank=RANK, alpha=6, target_modules=["few", "one", "patches"], init="eva")
    base = model(**batches()[0])
    settings = calibrated(model, config, batches())
    adapter = diffadapt.add_adapter(model, settings, "style")
    assert torch.equal(model(**batches()[0]), base)
    shares = {name: principal(rows_of(key)) for name, key in (("few", "few"), ("one", "one"), ("patches", "pictures"))}
    every = sorted(((float(s), name) for name, (_, found) in shares.items() for s in found[:6]), reverse=True)[
        : 3 * RANK
    ]
    ranks = {name: sum(chosen == name for _, chosen in every) for name in shares}
    assert ranks["one"] == 1
    assert len(set(ranks.values())) > 1
    variances = {name: found for name, (_, found) in shares.items()}
    for name, (directions, _) in shares.items():
        layer = adapter.layers[name]
        assert layer.rank == ranks[name]
        # The scale of the gradient does not depend on the rank.
        assert layer.scale == pytest.approx(2.0)
        down = layer.get_parameter("lora_down").detach().flatten(1).double()
        torch.testing.assert_close(down @ down.mT, torch.eye(len(down)).double(), atol=1e-5, rtol=0)
        # The directions of the patches come from a decomposition that is cut after every batch.
        explained = ((down @ directions.mT).square() @ variances[name]).sum()
        assert explained > (0.95 if name == "patches" else 1 - 1e-6) * variances[name][: len(down)].sum()


@for_each(init=["corda", "corda_kpm"])
def test_corda_takes_the_components_that_the_inputs_use_most_or_least(init: str) -> None:
    x = torch.randn(64, 16) * torch.linspace(0.1, 2, 16)
    model = nn.ModuleDict({"few": nn.Linear(16, 12)})
    base, weight = model["few"](x), model["few"].get_parameter("weight").detach().double()
    config = LoraConfig(rank=RANK, alpha=6, target_modules=["few"], init=init)
    halves = [x[:20], x[20:]]
    adapter = diffadapt.add_adapter(model, calibrated(model, config, halves, run=lambda m, batch: m["few"](batch)))
    assert torch.equal(model["few"](x), base)
    layer = adapter.layers["few"]
    start = 2.0 * (layer.get_parameter("lora_up") @ layer.get_parameter("lora_down")).detach().double()
    covariance = (x.mT @ x / 64).double()
    covariance += 0.01 * covariance.diagonal().mean() * torch.eye(16)
    values = torch.linalg.svdvals(weight @ covariance)
    rest = torch.linalg.svdvals((weight - start) @ covariance)
    kept = values[:-RANK] if init == "corda_kpm" else values[RANK:]
    torch.testing.assert_close(rest[: len(kept)], kept, rtol=1e-4, atol=1e-5)
    assert float(rest[len(kept) :].max()) < 1e-4


def test_lora_ga_starts_with_singular_vectors_of_the_gradient() -> None:
    model = Model()
    model.few.weight.requires_grad_(False)
    model.one.weight.grad = torch.full_like(model.one.weight, 7.0)
    base = model(**batches()[0])
    config = LoraConfig(rank=RANK, target_modules=["few", "one"], init="lora_ga")
    inputs = batches()
    settings = calibrated(model, config, inputs, run=lambda model, batch: model(**batch).square())
    assert not model.few.weight.requires_grad
    assert torch.equal(model.one.weight.grad, torch.full_like(model.one.weight, 7.0))
    adapter = diffadapt.add_adapter(model, settings, "style")
    assert torch.equal(model(**batches()[0]), base)
    reference = Model()
    for batch in inputs:
        reference(**batch).square().backward()
    gradient = reference.few.weight.grad
    assert gradient is not None
    left, _, right = torch.linalg.svd(gradient)
    size = 12**0.25 / 4
    down, up = (adapter.layers["few"].get_parameter(f"lora_{name}").detach() for name in ("down", "up"))
    torch.testing.assert_close((down @ right[:RANK].mT).abs(), size * torch.eye(RANK), atol=1e-3, rtol=0)
    torch.testing.assert_close((left[:, RANK : 2 * RANK].mT @ up).abs(), size * torch.eye(RANK), atol=1e-3, rtol=0)


@for_each(kind=["state dict", "model", "file", "folder"])
def test_loftq_brings_a_rounded_layer_closer_to_the_original(kind: str, tmp_path: Path) -> None:
    original = Model().requires_grad_(False)
    rounded = Model().requires_grad_(False)
    rounded.few.weight.copy_((original.few.weight * 8).round() / 8)
    state = {name: tensor.contiguous() for name, tensor in original.state_dict().items()}
    save_file(state, tmp_path / "model.safetensors")
    sources = {"state dict": state, "model": original, "file": tmp_path / "model.safetensors", "folder": tmp_path}
    config = LoraConfig(rank=6, alpha=3, target_modules=["few"], init="loftq")
    before = rounded.few.weight - original.few.weight
    adapter = diffadapt.add_adapter(rounded, calibrated(rounded, config, originals=sources[kind]), "closer")
    layer = adapter.layers["few"]
    change = 0.5 * layer.get_parameter("lora_up") @ layer.get_parameter("lora_down")
    values = torch.linalg.svdvals(before)
    after = rounded.few.weight + change.detach() - original.few.weight
    assert float(after.norm()) == pytest.approx(float(values[6:].norm()), rel=1e-3)
    assert float(after.norm()) < 0.6 * float(before.norm())


def _in_process(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    for init in ("eva", "corda"):
        config = LoraConfig(rank=RANK, target_modules=["few", "one"], init=init)
        settings = calibrated(Model(), config, batches()[3 * rank : 3 * rank + 3])
        torch.save(dict(settings.starts), f"{folder}/{init}-{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_with_half_of_the_batches_each_get_the_starts_of_one(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_in_process, (str(tmp_path),), nprocs=2)
    for init in ("eva", "corda"):
        alone = calibrated(Model(), LoraConfig(rank=RANK, target_modules=["few", "one"], init=init), batches()).starts
        found = [torch.load(tmp_path / f"{init}-{rank}.pt", weights_only=True) for rank in range(2)]
        for path, factors in alone.items():
            for own, other, wanted in zip(found[0][path], found[1][path], factors, strict=True):
                assert torch.equal(own, other)
                if wanted.any():
                    # Singular vectors have no sign.
                    assert relative_error(own.abs(), wanted.abs()) < 1e-3, (init, path)


def cases() -> Iterator[tuple[dict[str, object], dict[str, object], str]]:
    yield {"init": True}, {}, "init is True, which takes nothing from data; use one of eva, corda"
    yield {"init": "eva"}, {}, "few: no batch reached it"
    yield {"init": "loftq"}, {}, "init='loftq' needs originals=, the weights before quantisation"
    yield {"init": "eva"}, {"originals": {}}, "originals has no effect with init='eva'"
    yield {"init": "lora_ga"}, {"batches": batches(), "run": lambda m, b: 3.0}, "it returned a float"
    yield {"init": "lora_ga", "rank": 7}, {"batches": batches()}, "takes twice the rank of singular vectors"
    yield {"init": "loftq"}, {"originals": {}}, "few: originals has no few.weight"
    yield {"init": "eva", "rank_pattern": {"few": 2}}, {"batches": batches()}, "rank_pattern and alpha_pattern have no"


def test_what_is_refused() -> None:
    for options, arguments, message in cases():
        config = LoraConfig(**{"rank": RANK, "target_modules": ["few"], **options})
        with pytest.raises(AdapterError, match=message.replace("(", r"\(")):
            calibrated(Model(), config, **arguments)
    with pytest.raises(AdapterError, match=r"pass the settings through diffadapt\.calibrated"):
        diffadapt.add_adapter(Model(), LoraConfig(rank=RANK, target_modules=["few"], init="eva"))
