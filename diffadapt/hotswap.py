"""Reserve slots on the models of a pipeline and seat adapters in them: in all components, or in none.

What is where within one model is up to `slots.Reservation`; here is what adapters need, and who may have to leave.
"""

import os
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn

from diffadapt.adapter import AdapterLayer
from diffadapt.attach import Bank, bank_of, reserve_
from diffadapt.config import AdapterConfig
from diffadapt.create import new_layers
from diffadapt.errors import AdapterError
from diffadapt.hooks import compute_dtype, execution_device
from diffadapt.io import Source, read
from diffadapt.layer import LayerSpec
from diffadapt.load import plan
from diffadapt.loaded import Loaded
from diffadapt.merge import original_weight
from diffadapt.slots import Arrangement, Form, Forms, Needs, Reservation, lower
from diffadapt.targets import Targets

ByComponent = Mapping[str, Mapping[str, AdapterLayer]]
"""Component -> module path -> adapter layer."""
Request: TypeAlias = Source | AdapterConfig | Mapping[str, AdapterConfig]
Requests: TypeAlias = Request | Iterable[Request]


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


def requested(
    loaded: Loaded, sources: Requests, only: set[str] | None, tokenizers: Mapping[str, Any]
) -> list[ByComponent]:
    """The adapters that sources and loaded adapters are, by component; of sources only the shapes.

    Args:
        only: leave other components out.
        tokenizers: see `load.plan`.
    """
    models = loaded.models
    wanted: list[ByComponent] = [
        {component: adapter.layers for component, adapter in found.components.items()}
        for found in loaded.adapters.values()
    ]
    single = isinstance(sources, (str, os.PathLike, AdapterConfig, Mapping))
    for source in cast(Iterable[Request], [sources] if single else sources):
        configs = _configs(source, models)
        if configs is not None:
            wanted.append({c: new_layers(models[c], config)[0] for c, config in configs.items()})
        else:
            checkpoint = read(cast(Source, source), headers_only=True)
            planned = plan(checkpoint, models, components=only, tokenizers=tokenizers)
            planned.refuse_faults(strict=True)
            wanted.append(planned.layers)
    return wanted if only is None else [{c: part for c, part in w.items() if c in only} for w in wanted]


def room(
    loaded: Loaded, name: str, layers: ByComponent, activate: bool, allow_recompile: bool, *, replacing: bool
) -> tuple[dict[str, Arrangement], set[str]]:
    """Seats for a new adapter by component, and the components in which it has to run beside the slots.

    Args:
        activate: it will act at once.
        allow_recompile: where there is no room, it may run beside the slots.
        replacing: whoever has that name will be gone.

    Raises:
        AdapterError: there is no room.
    """
    found: dict[str, Arrangement] = {}
    beside: set[str] = set()
    if not _is_prepared(loaded):
        return found, beside
    staying = set(loaded.active if activate else loaded.adapters) - {name}
    for component, part in layers.items():
        wanted = {name: {component: part}}
        here = {component: loaded.models[component]}
        try:
            found |= arrange(here, wanted, staying, [name] if replacing else [])
        except AdapterError as error:
            if not activate:
                with suppress(AdapterError):
                    # There is room for it once others are gone: it gets a seat when it is activated.
                    arrange(here, wanted, ())
                    continue
            if not allow_recompile:
                raise AdapterError(
                    f"{error}. Nothing was changed. Deactivate or remove adapters, include this one in "
                    "prepare_hotswap() before compiling, or pass allow_recompile=True"
                ) from error
            beside.add(component)
    return found, beside


def seat_(loaded: Loaded, names: Iterable[str], staying: Collection[str] = ()) -> None:
    """Give these adapters seats where there are slots, before all others that are not in `staying`.

    Raises:
        AdapterError: there is no room. Nothing has changed then.
    """
    if not _is_prepared(loaded):
        return
    names = list(names)
    new: dict[str, dict[str, Mapping[str, AdapterLayer]]] = {}
    for name in names:
        for component, adapter in loaded[name].components.items():
            reservation = loaded.banks[component].reservation
            is_seated = reservation is not None and name in reservation.seated
            if adapter.layers and not adapter.beside and not is_seated:
                new.setdefault(name, {})[component] = adapter.layers
    for arrangement in arrange(loaded.models, new, {*names, *staying}).values():
        arrangement.carry_out()


def arrange(
    models: Mapping[str, nn.Module],
    new: Mapping[str, ByComponent],
    staying: Collection[str],
    gone: Collection[str] = (),
) -> dict[str, Arrangement]:
    """Seats for adapters in the slots of every component. Changes nothing.

    Args:
        new: adapter name -> component -> its layers.
        staying: seated adapters that keep their seats; all others may lose theirs, those seated longest first.
        gone: who loses theirs in any case.

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
            leaving = [name for name in others if name not in gone]
            try:
                forms = {name: _lowered(layers, bank, reservation) for name, layers in mine.items()}
                arrangements[component] = reservation.arrange(forms, leaving, [name for name in others if name in gone])
            except AdapterError as error:
                raise AdapterError(f"{component}.{error}") from error
    return arrangements


def _lowered(layers: Mapping[str, AdapterLayer], bank: Bank, room: Reservation) -> Forms:
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
            # Not the weight that others are merged into now: it may be another one when this adapter runs.
            forms[path] = lower(layer, partial(original_weight, bank, path, layer.spec), room.device)
    return forms


def _is_prepared(loaded: Loaded) -> bool:
    """Whether any of the models has slots."""
    return any(bank.reservation is not None for bank in loaded.banks.values())


def _configs(request: Request, models: Mapping[str, nn.Module]) -> dict[str, AdapterConfig] | None:
    """Settings by component, if a request consists of settings; without components they are for the denoisers."""
    if isinstance(request, AdapterConfig):
        denoisers = [component for component in models if not component.startswith(("text_encoder", "vae", "image"))]
        return dict.fromkeys(denoisers if len(models) > 1 else models, request)
    if not isinstance(request, Mapping) or not any(isinstance(config, AdapterConfig) for config in request.values()):
        return None
    unknown = sorted(set(request) - set(models))
    if unknown:
        raise AdapterError(f"no component {', '.join(unknown)}; the pipeline has {', '.join(models)}")
    return dict(cast(Mapping[str, AdapterConfig], request))


def _empty(spec: LayerSpec, dtype: torch.dtype) -> Tensor:
    wide = torch.promote_types(dtype, torch.float32)
    return torch.empty(spec.weight_shape, dtype=wide, device="meta")


def _shapes_of(layer: AdapterLayer, dtype: torch.dtype) -> AdapterLayer:
    tensors = {name: tensor.detach().to("meta", dtype) for name, tensor in layer.tensors.items()}
    return AdapterLayer(layer.kind, layer.spec, tensors, layer.alpha, settings=layer.settings, widens=layer.widens)
