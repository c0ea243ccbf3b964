"""Reserve slots on the models of a pipeline and seat adapters in them: in all components, or in none.

What is where within one model is up to `slots.Reservation`; here is what adapters need, and who may have to leave.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from diffadapt.adapter import AdapterLayer, weight_of
from diffadapt.attach import bank_of, reserve_
from diffadapt.errors import AdapterError
from diffadapt.hooks import compute_dtype, execution_device
from diffadapt.layer import LayerSpec
from diffadapt.slots import Arrangement, Form, Forms, Needs, Reservation, lower
from diffadapt.targets import Targets

ByComponent = Mapping[str, Mapping[str, AdapterLayer]]
"""Component -> module path -> adapter layer."""


@dataclass(frozen=True)
class Reserved:
    """What `prepare_hotswap` has reserved.

    Attributes:
        slots: how many adapters have room at once.
        layers: component -> number of layers with slots.
        bytes: size of all slots.
    """

    slots: int
    layers: Mapping[str, int]
    bytes: int

    def __str__(self) -> str:
        where = ", ".join(f"{component} {count}" for component, count in self.layers.items())
        return f"slots for {self.slots} on {where} layers, {self.bytes / 2**20:.1f} MiB"


def needs_of(models: Mapping[str, nn.Module], wanted: Iterable[ByComponent]) -> dict[str, dict[str, Needs]]:
    """What adapters need, by component and module path; only the shapes of their tensors count."""
    needs: dict[str, dict[str, Needs]] = {}
    dtypes = {component: compute_dtype(list(model.modules())) for component, model in models.items()}
    for adapter in wanted:
        for component, layers in adapter.items():
            for path, layer in layers.items():
                if layer.widens and LayerSpec.of(models[component].get_submodule(path)) != layer.spec:
                    raise AdapterError(f"{component}.{path}: it gets more inputs; load that adapter before reserving")
                need = needs.setdefault(component, {}).setdefault(path, Needs(layer.spec))
                need.cover(lower(_shapes_of(layer, dtypes[component]), partial(_empty, layer.spec, dtypes[component])))
    return needs


def reserve_all_(
    models: Mapping[str, nn.Module],
    needs: Mapping[str, Mapping[str, Needs]],
    slots: int,
    *,
    rank: int = 0,
    samples: int = 0,
) -> Reserved:
    """Reserve what is needed `slots` times over, in the place of what was reserved.

    Args:
        rank: rows that layers with low-rank changes get for each adapter, if that is more than they need.
        samples: see `Reservation`.
    """
    made: dict[str, tuple[Reservation, dict[str, nn.Module]]] = {}
    for component, layers in needs.items():
        modules = list(models[component].modules())
        for need in layers.values():
            need.rows = max(need.rows, rank) if need.rows else 0
        with torch.inference_mode(False):
            reservation = Reservation(layers, slots, compute_dtype(modules), execution_device(modules), samples)
        hosts = Targets(models[component]).modules
        made[component] = reservation, {path: hosts[path] for path in layers}
    for component, (reservation, hosts) in made.items():
        reserve_(models[component], reservation, hosts)
    return Reserved(
        slots,
        {component: len(reservation.slots) for component, (reservation, _) in made.items()},
        sum(reservation.bytes for reservation, _ in made.values()),
    )


def is_prepared(models: Mapping[str, nn.Module]) -> bool:
    """Whether any of these models has slots."""
    return any((bank := bank_of(model)) and bank.reservation for model in models.values())


def arrange(
    models: Mapping[str, nn.Module],
    new: Mapping[str, ByComponent],
    staying: Collection[str],
    first: Collection[str] = (),
) -> dict[str, Arrangement]:
    """Seats for adapters in the slots of every component. Changes nothing.

    Args:
        new: adapter name -> component -> its layers.
        staying: seated adapters that keep their seats; all others may lose theirs, those seated longest first.
        first: who loses theirs before others do.

    Raises:
        AdapterError: there is no room.
    """
    arrangements: dict[str, Arrangement] = {}
    for component, model in models.items():
        mine = {name: layers[component] for name, layers in new.items() if component in layers}
        if mine:
            bank = bank_of(model)
            reservation = None if bank is None else bank.reservation
            if bank is None or reservation is None:
                raise AdapterError(f"{component}: no slots are reserved there")
            others = [name for name in reservation.seated if name not in staying]
            leaving = [name for name in first if name in others] + [name for name in others if name not in first]
            try:
                forms = {name: _lowered(layers, bank.hosts, reservation) for name, layers in mine.items()}
                arrangements[component] = reservation.arrange(forms, leaving)
            except AdapterError as error:
                raise AdapterError(f"{component}.{error}") from error
    return arrangements


def _lowered(layers: Mapping[str, AdapterLayer], hosts: Mapping[str, nn.Module], room: Reservation) -> Forms:
    forms: dict[str, list[Form]] = {}
    with torch.inference_mode(False), torch.no_grad():
        for path, layer in layers.items():
            if path not in room.slots:
                raise AdapterError(f"{path}: no slots are reserved there")
            here = room.slots[path][0].spec.in_features
            if layer.spec.in_features != here:
                raise AdapterError(
                    f"{path}: {layer.spec.in_features} inputs expected, slots for {here} are reserved there"
                )
            forms[path] = lower(layer, partial(weight_of, hosts[path], layer.spec), room.device)
    return forms


def _empty(spec: LayerSpec, dtype: torch.dtype) -> Tensor:
    wide = torch.promote_types(dtype, torch.float32)
    return torch.empty(spec.weight_shape, dtype=wide, device="meta")


def _shapes_of(layer: AdapterLayer, dtype: torch.dtype) -> AdapterLayer:
    tensors = {name: tensor.detach().to("meta", dtype) for name, tensor in layer.tensors.items()}
    return AdapterLayer(layer.kind, layer.spec, tensors, layer.alpha, settings=layer.settings, widens=layer.widens)
