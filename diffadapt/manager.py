"""The object behind `pipe.adapters`: everything that can be done with loaded adapters."""

import os
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import torch
from torch import nn

from diffadapt import families, scales
from diffadapt.adapter import Adapter
from diffadapt.attach import bank_of, detach_, refresh_
from diffadapt.combine import Combination, Method, Sign
from diffadapt.errors import AdapterError
from diffadapt.formats import writer
from diffadapt.io import Location, Source, read, write
from diffadapt.load import attach_all_, plan
from diffadapt.lowrank import Conversion, Maker, Sources, conversion, derive_
from diffadapt.merge import merge_, refuse_mixture, unmerge_
from diffadapt.report import Report
from diffadapt.scales import Strength
from diffadapt.state import AdapterState
from diffadapt.targets import Targets

Chosen: TypeAlias = str | Iterable[str] | Mapping[str, Strength]


@dataclass(frozen=True)
class LoadedAdapter:
    """One adapter over all components.

    Attributes:
        components: component -> the `Adapter` module there, which owns the parameters.
    """

    name: str
    components: Mapping[str, Adapter]

    @property
    def types(self) -> tuple[str, ...]:
        """Adapter types in use."""
        return tuple(sorted({layer.kind.name for a in self.components.values() for layer in a.layers.values()}))

    @property
    def ranks(self) -> tuple[int, ...]:
        """Ranks in use, ascending."""
        ranks = {layer.rank for adapter in self.components.values() for layer in adapter.layers.values()}
        return tuple(sorted(rank for rank in ranks if rank is not None))

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """Dtypes of the parameters."""
        dtypes = {parameter.dtype for adapter in self.components.values() for parameter in adapter.parameters()}
        return tuple(sorted(dtypes, key=str))

    @property
    def bytes(self) -> int:
        """Size of the parameters."""
        parameters = (p for adapter in self.components.values() for p in adapter.parameters())
        return sum(parameter.numel() * parameter.element_size() for parameter in parameters)

    @property
    def metadata(self) -> Mapping[str, str]:
        """Metadata of the file, verbatim."""
        return next(iter(self.components.values())).metadata

    @property
    def active(self) -> bool:
        """Whether it takes part in the forward, at run time or merged."""
        return any(adapter.active for adapter in self.components.values())

    @property
    def strength(self) -> Strength:
        """What `activate` or `scale=` set last."""
        return next(iter(self.components.values())).strength


class Adapters:
    """The adapters of a pipeline, or of one model.

    Holds no state of its own: adapters live on the models, so pipelines that share a model share its adapters.
    """

    def __init__(
        self,
        models: Callable[[], Mapping[str, nn.Module]],
        *,
        qualified: bool = True,
        changed: Callable[[], None] = lambda: None,
    ) -> None:
        """
        Args:
            models: gives the present components.
            qualified: whether prefixes in `activate` start with a component name.
            changed: called after adapters were loaded or removed.
        """
        self._models = models
        self._qualified = qualified
        self._changed = changed

    @property
    def names(self) -> list[str]:
        """Names in the order of loading."""
        return list(self._loaded())

    @property
    def active(self) -> dict[str, Strength]:
        """Strength of every active adapter, as it was set."""
        return {name: adapter.strength for name, adapter in self._loaded().items() if adapter.active}

    @property
    def merged(self) -> list[str]:
        """Names of the adapters that are merged into the weights."""
        merged = {name for model in self._models().values() if (bank := bank_of(model)) for name in bank.merged}
        return [name for name in self.names if name in merged]

    def __contains__(self, name: object) -> bool:
        return name in self._loaded()

    def __len__(self) -> int:
        return len(self._loaded())

    def __iter__(self) -> Iterator[str]:
        return iter(self._loaded())

    def __getitem__(self, name: str) -> LoadedAdapter:
        loaded = self._loaded()
        if name not in loaded:
            raise AdapterError(f"no adapter {name!r}; loaded are {', '.join(loaded) or 'none'}")
        return loaded[name]

    def __repr__(self) -> str:
        header = ("name", "types", "components", "rank", "dtype", "size", "active", "scale")
        rows = [header, *(self._row(adapter) for adapter in self._loaded().values())]
        if len(rows) == 1:
            return "no adapters"
        widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
        return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)

    def load(
        self,
        source: Source,
        name: str | None = None,
        *,
        scale: Strength = 1.0,
        components: Iterable[str] | None = None,
        where: Location | None = None,
        strict: bool = True,
        dtype: torch.dtype | None = None,
        activate: bool = True,
    ) -> Report:
        """Load an adapter; `pipe.load_adapter` documents the arguments."""
        models = self._models()
        if components is not None:
            components = [components] if isinstance(components, str) else list(components)
            unknown = [component for component in components if component not in models]
            if unknown:
                raise AdapterError(f"components: no {', '.join(unknown)}; the pipeline has {', '.join(models)}")
        if dtype is not None and dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            raise AdapterError(f"dtype is {dtype}; adapters compute in float16, bfloat16, float32 or float64")
        if name is not None:
            self._refuse_name(name)
        checkpoint = read(source, where or Location())
        if name is None:
            name = checkpoint.name or next(n for i in range(len(self) + 1) if (n := f"default_{i}") not in self)
            self._refuse_name(name)
        scales.check(name, scale)
        planned = plan(checkpoint, models, components=components, dtype=dtype)
        planned.refuse_faults(strict)
        attached = attach_all_(models, name, planned)
        try:
            strengths = self._strengths(name, scale, attached)
            for component, adapter in attached.items():
                adapter.strength = scale
                adapter.set_strengths(strengths[component])
                adapter.active = activate
                bank = bank_of(models[component])
                assert bank is not None
                refuse_mixture(component, bank, bank.merged)
        except AdapterError:
            for component in attached:
                detach_(models[component], name)
            raise
        for component in attached:
            refresh_(models[component])
        self._changed()
        return planned.report(name)

    def activate(self, adapters: Chosen) -> None:
        """Make exactly these adapters active.

        Args:
            adapters: name -> strength. A strength is a number, or numbers by prefix ("unet", "unet.up_blocks.1"): the
                longest matching prefix wins, what no prefix names has the strength 1. A name alone means 1.

        Raises:
            AdapterError: an unknown name, a prefix that matches no layer of the adapter, a strength that is not a
                finite number, or an adapter is merged. Nothing has changed then.
        """
        self._refuse_merged("activate")
        wanted, strengths = self._resolved(adapters)
        for name, strength in wanted.items():
            for component, adapter in self[name].components.items():
                adapter.strength = strength
                adapter.set_strengths(strengths[name][component])
        self._set_active(wanted)

    @contextmanager
    def disabled(self) -> Generator[None, None, None]:
        """The base model inside; on leaving, also by an exception, the state before."""
        merged, active = self.merged, list(self.active)
        self.unmerge()
        self._set_active(())
        try:
            yield
        finally:
            self._set_active(active)
            if merged:
                merge_(self._models(), merged)

    def remove(self, name: str) -> None:
        """Remove an adapter and free its memory. The others stay as they are."""
        self[name]
        if name in self.merged:
            raise AdapterError(f"adapter {name!r} is merged into the weights; call unmerge() before remove()")
        for model in self._models().values():
            detach_(model, name)
        self._changed()

    def clear(self) -> None:
        """Remove every adapter, merged ones too: the models are bit for bit what they were before the first."""
        self.unmerge()
        for name in self.names:
            self.remove(name)

    def merge(self, *names: str) -> None:
        """Add adapters into the weights, at their present strengths; without names, all that are active.

        A merged adapter costs nothing at run time. `unmerge` undoes all merges, bit for bit.

        Raises:
            AdapterError: unknown or already merged, or nothing to merge; quantised or unreachable weights; a result
                that is not finite. Nothing has been written then.
        """
        chosen = names or tuple(name for name in self.active if name not in self.merged)
        if not chosen:
            raise AdapterError("nothing to merge: no adapter is active that is not merged already")
        for name in chosen:
            self[name]
            if name in self.merged:
                raise AdapterError(f"adapter {name!r} is merged already; call unmerge() first")
        merge_(self._models(), chosen)
        for name in chosen:
            for adapter in self[name].components.values():
                adapter.active = True

    def unmerge(self) -> None:
        """Undo every merge: all weights as they were, bit for bit, and the adapters active beside them."""
        for model in self._models().values():
            unmerge_(model)

    def to_lora(self, adapters: Chosen, name: str, rank: int | None = None, energy: float | None = None) -> Conversion:
        """Add a plain LoRA, inactive, that does what `activate(adapters)` would do.

        Args:
            rank: the most that a layer gets.
            energy: share of a layer's change, in squares, that the smallest rank is chosen for; see `lowrank`.

        Raises:
            AdapterError: no LoRA, or without `rank` and `energy` only a large one, can do it. Nothing has changed then.
        """
        return self._derive(adapters, name, lambda sources: conversion(rank, energy))

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
        layers = {c: {at: layer.state for at, layer in a.layers.items()} for c, a in loaded.components.items()}
        layouts = {component: families.layout(Targets(models[component])) for component in layers}
        return write(path, dump(AdapterState(layers, loaded.metadata, families.of_models(models), layouts)))

    def _loaded(self) -> dict[str, LoadedAdapter]:
        found: dict[str, dict[str, Adapter]] = {}
        for component, model in self._models().items():
            bank = bank_of(model)
            for name, adapter in bank.adapters.items() if bank is not None else ():
                found.setdefault(name, {})[component] = adapter
        return {name: LoadedAdapter(name, components) for name, components in found.items()}

    def _derive(self, adapters: Chosen, name: str, maker: Callable[[Sources], Maker]) -> Conversion:
        self._refuse_name(name)
        report = derive_(self._models(), name, self._resolved(adapters)[1], maker)
        self._changed()
        return report

    def _resolved(self, adapters: Chosen) -> tuple[dict[str, Strength], dict[str, dict[str, list[float]]]]:
        """What was asked for: name -> strength, and the same as name -> component -> one number per layer."""
        adapters = [adapters] if isinstance(adapters, str) else adapters
        wanted: dict[str, Strength] = dict(adapters) if isinstance(adapters, Mapping) else dict.fromkeys(adapters, 1.0)
        return wanted, {name: self._strengths(name, amount, self[name].components) for name, amount in wanted.items()}

    def _strengths(self, name: str, strength: Strength, components: Mapping[str, Adapter]) -> dict[str, list[float]]:
        scales.check(name, strength)
        strengths: dict[str, list[float]] = {}
        matched: set[str] = set()
        for component, adapter in components.items():
            paths = [f"{component}.{path}" for path in adapter.layers] if self._qualified else list(adapter.layers)
            strengths[component], hits = scales.resolve(strength, paths)
            matched |= hits
        missed = sorted(set(strength) - matched) if isinstance(strength, Mapping) else []
        if missed:
            raise AdapterError(
                f"adapter {name!r} has no layer under {', '.join(map(repr, missed))}; "
                f"it has layers under {', '.join(self._prefixes(components))}"
            )
        return strengths

    def _prefixes(self, components: Mapping[str, Adapter]) -> list[str]:
        tops = {f"{component}.{path.split('.')[0]}" for component, a in components.items() for path in a.layers}
        return sorted(tops if self._qualified else {top.partition(".")[2] for top in tops})

    def _set_active(self, names: Iterable[str]) -> None:
        names = set(names)
        for name, loaded in self._loaded().items():
            for adapter in loaded.components.values():
                adapter.active = name in names
        for model in self._models().values():
            refresh_(model)

    def _refuse_name(self, name: str) -> None:
        if not name or "." in name:
            raise AdapterError(f"{name!r} is no name for an adapter: it must not be empty or contain a dot")
        if name in self:
            raise AdapterError(f"adapter {name!r} exists already; remove it first or pass another name=")

    def _refuse_merged(self, action: str) -> None:
        if self.merged:
            raise AdapterError(f"{action}: {', '.join(self.merged)} is merged into the weights; call unmerge() first")

    def _row(self, adapter: LoadedAdapter) -> tuple[str, ...]:
        ranks = adapter.ranks
        state = "merged" if adapter.name in self.merged else "yes" if adapter.active else "no"
        return (
            adapter.name,
            ",".join(adapter.types),
            ", ".join(f"{name} {len(part.layers)}" for name, part in adapter.components.items()),
            str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]}-{ranks[-1]}" if ranks else "-",
            ",".join(str(dtype).removeprefix("torch.") for dtype in adapter.dtypes),
            f"{adapter.bytes / 2**20:.1f} MiB",
            state,
            str(adapter.strength),
        )
