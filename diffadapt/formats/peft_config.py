"""LoRA settings as PEFT's config spells them: in `adapter_config.json`, and in diffusers' safetensors header."""

import math
import re
from collections import Counter
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from diffadapt.errors import AdapterError
from diffadapt.formats.metadata import count, flag, number
from diffadapt.types import patterns
from diffadapt.types.layer_state import LayerState

# More is damage or mischief. `lokr_full_rank` of ai-toolkit has a rank of ten thousand million.
_MOST_TERMS, _MOST_RANK, _MOST_PATTERNS = 100, 10**12, 4096
_REPEATED = re.compile(r"(?<![\\(])[*+?]|\{")
_GROUP_REPEATED = re.compile(r"(?<!\\)\)[*+{]")


def alpha(config: Mapping[str, Any], path: str, rank: int) -> float | None:
    """Alpha of the layer at `path` such that `alpha / rank` is PEFT's scaling; `None` if the config has none."""
    value = _pattern_value(config, "alpha_pattern", path)
    if value is None:
        value = config.get("lora_alpha", config.get("alpha"))
    if value is None:
        return None
    value = number(value, "alpha")
    return value * math.sqrt(rank) if flag(config.get("use_rslora"), "use_rslora") else value


def dump(layers: Mapping[str, LayerState]) -> dict[str, Any]:
    """The config under which PEFT scales every one of `layers` as we do."""
    ranks = {path: layer.rank or 0 for path, layer in layers.items()}
    alphas = {path: layer.scale * ranks[path] for path, layer in layers.items()}
    magnitudes = {"dora_scale" in layer.tensors for layer in layers.values()}
    if len(magnitudes) > 1:
        raise AdapterError("some layers are DoRA and some plain LoRA, which PEFT cannot express")
    return {
        **ranks_and_alphas(ranks, alphas),
        "lora_bias": any("lora_bias" in layer.tensors for layer in layers.values()),
        "target_modules": list(layers),
        "use_dora": magnitudes == {True},
        "use_rslora": False,
    }


def ranks_and_alphas(ranks: Mapping[str, int], alphas: Mapping[str, float]) -> dict[str, Any]:
    """The commonest rank and alpha, and patterns for all others."""
    rank, alpha = _commonest(ranks), _commonest(alphas)
    return {
        "alpha_pattern": {_pattern(path): value for path, value in alphas.items() if value != alpha},
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "r": rank,
        "rank_pattern": {_pattern(path): value for path, value in ranks.items() if value != rank},
    }


def _pattern(path: str) -> str:
    """For one layer; above CLIP's there is a level in transformers 4, and in files for it, that 5 does not have."""
    return path if path.startswith("encoder.layers.") else f"^{path}"


def settings(config: Mapping[str, Any], path: str, type: str) -> dict[str, float]:
    """What the config says of the layer at `path` that its tensors do not, see `AdapterType.settings`."""
    if type == "oft":
        # Before there was a choice, there was only the exact inverse.
        uses_series = flag(config.get("use_cayley_neumann"), "use_cayley_neumann")
        name = "num_cayley_neumann_terms"
        terms = count(config.get(name, 5), name, _MOST_TERMS) if uses_series else 0
        if terms == 1:
            raise AdapterError(f"{name} in the file's metadata is 1, which is no rotation; expected at least 2")
        if terms and _version(config) < (0, 18):
            raise AdapterError(
                "an OFT of PEFT before 0.18 with use_cayley_neumann, which was another series; train it again, or load "
                "it with that version of PEFT"
            )
        radius = number(config.get("eps", 6e-5), "eps") if flag(config.get("coft"), "coft") else 0.0
        return {"neumann_terms": terms, "coft_eps": radius}
    if type in ("lokr", "dora-lokr"):
        # PEFT divides alpha by this also where both factors are whole and no tensor has it.
        rank = _pattern_value(config, "rank_pattern", path) or config.get("r")
        return {"rank": count(rank, "r", _MOST_RANK)} if rank else {}
    return {}


def is_feedforward(config: Mapping[str, Any], path: str) -> bool:
    """Whether the config of an (IA)^3 counts the layer at `path` among those whose inputs are scaled."""
    chosen = config.get("feedforward_modules") or []
    if isinstance(chosen, str):
        _refuse_slow(chosen, "feedforward_modules")
        try:
            return re.fullmatch(chosen, path) is not None
        except re.error as error:
            raise AdapterError(f"feedforward_modules in the file's metadata: {chosen!r}: {error}") from error
    if not isinstance(chosen, list) or not all(isinstance(name, str) for name in chosen):
        raise AdapterError(f"feedforward_modules in the file's metadata is {chosen!r}, expected names")
    return any(path.endswith(name) for name in chosen)


def _version(config: Mapping[str, Any]) -> tuple[int, ...]:
    """PEFT's version that wrote the config; it is there since 0.18."""
    digits = re.match(r"(\d+)\.(\d+)", str(config.get("peft_version", "")))
    return (int(digits[1]), int(digits[2])) if digits else (0, 0)


def _pattern_value(config: Mapping[str, Any], option: str, path: str) -> Any:
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
    """A file may come from anyone, and some regular expressions take years; names and simple patterns do not."""
    if not _is_simple(pattern):
        raise AdapterError(f"{option} in the file's metadata: {pattern!r} is no name and no simple pattern")


def _commonest(values: Mapping[str, Any]) -> Any:
    return Counter(values.values()).most_common(1)[0][0]
