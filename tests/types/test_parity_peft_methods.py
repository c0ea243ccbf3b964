"""Folders of PEFT's other methods: equal outputs, merged weights and gradients, and folders that PEFT reads back.

Errors are relative to the largest change that the adapter makes. Every comparison is repeated at a strength of 1.001,
where it has to fail.
"""

import copy
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import diffadapt
from diffadapt.types import adamss
from tests.support.parity import assert_equal_and_sensitive, error

pytestmark = [
    pytest.mark.filterwarnings("ignore:The symmetric initialization can NOT:UserWarning"),
    pytest.mark.filterwarnings("ignore:Specified to not (save|load):UserWarning"),
    pytest.mark.filterwarnings("ignore:save_precomputed_indices=False:UserWarning"),
    pytest.mark.filterwarnings("ignore:Unsupported layer type .*LayerNorm:UserWarning"),
    pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled:UserWarning"),
]

PeftConfig = Callable[..., peft.PeftConfig]


class Layers(nn.Module):
    """Layers of several sizes and kinds, each with its own input."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.linear = nn.Linear(24, 16)
        self.wide = nn.Linear(16, 36, bias=False)
        self.odd = nn.Linear(15, 21)
        self.conv = nn.Conv2d(12, 8, 3, padding=1)
        self.point = nn.Conv2d(12, 8, 1)
        self.conv1d = nn.Conv1d(12, 8, 3, padding=1)
        self.embedding = nn.Embedding(16, 12)
        self.norm = nn.LayerNorm(12)
        self.inputs = {
            "linear": torch.randn(3, 5, 24),
            "wide": torch.randn(4, 16),
            "odd": torch.randn(4, 15),
            "conv": torch.randn(2, 12, 7, 7),
            "point": torch.randn(2, 12, 4, 4),
            "conv1d": torch.randn(2, 12, 9),
            "embedding": torch.randint(0, 16, (3, 7)),
            "norm": torch.randn(3, 12),
        }
        # PVeRA draws samples in training.
        self.eval()

    def forward(self, *names: str) -> dict[str, Tensor]:
        return {name: getattr(self, name)(self.inputs[name]) for name in names}


@dataclass(frozen=True)
class Case:
    """One method with one set of options.

    Attributes:
        type: Our name of the adapter type.
        config: PEFT's config class.
        options: Its options.
        layers: The layers that PEFT supports.
        around: Tensor name -> the value that its random values are around.
        init: The option, and its value, with which PEFT's adapter is random; without it, the tensors are randomised.
        gradients: Whether PEFT's parameters and ours are the same tensors, so that gradients can be compared.
        merges: Whether PEFT merges to the same weight.
        writes: Whether PEFT's folders can be written, too.
    """

    type: str
    config: PeftConfig
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    layers: tuple[str, ...] = ("linear", "wide")
    around: Mapping[str, float] = field(default_factory=dict[str, float])
    gradients: bool = True
    merges: bool = True
    writes: bool = True


SIZES = ("linear", "wide", "odd")

CASES: dict[str, Case] = {
    "miss": Case("miss", peft.MissConfig, {"r": 4}),
    # The rank does not divide the inputs.
    "miss-odd": Case("miss", peft.MissConfig, {"r": 7}),
    "miss-mini": Case("miss", peft.MissConfig, {"r": 4, "init_weights": "mini", "mini_r": 4}),
    "miss-bat": Case("miss", peft.MissConfig, {"r": 4, "init_weights": "bat"}),
    "gralora": Case("gralora", peft.GraloraConfig, {"r": 4, "alpha": 6, "gralora_k": 2}),
    "gralora-hybrid": Case("gralora", peft.GraloraConfig, {"r": 8, "alpha": 6, "gralora_k": 4, "hybrid_r": 3}),
    "delora": Case("delora", peft.DeloraConfig, {"r": 3}, around={"delora_lambda": 9.0}),
    "hira": Case("hira", peft.HiraConfig, {"r": 3}, ("linear", "wide", "conv", "point", "conv1d", "embedding")),
    "deft": Case("deft", peft.DeftConfig, {"r": 3}),
    "deft-qr": Case("deft", peft.DeftConfig, {"r": 3, "alpha": 2, "decomposition_method": "qr"}),
    "deft-para": Case("deft", peft.DeftConfig, {"r": 3, "para": True}),
    **{
        f"road-{variant}": Case(
            "road", peft.RoadConfig, {"variant": f"road_{variant}", "group_size": 4}, around={"road_alpha": 1.0}
        )
        for variant in (1, 2, 4)
    },
    "hra": Case("hra", peft.HRAConfig, {"r": 3}),
    "hra-conv": Case("hra", peft.HRAConfig, {"r": 3}, ("conv",)),
    "hra-gram-schmidt": Case("hra", peft.HRAConfig, {"r": 3, "apply_GS": True}),
    "c3a": Case("c3a", peft.C3AConfig, {"block_size": 4}),
    "c3a-odd": Case("c3a", peft.C3AConfig, {"block_size": 3, "block_size_pattern": {"wide": 4}}, ("odd", "wide")),
    "fourierft": Case("fourierft", peft.FourierFTConfig, {"n_frequency": 40}, ("linear", "wide", "odd")),
    "fourierft-pattern": Case(
        "fourierft",
        peft.FourierFTConfig,
        {"n_frequency": 40, "n_frequency_pattern": {"odd": 17}, "random_loc_seed": 5, "scaling": 90.0},
        ("linear", "odd"),
    ),
    **{
        f"waveft-{family}": Case(
            "waveft", peft.WaveFTConfig, {"n_frequency": 50, "wavelet_family": family}, ("linear", "wide", "odd")
        )
        for family in ("db1", "db2", "db7", "sym4", "sym7", "coif1", "coif3")
    },
    "waveft-proportional": Case(
        "waveft", peft.WaveFTConfig, {"n_frequency": 50, "proportional_parameters": True}, ("linear", "wide")
    ),
    "waveft-plain": Case("waveft", peft.WaveFTConfig, {"n_frequency": 50, "use_idwt": False}, ("linear", "odd")),
    "shira": Case("shira", peft.ShiraConfig, {"r": 2}, ("linear", "wide", "odd")),
    "vera": Case("vera", peft.VeraConfig, {"r": 6}, SIZES),
    "vera-seeded": Case("vera", peft.VeraConfig, {"r": 6, "projection_prng_key": 4, "save_projection": False}, SIZES),
    "pvera": Case("pvera", peft.PveraConfig, {"r": 6}, SIZES, gradients=False),
    "pvera-seeded": Case("pvera", peft.PveraConfig, {"r": 6, "save_projection": False}, SIZES, gradients=False),
    "randlora": Case("randlora", peft.RandLoraConfig, {"r": 4, "randlora_alpha": 8}, SIZES),
    "randlora-seeded": Case(
        "randlora", peft.RandLoraConfig, {"r": 5, "projection_prng_key": 3, "save_projection": False}, SIZES
    ),
    **{
        f"randlora-{kind}": Case("randlora", peft.RandLoraConfig, {"r": 5, kind: True, "save_projection": False}, SIZES)
        for kind in ("sparse", "very_sparse")
    },
    "vblora": Case("vblora", peft.VBLoRAConfig, {"r": 3, "num_vectors": 12, "vector_length": 4}),
    "vblora-topk": Case(
        "vblora",
        peft.VBLoRAConfig,
        {"r": 3, "num_vectors": 12, "vector_length": 4, "topk": 3, "save_only_topk_weights": True},
        gradients=False,
    ),
    "unilora": Case("unilora", peft.UniLoraConfig, {"r": 3, "theta_d_length": 50}, SIZES),
    "unilora-indices": Case("unilora", peft.UniLoraConfig, {"r": 3, "theta_d_length": 50, "save_indices": True}, SIZES),
    "adalora": Case(
        "adalora", peft.AdaLoraConfig, {"init_r": 4, "total_step": 5, "lora_alpha": 6}, ("linear", "wide", "conv")
    ),
    "peanut": Case("peanut", peft.PeanutConfig, {"r": 3, "scaling": 0.7}),
    "peanut-deep": Case("peanut", peft.PeanutConfig, {"r": 3, "depth": 2, "act_fn": "silu"}),
    "supertuning": Case("supertuning", peft.SupertuningConfig, {"sparsity": 0.8}, SIZES),
    "supertuning-lora": Case(
        "supertuning", peft.SupertuningConfig, {"sparsity": 0.9, "select_top": False, "r": 2}, SIZES
    ),
    "supertuning-recomputed": Case(
        "supertuning", peft.SupertuningConfig, {"sparsity": 0.8, "save_precomputed_indices": False}, SIZES
    ),
    "glora": Case("glora-peft", peft.GloraConfig, {"r": 3, "config_D_E": "vector"}, ("linear", "odd")),
    "glora-vector": Case(
        "glora-peft", peft.GloraConfig, {"config_A_B": "vector", "config_C": "vector"}, ("linear", "odd")
    ),
    "glora-constant": Case(
        "glora-peft", peft.GloraConfig, {"config_A_B": "constant", "config_C": "none", "config_D_E": "none"}
    ),
    "beft": Case("full", peft.BeftConfig, {}, ("linear", "odd")),
    "ln-tuning": Case(
        "full", peft.LNTuningConfig, {}, ("norm",), around={"weight": 1.0}, gradients=False, writes=False
    ),
    "tinylora": Case("tinylora", peft.TinyLoraConfig, {"r": 3, "u": 7}, (*SIZES, "embedding")),
    "tinylora-tied": Case(
        "tinylora",
        peft.TinyLoraConfig,
        {"r": 2, "u": 5, "weight_tying": 0.5, "projection_seed": 3},
        (*SIZES, "embedding"),
    ),
    "tinylora-seeded": Case(
        "tinylora", peft.TinyLoraConfig, {"r": 2, "u": 5, "weight_tying": 1.0, "save_projection": False}, SIZES
    ),
    "osf": Case("osf", peft.OSFConfig, {"effective_rank": 10}, SIZES),
    "osf-few": Case("osf", peft.OSFConfig, {"effective_rank": 14, "rank_pattern": {"odd": 13}}, SIZES),
    "frod": Case("frod", peft.FrodConfig, {"sparse_rate": 0.05, "progressbar": False}, SIZES),
    "frod-seeded": Case(
        "frod",
        peft.FrodConfig,
        {"sparse_rate": 0.02, "save_projection": False, "projection_prng_key": 4, "progressbar": False},
        SIZES,
    ),
    "adamss": Case("adamss", peft.AdamssConfig, {"r": 8, "num_subspaces": 3, "subspace_rank": 2}, SIZES),
    "adamss-seed": Case("adamss", peft.AdamssConfig, {"r": 12, "num_subspaces": 4, "random_seed": 5}, SIZES),
    "psoft": Case("psoft", peft.PsoftConfig, {"r": 4, "psoft_alpha": 8}, around={"vector": 1.0}),
    "psoft-pissa": Case(
        "psoft",
        peft.PsoftConfig,
        {"r": 4, "ab_svd_init": "pissa_init", "psoft_orth": False, "psoft_mag_a": False},
        around={"vector": 1.0},
    ),
    "psoft-series": Case(
        "psoft",
        peft.PsoftConfig,
        {"r": 4, "use_cayley_neumann": True, "cayley_neumann_eps": 0.9, "psoft_mag_b": False, "psoft_mag_a": False},
    ),
    "psoft-lowrank": Case(
        "psoft", peft.PsoftConfig, {"r": 4, "psoft_svd": "lowrank", "random_seed": 3}, around={"vector": 1.0}
    ),
}


def adapted_by_peft(case: Case) -> Any:
    """Return a model with an adapter of PEFT with random values."""
    torch.manual_seed(2)
    adapted = peft.get_peft_model(Layers(), case.config(target_modules=list(case.layers), **case.options)).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad:
                middle = next((value for part, value in case.around.items() if part in name), 0.0)
                parameter.normal_(std=0.4).add_(middle)
    return adapted


def outputs(adapted: Any, names: tuple[str, ...]) -> dict[str, Tensor]:
    model = adapted.base_model.model
    return {name: getattr(model, name)(model.inputs[name]) for name in names}


class KMeans:
    """What AdaMSS of PEFT needs of scikit-learn; `test_adamss.py` compares our clusters with those of scikit-learn."""

    def __init__(self, n_clusters: int, init: str, n_init: int, max_iter: int, random_state: int) -> None:
        assert (init, n_init, max_iter, random_state) == ("random", 1, 10, 123456789)
        self.count = n_clusters

    def fit_predict(self, rows: Any) -> Any:
        labels = torch.zeros(len(rows), dtype=torch.int64)
        for number, cluster in enumerate(adamss._clustered(torch.from_numpy(rows), self.count)):
            labels[cluster] = number
        return labels.numpy()


@pytest.fixture(autouse=True)
def _without_sklearn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", SimpleNamespace())  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "sklearn.cluster", SimpleNamespace(KMeans=KMeans))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", CASES)
def test_a_folder_of_peft_is_equal_and_is_written_back(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    adapted = adapted_by_peft(case)
    adapted.save_pretrained(tmp_path / "theirs")
    model = Layers()
    report = diffadapt.load_adapter(model, tmp_path / "theirs", "a")
    assert report.unused == []
    assert report.types == {case.type: len(case.layers)}
    expected = outputs(adapted, case.layers)
    assert_equal_and_sensitive(model, expected)
    if case.gradients:
        assert_gradients(model, adapted, case, expected)
    base = Layers()(*case.layers)
    if case.merges:
        merged = copy.deepcopy(adapted).merge_and_unload()(*case.layers)
        for layer in case.layers:
            assert error(merged[layer], expected[layer], base[layer]) < 1e-4
    adapters = diffadapt.adapters(model)
    file = adapters.save("a", tmp_path / "one.safetensors", format="kohya")
    reloaded = Layers()
    assert diffadapt.load_adapter(reloaded, file, component="unet").unused == []
    assert_equal_and_sensitive(reloaded, expected)
    if case.writes:
        adapters.save("a", tmp_path / "ours", format="peft")
        again = peft.PeftModel.from_pretrained(Layers(), tmp_path / "ours").eval()
        for layer, output in outputs(again, case.layers).items():
            assert error(output, expected[layer], base[layer]) < 1e-5, layer
        reloaded = Layers()
        assert diffadapt.load_adapter(reloaded, tmp_path / "ours").unused == []
        assert_equal_and_sensitive(reloaded, expected)


def assert_gradients(model: Layers, adapted: Any, case: Case, expected: dict[str, Tensor]) -> None:
    """Assert that the gradients of our tensors are, together, those of PEFT's parameters."""
    adapters = diffadapt.adapters(model)
    adapter = adapters["a"].components["model"]
    fixed = {name for layer in adapter.layers.values() for name in layer.adapter_type.fixed}
    for path, parameter in adapter.named_parameters():
        parameter.requires_grad_(path.rpartition(".")[2] not in fixed)
    ours = [p for p in adapter.parameters() if p.requires_grad]
    theirs = [p for p in adapted.parameters() if p.requires_grad]
    mine, reference = (
        torch.autograd.grad(sum(output.pow(3).sum() for output in found.values()), parameters)
        for found, parameters in ((model(*case.layers), ours), (expected, theirs))
    )
    assert sum(g.numel() for g in mine) == sum(g.numel() for g in reference)
    values = [torch.cat([g.flatten() for g in found]).sort().values for found in (mine, reference)]
    assert values[1].abs().max() > 1e-2
    assert (values[0] - values[1]).abs().max() < 1e-5 * values[1].abs().max()


def test_the_rank_allocator_keeps_the_same_components_as_in_peft(tmp_path: Path) -> None:
    names, steps = ["linear", "wide", "conv"], 12
    options: dict[str, Any] = {"init_r": 5, "target_r": 2, "tinit": 2, "tfinal": 3, "deltaT": 2, "total_step": steps}
    torch.manual_seed(3)
    config = peft.AdaLoraConfig(target_modules=names, lora_alpha=6, init_lora_weights=False, **options)
    theirs: Any = peft.get_peft_model(Layers(), config)
    theirs.save_pretrained(tmp_path / "start")
    ours = Layers()
    diffadapt.load_adapter(ours, tmp_path / "start", "a")
    adapter = diffadapt.adapters(ours)["a"].components["model"].requires_grad_(True)
    allocator = diffadapt.RankAllocator(adapter, 2, steps, warmup_steps=2, final_steps=3, interval=2)
    trained = [[p for p in theirs.parameters() if p.requires_grad], list(adapter.parameters())]
    optimizers = [torch.optim.SGD(parameters, lr=1e-3) for parameters in trained]
    for step in range(1, steps + 1):
        for optimizer, found in zip(optimizers, (outputs(theirs, tuple(names)), ours(*names)), strict=True):
            optimizer.zero_grad()
            torch.stack([output.pow(2).mean() for output in found.values()]).sum().backward()
            optimizer.step()
        theirs.base_model.update_and_allocate(step)
        allocator.step(step)
    kept = theirs.peft_config["default"].rank_pattern
    assert sum(allocator.ranks) == 2 * len(names)
    for name, layer in adapter.layers.items():
        (mask,) = [found for path, found in kept.items() if f"{name}.lora_E" in path]
        assert [bool(value) for value in layer.tensors["lora_E"]] == mask
    assert allocator.penalty() > 0
    # PEFT stores the components that were kept, and the layers run with those.
    theirs.save_pretrained(tmp_path / "end")
    reloaded = Layers()
    assert diffadapt.load_adapter(reloaded, tmp_path / "end").unused == []
    assert_equal_and_sensitive(reloaded, outputs(theirs.eval(), tuple(names)))
