"""Content of a PEFT folder: a config with which PEFT builds exactly these layers, and PEFT's names of their tensors.

PEFT creates its layers from the config alone and then fills in the tensors, so the config has to reproduce every shape.
Adapters that no config reproduces are refused. Source: PEFT 0.21.2 `tuners/*/config.py` and `layer.py`.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeAlias

from torch import Tensor

from diffadapt.errors import AdapterError
from diffadapt.formats import peft_config, peft_methods
from diffadapt.formats.document import Document
from diffadapt.types.layer_state import LayerState
from diffadapt.types.oft import block_size, scaled_oft_divisor
from diffadapt.types.parameter import to_peft

Layers: TypeAlias = Mapping[str, LayerState]
"""Adapter layers by path of the model's layer."""

_VERSION = "0.21.2"
"""The version whose rules the config follows. PEFT assumes another formula of OFT for older versions."""

_PREFIX = "base_model.model."
_LORA = {"lora_down": "lora_A.weight", "lora_up": "lora_B.weight", "lora_bias": "lora_B.bias"}
_EMBEDDING = {"lora_down": "lora_embedding_A", "lora_up": "lora_embedding_B"}
_MAGNITUDE = {"dora_scale": "lora_magnitude_vector"}

PARAMETER = "lora-parameter"
"""The name of the type that changes bare parameters."""

TOKENS = "tokens"
"""The name of the type that retrains rows of an embedding."""

TOKEN_ROWS_IN_LORA = "token_adapter.trainable_tokens_delta"
"""The name of its rows next to a LoRA."""


def document(layers: Layers, owners: Mapping[str, tuple[int, bool]] | None = None) -> Document:
    """Return the layers of one model as a PEFT folder.

    Args:
        layers: the layers.
        owners: see `AdapterState.owners`.

    Raises:
        AdapterError: PEFT has no such adapter, because the types are mixed or unknown to it, or because no config
            reproduces the shapes.
    """
    tokens = {path: layer for path, layer in layers.items() if layer.type == TOKENS}
    rest = {path: layer for path, layer in layers.items() if path not in tokens}
    if tokens and rest:
        return _with_tokens(document(rest, owners), tokens)
    parameters = {path: layer for path, layer in layers.items() if layer.type == PARAMETER}
    if parameters:
        return _with_parameters(layers, parameters, owners or {})
    types = sorted({layer.type for layer in layers.values()})
    if len(types) > 1:
        raise AdapterError(f"a PEFT folder holds one type, and this adapter has {', '.join(types)}")
    if types[0] not in _TYPES:
        raise AdapterError(f"PEFT has no type like {types[0]}")
    peft_type, settings = _TYPES[types[0]]
    layers = with_equal_biases(layers)
    config = {**_config(peft_type), "target_modules": list(layers), **settings(layers)}
    tensors = {
        f"{_PREFIX}{path}.{spelling}": tensor
        for path, layer in layers.items()
        for spelling, tensor in spelled(path, layer).items()
    }
    tensors |= peft_methods.shared(layers)
    return Document(tensors, {"format": "pt"}, config)


def _with_parameters(layers: Layers, parameters: Layers, owners: Mapping[str, tuple[int, bool]]) -> Document:
    """Return the folder of a LoRA that changes bare parameters, too (`target_parameters`).

    PEFT wraps the module that owns the parameters once for each of them, the last one outermost.
    """
    rest = {path: layer for path, layer in layers.items() if path not in parameters}
    if any(layer.type != "lora" for layer in rest.values()) or any(path not in owners for path in parameters):
        raise AdapterError("PEFT has bare parameters next to a LoRA only, and their modules have to be known")
    document_of_rest = document(rest) if rest else None
    tensors = {} if document_of_rest is None else dict(document_of_rest.tensors)
    for path, layer in parameters.items():
        owner = path.rpartition(".")[0]
        later = [other for other in parameters if other.rpartition(".")[0] == owner and owners[other] > owners[path]]
        at = f"{_PREFIX}{owner}{'.base_layer' * len(later)}"
        factors = to_peft(layer.tensors, inputs_first=owners[path][1])
        tensors |= dict(zip((f"{at}.lora_A.weight", f"{at}.lora_B.weight"), factors, strict=True))
    config = {
        **_config("LORA"),
        **peft_config.dump({**with_equal_biases(rest), **parameters}),
        "target_modules": list(rest),
        "target_parameters": list(parameters),
    }
    return Document(tensors, {"format": "pt"}, config)


def _config(peft_type: str) -> dict[str, Any]:
    """Return the options that every config has."""
    return {
        "peft_type": peft_type,
        "peft_version": _VERSION,
        "base_model_name_or_path": None,
        "task_type": None,
        "inference_mode": True,
    }


def _with_tokens(rest: Document, tokens: Layers) -> Document:
    """Return the folder of a LoRA with retrained tokens (`trainable_token_indices`)."""
    assert rest.config is not None
    if rest.config["peft_type"] != "LORA":
        raise AdapterError(f"PEFT has retrained tokens next to a LoRA, not next to a {rest.config['peft_type']}")
    tensors = {f"{_PREFIX}{path}.{TOKEN_ROWS_IN_LORA}": layer.tensors["token_rows"] for path, layer in tokens.items()}
    ids = {path: layer.tensors["token_ids"].tolist() for path, layer in tokens.items()}
    return replace(rest, tensors={**rest.tensors, **tensors}, config={**rest.config, "trainable_token_indices": ids})


def spelled(path: str, layer: LayerState) -> dict[str, Tensor]:
    """Return a layer's tensors with the names and shapes of PEFT.

    Args:
        path: the layer's path, for messages.
        layer: the layer.

    Raises:
        AdapterError: PEFT has no such tensor.
    """
    if layer.type in peft_methods.BY_TYPE:
        return peft_methods.BY_TYPE[layer.type].spelled(layer)
    if layer.type == TOKENS:
        return {"trainable_tokens_delta": layer.tensors["token_rows"]}
    found: dict[str, Tensor] = {}
    for name, tensor in layer.tensors.items():
        if name in ("lora_mid", "oft_blocks", "oft_diag", "initial_norm") or (
            name == "dora_scale" and layer.type == "oft"
        ):
            raise AdapterError(f"{path}: PEFT has nothing like {name}")
        if name == "dora_scale":
            if tensor.shape[0] == 1 and tensor.shape[1] > 1:
                raise AdapterError(f"{path}: PEFT does not know DoRA with one length per input")
            tensor = tensor.reshape(1, -1, *(1,) * layer.kernel_dims) if layer.kernel_dims else tensor.reshape(-1)
        elif name == "lora_up":
            tensor = tensor.view(*tensor.shape, *(1,) * layer.kernel_dims)
        elif name in ("hada_t1", "hada_t2", "lokr_t2") and layer.kernel_dims == 1:
            tensor = tensor.unsqueeze(-1)
        elif name == "boft_s" and layer.kernel_dims:
            tensor = tensor.view(1, -1)
        elif name == "ia3_l" and layer.kernel_dims:
            tensor = tensor.view(1, -1, *(1,) * layer.kernel_dims)
        elif name == "oft_R":
            if layer.settings["scaled_oft"]:
                tensor = tensor / scaled_oft_divisor(block_size(tensor))
            found["oft_embedding_R.weight" if layer.is_embedding else "oft_R.weight"] = tensor
            continue
        spellings = {**(_EMBEDDING if layer.is_embedding else _LORA), **_MAGNITUDE}
        found[spellings.get(name, name)] = tensor
    return found


def with_equal_biases(layers: Layers) -> Layers:
    """Return the same LoRAs, with a bias of zeros on the others if any has a bias.

    PEFT has one setting for all layers.

    Raises:
        AdapterError: one of the others is an embedding, which cannot have a bias.
    """
    if not any("lora_bias" in layer.tensors for layer in layers.values()):
        return layers
    found: dict[str, LayerState] = {}
    for path, layer in layers.items():
        up = layer.tensors.get("lora_up")
        if "lora_bias" in layer.tensors or up is None:
            found[path] = layer
        elif layer.is_embedding:
            raise AdapterError(f"{path} is an embedding, which cannot have a LoRA bias, but other layers have one")
        else:
            found[path] = replace(layer, tensors={**layer.tensors, "lora_bias": up.new_zeros(up.shape[0])})
    return found


def _tokens(layers: Layers) -> dict[str, Any]:
    ids = {tuple(layer.tensors["token_ids"].tolist()) for layer in layers.values()}
    if len(ids) > 1:
        raise AdapterError("a PEFT folder of retrained tokens has the same ids for all embeddings; these differ")
    return {"token_indices": list(ids.pop()), "init_weights": True}


def _lora(layers: Layers) -> dict[str, Any]:
    return peft_config.dump(layers)


def _loha(layers: Layers) -> dict[str, Any]:
    for path, layer in layers.items():
        if layer.outputs and "hada_t1" not in layer.tensors and len(layer.tensors["hada_w1_a"]) != layer.outputs:
            raise AdapterError(f"{path}: PEFT has other shapes of a LoHa in a convolution with groups")
    return {**_ranks(layers), "use_effective_conv2d": _tucker(layers, "hada_t1")}


def _lokr(layers: Layers) -> dict[str, Any]:
    """Return the factor and the switches with which PEFT splits every layer as it is split here."""
    if any(len(layer.kernel) == 1 and "lokr_w2" in layer.tensors for layer in layers.values()):
        raise AdapterError("PEFT multiplies a whole lokr_w2 of a 1-d convolution along other axes")
    options = {"use_effective_conv2d": _tucker(layers, "lokr_t2")}
    shapes = {path: _lokr_shapes(layer) for path, layer in layers.items()}
    ranks = {path: layer.rank or _rank_of_whole(layer) for path, layer in layers.items()}
    for factor in dict.fromkeys((-1, *(size for shape in shapes.values() for size in shape[0]))):
        for both in (False, True):
            if all(_splits_alike(shapes[path], ranks[path], factor, both) for path in layers):
                return {**_ranks(layers, ranks), **options, "decompose_factor": factor, "decompose_both": both}
    raise AdapterError("no decompose_factor of PEFT results in the factors of this LoKr")


def _oft(layers: Layers) -> dict[str, Any]:
    _refuse_unknown_tensors(layers)
    sizes = {block_size(layer.tensors["oft_R"]) for layer in layers.values()}
    # `spelled` multiplies the scale of a scaled OFT into its tensors.
    settings = {tuple(sorted({**layer.settings, "scaled_oft": 0.0}.items())) for layer in layers.values()}
    single = [layer for layer in layers.values() if layer.tensors["oft_R"].shape[0] == 1]
    is_shared = len(single) == len(layers)
    # Among layers with several blocks, a layer with a single block must be as small as a block; else its blocks are
    # shared, which PEFT has one setting for.
    if len(sizes) > 1 or len(settings) > 1 or (not is_shared and any(layer.inputs not in sizes for layer in single)):
        raise AdapterError("PEFT has one block size and one set of options for all layers of an OFT; these differ")
    chosen = dict(settings.pop())
    terms = int(chosen["neumann_terms"])
    return {
        "r": 0,
        "oft_block_size": sizes.pop(),
        "block_share": is_shared,
        "coft": bool(chosen["coft_eps"]),
        "eps": chosen["coft_eps"] or 6e-5,
        "use_cayley_neumann": bool(terms),
        "num_cayley_neumann_terms": terms or 5,
    }


def _boft(layers: Layers) -> dict[str, Any]:
    _refuse_unknown_tensors(layers)
    shapes = {tuple(layer.tensors["boft_R"].shape[:3]) for layer in layers.values()}
    factors, numbers, sizes = ({shape[axis] for shape in shapes} for axis in range(3))
    if len(factors) > 1 or (len(sizes) > 1 and len(numbers) > 1):
        raise AdapterError("PEFT has one block size or number, and one number of factors, for all layers of a BOFT")
    size = sizes.pop() if len(sizes) == 1 else 0
    return {
        "boft_block_size": size,
        "boft_block_num": 0 if size else numbers.pop(),
        "boft_n_butterfly_factor": factors.pop(),
    }


def _ia3(layers: Layers) -> dict[str, Any]:
    """Return a regular expression for whole paths; PEFT would match the names in a list against the ends of paths."""
    scales_inputs = [path for path, layer in layers.items() if layer.tensors["ia3_l"].shape[1] > 1]
    return {"feedforward_modules": "|".join(map(re.escape, scales_inputs)) or []}


def _refuse_unknown_tensors(layers: Layers) -> None:
    for path, layer in layers.items():
        spelled(path, layer)


def _ranks(layers: Layers, ranks: Mapping[str, int] | None = None) -> dict[str, Any]:
    ranks = ranks or {path: layer.rank or 0 for path, layer in layers.items()}
    options = peft_config.ranks_and_alphas(ranks, {path: layer.scale * ranks[path] for path, layer in layers.items()})
    return {"alpha": options.pop("lora_alpha"), **options}


def _tucker(layers: Layers, core: str) -> bool:
    """Return whether convolutions have Tucker cores; PEFT has one setting for all kernels larger than 1 x 1."""
    found = {core in layer.tensors for layer in layers.values() if layer.taps > 1 and "lokr_w2" not in layer.tensors}
    if len(found) > 1:
        raise AdapterError("some convolutions have a Tucker core and others have none, which PEFT cannot express")
    return found == {True}


_LoKrShapes: TypeAlias = tuple[tuple[int, int], tuple[int, int], bool, bool]
"""(rows, columns) of w1, (rows, columns) of w2, whether w1 is whole, whether w2 is whole."""


def _lokr_shapes(layer: LayerState) -> _LoKrShapes:
    t = layer.tensors
    w1 = t["lokr_w1"].shape if "lokr_w1" in t else (t["lokr_w1_a"].shape[0], t["lokr_w1_b"].shape[1])
    if "lokr_w2" in t:
        w2 = t["lokr_w2"].shape[:2]
    elif "lokr_t2" in t:
        w2 = (t["lokr_w2_a"].shape[1], t["lokr_w2_b"].shape[1])
    else:
        w2 = (t["lokr_w2_a"].shape[0], t["lokr_w2_b"].shape[1] // layer.taps)
    return (int(w1[0]), int(w1[1])), (int(w2[0]), int(w2[1])), "lokr_w1" in t, "lokr_w2" in t


def _rank_of_whole(layer: LayerState) -> int:
    """Return a rank with which PEFT keeps both factors whole: at least half of every side."""
    w1, w2, *_ = _lokr_shapes(layer)
    return int(layer.settings.get("rank") or max(*w1, *w2))


def _splits_alike(shapes: _LoKrShapes, rank: int, factor: int, both: bool) -> bool:
    """Return whether PEFT splits a layer into these shapes with this `decompose_factor` and `decompose_both`."""
    (o1, i1), (o2, i2), whole_1, whole_2 = shapes
    if _factorization(o1 * o2, factor) != (o1, o2) or _factorization(i1 * i2, factor) != (i1, i2):
        return False
    return whole_1 == (not (both and rank < max(o1, i1) / 2)) and whole_2 == (rank >= max(o2, i2) / 2)


def _factorization(size: int, factor: int) -> tuple[int, int]:
    """Return the two factors that PEFT splits a size into; a factor that divides it comes first, even if larger."""
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    most = size if factor == -1 else factor
    small = max(d for d in range(1, int(size**0.5) + 1) if size % d == 0 and d <= most)
    return small, size // small


_TYPES: dict[str, tuple[str, Callable[[Layers], dict[str, Any]]]] = {
    "lora": ("LORA", _lora),
    "dora": ("LORA", _lora),
    TOKENS: ("TRAINABLE_TOKENS", _tokens),
    "loha": ("LOHA", _loha),
    "lokr": ("LOKR", _lokr),
    "oft": ("OFT", _oft),
    "boft": ("BOFT", _boft),
    "ia3": ("IA3", _ia3),
    **{method.type: (method.name, method.options) for method in peft_methods.BY_TYPE.values()},
}
