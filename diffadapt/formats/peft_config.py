"""Settings of adapters as PEFT spells them: in `adapter_config.json` and in diffusers' safetensors metadata."""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from diffadapt.errors import AdapterError
from diffadapt.formats.metadata import finite_number, flag, whole_number
from diffadapt.types import patterns
from diffadapt.types.layer_state import LayerState

# Larger values mean that a file is damaged or malicious. `lokr_full_rank` of ai-toolkit has a rank of 10^10.
_MOST_TERMS, _MOST_RANK, _MOST_PATTERNS = 100, 10**12, 4096
_REPEATED = re.compile(r"(?<![\\(])[*+?]|\{")
_GROUP_REPEATED = re.compile(r"(?<!\\)\)[*+{]")


def alpha(config: Mapping[str, Any], paths: Sequence[str], rank: int) -> float | None:
    """Return the alpha of a layer, such that `alpha / rank` is PEFT's scaling; `None` if the config has no alpha.

    Args:
        config: the options of PEFT's config.
        paths: the layer's paths that patterns in the config may refer to, the likeliest first.
        rank: the rank according to the layer's tensors.

    Raises:
        AdapterError: an option is not of the expected kind.
    """
    value = _value(config, "alpha_pattern", paths)
    if value is None:
        value = config.get("lora_alpha", config.get("alpha"))
    if value is None:
        return None
    value, divisor = finite_number(value, "alpha"), _divisor(config, paths, rank)
    if flag(config.get("use_rslora"), "use_rslora"):
        value *= math.sqrt(divisor)
    return value if divisor == rank else value * rank / divisor


def _divisor(config: Mapping[str, Any], paths: Sequence[str], rank: int) -> int:
    """Return the rank that PEFT divides the alpha of a layer by: that of the config.

    It differs from the rank of the tensors if the layer has fewer inputs or outputs and the factors were initialised
    from its weight, and in files that have several layers joined to one. If a pattern has the rank of the tensors, it
    is the one for this layer, though it may use other names.
    """
    found = _value(config, "rank_pattern", paths)
    if found is None:
        ranks = config.get("rank_pattern") or {}
        found = rank if rank in ranks.values() else config.get("r") or rank
    return whole_number(found, "r", _MOST_RANK)


def _value(config: Mapping[str, Any], option: str, paths: Sequence[str]) -> Any:
    """Return the value in `config[option]` for the first of a layer's paths that a pattern there matches, or `None`."""
    found = (_pattern_value(config, option, path) for path in paths)
    return next((value for value in found if value is not None), None)


def dump(layers: Mapping[str, LayerState]) -> dict[str, Any]:
    """Return a config of LoRA or DoRA with which PEFT scales every layer as the adapter does.

    Raises:
        AdapterError: only some layers are DoRA.
    """
    ranks = {path: layer.rank or 0 for path, layer in layers.items()}
    alphas = {path: layer.scale * ranks[path] for path, layer in layers.items()}
    magnitudes = {"dora_scale" in layer.tensors for layer in layers.values()}
    if len(magnitudes) > 1:
        raise AdapterError("some layers are DoRA and others plain LoRA, which PEFT cannot express")
    return {
        **ranks_and_alphas(ranks, alphas),
        "lora_bias": any("lora_bias" in layer.tensors for layer in layers.values()),
        "target_modules": list(layers),
        "use_dora": magnitudes == {True},
        "use_rslora": False,
    }


def ranks_and_alphas(ranks: Mapping[str, int], alphas: Mapping[str, float]) -> dict[str, Any]:
    """Return the options for ranks and alphas by path: the most common ones, and patterns for all others."""
    usual_rank, usual_alpha = _most_common(ranks), _most_common(alphas)
    return {
        "alpha_pattern": {_pattern(path): value for path, value in alphas.items() if value != usual_alpha},
        "lora_alpha": int(usual_alpha) if usual_alpha == int(usual_alpha) else usual_alpha,
        "r": usual_rank,
        "rank_pattern": {_pattern(path): value for path, value in ranks.items() if value != usual_rank},
    }


def _pattern(path: str) -> str:
    """Return a pattern for one layer."""
    # In transformers 4, and in files for it, CLIP's paths have a prefix that transformers 5 dropped.
    return path if path.startswith("encoder.layers.") else f"^{path}"


def settings(config: Mapping[str, Any], path: str, type: str) -> dict[str, float]:
    """Return the settings of an adapter type for the layer at `path`, see `AdapterType.settings`.

    Raises:
        AdapterError: an option is not of the expected kind, or the formula of the PEFT version is not supported.
    """
    if type == "oft":
        # PEFT versions without this option used the exact inverse.
        uses_series = flag(config.get("use_cayley_neumann"), "use_cayley_neumann")
        name = "num_cayley_neumann_terms"
        terms = whole_number(config.get(name, 5), name, _MOST_TERMS) if uses_series else 0
        if terms == 1:
            raise AdapterError(f"{name} in the file's metadata is 1, which is not a rotation; expected at least 2")
        if terms and _version(config) < (0, 18):
            raise AdapterError(
                "an OFT of PEFT before 0.18 with use_cayley_neumann, which used another series; train it again, or "
                "load it with that version of PEFT"
            )
        radius = finite_number(config.get("eps", 6e-5), "eps") if flag(config.get("coft"), "coft") else 0.0
        return {"neumann_terms": terms, "coft_eps": radius}
    if type in ("lokr", "dora-lokr"):
        # PEFT divides alpha by the rank even if both factors are whole and no tensor shows it.
        rank = _pattern_value(config, "rank_pattern", path) or config.get("r")
        return {"rank": whole_number(rank, "r", _MOST_RANK)} if rank else {}
    return {}


def is_feedforward(config: Mapping[str, Any], path: str) -> bool:
    """Return whether the config of an (IA)^3 lists the layer at `path` among those whose inputs are scaled.

    Raises:
        AdapterError: `feedforward_modules` is neither a list of names nor a simple regular expression.
    """
    chosen = config.get("feedforward_modules") or []
    if isinstance(chosen, str):
        _refuse_slow(chosen, "feedforward_modules")
        try:
            return re.fullmatch(chosen, path) is not None
        except re.error as error:
            raise AdapterError(f"feedforward_modules in the file's metadata: {chosen!r}: {error}") from error
    if not isinstance(chosen, list) or not all(isinstance(name, str) for name in chosen):
        raise AdapterError(f"feedforward_modules in the file's metadata is {chosen!r}, expected a list of names")
    return any(path.endswith(name) for name in chosen)


def _version(config: Mapping[str, Any]) -> tuple[int, ...]:
    """Return major and minor version of the PEFT that wrote the config; (0, 0) before 0.18, which did not write it."""
    digits = re.match(r"(\d+)\.(\d+)", str(config.get("peft_version", "")))
    return (int(digits[1]), int(digits[2])) if digits else (0, 0)


def _pattern_value(config: Mapping[str, Any], option: str, path: str) -> Any:
    """Return the value of the first pattern in `config[option]` that matches a layer, or `None`."""
    chosen = config.get(option) or {}
    if not isinstance(chosen, Mapping):
        raise AdapterError(f"{option} in the file's metadata is {chosen!r}, expected an object")
    if len(chosen) > _MOST_PATTERNS:
        raise AdapterError(
            f"{option} in the file's metadata has {len(chosen)} entries, expected at most {_MOST_PATTERNS}"
        )
    for pattern in chosen:
        _refuse_slow(pattern, option)
    try:
        return patterns.value(chosen, path)
    except AdapterError as error:
        raise AdapterError(f"{option} in the file's metadata: {error}") from error


@lru_cache(4096)
def _is_simple(pattern: str) -> bool:
    return _GROUP_REPEATED.search(pattern) is None and len(_REPEATED.findall(pattern)) <= 3


def _refuse_slow(pattern: str, option: str) -> None:
    """Raise `AdapterError` if matching a pattern could take forever; a file may come from anyone."""
    if not _is_simple(pattern):
        raise AdapterError(f"{option} in the file's metadata: {pattern!r} is neither a name nor a simple pattern")


def _most_common(values: Mapping[str, Any]) -> Any:
    return Counter(values.values()).most_common(1)[0][0]
