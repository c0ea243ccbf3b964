"""How PEFT spells the adapter types that it names other than LoRA, LoHa, LoKr, OFT, BOFT and (IA)^3.

A `Method` relates the settings, the alpha and the tensors of an adapter type to the options of `adapter_config.json`
and the names in `adapter_model.safetensors`. Source: PEFT 0.21.2 `tuners/*/config.py`, `layer.py` and `model.py`.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from diffadapt.errors import AdapterError
from diffadapt.formats import peft_config
from diffadapt.formats.metadata import finite_number, flag
from diffadapt.formats.peft_method import (
    Config,
    Layers,
    Method,
    common_setting,
    common_size,
    index_in,
    number_in,
    single,
    sizes_by_path,
    whole_in,
)
from diffadapt.formats.peft_options import (
    adalora_options,
    adamss_options,
    beft_options,
    frod_options,
    glora_options,
    glora_zeros,
    gralora_options,
    miss_options,
    osf_options,
    psoft_options,
    psoft_settings,
    road_options,
    shira_options,
    spectrum_options,
    supertuning_options,
    tinylora_options,
    vera_options,
    waveft_options,
    waveft_settings,
    with_column,
)
from diffadapt.formats.verdicts import Place, Verdict
from diffadapt.types import frod, named, tinylora
from diffadapt.types.adalora import DIVISOR_EPS
from diffadapt.types.adamss import MOST_CLUSTERS
from diffadapt.types.glora_peft import PATHS
from diffadapt.types.peanut import ACTIVATIONS, MOST_LAYERS


def alpha(config: Config, paths: Sequence[str], rank: int) -> float | None:
    """Return the alpha of a layer, such that `alpha / rank` is PEFT's scaling; `None` if the config has no alpha."""
    method = BY_NAME.get(str(config.get("peft_type")))
    if method is None:
        return peft_config.alpha(config, paths, rank)
    value = config.get(method.alpha) if method.alpha else None
    return None if value is None else finite_number(value, method.alpha)


def refuse_other_tensors(config: Config, verdicts: Iterable[Verdict]) -> None:
    """Raise `AdapterError` if a file has none of the tensors of the method that its config names."""
    method = BY_NAME.get(str(config.get("peft_type")))
    found = {verdict.name for verdict in verdicts if isinstance(verdict, Place)}
    if method is not None and found and found.isdisjoint(named(method.type).tensors):
        raise AdapterError(
            f"adapter_config.json says peft_type={method.name!r}, but the file has {', '.join(sorted(found))}"
        )


def settings(config: Config, path: str, type: str) -> dict[str, float]:
    """Return the settings of an adapter type for the layer at `path`, see `AdapterType.settings`.

    Raises:
        AdapterError: an option is not of the expected kind.
    """
    method = BY_TYPE.get(type)
    return peft_config.settings(config, path, type) if method is None else method.read(config, path)


def shared(layers: Layers) -> dict[str, Tensor]:
    """Return the tensors that PEFT stores once for all layers or for a group of them, by key.

    Raises:
        AdapterError: layers of a group have different tensors.
    """
    found: dict[str, Tensor] = {}
    first = next(iter(layers.values()))
    method = BY_TYPE.get(first.type)
    groups = None if method is None or method.groups is None else method.groups(list(layers), first.settings)
    for number, (path, layer) in enumerate(layers.items()):
        for name in named(layer.type).shared & layer.tensors.keys():
            key, tensor = f"base_model.{name}", layer.tensors[name]
            if groups is not None:
                key = f"{key}.{groups[number]}"
                known = found.get(key, tensor)
                if known is not tensor and (known.shape != tensor.shape or not torch.equal(known, tensor)):
                    raise AdapterError(f"{path}: PEFT stores one {name} as {key}, and its layers have several")
            found[key] = tensor
    return found


_METHODS: tuple[Method, ...] = (
    Method(name="MISS", type="miss", older=("BONE",), write=miss_options, other_names={"miss_block": "bone_block"}),
    Method(
        name="GRALORA",
        type="gralora",
        write=gralora_options,
        alpha="alpha",
        names={
            "gralora_A_general": "gralora_A_general.weight",
            "gralora_B_general": "gralora_B_general.weight",
        },
    ),
    Method(name="DELORA", type="delora", write=lambda layers: sizes_by_path(layers, "delora_A", 0)),
    Method(
        name="HIRA",
        type="hira",
        write=lambda layers: sizes_by_path(layers, "hira_A", 0),
        embedding_names={"hira_A": "hira_embedding_A", "hira_B": "hira_embedding_B"},
        reshape=lambda layer, name, tensor: (
            tensor.view(*tensor.shape, *(1,) * layer.kernel_dims) if name == "hira_B" else tensor
        ),
    ),
    Method(
        name="DEFT",
        type="deft",
        read=lambda config, path: {"qr": index_in(config, "decomposition_method", "relu", ("relu", "qr"))},
        write=lambda layers: {
            "r": common_size(layers, "deft_P", -1),
            "decomposition_method": "qr" if common_setting(layers, "qr") else "relu",
            "para": single({"deft_R" not in layer.tensors for layer in layers.values()}, "para"),
        },
        alpha="alpha",
    ),
    Method(
        name="ROAD",
        type="road",
        read=lambda config, path: {"group_size": whole_in(config, "group_size", 64)},
        write=road_options,
    ),
    Method(
        name="HRA",
        type="hra",
        read=lambda config, path: {"gram_schmidt": float(flag(config.get("apply_GS"), "apply_GS"))},
        write=lambda layers: {
            "r": common_size(layers, "hra_u", -1),
            "apply_GS": bool(common_setting(layers, "gram_schmidt")),
        },
    ),
    Method(
        name="PSOFT",
        type="psoft",
        read=psoft_settings,
        write=psoft_options,
        names={
            "psoft_R": "psoft_R.weight",
            "psoft_vector_a": "psoft_R.vector_a",
            "psoft_vector_b": "psoft_R.vector_b",
        },
        left_out=frozenset({"psoft_A", "psoft_B"}),
    ),
    Method(
        name="C3A",
        type="c3a",
        write=lambda layers: sizes_by_path(layers, "c3a_kernel", -1, "block_size", "block_size_pattern"),
    ),
    Method(
        name="FOURIERFT",
        type="fourierft",
        read=lambda config, path: {
            "scaling": number_in(config, "scaling", 150.0),
            "seed": whole_in(config, "random_loc_seed", 777),
        },
        write=lambda layers: spectrum_options(layers, "fourierft"),
        left_out=frozenset({"fourierft_indices"}),
    ),
    Method(
        name="WAVEFT",
        type="waveft",
        read=waveft_settings,
        write=waveft_options,
        left_out=frozenset({"waveft_indices"}),
    ),
    Method(name="SHIRA", type="shira", write=shira_options),
    *(
        Method(
            name=type.upper(),
            type=type,
            read=lambda config, path: {"seed": whole_in(config, "projection_prng_key", 0)},
            write=partial(vera_options, type),
        )
        for type in ("vera", "pvera")
    ),
    Method(
        name="RANDLORA",
        type="randlora",
        read=lambda config, path: {
            "seed": whole_in(config, "projection_prng_key", 0),
            "sparsity": 2.0
            if flag(config.get("very_sparse"), "very_sparse")
            else float(flag(config.get("sparse"), "sparse")),
        },
        write=lambda layers: {
            "r": common_size(layers, "randlora_lambda", 0),
            "projection_prng_key": int(common_setting(layers, "seed")),
            "save_projection": True,
            "sparse": common_setting(layers, "sparsity") == 1,
            "very_sparse": common_setting(layers, "sparsity") == 2,
        },
        alpha="randlora_alpha",
        repeats=True,
    ),
    Method(
        name="VBLORA",
        type="vblora",
        read=lambda config, path: {"topk": whole_in(config, "topk", 2)},
        write=lambda layers: {
            "r": common_size(layers, "vblora_logits_A", 0),
            "topk": int(common_setting(layers, "topk")),
            "num_vectors": common_size(layers, "vblora_vector_bank", 0),
            "vector_length": common_size(layers, "vblora_vector_bank", 1),
            "save_only_topk_weights": False,
        },
    ),
    Method(
        name="ADALORA",
        type="adalora",
        read=lambda config, path: {"rank": whole_in(config, "init_r", 12) + DIVISOR_EPS},
        write=adalora_options,
        names={"lora_down": "lora_A", "lora_up": "lora_B", "lora_E": "lora_E"},
        alpha="lora_alpha",
        reshape=lambda layer, name, tensor: tensor.flatten(1) if name == "lora_down" else tensor,
    ),
    Method(
        name="PEANUT",
        type="peanut",
        read=lambda config, path: {
            "scaling": number_in(config, "scaling", 1.0),
            "activation": index_in(config, "act_fn", "relu", tuple(ACTIVATIONS)),
        },
        write=lambda layers: {
            "r": common_size(layers, "peanut_A", 0),
            "depth": single({len(layer.tensors) // 2 - 1 for layer in layers.values()}, "depth"),
            "act_fn": tuple(ACTIVATIONS)[int(common_setting(layers, "activation"))],
            "scaling": common_setting(layers, "scaling"),
        },
        names={
            "peanut_A": "peanut_A.weight",
            "peanut_B": "peanut_B.weight",
            **{
                f"peanut_{side}_{number}": f"peanut_{side}s.{number}.weight"
                for side in ("encoder", "decoder")
                for number in range(MOST_LAYERS)
            },
        },
    ),
    Method(
        name="SUPERTUNING",
        type="supertuning",
        read=lambda config, path: {
            "lora_scale": number_in(config, "lora_alpha", 1.0) / number_in(config, "r", 1.0),
            "largest": float(config.get("select_top") is not False),
        },
        write=supertuning_options,
        names={
            "supertuning_lora_A": "supertuning_lora_A.weight",
            "supertuning_lora_B": "supertuning_lora_B.weight",
        },
    ),
    Method(
        name="GLORA",
        type="glora-peft",
        write=glora_options,
        names={f"glora_{path}_{part}": f"glora_{path}.{part}" for path in PATHS for part in ("Xd", "Xu", "X", "zeros")},
        more=glora_zeros,
    ),
    Method(
        name="LN_TUNING",
        type="full",
        other_names={"set_weight": "ln_tuning_layers.weight", "set_bias": "ln_tuning_layers.bias"},
    ),
    Method(
        name="BEFT",
        type="full",
        write=beft_options,
        names={"diff_b": "beft_bias"},
        reshape=lambda layer, name, tensor: tensor.view(1, -1),
    ),
    Method(
        name="TINYLORA",
        type="tinylora",
        read=lambda config, path: {
            "rank": whole_in(config, "r", 2),
            "tying": number_in(config, "weight_tying", 0.0),
            "seed": whole_in(config, "projection_seed", 42),
        },
        write=tinylora_options,
        groups=tinylora.groups,
    ),
    Method(
        name="OSF",
        type="osf",
        write=osf_options,
        names={f"osf_{part}": f"osf_svd_params.{part}_low" for part in "USV"},
        left_out=frozenset({"osf_U_start", "osf_S_start", "osf_V_start", "osf_U_kept", "osf_V_kept"}),
    ),
    Method(
        name="FROD",
        type="frod",
        read=lambda config, path: {
            "ridge": number_in(config, "regularization_alpha", 1e-3),
            "seed": whole_in(config, "projection_prng_key", 0),
        },
        write=frod_options,
        left_out=frozenset({"frod_U", "frod_start"}),
        groups=frod.groups,
    ),
    Method(
        name="ADAMSS",
        type="adamss",
        read=lambda config, path: {"seed": whole_in(config, "random_seed", 0)},
        write=adamss_options,
        names={
            f"adamss_{side}_{number}": f"adamss_{side}.{number}" for side in "AB" for number in range(MOST_CLUSTERS)
        },
        left_out=frozenset({"adamss_places", "adamss_column"}),
        reshape=lambda layer, name, tensor: with_column(layer, tensor) if name == "adamss_newB" else tensor,
    ),
    Method(
        name="UNILORA",
        type="unilora",
        read=lambda config, path: {
            "rank": whole_in(config, "r", 4),
            "seed": whole_in(config, "proj_seed", 42),
            "split": 0.0,
        },
        write=lambda layers: {
            "r": common_size(layers, "unilora_indices_A", 0),
            "theta_d_length": common_size(layers, "unilora_theta_d", 0),
            "proj_seed": int(common_setting(layers, "seed")),
            "save_indices": True,
        },
    ),
)

BY_NAME: Mapping[str, Method] = {name: method for method in _METHODS for name in (method.name, *method.older)}
BY_TYPE: Mapping[str, Method] = {method.type: method for method in _METHODS}

_OF_LANGUAGE_MODELS = "it changes the input or the attention cache of a language model, not a layer"
REFUSED: Mapping[str, str] = {
    "LILY": "its router averages over all tokens of a batch, so that pictures would change each other",
    "XLORA": "its router reads the hidden states of a language model; load its adapters and activate them together",
    "POLY": "its router reads the number of a task that a pipeline does not pass on",
    "SHADOW": "it runs a second, smaller language model beside the base model",
    "ADAPTION_PROMPT": _OF_LANGUAGE_MODELS,
    "CARTRIDGE": _OF_LANGUAGE_MODELS,
    "CPT": _OF_LANGUAGE_MODELS,
    "MULTITASK_PROMPT_TUNING": _OF_LANGUAGE_MODELS,
    "P_TUNING": _OF_LANGUAGE_MODELS,
    "PREFIX_TUNING": _OF_LANGUAGE_MODELS,
    "PROMPT_TUNING": _OF_LANGUAGE_MODELS,
}
"""Why a method of PEFT is no adapter type, by `peft_type`."""
