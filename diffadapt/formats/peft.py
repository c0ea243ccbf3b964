"""PEFT folders: `adapter_model.safetensors` with `base_model.model.` names, next to `adapter_config.json`.

Files without the config also occur; they have a scale of 1 unless they contain alpha tensors.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from diffadapt.errors import AdapterError
from diffadapt.formats import embeddings, peft_config, peft_dump, prefixes, suffixes
from diffadapt.formats.document import AdapterState, Document
from diffadapt.formats.format import Format, Header, Settings
from diffadapt.formats.names import Names
from diffadapt.formats.second_denoiser import as_first, entry
from diffadapt.formats.verdicts import OwnWeight, Place, Unused, Verdict
from diffadapt.types.ia3 import FEEDFORWARD
from diffadapt.types.layer_spec import LayerSpec

_WHOLE = {"weight": "set_weight", "bias": "set_bias"}
_COPY = re.compile(r"\.(?:modules_to_save|base_layer)$")
_ORIGINAL = ".original_module"
_OWN_WEIGHT = ".base_layer.weight"
_TYPES = ("LORA", "LOHA", "LOKR", "OFT", "BOFT", "IA3")


def _matches(header: Header) -> bool:
    return any(key.startswith(prefixes.PEFT) for key in header.keys)


def _locate(header: Header, names: Names) -> dict[str, Verdict]:
    config = header.config or {}
    peft_type = config.get("peft_type", "LORA")
    if peft_type not in _TYPES:
        raise AdapterError(f"adapter_config.json says peft_type={peft_type!r}, expected one of {', '.join(_TYPES)}")

    verdicts = suffixes.locate_keys(header.keys, lambda path, name: prefixes.place(path, name, names))
    for key, verdict in verdicts.items():
        path, _, last = key.rpartition(".")
        if isinstance(verdict, Unused) and last in _WHOLE and _is_stored_whole(config, path, last):
            layer = _COPY.sub("", path)
            if path.endswith(_ORIGINAL) or (layer != path and f"{layer}.{last}" in verdicts):
                verdicts[key] = Unused("a second copy of this layer; the trained one is used", harmless=True)
            else:
                verdicts[key] = prefixes.place(layer, _WHOLE[last], names)
        elif isinstance(verdict, Unused) and key.endswith(_OWN_WEIGHT):
            layer = prefixes.place(key.removesuffix(_OWN_WEIGHT), "alpha", names)
            if isinstance(layer, Place) and not layer.parts:
                verdicts[key] = OwnWeight(layer.component, layer.path)
        elif isinstance(verdict, Place):
            if verdict.name == "ia3_l" and peft_config.is_feedforward(config, verdict.written):
                verdict = verdict._replace(name=FEEDFORWARD)
            verdicts[key] = _unless_ambiguous(names, verdict)
    return verdicts


def _is_stored_whole(config: Mapping[str, Any], path: str, last: str) -> bool:
    """Return whether, by the config, the file holds trained parameters of this layer rather than changes of them.

    Args:
        config: the content of `adapter_config.json`.
        path: the path of the layer in the file.
        last: "weight" or "bias".
    """
    saved = config.get("modules_to_save") or []
    if isinstance(saved, list) and any(isinstance(name, str) and f".{path}".endswith(f".{name}") for name in saved):
        return True
    return last == "bias" and config.get("bias", "none") in ("all", "lora_only")


def _unless_ambiguous(names: Names, verdict: Verdict) -> Verdict:
    """Return the verdict, or `Unused` for a whole `lokr_w2` on a `Conv1d`.

    That is the one tensor that PEFT 0.21 does not multiply as a Kronecker product for every tap.
    """
    if not isinstance(verdict, Place) or verdict.name != "lokr_w2" or names.models is None:
        return verdict
    module = names.models[verdict.component].modules.get(verdict.path)
    spec = None if module is None else LayerSpec.of(module)
    if spec is None or len(spec.kernel) != 1:
        return verdict
    return Unused("PEFT has another, unintended formula for a LoKr with whole factors on a Conv1d; merge it with PEFT")


def _settings(header: Header) -> Settings:
    config = header.config
    return lambda component, path, type: {} if config is None else peft_config.settings(config, path, type)


def _dump(state: AdapterState) -> dict[str, Document]:
    embeddings.refuse_embeddings(state, "peft")
    state = as_first(state)
    documents = {component: peft_dump.document(layers) for component, layers in state.layers.items()}
    for component, document in documents.items():
        documents[component] = replace(document, metadata={**document.metadata, **entry(state.metadata)})
    # PEFT knows models, not pipelines, so every component gets a folder.
    return documents if len(documents) > 1 else {"": next(iter(documents.values()))}


PEFT = Format("peft", _matches, _locate, _dump, _settings)
