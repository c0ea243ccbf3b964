"""What a format is: a record of functions that say where each name of a file belongs."""

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from diffadapt import families
from diffadapt.families.family import Aliases
from diffadapt.pieces import Piece
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
        pieces: the model's layers that the file's layer consists of, in the order of its outputs; none where `path` is
            a layer of the model.
    """

    component: str
    path: str
    name: str
    written: str
    pieces: tuple[Piece, ...] = ()


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
        original: whether a family's files in this format are in the original layout of its models.
        dump: canonical form -> what to write, by subfolder; `None` if the format is only read. Raises
            `AdapterError` for content the format cannot express.
    """

    name: str
    matches: Callable[[Header], bool]
    locate: Callable[[Header, "Names"], dict[str, Verdict]]
    alphas: Callable[[Header], Alphas]
    dump: Callable[[AdapterState], dict[str, Document]] | None
    settings: Callable[[Header], Settings] = _no_settings
    original: Callable[[str | None], bool] = lambda family: False


class Names:
    """Resolves names of a file against the models they may belong to; without models every name is believed."""

    def __init__(self, models: Mapping[str, Targets] | None) -> None:
        self.models = models
        self._known: dict[str, tuple[Aliases, Mapping[str, str]]] = {}
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
        found = self._resolve(component, path)
        return self._missing(component, path) if found is None else self._place(component, path, name, found)

    def flat(self, components: Sequence[str], flat: str, name: str) -> Verdict:
        """The same for a flattened path, in the first of `components` that has it."""
        if self.models is None:
            return Place(components[0], flat, name, flat)
        for component in components:
            found = self._resolve_flat(component, flat)
            if found is not None:
                return self._place(component, flat, name, found)
        return self._missing(next((c for c in components if c in self.models), components[0]), flat)

    def bare(self, path: str, name: str) -> Verdict:
        """The same for a dotted path that names no component: the denoiser, or whichever component has it."""
        owner = self.denoiser()
        if self.models is not None and self._resolve(owner, path) is None:
            owner = next((other for other in self.models if self._resolve(other, path) is not None), owner)
        return self.dotted(owner, path, name)

    def _resolve(self, component: str, path: str) -> str | None:
        """The model's own path, or the name in its original layout."""
        if self.models is None or component not in self.models:
            return None
        return self.models[component].resolve(path) or (path if path in self._aliases(component)[0] else None)

    def _resolve_flat(self, component: str, flat: str) -> str | None:
        if self.models is None or component not in self.models:
            return None
        return self.models[component].resolve_flat(flat) or self._aliases(component)[1].get(flat)

    def _aliases(self, component: str) -> tuple[Aliases, Mapping[str, str]]:
        """Names of the original layout, and the same by their flattened form."""
        if component not in self._known:
            assert self.models is not None
            found = families.aliases(self.models[component])
            self._known[component] = found, {name.replace(".", "_"): name for name in found}
        return self._known[component]

    def _place(self, component: str, written: str, name: str, found: str) -> Place:
        assert self.models is not None
        if found in self.models[component].modules:
            return Place(component, found, name, written)
        pieces = self._aliases(component)[0][found]
        if len(pieces) == 1 and not pieces[0].swapped:
            return Place(component, pieces[0].path, name, written)
        return Place(component, found, name, written, pieces)

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
