"""PEFT folders: `adapter_model.safetensors` with `base_model.model.` names beside `adapter_config.json`.

Files without the config occur too; they have a scale of 1 unless there are alpha tensors.
"""

from diffadapt.errors import AdapterError
from diffadapt.formats import embeddings, peft_config, peft_dump, suffixes
from diffadapt.formats.format import Alphas, Format, Header, Names, Place, Settings, Unused, Verdict
from diffadapt.layer import LayerSpec
from diffadapt.state import AdapterState, Document
from diffadapt.types.ia3 import FEEDFORWARD

_PREFIX = "base_model.model."
_TYPES = ("LORA", "LOHA", "LOKR", "OFT", "BOFT", "IA3")


def _matches(header: Header) -> bool:
    return any(key.startswith(_PREFIX) for key in header.keys)


def _locate(header: Header, names: Names) -> dict[str, Verdict]:
    config = header.config or {}
    peft_type = config.get("peft_type", "LORA")
    if peft_type not in _TYPES:
        raise AdapterError(f"adapter_config.json says peft_type={peft_type!r}, expected one of {', '.join(_TYPES)}")

    def place(path: str, name: str) -> Verdict:
        if not path.startswith(_PREFIX):
            return Unused(f"a name without the {_PREFIX!r} that others in this file have")
        path = path.removeprefix(_PREFIX)
        return names.bare(path, name)

    verdicts = suffixes.located(header.keys, place)
    for key, verdict in verdicts.items():
        if isinstance(verdict, Place):
            if verdict.name == "ia3_l" and peft_config.is_feedforward(config, verdict.written):
                verdict = verdict._replace(name=FEEDFORWARD)
            verdicts[key] = _unless_misread(names, verdict)
    return verdicts


def _unless_misread(names: Names, verdict: Verdict) -> Verdict:
    """Not the one tensor that PEFT 0.21 multiplies otherwise than as a Kronecker product for every tap."""
    if not isinstance(verdict, Place) or verdict.name != "lokr_w2" or names.models is None:
        return verdict
    module = names.models[verdict.component].modules.get(verdict.path)
    spec = None if module is None else LayerSpec.of(module)
    if spec is None or len(spec.kernel) != 1:
        return verdict
    return Unused("PEFT has another, unintended formula for a LoKr with whole factors on a Conv1d; merge it with PEFT")


def _alphas(header: Header) -> Alphas:
    config = header.config or {}
    return lambda component, path, rank: peft_config.alpha(config, path, rank)


def _settings(header: Header) -> Settings:
    config = header.config
    return lambda component, path, type: {} if config is None else peft_config.settings(config, path, type)


def _dump(state: AdapterState) -> dict[str, Document]:
    embeddings.refuse(state, "peft")
    documents = {component: peft_dump.document(layers) for component, layers in state.layers.items()}
    # PEFT knows models and not pipelines: one folder for each.
    return documents if len(documents) > 1 else {"": next(iter(documents.values()))}


PEFT = Format("peft", _matches, _locate, _alphas, _dump, _settings)
