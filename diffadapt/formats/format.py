"""What a format is: a record of functions that say where each name of a file belongs."""

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from diffadapt.state import AdapterState, Document
from diffadapt.targets import Targets

DENOISERS = ("unet", "transformer", "prior", "decoder")
"""Component names that adapters without a component prefix are meant for, in this order."""


@dataclass(frozen=True)
class Header:
    """A file without its tensors: names, safetensors metadata, and `adapter_config.json` where there is one."""

    keys: tuple[str, ...]
    metadata: Mapping[str, str] = field(default_factory=dict[str, str])
    config: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor belongs.

    Attributes:
        component: of the pipeline.
        path: of the layer in that component (as the file spells it when there is no model to ask).
        name: canonical tensor name, or "alpha".
        written: the path before it was resolved against the model; what patterns in the file's metadata speak of.
    """

    component: str
    path: str
    name: str
    written: str


@dataclass(frozen=True, slots=True)
class Unused:
    """A tensor that belongs nowhere, and why.

    Attributes:
        component: that the name speaks of, where it does.
        harmless: bookkeeping, which does not make a file faulty.
    """

    reason: str
    component: str | None = None
    harmless: bool = False


Verdict: TypeAlias = Place | Unused
Alphas: TypeAlias = Callable[[str, str, int], float | None]
"""`(component, path as written, rank) -> alpha` from a file's metadata, `None` where it says nothing."""

Settings: TypeAlias = Callable[[str, str, str], Mapping[str, float]]
"""`(component, path as written, type name) -> settings of the type` that a file's metadata gives."""


def _no_settings(header: "Header") -> Settings:
    return lambda component, path, type: {}


@dataclass(frozen=True)
class Format:
    """One file format.

    Attributes:
        name: as in reports and in `save(format=...)`.
        matches: whether a file is in this format; mutually exclusive over all formats.
        locate: a verdict for every key.
        alphas: the alphas that the metadata gives; an alpha tensor in the file wins over it.
        settings: the type's other numbers that the metadata gives.
        dump: canonical form -> what to write, by subfolder; `None` if the format is only read. Raises
            `AdapterError` for content the format cannot express.
    """

    name: str
    matches: Callable[[Header], bool]
    locate: Callable[[Header, "Names"], dict[str, Verdict]]
    alphas: Callable[[Header], Alphas]
    dump: Callable[[AdapterState], dict[str, Document]] | None
    settings: Callable[[Header], Settings] = _no_settings


class Names:
    """Resolves names of a file against the models they may belong to; without models every name is believed."""

    def __init__(self, models: Mapping[str, Targets] | None) -> None:
        self.models = models
        self._guesses = 3

    def has(self, component: str) -> bool:
        """Whether names of this component can be resolved."""
        return self.models is None or component in self.models

    def denoiser(self) -> str:
        """The component that a name without a component means."""
        return next((name for name in DENOISERS if self.has(name)), DENOISERS[0])

    def dotted(self, component: str, path: str, name: str) -> Verdict:
        """Place of tensor `name` of the layer that the file calls `path`."""
        if self.models is None:
            return Place(component, path, name, path)
        found = self.models[component].resolve(path) if component in self.models else None
        return Place(component, found, name, path) if found is not None else self._missing(component, path)

    def flat(self, component: str, flat: str, name: str, aliases: Mapping[str, str]) -> Verdict:
        """The same for a flattened path; `aliases` are further flattened names of the model's layers."""
        if self.models is None:
            return Place(component, flat, name, flat)
        targets = self.models.get(component)
        found = (targets.resolve_flat(flat) or aliases.get(flat)) if targets is not None else None
        return Place(component, found, name, flat) if found is not None else self._missing(component, flat)

    def bare(self, path: str, name: str) -> Verdict:
        """The same for a dotted path that names no component: the denoiser, or whichever component has it."""
        owner = self.denoiser()
        if self.models is not None and (owner not in self.models or self.models[owner].resolve(path) is None):
            owner = next((other for other, targets in self.models.items() if targets.resolve(path)), owner)
        return self.dotted(owner, path, name)

    def _missing(self, component: str, path: str) -> Unused:
        assert self.models is not None
        if component not in self.models:
            return Unused(f"there is no component {component!r} (only {', '.join(self.models)})", component)
        reason = f"{component} has no layer {path!r}"
        if self._guesses:
            # Each guess compares with every path of the model: enough for a typo, too slow for a wrong base model.
            self._guesses -= 1
            targets = self.models[component]
            close = difflib.get_close_matches(
                path, targets.modules if "." in path else targets.flattened, n=1, cutoff=0.8
            )
            if close:
                reason += f"; did you mean {close[0]!r}?"
        return Unused(reason, component)
