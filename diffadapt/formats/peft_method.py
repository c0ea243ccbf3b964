"""`Method`: how PEFT spells one adapter type, and how options of its config are read and written."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from torch import Tensor

from diffadapt.errors import AdapterError
from diffadapt.formats import peft_config
from diffadapt.formats.metadata import finite_number, whole_number
from diffadapt.types import named
from diffadapt.types.layer_state import LayerState

Layers: TypeAlias = Mapping[str, LayerState]
"""Adapter layers by path of the model's layer."""
Config: TypeAlias = Mapping[str, Any]

_MOST = 2**40
"""Larger seeds and sizes mean that a file is damaged or malicious."""


Groups: TypeAlias = Callable[[Sequence[str], Mapping[str, float]], list[str]]
"""`(paths of all layers, in the order of the model, settings) -> the name of the group of each layer`."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """PEFT's spelling of one adapter type.

    Attributes:
        name: `peft_type` in the config.
        type: name of the adapter type.
        read: returns the settings of the type for the layer at a path, according to a config.
        write: returns the options of the config for all layers. Raises `AdapterError` if no options mean the same.
        alpha: the option for alpha; empty if the type has none.
        older: earlier values of `peft_type` for the same.
        names: the names of tensors that differ from those of the type.
        embedding_names: the names of tensors in embeddings, as far as they differ from those.
        other_names: further names that files may have instead.
        left_out: the tensors that PEFT computes again instead of storing them.
        repeats: whether files have shared tensors for every layer, too.
        groups: returns the groups of layers that a file has shared tensors for; `None` if all layers share them.
        more: returns further tensors that PEFT stores for a layer, by its names.
        reshape: returns a tensor, given with its name, in the shape that PEFT stores for this layer.
    """

    name: str
    type: str
    read: Callable[[Config, str], dict[str, float]] = lambda config, path: {}
    write: Callable[[Layers], dict[str, Any]] = lambda layers: {}
    alpha: str = ""
    older: tuple[str, ...] = ()
    names: Mapping[str, str] = field(default_factory=dict[str, str])
    embedding_names: Mapping[str, str] = field(default_factory=dict[str, str])
    other_names: Mapping[str, str] = field(default_factory=dict[str, str])
    left_out: frozenset[str] = frozenset()
    repeats: bool = False
    groups: Groups | None = None
    more: Callable[[LayerState], dict[str, Tensor]] = lambda layer: {}
    reshape: Callable[[LayerState, str, Tensor], Tensor] = lambda layer, name, tensor: tensor

    def options(self, layers: Layers) -> dict[str, Any]:
        """Return the options of the config with which PEFT builds these layers."""
        options = self.write(layers)
        if not self.alpha:
            return options
        ranks = {path: layer.rank or round(layer.settings.get("rank", 1)) for path, layer in layers.items()}
        alphas = {ranks[path] if layer.alpha is None else layer.alpha for path, layer in layers.items()}
        return {**options, self.alpha: _whole_if_possible(single(alphas, "alpha"))}

    def spelled(self, layer: LayerState) -> dict[str, Tensor]:
        """Return the tensors of one layer with the names and shapes of PEFT."""
        names = {**self.names, **(self.embedding_names if layer.is_embedding else {})}
        shared = named(layer.type).shared
        stored = {
            # A file cannot hold the same memory twice.
            names.get(name, name): tensor.clone() if name in shared else self.reshape(layer, name, tensor)
            for name, tensor in layer.tensors.items()
            if name not in self.left_out and (self.repeats or name not in shared)
        }
        return {**stored, **self.more(layer)}


def single(values: set[Any], what: str) -> Any:
    """Return the only one of the values that layers have."""
    if len(values) != 1:
        found = ", ".join(sorted(map(str, values)))
        raise AdapterError(f"PEFT has one {what} for all layers of such an adapter, and these have {found}")
    return values.pop()


def _whole_if_possible(value: float) -> float:
    return int(value) if value == int(value) else value


def number_in(config: Config, key: str, default: float) -> float:
    """Return a finite number."""
    value = config.get(key)
    return finite_number(default if value is None else value, key)


def whole_in(config: Config, key: str, default: int) -> float:
    """Return a whole number of at least 0, such as a seed."""
    value = config.get(key)
    value = default if value is None else value
    return 0.0 if value == 0 else float(whole_number(value, key, _MOST))


def index_in(config: Config, key: str, default: str, known: Sequence[str]) -> float:
    """Return the index of the option's value among the known ones."""
    value = config.get(key, default)
    if value not in known:
        raise AdapterError(f"{key} in adapter_config.json is {value!r}, expected one of {', '.join(known)}")
    return float(known.index(value))


def common_size(layers: Layers, name: str, axis: int) -> int:
    """Return the size that a tensor of all layers has along an axis."""
    return single({layer.tensors[name].shape[axis] for layer in layers.values()}, "rank")


def common_setting(layers: Layers, name: str) -> float:
    """Return the setting that all layers have in common."""
    return single({layer.settings[name] for layer in layers.values()}, name)


def sizes_by_path(
    layers: Layers, name: str, axis: int, option: str = "r", pattern: str = "rank_pattern"
) -> dict[str, Any]:
    """Return the options for sizes of tensors that may differ from layer to layer."""
    sizes = {path: layer.tensors[name].shape[axis] for path, layer in layers.items()}
    options = peft_config.ranks_and_alphas(sizes, dict.fromkeys(sizes, 1.0))
    # PEFT does not take every pattern for a regular expression of whole paths.
    return {option: options["r"], pattern: {key.removeprefix("^"): n for key, n in options["rank_pattern"].items()}}
