"""The object behind `pipe.adapters`: everything that can be done with loaded adapters."""

import os
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial, wraps
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import nn

from diffadapt.errors import AdapterError
from diffadapt.files.checkpoint import Location, Source
from diffadapt.loading.attach_plan import detach_all_
from diffadapt.loading.plan import Plan
from diffadapt.loading.report import Report
from diffadapt.management.activation import activate_, keep_time, restored
from diffadapt.management.deriving import derive_adapter_
from diffadapt.management.installation import install_
from diffadapt.management.owner import Owner
from diffadapt.management.per_sample import mixed_per_sample
from diffadapt.management.reserving import Requests, Reserved, prepare_hotswap_
from diffadapt.management.saving import save_adapter
from diffadapt.management.snapshot import Chosen, LoadedAdapter
from diffadapt.management.sources import plan_source
from diffadapt.management.weights import merge_adapters_, unmerge_adapters_, unmerged
from diffadapt.merging.undo_from_file import BaseFiles
from diffadapt.runtime.attach import unreserve_
from diffadapt.runtime.locks import exclusive
from diffadapt.strengths import scheduler_clock
from diffadapt.strengths.by_prefix import Strength, check_strength
from diffadapt.to_lora.combine import Combination, Method, Sign
from diffadapt.to_lora.derive import conversion
from diffadapt.to_lora.report import Conversion

P = ParamSpec("P")
R = TypeVar("R")


def _exclusive(method: Callable[Concatenate["Adapters", P], R]) -> Callable[Concatenate["Adapters", P], R]:
    """A method that waits until no other thread holds the models."""

    @wraps(method)
    def alone(self: "Adapters", /, *args: P.args, **kwargs: P.kwargs) -> R:
        with exclusive(self._owner.models().values()):
            return method(self, *args, **kwargs)

    return alone


class Adapters:
    """The adapters of a pipeline, or of one model.

    Holds no state of its own: adapters live on the models, so pipelines that share a model share its adapters.
    """

    def __init__(self, owner: Owner) -> None:
        self._owner = owner

    @property
    def names(self) -> list[str]:
        """Names in the order of loading."""
        return list(self._owner.snapshot().adapters)

    @property
    def active(self) -> dict[str, Strength]:
        """Strength of every active adapter, as it was set."""
        return self._owner.snapshot().active

    @property
    def merged(self) -> list[str]:
        """Names of the adapters that are merged into the weights."""
        return list(self._owner.snapshot().merged)

    def __contains__(self, name: object) -> bool:
        return name in self._owner.snapshot().adapters

    def __len__(self) -> int:
        return len(self._owner.snapshot().adapters)

    def __iter__(self) -> Iterator[str]:
        return iter(self._owner.snapshot().adapters)

    def __getitem__(self, name: str) -> LoadedAdapter:
        return self._owner.snapshot()[name]

    def __repr__(self) -> str:
        return str(self._owner.snapshot())

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
        snapshot = self._owner.snapshot()
        if name is not None:
            snapshot.refuse_name(name)
        checkpoint, planned = plan_source(
            self._owner, source, where=where, components=components, dtype=dtype, name=name, format=format
        )
        if name is None:
            name = checkpoint.name or snapshot.free_name()
            snapshot.refuse_name(name)
        check_strength(name, scale)
        planned.refuse_faults(strict)
        install_(self._owner, name, planned, scale, activate=activate, allow_recompile=allow_recompile)
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
        return prepare_hotswap_(self._owner, sources, slots, rank, samples, components)

    @_exclusive
    def release_slots(self) -> None:
        """Give up what `prepare_hotswap` reserved. A compiled model notices."""
        for model in self._owner.models().values():
            unreserve_(model)
        self._owner.changed()

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
        _, planned = plan_source(self._owner, source, where=where, dtype=dtype, name=name, leaving=name)
        strength = next(iter(old.components.values())).strength if scale is None else scale
        check_strength(name, strength)
        planned.refuse_faults(strict)
        install_(
            self._owner,
            name,
            planned,
            strength,
            activate=old.active,
            allow_recompile=allow_recompile,
            old=old,
            keeps_strength=scale is None,
        )
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
        models = self._owner.models()
        _, planned = plan_source(
            self._owner, source, where=where, components=components, dtype=dtype, device=torch.device("cpu")
        )
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
        activate_(self._owner, adapters, self._owner.follow)

    @contextmanager
    def scheduled(self, adapters: Chosen, scheduler: Any = None) -> Generator[None, None, None]:
        """`activate` inside; on leaving, also by an exception, the state before.

        Args:
            scheduler: whose steps schedules follow in a loop of your own; default those of the pipeline.
        """
        follow = self._owner.follow
        if scheduler is not None:
            follow = partial(scheduler_clock.follow, scheduler, next(iter(self._owner.models().values())))
        try:
            with restored(self._owner):
                activate_(self._owner, adapters, follow)
                yield
        finally:
            keep_time(self._owner, follow)

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
        with mixed_per_sample(self._owner, mixes, images):
            yield

    @contextmanager
    def disabled(self) -> Generator[None, None, None]:
        """The base model inside; on leaving, also by an exception, the state before."""
        with unmerged(self._owner), restored(self._owner):
            self._owner.snapshot().set_active_(())
            yield

    @_exclusive
    def remove(self, name: str) -> None:
        """Remove an adapter, with the tokens it brought, and free its memory. The others stay as they are.

        Raises:
            AdapterError: no such adapter, it is merged, or someone else added tokens to its tokenizers since.
        """
        loaded = self._owner.snapshot()
        if loaded[name].name in loaded.merged:
            raise AdapterError(f"adapter {name!r} is merged into the weights; call unmerge() before remove()")
        detach_all_(self._owner.models(), name)
        keep_time(self._owner, self._owner.follow)
        self._owner.changed()

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
        merge_adapters_(self._owner, names, compact, base_files)

    @property
    def undo_bytes(self) -> int:
        """Memory that is kept to undo merges."""
        banks = self._owner.snapshot().banks.values()
        return sum(way.nbytes for bank in banks for way in bank.undo)

    @_exclusive
    def unmerge(self) -> None:
        """Undo every merge: all weights as they were, bit for bit, and the adapters active beside them.

        Raises:
            AdapterError: a merged weight or adapter has been written since, so that the original is not known.
        """
        unmerge_adapters_(self._owner)

    @_exclusive
    def to_lora(self, adapters: Chosen, name: str, rank: int | None = None, energy: float | None = None) -> Conversion:
        """Add a plain LoRA, inactive, that does what `activate(adapters)` would do.

        Args:
            rank: the most that a layer gets.
            energy: share of a layer's change, in squares, that the smallest rank is chosen for; see `lowrank`.

        Raises:
            AdapterError: no LoRA, or without `rank` and `energy` only a large one, can do it. Nothing has changed then.
        """
        return derive_adapter_(self._owner, adapters, name, lambda sources: conversion(rank, energy))

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
        return derive_adapter_(
            self._owner, adapters, name, Combination(method, density, rank, energy, generator, sign).maker
        )

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
        return save_adapter(self._owner, name, path, format)

    def models(self) -> list[nn.Module]:
        """The models of the pipeline."""
        return list(self._owner.models().values())
