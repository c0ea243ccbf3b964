"""The tensors that PEFT stores once for a whole model, and the layers that they are for."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from diffadapt.errors import AdapterError
from diffadapt.formats.names import Names
from diffadapt.formats.peft_methods import BY_TYPE
from diffadapt.formats.verdicts import Place, Shared, Unused, Verdict
from diffadapt.types import TYPES, named
from diffadapt.types.layer_spec import LayerSpec

_PREFIX = "base_model."
_SHARED = frozenset(name for adapter_type in TYPES for name in adapter_type.shared)
_WITHOUT_LAYERS = frozenset({"unilora_theta_d"})
"""Tensors that may be the only ones of a file."""


def is_shared(key: str) -> bool:
    """Return whether a key names a tensor of the whole model, or of a group of its layers."""
    return key.startswith(_PREFIX) and _split(key)[0] in _SHARED


def _split(key: str) -> tuple[str, str]:
    """Return the name of a shared tensor, and the name of its group."""
    name, _, group = key.removeprefix(_PREFIX).partition(".")
    return name, group


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
    grouped = _groups(verdicts.values(), config, names)
    for key in keys:
        name, group = _split(key)
        if group and group not in grouped:
            verdicts[key] = Unused(
                f"no layer of the file belongs to {group}, for which PEFT has this tensor", component
            )
        else:
            verdicts[key] = Shared(component, name, paths, frozenset(grouped[group]) if group else None)


def _groups(verdicts: Iterable[Verdict], config: Mapping[str, Any], names: Names) -> dict[str, list[str]]:
    """Return the paths of the layers in each group that the file has shared tensors for; see `Method.groups`."""
    found: dict[str, list[str]] = {}
    places = {verdict.path: verdict for verdict in verdicts if isinstance(verdict, Place)}
    types = {name: method for method in BY_TYPE.values() for name in named(method.type).tensors}
    method = next((types[place.name] for place in places.values() if place.name in types), None)
    if method is None or method.groups is None:
        return found
    component = next(iter(places.values())).component
    order = {} if names.models is None else {path: n for n, path in enumerate(names.models[component].modules)}
    paths = sorted(places, key=lambda path: order.get(path, 0))
    written = [places[path].written for path in paths]
    for path, group in zip(paths, method.groups(written, method.read(config, "")), strict=True):
        found.setdefault(group, []).append(path)
    return found


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
