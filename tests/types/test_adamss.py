"""What AdaMSS computes from the base weight: its clusters, and the refusal of files whose clusters are others."""

from pathlib import Path

import numpy
import pytest
import torch
from torch import nn

import diffadapt
from diffadapt import AdapterError, LoadError
from diffadapt.types.adamss import _clustered

# Labels from `KMeans(n_clusters, init="random", n_init=1, max_iter=10, random_state=123456789)` of scikit-learn 1.9.1.
LABELS = {
    "few": "0002100101021112001110001010022000200000",
    "many": "0053162101331413261110661515244020450055",
    "empty": "155555242222000000333333",
}


@pytest.mark.parametrize("name", LABELS)
def test_clusters_are_those_of_scikit_learn(name: str) -> None:
    if name == "empty":
        # A cluster loses all its rows on the way.
        rows = numpy.repeat(numpy.random.RandomState(5).standard_normal((4, 3)), 6, 0).astype("float32")
        rows[0] += 0.5
        rows[7] -= 0.25
    else:
        rows = numpy.random.RandomState(4).standard_normal((40, 5)).astype("float32")
    count = len(set(LABELS[name]))
    count = 6 if name == "empty" else count
    found = ["?"] * len(rows)
    for number, cluster in enumerate(_clustered(torch.from_numpy(rows), count)):
        for row in cluster.tolist():
            found[row] = str(number)
    assert "".join(found) == LABELS[name]


def model(seed: int = 0, out: int = 24) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(10, out))


def folder(path: Path, out: int = 24, **options: int) -> Path:
    root = model(out=out)
    config = diffadapt.AdaMSSConfig(rank=6, clusters=3, cluster_rank=2, init=False, target_modules=["0"], **options)
    diffadapt.add_adapter(root, config, "a")
    diffadapt.adapters(root).save("a", path, format="peft")
    return path


def test_a_folder_for_another_base_model_is_refused(tmp_path: Path) -> None:
    path = folder(tmp_path / "a")
    assert diffadapt.load_adapter(model(), path).types == {"adamss": 1}
    other = model(seed=1)
    with pytest.raises(LoadError, match="made with another base model or on another kind of device"):
        diffadapt.load_adapter(other, path)
    assert diffadapt.adapters(other).names == []


def test_clusters_that_depend_on_rounding_are_refused_in_a_folder_of_peft(tmp_path: Path) -> None:
    root = model(out=5)
    config = diffadapt.AdaMSSConfig(rank=6, clusters=2, init=False, target_modules=["0"])
    diffadapt.add_adapter(root, config, "a")
    with pytest.raises(AdapterError, match="depend on rounding"):
        diffadapt.adapters(root).save("a", tmp_path / "a", format="peft")
    # A file of ours says which outputs the clusters have.
    file = diffadapt.adapters(root).save("a", tmp_path / "a.safetensors", format="kohya")
    again, input = model(out=5), torch.randn(3, 10)
    diffadapt.load_adapter(again, file, component="unet")
    assert torch.equal(again(input), root(input))


def test_places_that_are_no_permutation_are_refused(tmp_path: Path) -> None:
    root = model()
    diffadapt.add_adapter(root, diffadapt.AdaMSSConfig(rank=4, clusters=2, target_modules=["0"]), "a")
    layer = next(iter(diffadapt.adapters(root)["a"].components.values())).layers["0"]
    tensors = {f"unet.0.{name}": tensor.detach().clone() for name, tensor in layer.tensors.items()}
    tensors["unet.0.adamss_places"][0] = 7
    tensors["unet.0.adamss_places"][1] = 7
    with pytest.raises(LoadError, match="adamss_places are not all 24 outputs"):
        diffadapt.load_adapter(model(), tensors)
