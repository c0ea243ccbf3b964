"""The tensors that PEFT stores once for a whole model, and the layers that they are for."""

import re
from collections.abc import Mapping
from typing import Any

from diffadapt.errors import AdapterError
from diffadapt.formats.names import Names
from diffadapt.formats.verdicts import Place, Shared, Verdict
from diffadapt.types import TYPES
from diffadapt.types.layer_spec import LayerSpec

_PREFIX = "base_model."
_SHARED = frozenset(name for adapter_type in TYPES for name in adapter_type.shared)
_WITHOUT_LAYERS = frozenset({"unilora_theta_d"})
"""Tensors that may be the only ones of a file."""


def is_shared(key: str) -> bool:
    """Return whether a key names a tensor of the whole model."""
    return key.startswith(_PREFIX) and key.removeprefix(_PREFIX) in _SHARED


def place_shared(verdicts: dict[str, Verdict], config: Mapping[str, Any], names: Names) -> None:
    """Replace the verdicts on tensors of the whole model.

    Args:
        verdicts: the verdicts on all keys of a file.
        config: the content of `adapter_config.json`.
        names: the models.

    Raises:
        AdapterError: the file is for layers of several models, or does not say for which.
    """
    keys = [key for key in verdicts if is_shared(key)]
    if not keys:
        return
    components = {verdict.component for verdict in verdicts.values() if isinstance(verdict, Place)}
    paths: tuple[str, ...] = ()
    if not components:
        found = _targets(config, names) if _WITHOUT_LAYERS.intersection(k.removeprefix(_PREFIX) for k in keys) else {}
        components, paths = set(found), next(iter(found.values()), ())
    if len(components) != 1:
        where = ", ".join(sorted(components)) or "no model"
        raise AdapterError(f"{keys[0]} is for all layers of one model, and those of the file are in {where}")
    (component,) = components
    verdicts.update((key, Shared(component, key.removeprefix(_PREFIX), paths)) for key in keys)


def _targets(config: Mapping[str, Any], names: Names) -> dict[str, tuple[str, ...]]:
    """Return component -> the paths of the linear layers that the config names."""
    chosen, excluded = config.get("target_modules"), config.get("exclude_modules")
    if config.get("layers_to_transform") is not None:
        raise AdapterError("layers_to_transform: the file does not name its layers; save it with save_indices=True")
    found: dict[str, tuple[str, ...]] = {}
    for component, targets in (names.models or {}).items():
        paths = tuple(
            path
            for path, module in targets.modules.items()
            if _is_named(chosen, path)
            and not _is_named(excluded, path)
            and (spec := LayerSpec.of(module)) is not None
            and spec.kind == "linear"
        )
        if paths:
            found[component] = paths
    return found


def _is_named(chosen: Any, path: str) -> bool:
    if isinstance(chosen, str):
        try:
            return re.fullmatch(chosen, path) is not None
        except re.error as error:
            raise AdapterError(f"target_modules in adapter_config.json: {chosen!r}: {error}") from error
    return isinstance(chosen, list) and any(
        isinstance(name, str) and (path == name or path.endswith(f".{name}"))
        for name in chosen  # type: ignore[misc]
    )
