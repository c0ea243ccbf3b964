"""The options of PEFT's config that a file carries: in `adapter_config.json`, or in diffusers' safetensors metadata.

PEFT rebuilds an adapter from its config, so an option can change what the tensors mean. Options are of three kinds:
those that are read here or elsewhere, those that concern training or bookkeeping alone, and those that change the
result in a way that is not supported, which are refused. All others, such as those of future versions, are reported.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from diffadapt.errors import AdapterError, Fault
from diffadapt.formats.document import Document
from diffadapt.formats.format import Header
from diffadapt.formats.metadata import flag, parse_json

METADATA = "lora_adapter_metadata"
"""The entry of the safetensors metadata for which diffusers writes the options of PEFT's config, as JSON."""

TIES = "ensure_weight_tying"
"""The option, and the entry of the metadata of other files, by which tied layers share the tensors of a file."""

_MOST_IDS = 2**16
_LARGEST_ID = 2**31
_CHECKED = ("LORA", "LOHA", "LOKR", "OFT", "BOFT", "IA3", "TRAINABLE_TOKENS")
"""Types of PEFT whose options are all known here."""

_READ = frozenset(
    "r lora_alpha alpha rank_pattern alpha_pattern use_rslora use_dora lora_bias bias modules_to_save "
    "init_lora_weights init_weights trainable_token_indices token_indices ensure_weight_tying target_parameters "
    "feedforward_modules "
    "use_effective_conv2d decompose_both decompose_factor oft_block_size block_share coft eps use_cayley_neumann "
    "num_cayley_neumann_terms boft_block_size boft_block_num boft_n_butterfly_factor init_ia3_weights".split()
)
_WITHOUT_EFFECT = frozenset(
    "peft_type task_type auto_mapping peft_version base_model_name_or_path revision inference_mode target_modules "
    "exclude_modules layers_to_transform layers_pattern fan_in_fan_out lora_dropout rank_dropout module_dropout "
    "boft_dropout rank_dropout_scale megatron_config megatron_core loftq_config eva_config corda_config lora_ga_config "
    "velora_config qalora_group_size runtime_config lora_magnitude_vector".split()
)
_REFUSED = {
    "alora_invocation_tokens": "the adapter acts on the tokens after these only (aLoRA)",
    "layer_replication": "layers of the model are repeated, which makes it another model; repeat them before loading",
    "use_qalora": "the factors work on groups of inputs (QA-LoRA)",
    "use_bdlora": "its factors are block-diagonal (BD-LoRA)",
    "arrow_config": "a router chooses between adapters (Arrow)",
    "kasa_config": "the singular values of the weight are part of the formula (KaSA)",
    "monteclora_config": "its factors are samples of a distribution (MonteCLoRA)",
}
_STARTS = {
    "corda": "the start came from data that the file does not have",
    "loftq": "the base was replaced by a quantised one",
    "lora_ga": "the start came from gradients that the file does not have",
    "pissa_niter": "the start was computed with random numbers",
}
_CONVERT = (
    "so the tensors alone are not the change; save it with PEFT's path_initial_model_for_weight_conversion, which "
    "writes a plain LoRA, or load it with PEFT and merge it"
)


def options_by_component(header: Header) -> dict[str, dict[str, Any]]:
    """Return component -> the options for it; "" stands for files that name no component.

    Raises:
        AdapterError: the metadata is not a JSON object.
    """
    config: Any = header.config
    if config is None and METADATA in header.metadata:
        config = parse_json(header.metadata[METADATA], f"the header's {METADATA}")
        if not isinstance(config, dict):
            raise AdapterError(f"the header's {METADATA} is a {type(config).__name__}, expected an object")
    found: dict[str, dict[str, Any]] = {}
    for key, value in (config or {}).items():
        # The keys of a PEFT config have no component, and options have no dots.
        component, _, option = key.rpartition(".")
        found.setdefault(component, {})[option] = value
    return found


def options_for(options: Mapping[str, Mapping[str, Any]], component: str) -> Mapping[str, Any]:
    """Return the options for a component: its own, or those of a file that names none."""
    return options.get(component) or options.get("") or {}


def token_ids(options: Mapping[str, Any], path: str) -> tuple[int, ...]:
    """Return the ids of the tokens whose rows a file has for the embedding at `path`; empty if it does not say.

    Raises:
        AdapterError: an option is not of the expected kind.
    """
    chosen = options.get("trainable_token_indices")
    name = "token_indices" if chosen is None else "trainable_token_indices"
    chosen = options.get("token_indices") if chosen is None else chosen
    if isinstance(chosen, Mapping):
        names = [key for key in chosen if isinstance(key, str) and f".{path}".endswith(f".{key}")]  # type: ignore[misc]
        chosen = chosen[max(names, key=len)] if names else None
    if chosen is None:
        return ()
    is_list = isinstance(chosen, list) and len(chosen) <= _MOST_IDS  # type: ignore[arg-type]
    if not is_list or not all(type(index) is int and 0 <= index < _LARGEST_ID for index in chosen):  # type: ignore[misc]
        raise AdapterError(f"{name} in the file's metadata is no list of at most {_MOST_IDS} token ids")
    return tuple(chosen)  # type: ignore[arg-type]


def is_tied(header: Header) -> bool:
    """Return whether layers that share a weight share the tensors of this file."""
    if header.metadata.get(TIES) == "true":
        return True
    return any(flag(options.get(TIES), TIES) for options in options_by_component(header).values())


def dropouts(options: Mapping[str, Any]) -> tuple[float, float, float]:
    """Return the probabilities with which training dropped elements of the input, components of the rank and layers."""
    found: list[Any] = [options.get(name) for name in ("lora_dropout", "rank_dropout", "module_dropout")]
    return tuple(  # type: ignore[return-value]
        float(value) if type(value) in (int, float) and 0 < value < 1 else 0.0 for value in found
    )


def marked(documents: Mapping[str, Document], is_tied: bool) -> dict[str, Document]:
    """Return the files that a format writes, with the mark that `is_tied` reads."""
    if not is_tied:
        return dict(documents)
    return {
        folder: replace(
            document,
            metadata={**document.metadata, TIES: "true"},
            config=document.config and {**document.config, TIES: True},
        )
        for folder, document in documents.items()
    }


def start_of(options: Mapping[str, Any]) -> str | None:
    """Return the start that was taken out of the base weights when training began: "pissa" or "olora"; or `None`.

    Raises:
        AdapterError: the start cannot be computed again.
    """
    start = options.get("init_lora_weights")
    if not isinstance(start, str):
        return None
    start = start.lower()
    for name, reason in _STARTS.items():
        if start.startswith(name):
            raise AdapterError(f"init_lora_weights={start!r}: {reason}, {_CONVERT}")
    return start if start in ("pissa", "olora") else None


def refuse_options(options: Mapping[str, Any]) -> None:
    """Raise `AdapterError` if an option changes the result in a way that is not supported."""
    for name, effect in _REFUSED.items():
        if _is_set(options.get(name)):
            raise AdapterError(
                f"{name} in the file's metadata is {_short(options[name])}: {effect}, which is not supported; load it "
                "with PEFT"
            )


def unknown_options(header: Header) -> Iterable[Fault]:
    """Yield a note for each option that is not known here and is set to something."""
    where = "adapter_config.json" if header.config is not None else METADATA
    for component, options in options_by_component(header).items():
        if options.get("peft_type", "LORA") not in _CHECKED:
            continue
        for name, value in options.items():
            if name not in _READ | _WITHOUT_EFFECT | _REFUSED.keys() and _is_set(value):
                full = f"{component}.{name}" if component else name
                yield Fault(
                    where, f"its option {full}={_short(value)} is not known and was not used; it may change the result"
                )


def _is_set(value: Any) -> bool:
    return value is not None and value is not False and value not in ("", [], {}, "none")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
