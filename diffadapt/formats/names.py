"""Resolves the names of a file against the models that they may belong to."""

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import TypeAlias

from diffadapt import families
from diffadapt.families.family import Aliases
from diffadapt.families.fused_parts import FusedPart
from diffadapt.formats.verdicts import Place, Unused, Verdict
from diffadapt.runtime.components import is_text_encoder
from diffadapt.runtime.targets import Targets

DENOISERS = ("unet", "transformer", "prior", "decoder")
"""Component names that adapters without a component prefix are meant for, in this order."""

_OWN_MODELS = {
    "llm_adapter": "text_conditioner",
    "video_embeddings_connector": "connectors",
    "audio_embeddings_connector": "connectors",
    "text_embedding_projection": "connectors",
}
"""Parts of a denoiser's original checkpoint (Anima's, LTX-2's) that are components of their own in diffusers."""

_LEVELS = re.compile(r"(?:(?:model|language_model|text_model|transformer)[._])*")
"""Levels above the layers of a text encoder, which come and go with versions of transformers and with programs."""

_Found: TypeAlias = tuple[str, tuple[FusedPart, ...]]
"""`Place.path` and `Place.pieces`."""


class Names:
    """Resolves names of a file against the models they may belong to; without models every name is believed."""

    def __init__(self, models: Mapping[str, Targets] | None) -> None:
        self.models = models
        self._known: dict[str, tuple[Aliases, Mapping[str, str]]] = {}
        self._known_cores: dict[str, tuple[Mapping[str, str], Mapping[str, str]]] = {}
        self._guesses = 3

    def has(self, component: str) -> bool:
        """Whether names of this component can be resolved."""
        return self.models is None or component in self.models

    @cached_property
    def denoiser(self) -> str:
        """The component that a name without a component means."""
        # Of a model with two denoisers, someone may have asked for the second one only ("transformer_2").
        among = (*DENOISERS, *(name for name in self.models or () if name.startswith(DENOISERS)))
        if self.models is not None and len(self.models) == 1 and "model" in self.models:
            return "model"
        return next((name for name in among if self.has(name)), DENOISERS[0])

    def owners(self, path: str) -> Sequence[str]:
        """The components that a name of the denoiser's original checkpoint may be in, dotted or flattened."""
        if not path.startswith(tuple(_OWN_MODELS)):
            return (self.denoiser,)
        own = [component for part, component in _OWN_MODELS.items() if path.startswith((f"{part}.", f"{part}_"))]
        return (*own, self.denoiser)

    def dotted(self, component: str, path: str, name: str) -> Verdict:
        """Place of tensor `name` of the layer that the file calls `path`."""
        return self.first((component,), path, name)

    def first(self, components: Sequence[str], path: str, name: str) -> Verdict:
        """The same in the first of `components` that has the layer."""
        return self._first(components, path, name, self._resolve)

    def flat(self, components: Sequence[str], flat: str, name: str) -> Verdict:
        """The same for a flattened path; some programs leave an underscore at either end of it."""
        return self._first(components, flat, name, self._resolve_flat)

    def bare(self, path: str, name: str) -> Verdict:
        """The same for a dotted path that names no component: the denoiser, or whichever component has it."""
        return self.first((self.denoiser, *(self.models or ())), path, name)

    def parts(self, component: str, written: str, paths: Sequence[str], name: str) -> Verdict:
        """The same for a layer of the file that consists of these layers of the model, in the order of its outputs."""
        if self.models is None:
            return Place(component, written, name, written)
        if component not in self.models or not all(path in self.models[component].modules for path in paths):
            return self._missing(component, written)
        return Place(component, written, name, written, tuple(FusedPart(path) for path in paths))

    def _first(
        self, components: Sequence[str], path: str, name: str, resolve: Callable[[str, str], _Found | None]
    ) -> Verdict:
        if self.models is None:
            return Place(components[0], path, name, path)
        present = [component for component in components if component in self.models]
        for component in present:
            found = resolve(component, path)
            if found is not None:
                return Place(component, found[0], name, path, found[1])
        return self._missing(present[0] if present else components[0], path)

    def _resolve(self, component: str, path: str) -> _Found | None:
        """The layer of a dotted name, which is the model's own or that of its original layout."""
        assert self.models is not None
        targets = self.models[component]
        found = targets.resolve(path)
        # Wan has a bare norm where its original layout has another one.
        if found is not None and targets.has_weight(found):
            return found, ()
        return self._alias(component, path) or self._other(component, path, found, 0)

    def _resolve_flat(self, component: str, flat: str) -> _Found | None:
        assert self.models is not None
        targets = self.models[component]
        for spelling in (flat, flat.strip("_")):
            found = targets.resolve_flat(spelling)
            if found is not None and targets.has_weight(found):
                return found, ()
            name = self._aliases(component)[1].get(spelling)
            if name is not None:
                return self._alias(component, name)
            other = self._other(component, spelling, found, 1)
            if other is not None:
                return other
        return None

    def _alias(self, component: str, name: str) -> _Found | None:
        """The layers of a name of the original layout."""
        parts = self._aliases(component)[0].get(name)
        if parts is None:
            return None
        return (parts[0].path, ()) if len(parts) == 1 and not parts[0].swapped else (name, parts)

    def _other(self, component: str, spelling: str, found: str | None, flat: int) -> _Found | None:
        """What was found, though it has no weight, or the layer of a text encoder below other upper levels."""
        if found is None and is_text_encoder(component):
            found = self._cores(component)[flat].get(_core(spelling))
        return None if found is None else (found, ())

    def _aliases(self, component: str) -> tuple[Aliases, Mapping[str, str]]:
        """Names of the original layout, and the same by their flattened form."""
        if component not in self._known:
            assert self.models is not None
            layers = {**families.fused(self.models[component]), **families.aliases(self.models[component])}
            # Some programs keep the original names and number the parts of a fused layer.
            parts = {
                f"{name}.{index}": (part,)
                for name, parts in layers.items()
                if len(parts) > 1
                for index, part in enumerate(parts)
            }
            found = {**parts, **layers}
            self._known[component] = found, {name.replace(".", "_"): name for name in found}
        return self._known[component]

    def _cores(self, component: str) -> tuple[Mapping[str, str], Mapping[str, str]]:
        """Paths of a text encoder by what is left of them without the upper levels, dotted and flattened."""
        if component not in self._known_cores:
            assert self.models is not None
            paths: dict[str, list[str]] = {}
            for path in self.models[component].modules:
                paths.setdefault(_core(path), []).append(path)
            found = {core: found[0] for core, found in paths.items() if len(found) == 1}
            self._known_cores[component] = found, {core.replace(".", "_"): path for core, path in found.items()}
        return self._known_cores[component]

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


def _core(path: str) -> str:
    """A path, dotted or flattened, of a layer in a text encoder without the levels that not everyone has."""
    levels = _LEVELS.match(path)
    return path if levels is None else path[levels.end() :]
