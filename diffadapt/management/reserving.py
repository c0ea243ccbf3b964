"""Reserve slots on the models of a pipeline, as large as files, settings and loaded adapters need them."""

import os
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn

from diffadapt.errors import AdapterError, naming
from diffadapt.files.checkpoint import Source
from diffadapt.files.read import read
from diffadapt.loading.plan import plan
from diffadapt.management.creation import new_layers
from diffadapt.management.owner import Owner, exclusive_method
from diffadapt.management.regional import prepare_regions_
from diffadapt.management.request_contexts import RequestContexts
from diffadapt.management.seating import ByComponent, seat_
from diffadapt.management.snapshot import AdapterSnapshot
from diffadapt.runtime.adapter_layer import AdapterLayer
from diffadapt.runtime.attach import reserve_, unreserve_
from diffadapt.runtime.components import is_text_encoder
from diffadapt.runtime.foreign_hooks import compute_dtype, execution_device
from diffadapt.runtime.slots.common_forms import common_needs, lower_in_common
from diffadapt.runtime.slots.forms import Form, lower
from diffadapt.runtime.slots.reservation import Reservation
from diffadapt.runtime.slots.slot import Needs
from diffadapt.runtime.targets import Targets, refuse_peft
from diffadapt.types import TYPES
from diffadapt.types.config import AdapterConfig
from diffadapt.types.layer_spec import LayerSpec
from diffadapt.types.parameter import PARAMETER
from diffadapt.types.tensor_ops import converted, shape_of

Request: TypeAlias = Source | AdapterConfig | Mapping[str, AdapterConfig]
"""An adapter that slots have to fit: a file or state dict, or settings, for the denoisers or by component."""
Requests: TypeAlias = Request | Iterable[Request]


@dataclass(frozen=True)
class Reserved:
    """The slots that `prepare_hotswap` has reserved.

    Attributes:
        slots: how many adapters of the largest size fit at once.
        layers: component -> number of layers with slots.
        bytes: size of all slots.
    """

    slots: int
    layers: Mapping[str, int]
    bytes: int

    def __str__(self) -> str:
        where = ", ".join(f"{component} {count}" for component, count in self.layers.items())
        return f"slots for {self.slots} on {where} layers, {self.bytes / 2**20:.1f} MiB"


class PreparedModels(RequestContexts):
    """Adapters by name, on models that can be prepared to take others without a recompile."""

    @exclusive_method
    def prepare_hotswap(
        self,
        sources: Requests = (),
        *,
        slots: int | None = None,
        rank: int = 0,
        samples: int = 0,
        components: Iterable[str] | None = None,
        types: str | Iterable[str] = (),
        regions: bool = False,
        adapters_per_sample: int = 0,
    ) -> Reserved:
        """Reserve slots for adapters, so that a compiled pipeline takes them without a recompile.

        Call it before compiling. From then on adapters are written into the reserved slots: loading, swapping,
        removing, activating, rescaling and disabling them compiles nothing. An adapter that does not fit raises an
        error and changes nothing. Adapters that are loaded already get seats, too. Slots of an earlier call are
        released.

        Args:
            sources: adapters that the slots have to fit: files, folders, hub ids, state dicts (only headers are read),
                or settings as for `add_adapter`, such as `LoraConfig(rank=64, target_modules="all-linear")`, for all
                denoisers, or component -> settings. Every layer that one of them changes gets slots for the largest
                rank and for every adapter type that occurs on it.
            slots: how many adapters of that size fit at once; defaults to the number of active ones, at least 1.
            rank: reserve at least this rank on every layer with low-rank changes.
            samples: how many prompts `per_sample` will be used with at most; with 0 it cannot be used.
            components: reserve slots on these components only; defaults to all.
            types: names of adapter types ("oft", "lokr", ...) of which any adapter has to fit, with blocks or factors
                of any size. They run in a common form, which is as large as the weight of a layer for every slot, on
                every layer with slots. Rotations of outputs (LyCORIS' OFT) need a source of that kind, too.
            regions: whether compiled models take masks (`regions`) without a recompile. Otherwise they are compiled
                once more for the first. A call then costs as much without masks as with them.
            adapters_per_sample: how many adapters the mix of one prompt usually has at most. Every row of a batch then
                meets the low-rank factors of so many only, instead of those in all slots, where there are at least
                twice as many slots. A prompt with more adapters makes compiled models compile once more. 0 if mixes
                may be of any number.

        Raises:
            AdapterError: a source cannot be read or applied, more adapters are active than `slots`, there is nothing to
                reserve for, or an unknown type. Nothing has changed then.
        """
        names = [types] if isinstance(types, str) else list(types)
        return prepare_hotswap_(
            self._owner, sources, slots, rank, samples, components, names, regions, adapters_per_sample
        )

    @exclusive_method
    def release_slots(self) -> None:
        """Release all slots that `prepare_hotswap` reserved. Compiled models are compiled again at their next call."""
        release_slots_(self._owner)


def prepare_hotswap_(
    owner: Owner,
    sources: Requests,
    slots: int | None,
    rank: int,
    samples: int,
    components: Iterable[str] | None,
    types: Sequence[str],
    regions: bool = False,
    adapters_per_sample: int = 0,
) -> Reserved:
    """Reserve slots on the models of `owner` and give the loaded adapters seats; see `Adapters.prepare_hotswap`."""
    known = {adapter_type.name for adapter_type in TYPES if adapter_type.stages is not PARAMETER.stages}
    unknown = [name for name in types if name not in known]
    if unknown:
        raise AdapterError(f"types: no {', '.join(map(repr, unknown))}, expected some of {', '.join(sorted(known))}")
    snapshot = owner.snapshot()
    active = snapshot.running
    least = max(1, len(active))
    count = least if slots is None else slots
    if count < least:
        raise AdapterError(f"slots is {count}, expected at least {least} for {len(active)} active adapters")
    wanted = _wanted_layers(snapshot, sources, None if components is None else set(components), owner.tokenizers())
    if not wanted:
        raise AdapterError("nothing to reserve for: pass files, folders or settings, or load an adapter first")
    models = snapshot.models
    needs = needs_of(models, wanted, types)
    reserved = reserve_all_(
        models, needs, count, rank=rank, samples=samples, common=types, adapters_per_sample=adapters_per_sample
    )
    snapshot = owner.snapshot()
    for component, bank in snapshot.banks.items():
        bank.call.by_rows = not owner.counts_prompts
        for adapter in bank.adapters.values():
            # An adapter in training stays outside the slots, which are copies of its parameters.
            is_trained = any(parameter.requires_grad for parameter in adapter.parameters())
            adapter.outside_slots = component not in reserved.layers or (adapter.outside_slots and is_trained)
    prepare_regions_(snapshot, regions)
    seat_(snapshot, active)
    for name in snapshot.adapters:
        if name not in active:
            with suppress(AdapterError):
                seat_(snapshot, [name], staying=snapshot.adapters)
    snapshot.refresh_()
    owner.changed()
    return reserved


def release_slots_(owner: Owner) -> None:
    """Release all slots on the models of `owner`."""
    for model in owner.models().values():
        unreserve_(model)
    owner.changed()


def needs_of(
    models: Mapping[str, nn.Module], wanted: Iterable[ByComponent], common: Collection[str] = ()
) -> dict[str, dict[str, Needs]]:
    """Return the needs of adapters by component and module path. Only the shapes of their tensors are used.

    Args:
        wanted: the layers of every adapter.
        common: names of adapter types of which any adapter has to fit on these layers.

    Raises:
        AdapterError: an adapter gives a layer more inputs than it has now.
    """
    needs: dict[str, dict[str, Needs]] = {}
    dtypes = {component: compute_dtype(list(model.modules())) for component, model in models.items()}
    # Shapes are slow to compute without values, and most layers of most files have those of another one.
    known: dict[Hashable, list[Form]] = {}
    for adapter in wanted:
        for component, layers in adapter.items():
            for path, layer in layers.items():
                if layer.widens and LayerSpec.of(models[component].get_submodule(path)) != layer.spec:
                    raise AdapterError(
                        f"{component}.{path}: an adapter gives it more inputs; load that adapter before reserving"
                    )
                need = needs.setdefault(component, {}).setdefault(path, Needs(layer.spec))
                dtype = dtypes[component]
                layout = _layout(layer, dtype)
                if layout not in known:
                    lowered = lower_in_common if layer.adapter_type.name in common else lower
                    known[layout] = lowered(_on_meta(layer, dtype), partial(_meta_weight, layer.spec, dtype))
                need.cover(known[layout])
    for component, layers in needs.items() if common else ():
        for need in layers.values():
            for adapter_type in TYPES:
                if adapter_type.name in common:
                    need.cover(common_needs(adapter_type, need.spec, dtypes[component]))
    return needs


def reserve_all_(
    models: Mapping[str, nn.Module],
    needs: Mapping[str, Mapping[str, Needs]],
    slots: int,
    *,
    rank: int = 0,
    samples: int = 0,
    common: Collection[str] = (),
    adapters_per_sample: int = 0,
) -> Reserved:
    """Reserve slots on models, in the place of those that were reserved before.

    Args:
        needs: what one adapter needs at most, by component and module path.
        slots: how many adapters with these needs fit at once.
        rank: the smallest number of rows per adapter on layers with low-rank changes.
        samples: how many samples of a batch can have strengths of their own; 0 for one strength for all.
        common: names of the adapter types that run in their common form.
        adapters_per_sample: see `Reservation`.
    """
    made: dict[str, tuple[Reservation, dict[str, nn.Module]]] = {}
    for component, layers in needs.items():
        modules = list(models[component].modules())
        for need in layers.values():
            need.rows = max(need.rows, rank) if need.rows else 0
        with torch.inference_mode(False):
            where = compute_dtype(modules), execution_device(modules)
            reservation = Reservation(layers, slots, *where, samples, common, adapters_per_sample)
        hosts = Targets(models[component]).modules
        for path in layers:
            with naming(f"{component}.{path}"):
                refuse_peft(hosts[path])
        made[component] = reservation, {path: hosts[path] for path in layers}
    for component, (reservation, hosts) in made.items():
        reserve_(models[component], reservation, hosts)
    return Reserved(
        slots,
        {component: len(reservation.slots) for component, (reservation, _) in made.items()},
        sum(reservation.bytes for reservation, _ in made.values()),
    )


def _wanted_layers(
    snapshot: AdapterSnapshot, sources: Requests, only: set[str] | None, tokenizers: Mapping[str, Any]
) -> list[ByComponent]:
    """Return the layers of all loaded adapters and of `sources`; of files only the shapes are read.

    Args:
        only: leave out other components; `None` for all.
        tokenizers: the tokenizers by the component of their text encoder.
    """
    models = snapshot.models
    wanted: list[ByComponent] = [
        {component: adapter.layers for component, adapter in loaded.components.items()}
        for loaded in snapshot.adapters.values()
    ]
    single = isinstance(sources, (str, os.PathLike, AdapterConfig, Mapping))
    for source in cast(Iterable[Request], [sources] if single else sources):
        configs = _configs(source, models)
        if configs is not None:
            wanted.append(
                {component: new_layers(models[component], config)[0] for component, config in configs.items()}
            )
        else:
            checkpoint = read(cast(Source, source), headers_only=True)
            planned = plan(checkpoint, models, components=only, tokenizers=tokenizers)
            planned.refuse_faults(strict=True)
            wanted.append(planned.layers)
    if only is None:
        return wanted
    return [{component: layers for component, layers in adapter.items() if component in only} for adapter in wanted]


def _configs(request: Request, models: Mapping[str, nn.Module]) -> dict[str, AdapterConfig] | None:
    """Return settings by component, or `None` if a request is a source. Settings alone are for all denoisers."""
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


def _meta_weight(spec: LayerSpec, dtype: torch.dtype) -> Tensor:
    """Return a base weight without values, in the dtype that it is read in."""
    return torch.empty(spec.weight_shape, dtype=torch.promote_types(dtype, torch.float32), device="meta")


def _layout(layer: AdapterLayer, dtype: torch.dtype) -> Hashable:
    """Return everything about an adapter layer that its forms without values depend on."""
    shapes = tuple((name, shape_of(t), t.is_floating_point() or t.dtype) for name, t in layer.tensors.items())
    settings = tuple(sorted(layer.settings.items()))
    return id(layer.adapter_type), layer.spec, layer.widens, layer.alpha, settings, shapes, dtype


def _on_meta(layer: AdapterLayer, dtype: torch.dtype) -> AdapterLayer:
    """Return a copy of an adapter layer without values, in `dtype`."""
    tensors = {name: converted(tensor.detach(), dtype, "meta") for name, tensor in layer.tensors.items()}
    return AdapterLayer(
        layer.adapter_type, layer.spec, tensors, layer.alpha, settings=layer.settings, widens=layer.widens
    )
