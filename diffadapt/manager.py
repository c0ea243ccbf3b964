"""The object behind `pipe.adapters`: everything that can be done with loaded adapters."""

import os
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial, wraps
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

from diffadapt import clock, families, scales
from diffadapt.adapter import Adapter
from diffadapt.attach import bank_of, unreserve_
from diffadapt.base_files import BaseFiles
from diffadapt.base_files import base_files as find_base_files
from diffadapt.combine import Combination, Method, Sign
from diffadapt.errors import AdapterError
from diffadapt.formats import writer
from diffadapt.hooks import execution_device
from diffadapt.hotswap import Requests, Reserved, needs_of, requested, reserve_all_, room, seat_
from diffadapt.io import Checkpoint, Location, Source, read, write
from diffadapt.load import Plan, attach_all_, detach_all_, plan
from diffadapt.loaded import Chosen, Loaded, LoadedAdapter, Numbers
from diffadapt.locks import held
from diffadapt.lowrank import Conversion, Maker, Sources, conversion, derive_
from diffadapt.merge import Keeping, expand_, merge_, refuse_mixture, remerged, unmerge_
from diffadapt.report import Report
from diffadapt.scales import Strength
from diffadapt.schedules import Moment
from diffadapt.state import AdapterState
from diffadapt.targets import Targets

P = ParamSpec("P")
R = TypeVar("R")


def _exclusive(method: Callable[Concatenate["Adapters", P], R]) -> Callable[Concatenate["Adapters", P], R]:
    """A method that waits until no other thread holds the models."""

    @wraps(method)
    def alone(self: "Adapters", /, *args: P.args, **kwargs: P.kwargs) -> R:
        with held(self._models().values()):
            return method(self, *args, **kwargs)

    return alone


Follow: TypeAlias = Callable[[clock.Listener | None], None]


class Adapters:
    """The adapters of a pipeline, or of one model.

    Holds no state of its own: adapters live on the models, so pipelines that share a model share its adapters.
    """

    def __init__(
        self,
        models: Callable[[], Mapping[str, nn.Module]],
        *,
        tokenizers: Callable[[], Mapping[str, Any]] = dict[str, Any],
        qualified: bool = True,
        changed: Callable[[], None] = lambda: None,
        follow: Follow | None = None,
    ) -> None:
        """
        Args:
            models: gives the present components.
            tokenizers: gives those of the text encoders, by component.
            qualified: whether prefixes in `activate` start with a component name.
            changed: called after adapters were loaded or removed.
            follow: makes the schedulers tell a listener of their steps, or nobody any more, if there are schedulers.
        """
        self._models = models
        self._tokenizers = tokenizers
        self._qualified = qualified
        self._changed = changed
        self._follow = follow

    @property
    def names(self) -> list[str]:
        """Names in the order of loading."""
        return list(self._loaded().adapters)

    @property
    def active(self) -> dict[str, Strength]:
        """Strength of every active adapter, as it was set."""
        return self._loaded().active

    @property
    def merged(self) -> list[str]:
        """Names of the adapters that are merged into the weights."""
        return list(self._loaded().merged)

    def __contains__(self, name: object) -> bool:
        return name in self._loaded().adapters

    def __len__(self) -> int:
        return len(self._loaded().adapters)

    def __iter__(self) -> Iterator[str]:
        return iter(self._loaded().adapters)

    def __getitem__(self, name: str) -> LoadedAdapter:
        return self._loaded()[name]

    def __repr__(self) -> str:
        return str(self._loaded())

    @_exclusive
    def load(
        self,
        source: Source | Plan,
        name: str | None = None,
        *,
        scale: Strength = 1.0,
        components: Iterable[str] | None = None,
        where: Location | None = None,
        strict: bool = True,
        dtype: torch.dtype | None = None,
        activate: bool = True,
        allow_recompile: bool = False,
        format: str | None = None,
    ) -> Report:
        """Load an adapter; `pipe.load_adapter` documents the arguments."""
        models = self._models()
        if components is not None:
            components = [components] if isinstance(components, str) else list(components)
            unknown = [component for component in components if component not in models]
            if unknown:
                raise AdapterError(f"components: no {', '.join(unknown)}; the pipeline has {', '.join(models)}")
        loaded = self._loaded()
        if name is not None:
            loaded.refuse_name(name)
        checkpoint, planned = self._planned(source, where, components, dtype, models, name=name, format=format)
        if name is None:
            names = (f"default_{number}" for number in range(len(loaded.adapters) + 1))
            name = checkpoint.name or next(name for name in names if name not in loaded.adapters)
            loaded.refuse_name(name)
        scales.check(name, scale)
        planned.refuse_faults(strict)
        self._bring(name, planned, scale, activate, allow_recompile)
        return planned.report(name)

    @_exclusive
    def prepare_hotswap(
        self,
        sources: Requests = (),
        *,
        slots: int | None = None,
        rank: int = 0,
        samples: int = 0,
        components: Iterable[str] | None = None,
    ) -> Reserved:
        """Reserve room for adapters, so that a compiled pipeline takes them without a recompile. Call before compiling.

        From then on adapters are written into the reserved slots: loading, swapping, removing, activating, rescaling
        and disabling them compiles nothing. What has no room raises and changes nothing. Adapters loaded already
        get slots too. What was reserved before is given up.

        Args:
            sources: what the room has to be enough for: files, folders, hub ids, state dicts (of which only headers
                are read), or settings as for `add_adapter` (`LoraConfig(rank=64, target_modules="all-linear")`).
                Every layer that one of them changes gets room for the largest rank and for every type that one of
                them has there.
            slots: how many adapters of that size have room at once; default: one, or as many as are active.
            rank: room for at least this rank wherever low-rank changes go.
            samples: how many prompts `per_sample` will be used with; without it `per_sample` is refused.
            components: reserve on these only.

        Raises:
            AdapterError: a source cannot be read or applied, more adapters are active than `slots`, or there is
                nothing to reserve for. Nothing has changed then.
        """
        loaded = self._loaded()
        active = loaded.running
        count = max(1, len(active)) if slots is None else slots
        if count < max(1, len(active)):
            raise AdapterError(f"slots is {count}, expected at least {max(1, len(active))}, as many as are active")
        wanted = requested(loaded, sources, None if components is None else set(components), self._tokenizers())
        if not wanted:
            raise AdapterError("nothing to reserve for: pass files, folders or settings, or load an adapter first")
        models = loaded.models
        reserved = reserve_all_(models, needs_of(models, wanted), count, rank=rank, samples=samples)
        loaded = self._loaded()
        seat_(loaded, active)
        for name in loaded.adapters:
            if name not in active:
                with suppress(AdapterError):
                    seat_(loaded, [name], staying=loaded.adapters)
        self._changed()
        return reserved

    @_exclusive
    def release_slots(self) -> None:
        """Give up what `prepare_hotswap` reserved. A compiled model notices."""
        for model in self._models().values():
            unreserve_(model)
        self._changed()

    @_exclusive
    def hotswap(
        self,
        name: str,
        source: Source | Plan,
        *,
        scale: Strength | None = None,
        where: Location | None = None,
        strict: bool = True,
        dtype: torch.dtype | None = None,
        allow_recompile: bool = False,
    ) -> Report:
        """Put another adapter in the place of `name`, in all components or, if anything is wrong, in none.

        After `prepare_hotswap` a compiled model takes it without a recompile: other rank, alpha, type and layers. In
        the place of a merged adapter it is merged, too, into the same parameters, and others stay merged: no recompile
        either, without slots if none of its layers is new to adapters.

        Args:
            source: as for `pipe.load_adapter`, or what `prefetch` returned.
            scale: default: the one that `name` has.
            allow_recompile: if the slots have no room, run beside them.

        Raises:
            AdapterError: no such adapter, the source cannot be read or applied, or there is no room for it; the
                message says what to reserve. Or it cannot be merged in the place of a merged one. The old adapter goes
                on running then, and what was merged is, bit for bit.
        """
        old = self[name]
        models = self._models()
        _, planned = self._planned(source, where, None, dtype, models, name=name, leaving=name)
        strength = next(iter(old.components.values())).strength if scale is None else scale
        scales.check(name, strength)
        planned.refuse_faults(strict)
        if name in self.merged:
            self._swap_merged(old, planned, strength, kept=scale is None)
        else:
            self._bring(name, planned, strength, old.active, allow_recompile, old=old, kept=scale is None)
        return planned.report(name)

    def prefetch(
        self,
        source: Source,
        *,
        where: Location | None = None,
        components: Iterable[str] | None = None,
        strict: bool = True,
        dtype: torch.dtype | None = None,
    ) -> Plan:
        """Read, check and convert an adapter for these models without loading it.

        `load` and `hotswap` take the result as their source, any number of times, with little left to do. It is in CPU
        memory, page-locked if there is CUDA, and stays there on a pipeline with slots.

        Raises:
            AdapterError: as `load`.
        """
        models = self._models()
        _, planned = self._planned(source, where, components, dtype, models, device=torch.device("cpu"))
        planned.refuse_faults(strict)
        for component, adapter in planned.adapters.items():
            adapter.train(models[component].training)
        return planned

    @_exclusive
    def activate(self, adapters: Chosen) -> None:
        """Make exactly these adapters active.

        Args:
            adapters: name -> strength. A strength is a number, or numbers by prefix ("unet", "unet.up_blocks.1"): the
                longest matching prefix wins, what no prefix names has that of "", else 1. A name alone means 1. In the
                place of a number, a schedule (`Linear`, `Cosine`, `Piecewise`) sets the strength at every step of
                the runs that follow. Text encoders run before them and have the strength of the start.

        Raises:
            AdapterError: an unknown name, a prefix that matches no layer of the adapter, a strength that is not a
                finite number, an adapter is merged, the slots have no room for all of them at once, or a schedule
                with no scheduler to follow. Nothing has changed then.
        """
        self._activate(adapters, self._follow)

    @contextmanager
    def scheduled(self, adapters: Chosen, scheduler: Any = None) -> Generator[None, None, None]:
        """`activate` inside; on leaving, also by an exception, the state before.

        Args:
            scheduler: whose steps schedules follow in a loop of your own; default those of the pipeline.
        """
        follow = self._follow
        if scheduler is not None:
            follow = partial(clock.follow, scheduler, next(iter(self._models().values())))
        try:
            with self._restored():
                self._activate(adapters, follow)
                yield
        finally:
            self._keep_time(follow)

    @contextmanager
    def activated(self, adapters: Chosen) -> Generator[None, None, None]:
        """`activate(adapters)` inside; on leaving, also by an exception, exactly what was active before.

        Other threads that ask for adapters of the same models wait meanwhile, see `locks`.
        """
        with self.scheduled(adapters):
            yield

    @contextmanager
    def per_sample(self, mixes: Sequence[Chosen], *, images: int | None = None) -> Generator[None, None, None]:
        """Inside, every prompt of a batch has a mix of adapters of its own: `{"a": 1.0}`, `["a", "b"]`, `{}`, ...

        Row i of the result is what a run with prompt i and mix i alone gives. The batch may be repeated for guidance,
        and in every prompt for its images. A pipeline has to get as many prompts (and negative prompts, if any) as
        there are mixes. After `prepare_hotswap(..., samples=len(mixes))` nothing is compiled anew for other mixes.

        Args:
            mixes: for every prompt what `activate` takes.
            images: per prompt; default: what the pipeline is called with (`num_images_per_prompt`).

        Raises:
            AdapterError: as `activate`; the slots are not for so many samples; or an adapter is on routed experts.
        """
        loaded = self._loaded()
        loaded.refuse_merged("per_sample")
        if not mixes:
            raise AdapterError("per_sample: no mixes, expected one for every prompt")
        resolved: list[dict[str, dict[str, Numbers]]] = []
        for mix in mixes:
            wanted, strengths = loaded.resolved(mix)
            for name, strength in wanted.items():
                self._refuse_schedule("per_sample", name, strength)
            resolved.append(strengths)
        for component, bank in loaded.banks.items():
            reservation = bank.reservation
            if reservation is not None and reservation.samples != len(mixes):
                raise AdapterError(
                    f"per_sample: {len(mixes)} mixes, but the slots of {component} are for "
                    f"{reservation.samples or 'no'} samples; call prepare_hotswap(..., samples={len(mixes)}) "
                    "before compiling"
                )
        names = list(dict.fromkeys(name for mix in resolved for name in mix))
        for name in names:
            for component, adapter in loaded[name].components.items():
                routed = next((path for path in adapter.layers if "experts" in path.split(".")), None)
                if routed is not None:
                    raise AdapterError(
                        f"per_sample: {component}.{routed}, which {name!r} changes, is an expert, and gets some tokens "
                        "of any sample; run them one by one"
                    )
        with self._restored():
            loaded = self._loaded()
            seat_(loaded, names)
            for name in names:
                for component, adapter in loaded[name].components.items():
                    strengths = [mix[name][component] if name in mix else 0.0 for mix in resolved]
                    count = len(adapter.layers)
                    adapter.set_strengths([[s] * count if isinstance(s, (int, float)) else s for s in strengths])
            for component, bank in loaded.banks.items():
                # A text encoder sees every prompt once.
                encodes = component.startswith("text_encoder")
                bank.call.samples, bank.call.images = len(mixes), 1 if encodes else images or 1
                bank.call.asks_images = images is None and not encodes
            loaded.set_active_(names)
            yield

    @contextmanager
    def disabled(self) -> Generator[None, None, None]:
        """The base model inside; on leaving, also by an exception, the state before."""
        with held(self._models().values()):
            merged, keeping = self.merged, Keeping.of(self._models())
            self.unmerge()
            try:
                with self._restored():
                    self._loaded().set_active_(())
                    yield
            finally:
                if merged:
                    merge_(self._models(), merged, keeping)

    @contextmanager
    def _restored(self) -> Generator[None, None, None]:
        """Have the models to oneself; on leaving, every adapter is as active and as strong as before, and new ones are
        not active.
        """
        with held(self._models().values()):
            yield from self._restoring()

    def _restoring(self) -> Generator[None, None, None]:
        states: dict[tuple[str, str], tuple[Adapter, bool, Strength, Tensor]] = {}
        calls: dict[str, tuple[int, int, bool]] = {}
        for component, bank in self._loaded().banks.items():
            calls[component] = bank.call.samples, bank.call.images, bank.call.asks_images
            for name, adapter in bank.adapters.items():
                states[component, name] = adapter, adapter.active, adapter.strength, adapter.gates.clone()
        try:
            yield
        finally:
            loaded = self._loaded()
            for component, bank in loaded.banks.items():
                bank.call.samples, bank.call.images, bank.call.asks_images = calls.get(component, (0, 1, True))
                for name, adapter in bank.adapters.items():
                    state = states.get((component, name))
                    adapter.active = state is not None and state[1]
                    if state is not None and adapter is state[0]:
                        adapter.strength = state[2]
                        adapter.set_gates(state[3])
                    elif state is not None:
                        # Another one took its place meanwhile.
                        adapter.strength = state[2]
                        strengths = loaded.strengths(name, state[2], {component: adapter}, strict=False)
                        adapter.set_strengths(strengths[component])
            seat_(loaded, loaded.running)
            loaded.refresh_()
            self._keep_time(self._follow)

    @_exclusive
    def remove(self, name: str) -> None:
        """Remove an adapter, with the tokens it brought, and free its memory. The others stay as they are.

        Raises:
            AdapterError: no such adapter, it is merged, or someone else added tokens to its tokenizers since.
        """
        loaded = self._loaded()
        if loaded[name].name in loaded.merged:
            raise AdapterError(f"adapter {name!r} is merged into the weights; call unmerge() before remove()")
        detach_all_(self._models(), name)
        self._keep_time(self._follow)
        self._changed()

    @_exclusive
    def clear(self) -> None:
        """Remove every adapter, merged ones too: the models are bit for bit what they were before the first."""
        self.unmerge()
        for name in self.names:
            self.remove(name)

    @_exclusive
    def merge(self, *names: str, compact: bool | None = None, base_files: BaseFiles = False) -> None:
        """Add adapters into the weights, at their present strengths; without names, all that are active.

        A merged adapter costs nothing at run time, and `hotswap` puts another in its place. `unmerge` undoes all
        merges, bit for bit, as long as neither the merged weights nor the adapters are written meanwhile.

        Args:
            compact: keep for that not the changed weights but what rounding lost, a few percent of them. The default
                does so where it also is the faster way, when memory has to be found for copies: for sums of low-rank
                changes (LoRA, LoHa, LoKr) in weights of half precision. `undo_bytes` says what is kept.
            base_files: keep nothing of weights that are, bit for bit, in the safetensors files that the models were
                read from; unmerging and swapping read those again. `True` for where `from_pretrained` found them, or
                a path (a file, a folder, a pipeline's folder), or one by component. Faster than the other two. The
                files are held open as long as something is merged: they may be moved or deleted, not written.

        Raises:
            AdapterError: unknown or already merged, or nothing to merge; quantised or unreachable weights; a result
                that is not finite; no such files. Nothing has been written then.
        """
        loaded = self._loaded()
        if any(bank.call.samples for bank in loaded.banks.values()):
            raise AdapterError("merge: inside per_sample every sample has weights of its own; leave it first")
        chosen = names or tuple(loaded.running)
        if not chosen:
            raise AdapterError("nothing to merge: no adapter is active that is not merged already")
        for name in chosen:
            if name in loaded.merged:
                raise AdapterError(f"adapter {name!r} is merged already; call unmerge() first")
            self._refuse_schedule("merge", name, loaded[name].strength)
        components = {component for name in chosen for component in loaded[name].components}
        models = {component: model for component, model in loaded.models.items() if component in components}
        files = find_base_files(models, base_files)
        merge_(loaded.models, chosen, Keeping(compact, files))
        for name in chosen:
            for adapter in loaded[name].components.values():
                adapter.active = True

    @property
    def undo_bytes(self) -> int:
        """Memory that is kept to undo merges."""
        banks = self._loaded().banks.values()
        return sum(way.nbytes for bank in banks for way in bank.undo)

    @_exclusive
    def unmerge(self) -> None:
        """Undo every merge: all weights as they were, bit for bit, and the adapters active beside them.

        Raises:
            AdapterError: a merged weight or adapter has been written since, so that the original is not known.
        """
        merged = self.merged
        if not merged:
            return
        for model in self._models().values():
            unmerge_(model)
        loaded = self._loaded()
        # Others may have taken their seats; without one they run beside the slots.
        with suppress(AdapterError):
            seat_(loaded, merged, staying=loaded.active)
        loaded.refresh_()

    @_exclusive
    def to_lora(self, adapters: Chosen, name: str, rank: int | None = None, energy: float | None = None) -> Conversion:
        """Add a plain LoRA, inactive, that does what `activate(adapters)` would do.

        Args:
            rank: the most that a layer gets.
            energy: share of a layer's change, in squares, that the smallest rank is chosen for; see `lowrank`.

        Raises:
            AdapterError: no LoRA, or without `rank` and `energy` only a large one, can do it. Nothing has changed then.
        """
        return self._derive(adapters, name, lambda sources: conversion(rank, energy))

    @_exclusive
    def combine(
        self,
        adapters: Mapping[str, Strength],
        name: str,
        *,
        method: Method = "svd",
        density: float | None = None,
        rank: int | None = None,
        energy: float | None = None,
        generator: torch.Generator | None = None,
        sign: Sign = "total",
    ) -> Conversion:
        """Add a plain LoRA, inactive, of adapters with weights, or weights by prefix; options as in `Combination`."""
        return self._derive(adapters, name, Combination(method, density, rank, energy, generator, sign).maker)

    def save(self, name: str, path: str | os.PathLike[str], format: str = "diffusers") -> Path:
        """Write an adapter to a file.

        Args:
            path: a `.safetensors` file, or a folder, which gets `pytorch_lora_weights.safetensors`. For "peft" a
                folder, which gets `adapter_model.safetensors` and `adapter_config.json`, in a folder of its own for
                each component if there are several.
            format: "diffusers", "kohya", "peft", "comfy" or "onetrainer".

        Returns:
            The file written; it appears complete or not at all.

        Raises:
            AdapterError: the format cannot express the adapter. Nothing has been written then.
        """
        loaded = self[name]
        dump = writer(format).dump
        assert dump is not None
        models = self._models()
        layers = {
            c: {at: layer.state for at, layer in a.layers.items()} for c, a in loaded.components.items() if a.layers
        }
        embeddings = {key: vectors for learned in loaded.learned for key, vectors in learned.state.items()}
        layouts = {component: families.layout(Targets(models[component])) for component in layers}
        return write(path, dump(AdapterState(layers, loaded.metadata, families.of_models(models), layouts, embeddings)))

    def models(self) -> list[nn.Module]:
        """The models of the pipeline."""
        return list(self._models().values())

    def _planned(
        self,
        source: Source | Plan,
        where: Location | None,
        components: Iterable[str] | None,
        dtype: torch.dtype | None,
        models: Mapping[str, nn.Module],
        *,
        name: str | None = None,
        device: torch.device | None = None,
        leaving: str | None = None,
        format: str | None = None,
    ) -> tuple[Checkpoint, Plan]:
        """A source resolved against the models.

        Args:
            name: what tokens are called that have no name in the file.
            leaving: the adapter whose place it will take.
            format: see `load.plan`.
        """
        if isinstance(source, Plan):
            if components is not None or dtype is not None:
                raise AdapterError("components and dtype were settled by prefetch(); pass them there")
            for component, adapter in source.adapters.items():
                if source.targets[component].model is not models.get(component):
                    raise AdapterError(f"it was prefetched for another {component}; call prefetch() on this pipeline")
                bank = bank_of(models[component])
                held = [name for name, other in bank.adapters.items() if other is adapter] if bank else []
                if held:
                    raise AdapterError(f"it is loaded already, as {held[0]!r}; remove that first")
            if not source.tokens:
                return source.checkpoint, source
            # Which tokens are free may have changed.
            checkpoint = source.checkpoint
        else:
            checkpoint = read(source, where or Location())
            if name is not None:
                checkpoint = replace(checkpoint, name=name)
        if dtype is not None and dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            raise AdapterError(f"dtype is {dtype}; adapters compute in float16, bfloat16, float32 or float64")
        return checkpoint, plan(
            checkpoint,
            models,
            components=components,
            dtype=dtype,
            device=device,
            tokenizers=self._tokenizers(),
            leaving=leaving,
            format=format,
        )

    def _bring(
        self,
        name: str,
        planned: Plan,
        scale: Strength,
        activate: bool,
        allow_recompile: bool,
        *,
        old: LoadedAdapter | None = None,
        kept: bool = False,
    ) -> None:
        """Attach planned adapters as `name` and give them seats, or change nothing.

        Args:
            old: who has that name now.
            kept: the scale is that of `old`, whose prefixes need not suit the new one.
        """
        loaded, adapters = self._loaded(), planned.adapters
        models = loaded.models
        strengths = loaded.strengths(name, scale, adapters, strict=not kept)
        for component, adapter in adapters.items():
            bank = loaded.banks.get(component)
            if bank is not None and activate and bank.merged:
                adapter.active = True
                refuse_mixture(component, {**bank.adapters, name: adapter}, bank.merged)
        layers = {component: adapter.layers for component, adapter in adapters.items() if adapter.layers}
        arrangements, beside = room(loaded, name, layers, activate, allow_recompile, replacing=old is not None)
        attach_all_(models, name, planned, replacing=old is not None)
        for component, model in models.items():
            if component in arrangements:
                arrangements[component].carry_out()
            elif (bank := bank_of(model)) and bank.reservation:
                bank.reservation.vacate(name)
        for component, adapter in adapters.items():
            if component not in arrangements and planned.device is not None:
                # It was prefetched into CPU memory, and runs from where it is.
                adapter.to(execution_device(planned.targets[component].all))
            adapter.strength = scale
            adapter.set_strengths(strengths[component])
            adapter.active = activate
            adapter.beside = component in beside
        self._loaded().refresh_()
        self._keep_time(self._follow)
        self._changed()

    def _swap_merged(self, old: LoadedAdapter, planned: Plan, scale: Strength, *, kept: bool) -> None:
        """Merge planned adapters in the place of a merged one, or change nothing; arguments as for `_bring`."""
        loaded, adapters, name = self._loaded(), planned.adapters, old.name
        self._refuse_schedule("hotswap", name, scale)
        for part in (*old.components.values(), *adapters.values()):
            if any(layer.widens for layer in part.layers.values()):
                raise AdapterError(f"hotswap: {name!r} is merged, and a layer's inputs would change; unmerge() first")
        strengths = loaded.strengths(name, scale, adapters, strict=not kept)
        wanted: dict[str, dict[str, Adapter]] = {}
        for component in loaded.models:
            bank = loaded.banks.get(component)
            after = {} if bank is None else bank.adapters
            if component in adapters:
                after[name] = adapters[component]
            else:
                after.pop(name, None)
            merged = {name, *(() if bank is None else bank.merged)}
            refuse_mixture(component, after, merged)
            wanted[component] = {n: adapter for n, adapter in after.items() if n in merged}
        for component, adapter in adapters.items():
            if planned.device is not None:
                adapter.to(execution_device(planned.targets[component].all))
            adapter.strength, adapter.active, adapter.beside = scale, True, False
            adapter.set_strengths(strengths[component])
        hosts = {component: planned.hosts(component) for component in adapters}
        with remerged(loaded.models, wanted, Keeping.of(loaded.models), hosts=hosts):
            attach_all_(loaded.models, name, planned, replacing=True)
        for bank in self._loaded().banks.values():
            if bank.reservation is not None:
                bank.reservation.vacate(name)
        self._keep_time(self._follow)
        self._changed()

    def _loaded(self) -> Loaded:
        return Loaded(self._models(), qualified=self._qualified)

    def _derive(self, adapters: Chosen, name: str, maker: Callable[[Sources], Maker]) -> Conversion:
        loaded = self._loaded()
        loaded.refuse_name(name)
        for bank in loaded.banks.values():
            expand_(bank)
        wanted, strengths = loaded.resolved(adapters)
        for source, strength in wanted.items():
            self._refuse_schedule(name, source, strength)
        report = derive_(loaded.models, name, strengths, maker)
        self._changed()
        return report

    def _activate(self, adapters: Chosen, follow: Follow | None) -> None:
        loaded = self._loaded()
        loaded.refuse_merged("activate")
        wanted, strengths = loaded.resolved(adapters)
        if follow is None and any(map(scales.is_scheduled, wanted.values())):
            raise AdapterError(
                "a schedule follows the steps of a scheduler, which a single model does not have; "
                "use `with adapters.scheduled(..., scheduler=...)`"
            )
        seat_(loaded, wanted)
        for name, strength in wanted.items():
            for component, adapter in loaded[name].components.items():
                adapter.strength = strength
                adapter.set_strengths(strengths[name][component])
        loaded.set_active_(wanted)
        self._keep_time(follow)

    def _keep_time(self, follow: Follow | None) -> None:
        """Hear of the steps of a run for as long as one of the active adapters has a schedule."""
        if follow is not None:
            follow(self._advance if any(map(scales.is_scheduled, self.active.values())) else None)

    def _advance(self, moment: Moment) -> None:
        """Set the strengths that schedules have at `moment`."""
        loaded = self._loaded()
        for name, found in loaded.adapters.items():
            if scales.is_scheduled(found.strength):
                strengths = loaded.strengths(name, found.strength, found.components, strict=False, moment=moment)
                for component, adapter in found.components.items():
                    # Prompts are encoded before a run, and perhaps again before the next one.
                    if not component.startswith("text_encoder"):
                        adapter.set_strengths(strengths[component])
        loaded.refresh_()

    def _refuse_schedule(self, action: str, name: str, strength: Strength) -> None:
        if scales.is_scheduled(strength):
            raise AdapterError(f"{action}: the strength of {name!r} is a schedule; a number is expected here")
