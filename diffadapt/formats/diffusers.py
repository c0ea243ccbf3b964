"""diffusers' own files, new and old, and all other files with dotted names that no other format claims.

`unet.<path>.lora_A.weight`, `unet.<path>.lora.down.weight`, `<path>.processor.to_q_lora.down.weight` and
`text_encoder.<path>.lora_linear_layer.up.weight` all occur, also mixed in one file. Since diffusers 0.34, alpha is in
the safetensors metadata (`lora_adapter_metadata`); older files have none, which means a scale of 1. Other programs omit
the component, use names of the model's original layout, or add alpha tensors (OneTrainer, DiffSynth, lightx2v).

Control LoRAs for Flux.1 contain new weights of norms, under the names of the parameters (diffusers 0.42.1
`loaders/lora_pipeline.py`; its trainer writes the component in front of them twice).
"""

import json
import re
from typing import Any

from torch import Tensor

from diffadapt.errors import AdapterError
from diffadapt.formats import embeddings, peft_config, peft_dump, prefixes, suffixes
from diffadapt.formats.document import AdapterState, Document
from diffadapt.formats.format import Alphas, Format, Header
from diffadapt.formats.metadata import parse_json
from diffadapt.formats.names import Names
from diffadapt.formats.verdicts import Verdict
from diffadapt.types.layer_state import LayerState

_METADATA = "lora_adapter_metadata"
_CLIP_LAYERS = "encoder.layers."
_NORM_PATH = r".+\.norm_(?:added_)?[qk]"
_NORM = re.compile(rf"transformer\.(?:transformer\.)?({_NORM_PATH})\.weight")


def _matches(header: Header) -> bool:
    return any(suffixes.split_key(key) is not None for key in header.keys)


def _locate(header: Header, names: Names) -> dict[str, Verdict]:
    verdicts = suffixes.locate_keys(header.keys, lambda path, name: prefixes.place(path, name, names))
    for key in header.keys:
        norm = _NORM.fullmatch(key) if ".norm_" in key else None
        if norm:
            verdicts[key] = names.dotted("transformer", norm[1], "set_weight")
    return verdicts


def _alphas(header: Header) -> Alphas:
    config = header.config or _config(header.metadata.get(_METADATA))
    by_component: dict[str, dict[str, Any]] = {}
    for key, value in config.items():
        component, _, option = key.rpartition(".")
        by_component.setdefault(component, {})[option] = value

    def alpha(component: str, path: str, rank: int) -> float | None:
        # A model saved on its own has no component in its keys, and none in its metadata.
        options = by_component.get(component) or by_component.get("") or {}
        return peft_config.alpha(options, path, rank)

    return alpha


def _config(text: str | None) -> dict[str, Any]:
    if text is None:
        return {}
    config = parse_json(text, f"the header's {_METADATA}")
    if not isinstance(config, dict):
        raise AdapterError(f"the header's {_METADATA} is a {type(config).__name__}, expected an object")
    return config  # type: ignore[return-value]


def _dump(state: AdapterState) -> dict[str, Document]:
    embeddings.refuse_embeddings(state, "diffusers")
    tensors: dict[str, Tensor] = {}
    config: dict[str, Any] = {}
    for component, found in state.layers.items():
        norms = {path: layer for path, layer in found.items() if _is_norm(state.family, component, path, layer)}
        for path, layer in norms.items():
            tensors[f"{component}.{path}.weight"] = layer.tensors["set_weight"]
        layers = peft_dump.with_equal_biases({path: layer for path, layer in found.items() if path not in norms})
        options = peft_config.dump(layers) if layers else {}
        config.update({f"{component}.{option}": value for option, value in options.items()})
        for path, layer in layers.items():
            # Old readers know CLIP only with the prefix that transformers 5 dropped; new ones strip it.
            prefix = "text_model." if path.startswith(_CLIP_LAYERS) else ""
            for name, tensor in _spelled(component, path, layer).items():
                tensors[f"{component}.{prefix}{path}.{name}"] = tensor
    metadata = {**state.metadata, "format": "pt", _METADATA: json.dumps(config, indent=2, sort_keys=True)}
    return {"": Document(tensors, metadata)}


def _is_norm(family: str | None, component: str, path: str, layer: LayerState) -> bool:
    """Return whether diffusers reads the new weight of this layer: one of certain norms, in control LoRAs."""
    known = family in ("flux", "chroma") and component == "transformer" and re.fullmatch(_NORM_PATH, path)
    return bool(known) and set(layer.tensors) == {"set_weight"}


def _spelled(component: str, path: str, layer: LayerState) -> dict[str, Tensor]:
    if layer.type not in ("lora", "dora"):
        raise AdapterError(
            f"{component}.{path} is of type {layer.type}, which diffusers cannot read; "
            "save with format='kohya' or 'peft', or make it a LoRA with to_lora()"
        )
    return peft_dump.spelled(f"{component}.{path}", layer)


DIFFUSERS = Format("diffusers", _matches, _locate, _dump, _alphas)
