"""The options of PEFT's config for types whose options are more than a name and a number; see `peft_methods.py`."""

import re
from typing import Any

import torch
from torch import Tensor

from diffadapt.errors import AdapterError
from diffadapt.formats.metadata import flag
from diffadapt.formats.peft_method import (
    Config,
    Layers,
    common_setting,
    common_size,
    index_in,
    number_in,
    single,
    sizes_by_path,
    whole_in,
)
from diffadapt.types.adalora import DIVISOR_EPS
from diffadapt.types.formulas import rank_of
from diffadapt.types.glora_peft import PATHS
from diffadapt.types.layer_state import LayerState
from diffadapt.types.sparse import random_places
from diffadapt.types.wavelets import FAMILIES, KNOWN

_NO_WAVELETS = ("coif4", "coif5")


def beft_options(layers: Layers) -> dict[str, Any]:
    """Return the options of BEFT, the one method of PEFT for full changes: those of biases."""
    if any(set(layer.tensors) != {"diff_b"} or layer.kernel for layer in layers.values()):
        raise AdapterError("PEFT has no type like full, except for changes of the biases of linear layers alone")
    return {}


def spectrum_options(layers: Layers, type: str) -> dict[str, Any]:
    """Return the options of FourierFT and WaveFT, whose places PEFT draws again."""
    for path, layer in layers.items():
        places = layer.tensors[f"{type}_indices"]
        drawn = random_places(layer.outputs, layer.inputs, places.shape[1], int(layer.settings["seed"]), places.device)
        if not places.is_meta and not torch.equal(places.long(), drawn):
            raise AdapterError(f"{path}: its places are not those that PEFT draws from the seed")
    return {
        **sizes_by_path(layers, f"{type}_spectrum", 0, "n_frequency", "n_frequency_pattern"),
        "scaling": common_setting(layers, "scaling"),
        "random_loc_seed": int(common_setting(layers, "seed")),
    }


def waveft_settings(config: Config, path: str) -> dict[str, float]:
    name = config.get("wavelet_family", "db1")
    is_transformed = config.get("use_idwt") is None or flag(config.get("use_idwt"), "use_idwt")
    if is_transformed and name in _NO_WAVELETS:
        raise AdapterError(
            f"wavelet_family in adapter_config.json is {name!r}, and what PEFT has under that name is no wavelet (its "
            "filter is not orthonormal); merge the adapter with PEFT"
        )
    if is_transformed and name != "haar" and name not in KNOWN:
        raise AdapterError(
            f"wavelet_family in adapter_config.json is {name!r}, expected haar, {', '.join(KNOWN)}; PEFT has no filter "
            "for others, either"
        )
    family, moments = ("db", 1) if name == "haar" or not is_transformed else (name.rstrip("0123456789"), 0)
    moments = moments or int(name.removeprefix(family))
    return {
        "scaling": number_in(config, "scaling", 25.0),
        "seed": whole_in(config, "random_loc_seed", 777),
        "family": float(FAMILIES.index(family)),
        "moments": float(moments) if is_transformed else 0.0,
    }


def waveft_options(layers: Layers) -> dict[str, Any]:
    family, moments = FAMILIES[int(common_setting(layers, "family"))], int(common_setting(layers, "moments"))
    return {**spectrum_options(layers, "waveft"), "use_idwt": moments > 0, "wavelet_family": f"{family}{moments or 1}"}


def vera_options(type: str, layers: Layers) -> dict[str, Any]:
    tensors = next(iter(layers.values())).tensors
    rows = max(layer.outputs for layer in layers.values())
    columns = max(layer.inputs for layer in layers.values())
    if (tensors[f"{type}_B"].shape[0], tensors[f"{type}_A"].shape[1]) != (rows, columns):
        raise AdapterError(
            f"PEFT makes projections as large as the largest layer, ({rows}, {columns}); these are larger"
        )
    return {
        "r": common_size(layers, f"{type}_B", 1),
        "projection_prng_key": int(common_setting(layers, "seed")),
        "save_projection": True,
    }


def adalora_options(layers: Layers) -> dict[str, Any]:
    rank = common_setting(layers, "rank") - DIVISOR_EPS
    ranks = {path: layer.tensors["lora_E"].shape[0] for path, layer in layers.items()}
    options: dict[str, Any] = {"init_r": round(rank), "target_r": round(rank), "total_step": 1}
    if set(ranks.values()) != {round(rank)}:
        # PEFT makes layers of the initial rank, of which these components are kept.
        options["rank_pattern"] = {
            f"{path}.lora_E": [number < kept for number in range(max(kept, round(rank)))]
            for path, kept in ranks.items()
        }
    return options


def supertuning_options(layers: Layers) -> dict[str, Any]:
    counts = {path: layer.tensors["supertuning_values"].numel() for path, layer in layers.items()}
    sizes = {path: layer.inputs * layer.outputs for path, layer in layers.items()}
    sparsity = next(
        (
            share
            for path, count in counts.items()
            for share in (round(1 - count / sizes[path], 4), 1 - (count + 0.5) / sizes[path])
            if all(int(sizes[at] * (1 - share)) == counts[at] for at in counts)
        ),
        None,
    )
    if sparsity is None:
        raise AdapterError("PEFT has one sparsity for all layers of a SuperTuning, and these differ")
    rank = single({rank_of(layer.tensors, "supertuning_lora_A", 0) for layer in layers.values()}, "rank")
    scale = common_setting(layers, "lora_scale")
    return {
        "sparsity": sparsity,
        "select_top": bool(common_setting(layers, "largest")),
        "r": rank or None,
        "lora_alpha": scale * rank if rank else None,
    }


def _glora_kind(layer: LayerState, path: str) -> str:
    if f"glora_{path}_Xd" in layer.tensors:
        return "lora"
    vector = layer.tensors.get(f"glora_{path}_X")
    return "none" if vector is None else "constant" if vector.numel() == 1 else "vector"


def glora_options(layers: Layers) -> dict[str, Any]:
    kinds = {
        path: single({_glora_kind(layer, path) for layer in layers.values()}, f"kind of glora_{path}") for path in PATHS
    }
    if kinds["A"] != kinds["B"] or kinds["D"] != kinds["E"]:
        raise AdapterError("PEFT has one kind for A and B, and one for D and E")
    ranks = {t.shape[1] for layer in layers.values() for name, t in layer.tensors.items() if name.endswith("_Xd")}
    return {
        "r": single(ranks, "rank") if ranks else 8,
        "config_A_B": kinds["A"],
        "config_C": kinds["C"],
        "config_D_E": kinds["D"],
    }


def glora_zeros(layer: LayerState) -> dict[str, Tensor]:
    """Return the zeros that PEFT stores for missing parts."""
    like = next(iter(layer.tensors.values()))
    shapes = {"A": (layer.outputs, layer.inputs), "B": (layer.outputs, layer.inputs), "C": (layer.inputs, 1)}
    return {
        f"glora_{path}.zeros": like.new_zeros(shapes.get(path, (layer.outputs,)))
        for path in PATHS
        if _glora_kind(layer, path) == "none"
    }


def shira_options(layers: Layers) -> dict[str, Any]:
    ranks = {layer.tensors["shira_weight"].numel() / (layer.inputs + layer.outputs) for layer in layers.values()}
    rank = single(ranks, "rank")
    if rank != int(rank):
        raise AdapterError(
            f"a SHiRA of PEFT has a whole multiple of inputs + outputs elements, and this one {rank:g} times as many"
        )
    return {"r": int(rank), "mask_type": "random"}


def tinylora_options(layers: Layers) -> dict[str, Any]:
    ranks = {path: layer.tensors["tinylora_A"].shape[0] for path, layer in layers.items()}
    most = max(ranks.values())
    for path, layer in layers.items():
        if ranks[path] != min(most, layer.inputs, layer.outputs):
            raise AdapterError(f"{path}: PEFT has one rank for all layers of a TinyLoRA, and these differ")
    return {
        "r": most,
        "u": common_size(layers, "tinylora_v", 0),
        "weight_tying": common_setting(layers, "tying"),
        "projection_seed": int(common_setting(layers, "seed")),
        "save_projection": True,
    }


def osf_options(layers: Layers) -> dict[str, Any]:
    kept = {path: min(layer.inputs, layer.outputs) - layer.tensors["osf_S"].numel() for path, layer in layers.items()}
    if any(layer.kernel or layer.is_embedding for layer in layers.values()):
        raise AdapterError("PEFT has OSF for linear layers alone")
    first = next(iter(kept.values()))
    # Its patterns are searched for anywhere in a path.
    own = {f"(^|\\.){re.escape(path)}$": count for path, count in kept.items() if count != first}
    return {"effective_rank": first, "rank_pattern": own}


def frod_options(layers: Layers) -> dict[str, Any]:
    if any(layer.kernel for layer in layers.values()):
        raise AdapterError("PEFT has FRoD for linear layers alone")
    counts = {(layer.inputs, layer.tensors["frod_lambda_s_values"].numel()) for layer in layers.values()}
    rates = [rate for size, count in counts for rate in (round(count / size**2, 6), (count + 0.5) / size**2)]
    rate = next((r for r in rates if all(max(1, min(int(n * n * r), n * n - n)) == count for n, count in counts)), None)
    if rate is None:
        raise AdapterError("PEFT has one share of trained elements for all layers of a FRoD, and these differ")
    return {
        "sparse_rate": rate,
        "regularization_alpha": common_setting(layers, "ridge"),
        "projection_prng_key": int(common_setting(layers, "seed")),
        "save_projection": True,
        "progressbar": False,
    }


def adamss_options(layers: Layers) -> dict[str, Any]:
    if any(layer.kernel or layer.is_embedding for layer in layers.values()):
        raise AdapterError("PEFT has AdaMSS for linear layers alone")
    ranks = {path: layer.tensors["adamss_newB"].shape[0] for path, layer in layers.items()}
    clusters = {path: sum(name.startswith("adamss_A_") for name in layer.tensors) for path, layer in layers.items()}
    rank, count = max(ranks.values()), max(clusters.values())
    for path, layer in layers.items():
        columns = layer.inputs + ("adamss_column" in layer.tensors)
        if ranks[path] != min(rank, layer.outputs, columns) or clusters[path] != min(count, layer.outputs):
            raise AdapterError(f"{path}: PEFT has one rank and one number of clusters for all layers, and these differ")
        if ranks[path] >= layer.outputs and count > 1:
            raise AdapterError(
                f"{path}: PEFT computes the clusters again, and with as many singular vectors as outputs, they depend "
                "on rounding"
            )
    return {
        "r": rank,
        "num_subspaces": count,
        "subspace_rank": max(
            tensor.shape[0]
            for layer in layers.values()
            for name, tensor in layer.tensors.items()
            if name.startswith("adamss_A_")
        ),
        "random_seed": int(common_setting(layers, "seed")),
    }


def with_column(layer: LayerState, tensor: Tensor) -> Tensor:
    """Return the singular vectors of an AdaMSS with the column for the bias, if the layer has one."""
    column = layer.tensors.get("adamss_column")
    return tensor if column is None else torch.cat([tensor, column.unsqueeze(1)], 1)


# Types that are one tensor, or two.


def miss_options(layers: Layers) -> dict[str, Any]:
    shapes = {tuple(layer.tensors["miss_block"].shape) for layer in layers.values()}
    if any(len(shape) == 3 for shape in shapes):
        return {"r": common_size(layers, "miss_block", -1), "init_weights": "bat"}
    rank = common_size(layers, "miss_block", 0)
    if all(layer.outputs == layer.tensors["miss_block"].shape[1] for layer in layers.values()):
        return {"r": rank, "init_weights": True}
    return {"r": rank, "init_weights": "mini", "mini_r": common_size(layers, "miss_block", 1)}


def road_options(layers: Layers) -> dict[str, Any]:
    variants = {2 * layer.tensors["road_theta"].numel() // layer.outputs for layer in layers.values()}
    return {"variant": f"road_{single(variants, 'variant')}", "group_size": int(common_setting(layers, "group_size"))}


def gralora_options(layers: Layers) -> dict[str, Any]:
    hybrid = {rank_of(layer.tensors, "gralora_A_general", 0) for layer in layers.values()}
    return {
        "r": common_size(layers, "gralora_A", -1),
        "gralora_k": common_size(layers, "gralora_A", 0),
        "hybrid_r": single(hybrid, "hybrid_r"),
    }


def psoft_options(layers: Layers) -> dict[str, Any]:
    iterations, limit = int(common_setting(layers, "svd_iterations")), common_setting(layers, "neumann_limit")
    terms = int(common_setting(layers, "neumann_terms"))
    rank = common_size(layers, "psoft_A", 0)
    return {
        "r": rank,
        "psoft_alpha": rank,
        "ab_svd_init": "pissa_init" if common_setting(layers, "pissa") else "psoft_init",
        "psoft_svd": "lowrank" if iterations else "full",
        "psoft_svd_lowrank_niter": iterations or 10,
        "random_seed": int(common_setting(layers, "seed")),
        "psoft_orth": single({layer.tensors["psoft_R"].ndim for layer in layers.values()}, "psoft_orth") == 1,
        "psoft_mag_a": single({"psoft_vector_a" in layer.tensors for layer in layers.values()}, "psoft_mag_a"),
        "psoft_mag_b": single({"psoft_vector_b" in layer.tensors for layer in layers.values()}, "psoft_mag_b"),
        "use_cayley_neumann": bool(terms),
        "num_cayley_neumann_terms": terms or 5,
        "cayley_neumann_eps": limit or None,
    }


def psoft_settings(config: Config, path: str) -> dict[str, float]:
    series = flag(config.get("use_cayley_neumann"), "use_cayley_neumann")
    lowrank = index_in(config, "psoft_svd", "full", ("full", "lowrank"))
    return {
        "pissa": index_in(config, "ab_svd_init", "psoft_init", ("psoft_init", "pissa_init")),
        "svd_iterations": whole_in(config, "psoft_svd_lowrank_niter", 10) if lowrank else 0.0,
        "seed": whole_in(config, "random_seed", 0),
        "neumann_terms": whole_in(config, "num_cayley_neumann_terms", 5) if series else 0.0,
        "neumann_limit": number_in(config, "cayley_neumann_eps", 0.0) if series else 0.0,
    }
