"""The object behind `pipe.adapters`: everything users can do with loaded adapters."""

import os
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from diffadapt.errors import AdapterError
from diffadapt.files.checkpoint import Location, Source
from diffadapt.loading.plan import Plan
from diffadapt.loading.report import Report
from diffadapt.management.activation import activate_, await_, follow_of, follow_schedules
from diffadapt.management.call_forms import Names, Strengths, chosen_of, name_and_scale, names_of
from diffadapt.management.continuing import install_trainable_
from diffadapt.management.deriving import derive_adapter_
from diffadapt.management.installation import install_adapter_, remove_adapters_
from diffadapt.management.owner import exclusive_method
from diffadapt.management.reserving import PreparedModels
from diffadapt.management.saving import save_adapter
from diffadapt.management.shared_components import may_be_shared, without_shared
from diffadapt.management.showing import reported
from diffadapt.management.snapshot import Chosen
from diffadapt.management.sources import located, plan_source, prefetch_source
from diffadapt.management.upcoming import UpcomingAdapter, cancel_all
from diffadapt.management.weights import merge_adapters_, unmerge_adapters_
from diffadapt.merging.undo_from_file import BaseFiles
from diffadapt.strengths.by_prefix import Strength
from diffadapt.to_lora.combine import Combination, Method, Sign
from diffadapt.to_lora.derive import conversion
from diffadapt.to_lora.report import Conversion


class Adapters(PreparedModels):
    """The adapters of a pipeline or of one model: a collection by name, and everything that can be done with them.

    It holds no state of its own: adapters live on the models, so pipelines that share a model share its adapters.
    """

    @exclusive_method
    def load(
        self,
        source: Source | Plan,
        name: str | None = None,
        scale: Strength = 1.0,
        *,
        adapter_name: str | None = None,
        components: Iterable[str] | None = None,
        where: Location | None = None,
        strict: bool = True,
        dtype: torch.dtype | None = None,
        activate: bool = True,
        allow_recompile: bool = False,
        format: str | None = None,
        trainable: bool = False,
    ) -> Report:
        """Load an adapter. `pipe.load_adapter` calls this method and documents the arguments.

        Args:
            where: the arguments of `pipe.load_adapter` that locate a file: `weight_name`, `subfolder`, `revision`, ...
        """
        snapshot = self._owner.snapshot()
        name, scale = name_and_scale(name, adapter_name, scale)
        if name is not None and not may_be_shared(snapshot, name):
            snapshot.refuse_name(name)
        dtype = torch.float32 if trainable and dtype is None and not isinstance(source, Plan) else dtype
        planned = plan_source(
            self._owner, source, where=where, components=components, dtype=dtype, name=name, format=format
        )
        if name is None:
            name = planned.checkpoint.name or snapshot.free_name()
        planned.refuse_faults(strict)
        new = without_shared(snapshot, name, planned)
        install = install_trainable_ if trainable else install_adapter_
        install(self._owner, name, new, scale, activate=activate, allow_recompile=allow_recompile)
        return reported(planned, name)

    @exclusive_method
    def hotswap(
        self,
        name: str,
        source: Source | Plan,
        *,
        scale: Strength | None = None,
        where: Location | None = None,
        weight_name: str | None = None,
        subfolder: str | None = None,
        strict: bool = True,
        dtype: torch.dtype | None = None,
        allow_recompile: bool = False,
    ) -> Report:
        """Replace adapter `name` by another one in all components, or in none if anything is wrong.

        After `prepare_hotswap` a compiled model takes an adapter of another rank, alpha, type and set of layers without
        a recompile. If `name` is merged, the new adapter is merged in its place, into the same parameters, and others
        stay merged. That needs no recompile either, even without slots if all its layers carried adapters before.

        Args:
            source: a file, folder, hub id or state dict, or what `prefetch` returned.
            scale: strength of the new adapter; defaults to that of the old one.
            where: the arguments of `pipe.load_adapter` that locate a file: `weight_name`, `subfolder`, `revision`, ...
            weight_name: name of the file in a folder or hub repository with several.
            subfolder: folder of the file in a hub repository or local folder.
            strict: raise an error unless every tensor of the file can be used.
            dtype: dtype of the parameters; defaults to the dtype each component computes in.
            allow_recompile: if the slots have no room, run the adapter outside them instead of raising an error.

        Returns:
            Which tensors of the file are used, and why others are not.

        Raises:
            AdapterError: no such adapter; the source cannot be read or applied; the slots have no room for it (the
                message says what to reserve); or it cannot be merged in the place of a merged one. The old adapter
                then stays as it is, and merged weights keep every bit.
        """
        old = self._owner.snapshot()[name]
        where = located(where, weight_name, subfolder)
        planned = plan_source(self._owner, source, where=where, dtype=dtype, name=name, leaving=name)
        planned.refuse_faults(strict)
        install_adapter_(
            self._owner, name, planned, scale, activate=old.active, allow_recompile=allow_recompile, old=old
        )
        return reported(planned, name)

    def prefetch(
        self,
        source: Source,
        *,
        where: Location | None = None,
        weight_name: str | None = None,
        subfolder: str | None = None,
        components: Iterable[str] | None = None,
        strict: bool = True,
        dtype: torch.dtype | None = None,
    ) -> Plan:
        """Read, check and convert an adapter for these models without loading it.

        `load` and `hotswap` accept the result as their source, any number of times, and have little left to do. It is
        in CPU memory, page-locked if there is a CUDA device, and stays there on a pipeline with slots.

        Args:
            source: a file, folder, hub id or state dict.
            where: the arguments of `pipe.load_adapter` that locate a file: `weight_name`, `subfolder`, `revision`, ...
            weight_name: name of the file in a folder or hub repository with several.
            subfolder: folder of the file in a hub repository or local folder.
            components: use these components only and ignore the rest of the file; defaults to all.
            strict: raise an error unless every tensor of the file can be used.
            dtype: dtype of the parameters; defaults to the dtype each component computes in.

        Raises:
            AdapterError: the source cannot be read or applied.
        """
        where = located(where, weight_name, subfolder)
        return prefetch_source(self._owner, source, where=where, components=components, strict=strict, dtype=dtype)

    def begin(
        self,
        source: Source | Plan,
        name: str | None = None,
        *,
        at_step: int | None = None,
        by_step: int | None = None,
        scale: Strength = 1.0,
        components: Iterable[str] | None = None,
        where: Location | None = None,
        weight_name: str | None = None,
        subfolder: str | None = None,
        strict: bool = True,
        dtype: torch.dtype | None = None,
        allow_recompile: bool = False,
        format: str | None = None,
        scheduler: Any = None,
    ) -> UpcomingAdapter:
        """Read an adapter in the background, and load it at a step of the run that begins next.

        With `at_step`, the result does not depend on how long reading takes: the run waits for the file, if it has to.
        The adapter then acts as with a schedule that is 0 before that step, and stays loaded. Its parts for text
        encoders act from the next prompt on, since prompts are encoded before the first step.

        Args:
            source: a file, folder, hub id or state dict, or what `prefetch` returned.
            name, scale, components, where, weight_name, subfolder, strict, dtype, allow_recompile, format: see
                `pipe.load_adapter`.
            at_step: the step from which on it acts, from 0.
            by_step: instead of `at_step`, the last step at which it may begin to act; it does as soon as it is read.
            scheduler: the scheduler that steps a loop of your own; defaults to the pipeline's.

        Returns:
            The adapter on its way: `wait()` returns the report once the file has been read, `cancel()` takes it back.

        Raises:
            AdapterError: the name or the step is none, or there is no scheduler. Errors in the file are raised by
                `wait()` and by the run; the run also raises if it has no such step, or if the slots have no room. The
                adapters are then those of before the run.
        """
        options: dict[str, Any] = {"components": components, "strict": strict, "dtype": dtype, "format": format}
        upcoming = UpcomingAdapter(
            name,
            at_step,
            by_step,
            partial(prefetch_source, self._owner, source, where=located(where, weight_name, subfolder), **options),
            lambda owner, planned: Adapters(owner).load(
                planned, name, scale=scale, strict=strict, allow_recompile=allow_recompile
            ),
            lambda owner, name: Adapters(owner).remove(name),
        )
        await_(self._owner, upcoming, scale, follow_of(self._owner, scheduler))
        return upcoming

    @exclusive_method
    def activate(self, adapters: Chosen, strengths: Strengths | None = None) -> None:
        """Make exactly these adapters active.

        Args:
            adapters: one name, several names (each with the strength 1), or name -> strength. A strength is a number,
                or prefix -> number ("unet", "unet.up_blocks.1"). The longest prefix that covers a layer applies to it;
                a layer that none covers gets the number of the prefix "", or 1. In the place of a number, a schedule
                (`Linear`, `Cosine`, `Piecewise`) sets the strength at every step of the runs that follow. Text encoders
                run before the steps and get the strength of the first one.
            strengths: without a mapping, one strength for all names, or one for each in a list.

        Raises:
            AdapterError: an unknown name, a prefix that matches no layer of the adapter, a strength that is not a
                finite number, a merged adapter, slots without room for all adapters at once, or a schedule without a
                scheduler to follow. Nothing has changed then.
        """
        activate_(self._owner, chosen_of("activate", adapters, strengths), self._owner.follow)

    @exclusive_method
    def remove(self, *names: Names) -> None:
        """Remove adapters with the tokens they brought, and free their memory. Other adapters stay as they are.

        Raises:
            AdapterError: no such adapter, it is merged (nothing has been removed then), or other tokens were added to
                its tokenizers since.
        """
        if not names:
            raise AdapterError("remove: no name; clear() removes all adapters")
        remove_adapters_(self._owner, names_of("remove", names))

    __delitem__ = remove

    @exclusive_method
    def clear(self) -> None:
        """Remove every adapter, merged and upcoming ones, too: the models are what they were before, bit for bit."""
        cancel_all(self._owner)
        self.unmerge()
        for name in self.names:
            self.remove(name)
        follow_schedules(self._owner, self._owner.follow)

    @exclusive_method
    def merge(self, *names: Names, compact: bool | None = None, base_files: BaseFiles = False) -> None:
        """Add adapters to the weights, at their present strengths. Without names, merge all that are active.

        A merged adapter costs nothing at run time, and `hotswap` merges another one in its place. `unmerge` undoes all
        merges, bit for bit, as long as neither the merged weights nor the adapters are written in between.

        Args:
            compact: to undo the merge, keep what rounding lost instead of copies of the changed weights: a few percent
                of their size. By default this is done where it is also faster, counting the time to allocate copies:
                for sums of low-rank changes (LoRA, LoHa, LoKr) in half-precision weights. See `undo_bytes`.
            base_files: keep nothing for weights that are, bit for bit, in the safetensors files that the models were
                read from; unmerging and swapping read them there again, which is faster. `True` for the files
                that `from_pretrained` found, a path (a file, a folder, a pipeline's folder), or component -> path. The
                files stay open while anything is merged: they may be moved or deleted, but not written.

        Raises:
            AdapterError: an adapter that is unknown or merged already, nothing to merge, weights that are out of reach
                or that cannot be quantised again, a result that the weights cannot hold, or no such files. The weights
                are unchanged then.

        Warns:
            UserWarning: quantising merged weights again made an error of more than half of the adapters' change in
                some layers; the warning names the worst. See `requantisation_errors`.
        """
        chosen = tuple(names_of("merge", names))
        if names and not chosen:
            return
        merge_adapters_(self._owner, chosen, compact, base_files)

    @exclusive_method
    def unmerge(self, *names: Names) -> None:
        """Undo every merge: restore all weights bit for bit; the merged adapters run next to the weights again.

        Args:
            names: the merged adapters; they need not be named, since merges are undone together.

        Raises:
            AdapterError: a merged weight or adapter has been written since, so that the original is not known; or
                `names` are not all that are merged. Nothing has changed then.
        """
        if names and set(names_of("unmerge", names)) != set(self.merged):
            raise AdapterError(
                f"unmerge: merged are {', '.join(self.merged) or 'none'}, and all merges are undone together; "
                "call unmerge(), then merge(...) those that stay"
            )
        unmerge_adapters_(self._owner)

    @exclusive_method
    def to_lora(self, adapters: Chosen, name: str, rank: int | None = None, energy: float | None = None) -> Conversion:
        """Add a plain LoRA, inactive, that does what `activate(adapters)` would do.

        Args:
            adapters: names and strengths as for `activate`, without schedules.
            name: name of the new LoRA.
            rank: largest rank on any layer.
            energy: give every layer the smallest rank that keeps this share of the squared Frobenius norm of its
                change, above 0 and at most 1. Without `rank` and `energy` the LoRA is exact.

        Returns:
            Rank and error of every layer.

        Raises:
            AdapterError: the adapters change what a LoRA cannot express; without `rank` and `energy`, an exact LoRA
                would be no smaller than a weight; or the name is in use. Nothing has changed then.
        """
        return derive_adapter_(self._owner, adapters, name, lambda sources: conversion(rank, energy))

    @exclusive_method
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
        """Add a plain LoRA, inactive, that combines several adapters.

        Args:
            adapters: name -> weight, or name -> prefix -> weight.
            name: name of the new LoRA.
            method: "cat", "svd", "linear", "magnitude_prune", "ties", "dare_linear" or "dare_ties".
            density: share of the elements that the last four methods keep, above 0 and at most 1.
            rank: largest rank on any layer.
            energy: share of the squared Frobenius norm of a layer's change that its rank has to keep.
            generator: draws the elements that "dare_linear" and "dare_ties" keep; defaults to a new one seeded with 0.
            sign: how "ties" and "dare_ties" elect a sign: that of the sum ("total") or of the majority ("frequency").

        Returns:
            Rank and error of every layer.

        Raises:
            AdapterError: an option that has no effect with the method, or adapters that the method cannot combine.
                Nothing has changed then.
        """
        options = Combination(method, density, rank, energy, generator, sign)
        return derive_adapter_(self._owner, adapters, name, options.maker)

    def save(self, name: str, path: str | os.PathLike[str], format: str = "diffusers") -> Path:
        """Write an adapter to a file.

        Args:
            name: name of the adapter.
            path: a `.safetensors` file, or a folder, which gets `pytorch_lora_weights.safetensors`. For "peft" it is a
                folder, which gets `adapter_model.safetensors` and `adapter_config.json`; if there are several
                components, each gets a folder of its own in it.
            format: "diffusers", "kohya", "peft", "comfy" or "onetrainer".

        Returns:
            The path of the file, or of the folder if PEFT has several components. It appears complete or not at all.

        Raises:
            AdapterError: no such adapter, or the format cannot express it. Nothing has been written then.
        """
        return save_adapter(self._owner, name, path, format)
