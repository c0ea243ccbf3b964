"""Reserve slots on the models of a pipeline: what adapters need, from files, settings or loaded adapters."""

import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn

from diffadapt.errors import AdapterError
from diffadapt.files.checkpoint import Source
from diffadapt.files.read import read
from diffadapt.loading.plan import plan
from diffadapt.management.create import new_layers
from diffadapt.management.owner import Owner
from diffadapt.management.seating import ByComponent, seat_
from diffadapt.management.snapshot import AdapterSnapshot
from diffadapt.runtime.adapter_layer import AdapterLayer
from diffadapt.runtime.attach import reserve_
from diffadapt.runtime.components import is_text_encoder
from diffadapt.runtime.foreign_hooks import compute_dtype, execution_device
from diffadapt.runtime.slots.forms import lower
from diffadapt.runtime.slots.reservation import Reservation
from diffadapt.runtime.slots.slot import Needs
from diffadapt.runtime.targets import Targets
from diffadapt.types.config import AdapterConfig
from diffadapt.types.layer_spec import LayerSpec

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
    loaded: AdapterSnapshot, sources: Requests, only: set[str] | None, tokenizers: Mapping[str, Any]
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


def _configs(request: Request, models: Mapping[str, nn.Module]) -> dict[str, AdapterConfig] | None:
    """Settings by component, if a request consists of settings; without components they are for the denoisers."""
    if isinstance(request, AdapterConfig):
        denoisers = [
            component
            for component in models
            if not is_text_encoder(component) and not component.startswith(("vae", "image"))
        ]
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
    return AdapterLayer(
        layer.adapter_type, layer.spec, tensors, layer.alpha, settings=layer.settings, widens=layer.widens
    )


def prepare_hotswap_(
    owner: Owner, sources: Requests, slots: int | None, rank: int, samples: int, components: Iterable[str] | None
) -> Reserved:
    """Reserve slots on the models of `owner` and give the loaded adapters seats; see `Adapters.prepare_hotswap`."""
    snapshot = owner.snapshot()
    active = snapshot.running
    least = max(1, len(active))
    count = least if slots is None else slots
    if count < least:
        raise AdapterError(f"slots is {count}, expected at least {least}, as many as are active")
    wanted = requested(snapshot, sources, None if components is None else set(components), owner.tokenizers())
    if not wanted:
        raise AdapterError("nothing to reserve for: pass files, folders or settings, or load an adapter first")
    models = snapshot.models
    reserved = reserve_all_(models, needs_of(models, wanted), count, rank=rank, samples=samples)
    snapshot = owner.snapshot()
    seat_(snapshot, active)
    for name in snapshot.adapters:
        if name not in active:
            with suppress(AdapterError):
                seat_(snapshot, [name], staying=snapshot.adapters)
    owner.changed()
    return reserved
