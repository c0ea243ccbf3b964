"""diffusers' own files, new and old, and all other files with dotted names that no other format claims.

`unet.<path>.lora_A.weight`, `unet.<path>.lora.down.weight`, `<path>.processor.to_q_lora.down.weight` and
`text_encoder.<path>.lora_linear_layer.up.weight` all occur, also mixed in one file. Since diffusers 0.34, alpha is in
the safetensors metadata (`lora_adapter_metadata`); older files have none, which means a scale of 1. Other programs omit
the component, use names of the model's original layout, or add alpha tensors (OneTrainer, DiffSynth, lightx2v).

Files are saved at a scale of 1, with alpha multiplied into the factors, because ComfyUI, InvokeAI and OneTrainer read
this layout, too, but no metadata.

Control LoRAs for Flux.1 contain new weights of norms, under the names of the parameters (diffusers 0.42.1
`loaders/lora_pipeline.py`; its trainer writes the component in front of them twice). Some files have nothing else.
"""

import json
import math
import re
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from diffadapt.errors import AdapterError
from diffadapt.formats import embeddings, peft_config, peft_dump, prefixes, suffixes
from diffadapt.formats.document import AdapterState, Document
from diffadapt.formats.format import Format, Header
from diffadapt.formats.header_alpha import METADATA, kept
from diffadapt.formats.header_options import options_by_component, options_for, token_ids
from diffadapt.formats.names import Names
from diffadapt.formats.second_denoiser import FIRST, SECOND, as_first, is_for_second, warn_of_both
from diffadapt.formats.verdicts import Place, Verdict
from diffadapt.types.layer_state import LayerState
from diffadapt.types.tensor_ops import narrowed, promoted

_TYPES = ("lora", "dora")
_CLIP_LAYERS = "encoder.layers."
_NORM_PATH = r".+\.norm_(?:added_)?[qk]"
_NORM = re.compile(rf"transformer\.(?:transformer\.)?({_NORM_PATH})\.weight")


def _matches(header: Header) -> bool:
    return any(suffixes.split_key(key) is not None or (".norm_" in key and _NORM.fullmatch(key)) for key in header.keys)


def _locate(header: Header, names: Names) -> dict[str, Verdict]:
    is_second = is_for_second(header.metadata) and names.has(SECOND)

    def place(path: str, name: str) -> Verdict:
        if is_second and path.startswith(f"{FIRST}."):
            path = f"{SECOND}{path.removeprefix(FIRST)}"
        return prefixes.place(path, name, names)

    verdicts = suffixes.locate_keys(header.keys, place)
    for key in header.keys:
        norm = _NORM.fullmatch(key) if ".norm_" in key else None
        if norm:
            verdicts[key] = names.dotted("transformer", norm[1], "set_weight")
    options = options_by_component(header)
    for key, verdict in verdicts.items():
        if isinstance(verdict, Place) and verdict.name == "token_rows":
            verdicts[key] = verdict._replace(ids=token_ids(options_for(options, verdict.component), verdict.written))
    return verdicts


def _dump(state: AdapterState) -> dict[str, Document]:
    if state.embeddings and not state.layers:
        return {"": Document(embeddings.diffusers_file(state), {"format": "pt"})}
    embeddings.refuse_embeddings(state, "diffusers")
    tensors: dict[str, Tensor] = {}
    config: dict[str, Any] = {}
    state = as_first(state)
    warn_of_both(state)
    metadata = {**kept(state.metadata), "format": "pt"}
    for component, found in state.layers.items():
        norms = {path: layer for path, layer in found.items() if _is_norm(state.family, component, path, layer)}
        for path, layer in norms.items():
            tensors[f"{component}.{path}.weight"] = layer.tensors["set_weight"]
        others = {path: _at_scale_1(layer) for path, layer in found.items() if path not in norms}
        tokens = {path: layer for path, layer in others.items() if layer.type == peft_dump.TOKENS}
        layers = peft_dump.with_equal_biases({path: layer for path, layer in others.items() if path not in tokens})
        options = peft_config.dump(layers) if layers else {}
        for path, layer in tokens.items():
            tensors[f"{component}.{path}.{peft_dump.TOKEN_ROWS_IN_LORA}"] = layer.tensors["token_rows"]
            options.setdefault("trainable_token_indices", {})[path] = layer.tensors["token_ids"].tolist()
        config.update({f"{component}.{option}": value for option, value in options.items()})
        for path, layer in layers.items():
            # Old readers know CLIP only with the prefix that transformers 5 dropped; new ones strip it.
            prefix = "text_model." if path.startswith(_CLIP_LAYERS) else ""
            for name, tensor in _spelled(component, path, layer).items():
                tensors[f"{component}.{prefix}{path}.{name}"] = tensor
    metadata[METADATA] = json.dumps(config, indent=2, sort_keys=True)
    return {"": Document(tensors, metadata)}


def _at_scale_1(layer: LayerState) -> LayerState:
    """Return the same LoRA or DoRA with the scale multiplied into its factors.

    A power of two is split between the factors such that no bit is lost, if there is such a split. Any other number
    rounds `up` once. A factor that its dtype cannot hold becomes float32.
    """
    if layer.scale == 1 or layer.type not in _TYPES or layer.rank is None:
        return layer
    down, up = layer.tensors["lora_down"], layer.tensors["lora_up"]
    exponent = math.frexp(layer.scale)[1] - 1
    shares = (int(exponent / 2), exponent, 0)
    exact = (s for s in shares if _is_exact(down, 2.0**s) and _is_exact(up, 2.0 ** (exponent - s)))
    factor = 2.0 ** next(exact, shares[0])
    tensors = {**layer.tensors, "lora_down": _times(down, factor), "lora_up": _times(up, layer.scale / factor)}
    if "lora_bias" in tensors:
        tensors["lora_bias"] = _times(tensors["lora_bias"], layer.scale)
    return replace(layer, tensors=tensors, alpha=float(layer.rank))


def _is_exact(tensor: Tensor, factor: float) -> bool:
    """Return whether the dtype of a tensor can hold its product with `factor`."""
    product = tensor.double() * factor
    return torch.equal(product.to(tensor.dtype).double(), product)


def _times(tensor: Tensor, factor: float) -> Tensor:
    """Return the product, in the dtype of the tensor if that loses no more than rounding does, else in float32."""
    return narrowed((tensor.double() * factor).to(promoted(tensor).dtype), tensor.dtype)


def _is_norm(family: str | None, component: str, path: str, layer: LayerState) -> bool:
    """Return whether diffusers reads the new weight of this layer: one of certain norms, in control LoRAs."""
    known = family in ("flux", "chroma") and component == "transformer" and re.fullmatch(_NORM_PATH, path)
    return bool(known) and set(layer.tensors) == {"set_weight"}


def _spelled(component: str, path: str, layer: LayerState) -> dict[str, Tensor]:
    if layer.type not in _TYPES:
        raise AdapterError(f"{component}.{path} is of type {layer.type}, which diffusers cannot read")
    return peft_dump.spelled(f"{component}.{path}", layer)


DIFFUSERS = Format("diffusers", _matches, _locate, _dump)
