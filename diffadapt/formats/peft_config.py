"""LoRA settings as PEFT's config spells them: in `adapter_config.json`, and in diffusers' safetensors header."""

import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from diffadapt.errors import AdapterError
from diffadapt.state import LayerState


def alpha(config: Mapping[str, Any], path: str, rank: int) -> float | None:
    """Alpha of the layer at `path` such that `alpha / rank` is PEFT's scaling; `None` if the config has none."""
    value = _by_pattern(config.get("alpha_pattern"), path)
    if value is None:
        value = config.get("lora_alpha")
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise AdapterError(f"alpha in the file's metadata is {value!r}, expected a finite number")
    return value * math.sqrt(rank) if config.get("use_rslora") else float(value)


def dump(layers: Mapping[str, LayerState]) -> dict[str, Any]:
    """The config under which PEFT scales every one of `layers` as we do."""
    ranks = {path: layer.rank or 0 for path, layer in layers.items()}
    alphas = {
        path: float(rank if layers[path].alpha is None else layers[path].alpha or 0) for path, rank in ranks.items()
    }
    biased = {"lora_bias" in layer.tensors for layer in layers.values()}
    if len(biased) > 1:
        raise AdapterError("some layers have a LoRA bias and some have not, which PEFT cannot express")
    rank, alpha = _commonest(ranks), _commonest(alphas)
    return {
        "alpha_pattern": {f"^{path}": value for path, value in alphas.items() if value != alpha},
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_bias": biased == {True},
        "r": rank,
        "rank_pattern": {f"^{path}": value for path, value in ranks.items() if value != rank},
        "target_modules": list(layers),
        "use_dora": False,
        "use_rslora": False,
    }


def _by_pattern(patterns: Any, path: str) -> Any:
    """PEFT's rule: the first key that matches the path from its start or from after a dot, to its end."""
    if not isinstance(patterns or {}, Mapping):
        raise AdapterError(f"alpha_pattern in the file's metadata is {patterns!r}, expected an object")
    for pattern, value in (patterns or {}).items():
        start = "" if pattern.startswith("^") else "(.*[.])?"
        try:
            if re.match(f"{start}({pattern.removeprefix('^')})$", path):
                return value
        except re.error as error:
            raise AdapterError(
                f"alpha_pattern in the file's metadata has a bad expression {pattern!r}: {error}"
            ) from error
    return None


def _commonest(values: Mapping[str, Any]) -> Any:
    return Counter(values.values()).most_common(1)[0][0]
