"""Layers that were replaced after adapters were attached to them, by quantising, dequantising or wrapping a model.

Libraries that quantise put new modules in the place of the old ones. Adapters stay with their paths: `Watch` notices
that a module between the root of a model and an adapted layer is another one, and `find_again_` moves the adapter
layers to the layer that is at their path now.

A convolution may also be set to another padding or dilation, as for pictures that tile. `follow_convolutions_` makes
the adapter layers compute as their hosts do.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from operator import itemgetter
from typing import Any, TypeAlias

import torch
from torch import nn

from diffadapt.errors import AdapterError
from diffadapt.runtime.adapted_layers import ACTIVE, TOKENS, Adapted, Extended, carry_
from diffadapt.runtime.adapter_layer import AdapterLayer
from diffadapt.runtime.class_mixing import unmix_
from diffadapt.runtime.input_width import move_original_
from diffadapt.runtime.slots.forms import lower
from diffadapt.runtime.slots.reservation import Reservation
from diffadapt.types.layer_spec import LayerSpec

Carried: TypeAlias = Mapping[str, tuple[list[str], list[AdapterLayer]]]
"""Module path -> the names of the adapters on the layer there, and all its adapter layers and slots."""

_WRAPPED = ("_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "base_layer")
"""Names that wrappers give to the module inside them."""

_SETTINGS = ("stride", "padding", "dilation", "padding_mode")
_settings_of = itemgetter(*_SETTINGS)


class Watch:
    """What `find_again_` has seen of a model: the children of every module between the root and an adapted layer, the
    classes of these layers, and how those that are convolutions compute.
    """

    def __init__(self, model: nn.Module, hosts: Mapping[str, nn.Module]) -> None:
        """Remember the modules that are on the paths of `hosts` now."""
        self._paths = dict(hosts)
        self._hosts = list(hosts.values())
        self._classes = list(map(type, self._hosts))
        self._convolutions = [host.__dict__ for host in self._hosts if _is_convolution(host)]
        self._settings: list[Any] = list(map(_settings_of, self._convolutions))
        parents: dict[int, nn.Module] = {}
        lookup = Lookup(model)
        for path, host in hosts.items():
            if lookup.at(path) is not host:
                parents.update((id(parent), parent) for parent, _, _ in _steps(model, path))
        parents.update((id(parent), parent) for parent in lookup.parents.values() if parent is not None)
        self._children = [parent._modules for parent in parents.values()]
        self._remembered = [dict(children) for children in self._children]

    def is_current(self) -> bool:
        """Return whether these modules still have the same children, and the layers their classes and settings."""
        # Without a loop in Python. Modules have no equality but identity.
        return (
            self._children == self._remembered
            and list(map(type, self._hosts)) == self._classes
            and list(map(_settings_of, self._convolutions)) == self._settings
        )

    def refuse_own_convolutions(self) -> None:
        """Raise `AdapterError` if an adapter acts on a convolution that convolves with a function of its own.

        Such a function pads as it likes, for pictures that tile in one direction.
        """
        for attributes in self._convolutions:
            if "_conv_forward" in attributes and attributes.get(ACTIVE) and max(attributes["kernel_size"]) > 1:
                path = next(path for path, host in self._paths.items() if host.__dict__ is attributes)
                raise AdapterError(
                    f"{path} carries an adapter, but convolves with a function of its own (`_conv_forward` was "
                    "replaced), and the adapter would pad its input in another way; merge the adapter, or set "
                    "`padding_mode` of the layer instead"
                )


def module_at(model: nn.Module, path: str) -> nn.Module | None:
    """Return the module at `path`, through wrappers that were put around modules since, or `None`."""
    *_, (_, _, module) = _steps(model, path)
    return module


def present_hosts(
    model: nn.Module,
    hosts: Mapping[str, nn.Module],
    layers: Mapping[str, AdapterLayer],
    known: Mapping[str, nn.Module],
) -> dict[str, nn.Module]:
    """Return the layers of `model` that are at the paths of `layers` now, which are those in `hosts` as a rule.

    Args:
        known: module path -> layer, for paths that were looked up just now.

    Raises:
        AdapterError: a layer in `hosts` was replaced by one that these adapter layers do not fit.
    """
    present: dict[str, nn.Module] = {}
    lookup = Lookup(model)
    for path, layer in layers.items():
        if known.get(path) is hosts[path] or lookup.at(path) is hosts[path]:
            present[path] = hosts[path]
            continue
        found = module_at(model, path)
        if found is hosts[path] or _holds(found, hosts[path]):
            present[path] = hosts[path]
            continue
        problem = _misfit(found, [layer])
        if found is None or problem is not None:
            raise AdapterError(f"{path}: this layer was replaced after the adapter was planned, and {problem}")
        present[path] = found
    return present


def find_again_(model: nn.Module, hosts: dict[str, nn.Module], carried: Carried) -> tuple[list[str], dict[str, str]]:
    """Move adapter layers and slots to the layers that are at their paths now.

    Args:
        hosts: module path -> the layer that carried them; brought up to date.
        carried: what they carry.

    Returns:
        The paths of layers that were replaced, and path -> problem for those without a successor, which stay in
        `hosts`.
    """
    moved: list[str] = []
    problems: dict[str, str] = {}
    left: set[int] | None = None
    lookup = Lookup(model)
    for path, host in list(hosts.items()):
        found = host if lookup.at(path) is host else module_at(model, path)
        if found is host or _holds(found, host):
            # Does nothing unless someone else has given the layer a class that is not derived from the mixed one.
            _carry_as_(host, host)
            continue
        if left is None:
            left = {id(module) for module in model.modules()}
        names, layers = carried[path]
        problem = _misfit(found, layers) or _misfit_of_tokens(host, found)
        if problem is None and id(host) in left:
            problem = "the model still has the old layer at another path"
        if found is not None and problem is None:
            try:
                _move_(host, found, layers)
            except TypeError as error:
                problem = f"the class of the {type(found).__name__} there now cannot carry an adapter ({error})"
            else:
                hosts[path] = found
                moved.append(path)
        if problem is not None:
            owner = f"adapter {', '.join(map(repr, names))} was loaded" if names else "slots were reserved"
            problems[path] = (
                f"{path}: this layer was replaced after {owner}, and {problem}; remove the "
                f"{'adapter' if names else 'slots'}, or change the model before"
            )
    return moved, problems


def follow_convolutions_(hosts: Mapping[str, nn.Module], carried: Carried) -> None:
    """Let adapter layers and slots convolve with the stride, padding and dilation that their hosts have now."""
    for path, host in hosts.items():
        spec = LayerSpec.of(host) if _is_convolution(host) else None
        for layer in carried[path][1] if spec is not None else ():
            current: Any = {name: getattr(spec, name) for name in _SETTINGS}
            if any(getattr(layer.spec, name) != value for name, value in current.items()):
                layer.__dict__.update(spec=replace(layer.spec, **current), _cache=None, _term=None)


def refuse_problems(problems: Mapping[str, str]) -> None:
    """Raise `AdapterError` if there are any problems of those that `find_again_` returned."""
    if problems:
        first, *more = problems.values()
        raise AdapterError(first + (f" ({len(more)} more layers likewise)" if more else ""))


def reseat_(reservation: Reservation, moved: Iterable[str], adapters: Mapping[str, Mapping[str, AdapterLayer]]) -> None:
    """Write adapters into their seats again if what was written depends on the weight of a layer that was replaced.

    Args:
        moved: the paths of these layers.
        adapters: adapter name -> its layers by path.
    """
    paths = set(moved)
    gates = reservation._gates.clone()
    for name, seat in reservation.seated.items():
        layers = adapters[name]
        if any(layers[path].reads_weight for path in paths & layers.keys()):
            with torch.inference_mode(False), torch.no_grad():
                forms = {p: lower(layer, layer.base_weight, reservation.device) for p, layer in layers.items()}
                reservation.write(forms, seat)
    with torch.no_grad():
        reservation._gates.copy_(gates)
        reservation._update_copies()


def _steps(model: nn.Module, path: str) -> Iterator[tuple[nn.Module, str, nn.Module | None]]:
    """Yield (parent, name, child) for every module from the root of a model to `path`. The last may be `None`."""
    parent = model
    for name in path.split("."):
        while name not in parent._modules:
            inner = next((inner for inner in _WRAPPED if parent._modules.get(inner) is not None), None)
            if inner is None:
                break
            wrapped = parent._modules[inner]
            assert wrapped is not None
            yield parent, inner, wrapped
            parent = wrapped
        child = parent._modules.get(name)
        if child is None and name in parent._parameters:
            # The path of a bare parameter means the module that owns it.
            child = parent
        yield parent, name, child
        if child is None:
            return
        parent = child


class Lookup:
    """Looks up modules by path. It visits every module on the way once, so it must not outlive a change of the model.

    Attributes:
        parents: path -> the module there, or `None`, for all paths on the way.
    """

    def __init__(self, model: nn.Module) -> None:
        self.parents: dict[str, nn.Module | None] = {"": model}

    def at(self, path: str) -> nn.Module | None:
        """Return the module at `path`; `None` if there is none. Wrappers are not looked through."""
        above, _, name = path.rpartition(".")
        parent = self.parents[above] if above in self.parents else self.parent(above)
        if parent is None:
            return None
        return parent if name in parent._parameters else parent._modules.get(name)

    def parent(self, path: str) -> nn.Module | None:
        """Return the module at `path`, which is on the way to layers."""
        if path not in self.parents:
            above, _, name = path.rpartition(".")
            outer = self.parent(above)
            self.parents[path] = None if outer is None else outer._modules.get(name)
        return self.parents[path]


def _is_convolution(host: nn.Module) -> bool:
    return isinstance(host, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) and host.__dict__.keys() >= set(_SETTINGS)


def _holds(found: nn.Module | None, host: nn.Module) -> bool:
    return found is not None and any(module is host for module in found.modules())


def _misfit(found: nn.Module | None, layers: Iterable[AdapterLayer]) -> str | None:
    """Return why adapter layers cannot sit on the module `found`, or `None` if they can."""
    if found is None:
        return "there is no layer at its path now"
    spec = LayerSpec.of(found)
    other = next((layer.spec for layer in layers if layer.spec != spec), None)
    if other is None:
        return None
    size = "no layer of a known kind" if spec is None else f"{spec.kind} {spec.weight_shape}"
    return (
        f"the {type(found).__name__} there now does not fit (expected {other.kind} {other.weight_shape}, found {size})"
    )


def _move_(host: nn.Module, found: nn.Module, layers: Iterable[AdapterLayer]) -> None:
    """Move what `host` carries to `found`.

    Raises:
        TypeError: the class of `found` cannot be changed. Nothing is changed then.
    """
    _carry_as_(found, host)
    for name in (ACTIVE, TOKENS):
        if name in host.__dict__:
            found.__dict__[name] = host.__dict__[name]
    for layer in layers:
        layer.__dict__.update(host=found, _cache=None, _term=None)
    move_original_(host, found)
    host.__dict__.pop(TOKENS, None)
    host.__dict__.pop(ACTIVE, None)
    unmix_(host)


def _carry_as_(found: nn.Module, host: nn.Module) -> None:
    """Make `found` able to carry what `host` carries: adapter layers, learned tokens or both."""
    adapted = ACTIVE in host.__dict__
    carry_(found, Extended if TOKENS in host.__dict__ else Adapted)
    if not adapted:
        del found.__dict__[ACTIVE]


def _misfit_of_tokens(host: nn.Module, found: nn.Module | None) -> str | None:
    """Return why learned tokens of `host` cannot be on the module `found`, or `None` if they can or there are none."""
    if TOKENS not in host.__dict__:
        return None
    sizes = [
        tuple(getattr(module, name, None) for name in ("num_embeddings", "embedding_dim")) for module in (host, found)
    ]
    if sizes[0] == sizes[1]:
        return None
    return (
        f"the {type(found).__name__} there now cannot look up its learned tokens (expected an embedding of "
        f"{sizes[0][0]} x {sizes[0][1]})"
    )
