"""PEFT folders: `adapter_model.safetensors` with `base_model.model.` names, next to `adapter_config.json`.

Files without the config also occur; they have a scale of 1 unless they contain alpha tensors.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from diffadapt.errors import AdapterError
from diffadapt.formats import embeddings, peft_config, peft_dump, peft_methods, peft_shared, prefixes, suffixes
from diffadapt.formats.document import AdapterState, Document
from diffadapt.formats.format import Format, Header, Settings
from diffadapt.formats.header_options import token_ids
from diffadapt.formats.names import Names
from diffadapt.formats.second_denoiser import as_first, entry
from diffadapt.formats.verdicts import OwnWeight, Place, Unused, Verdict
from diffadapt.types.ia3 import FEEDFORWARD
from diffadapt.types.layer_spec import LayerSpec

_WHOLE = {"weight": "set_weight", "bias": "set_bias"}
_PARAMETER_FACTORS = {"lora_down": "param_A", "lora_up": "param_B"}
_STATISTICS = {"running_mean": "bn_mean", "running_var": "bn_var"}
_COPY = re.compile(r"\.(?:modules_to_save|base_layer)$")
_ORIGINAL = ".original_module"
_OWN_WEIGHT = ".base_layer.weight"
_TYPES = ("LORA", "TRAINABLE_TOKENS", "LOHA", "LOKR", "OFT", "BOFT", "IA3", *peft_methods.BY_NAME)


def _matches(header: Header) -> bool:
    return any(key.startswith(prefixes.PEFT) or peft_shared.is_shared(key) for key in header.keys)


def _locate(header: Header, names: Names) -> dict[str, Verdict]:
    config = header.config or {}
    peft_type = config.get("peft_type", "LORA")
    if not isinstance(peft_type, str):
        raise AdapterError(f"adapter_config.json says peft_type={peft_type!r}, expected one of {', '.join(_TYPES)}")
    if peft_type in peft_methods.REFUSED:
        reason = peft_methods.REFUSED[peft_type]
        raise AdapterError(f"adapter_config.json says peft_type={peft_type!r}, which cannot be loaded: {reason}")
    if peft_type not in _TYPES:
        raise AdapterError(f"adapter_config.json says peft_type={peft_type!r}, expected one of {', '.join(_TYPES)}")

    verdicts = suffixes.locate_keys(header.keys, lambda path, name: prefixes.place(path, name, names))
    verdicts |= _of_parameters(header.keys, config, names)
    for key, verdict in verdicts.items():
        path, _, last = key.rpartition(".")
        layer = _COPY.sub("", path)
        if isinstance(verdict, Unused) and last == "num_batches_tracked":
            verdicts[key] = Unused("a count of training steps, without effect", harmless=True)
        elif isinstance(verdict, Unused) and last in _STATISTICS:
            verdicts[key] = prefixes.place(layer, _STATISTICS[last], names)
        elif isinstance(verdict, Unused) and last in _WHOLE and _is_stored_whole(config, path, last):
            if path.endswith(_ORIGINAL) or (layer != path and f"{layer}.{last}" in verdicts):
                verdicts[key] = Unused("a second copy of this layer; the trained one is used", harmless=True)
            else:
                has_statistics = f"{path}.running_mean" in verdicts
                whole = "bn_weight" if has_statistics and last == "weight" else _WHOLE[last]
                verdicts[key] = prefixes.place(layer, whole, names)
        elif isinstance(verdict, Unused) and key.endswith(_OWN_WEIGHT):
            found = prefixes.place(key.removesuffix(_OWN_WEIGHT), "alpha", names)
            if isinstance(found, Place) and not found.parts:
                verdicts[key] = OwnWeight(found.component, found.path)
        elif isinstance(verdict, Place):
            if verdict.name == "ia3_l" and peft_config.is_feedforward(config, verdict.written):
                verdict = verdict._replace(name=FEEDFORWARD)
            elif verdict.name == "token_rows":
                verdict = verdict._replace(ids=token_ids(config, verdict.written))
            verdicts[key] = _unless_ambiguous(names, verdict)
    peft_shared.place_shared(verdicts, config, names)
    peft_methods.refuse_other_tensors(config, verdicts.values())
    return verdicts


def _of_parameters(keys: Iterable[str], config: Mapping[str, Any], names: Names) -> dict[str, Verdict]:
    """Return the verdicts on the tensors of bare parameters (`target_parameters`).

    PEFT wraps the module that owns the parameters once for each of them, in the order of the model, so the last one has
    the outermost factors.
    """
    wanted = config.get("target_parameters")
    if not isinstance(wanted, list) or not wanted:
        return {}
    found: dict[str, Verdict] = {}
    for key in keys:
        split = suffixes.split_key(key)
        if split is None or split[1] not in _PARAMETER_FACTORS:
            continue
        path = split[0].removesuffix(".base_layer")
        depth = 0 if path == split[0] else split[0].count(".base_layer")
        path = path.replace(".base_layer", "")
        owner = prefixes.place(path, split[1], names)
        if not isinstance(owner, Place) or names.models is None or owner.parts:
            continue
        module = names.models[owner.component].modules.get(owner.path)
        own = () if module is None else tuple(module._parameters)
        chosen = [name for name in own if any(f".{owner.path}.{name}".endswith(f".{end}") for end in wanted)]
        if depth < len(chosen):
            name = chosen[len(chosen) - 1 - depth]
            place = f"{owner.path}.{name}"
            found[key] = Place(owner.component, place, _PARAMETER_FACTORS[split[1]], place)
    return found


def _is_stored_whole(config: Mapping[str, Any], path: str, last: str) -> bool:
    """Return whether, by the config, the file holds trained parameters of this layer rather than changes of them.

    Args:
        config: the content of `adapter_config.json`.
        path: the path of the layer in the file.
        last: "weight" or "bias".
    """
    saved = config.get("modules_to_save") or []
    # A name may be that of a container, whose layers are all stored.
    if isinstance(saved, list) and any(isinstance(name, str) and f".{name}." in f".{path}." for name in saved):
        return True
    if saved and last == "weight" and config.get("ensure_weight_tying") is True:
        # The other layers that share a saved weight are stored without being named.
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
    return lambda component, path, type: {} if config is None else peft_methods.settings(config, path, type)


def _dump(state: AdapterState) -> dict[str, Document]:
    embeddings.refuse_embeddings(state, "peft")
    state = as_first(state)
    for component, layers in state.layers.items():
        untied = [at for at, layer in layers.items() if layer.type == "tokens" and f"{component}.{at}" in state.untied]
        if untied:
            raise AdapterError(
                f"{component}.{untied[0]}: PEFT gives retrained tokens to all layers that share the weight, and here "
                "they are in one of these alone (train them with ensure_weight_tying=True)"
            )
    documents = {
        component: peft_dump.document(layers, state.owners.get(component)) for component, layers in state.layers.items()
    }
    for component, document in documents.items():
        documents[component] = replace(document, metadata={**document.metadata, **entry(state.metadata)})
    # PEFT knows models, not pipelines, so every component gets a folder.
    return documents if len(documents) > 1 else {"": next(iter(documents.values()))}


PEFT = Format("peft", _matches, _locate, _dump, _settings)
