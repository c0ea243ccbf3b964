"""`Names`: layer names of a file, resolved against the models that they may belong to."""

import difflib
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cached_property
from typing import TypeAlias

from torch import nn

from diffadapt import families
from diffadapt.families.family import Aliases
from diffadapt.families.fused_parts import FusedPart
from diffadapt.formats.second_denoiser import SECOND
from diffadapt.formats.verdicts import Place, Unused, Verdict
from diffadapt.runtime.components import is_text_encoder
from diffadapt.runtime.targets import Targets
from diffadapt.types.layer_spec import LayerSpec

_OWN_MODELS = {
    "llm_adapter": "text_conditioner",
    "video_embeddings_connector": "connectors",
    "audio_embeddings_connector": "connectors",
    "text_embedding_projection": "connectors",
}
"""Modules of a denoiser's original checkpoint (Anima's, LTX-2's) that are components of their own in diffusers."""

_OUTER_MODULES = re.compile(r"(?:(?:model|language_model|text_model|transformer)[._])*")
"""Modules around the layers of a text encoder, which depend on the version of transformers and on the program."""

_Resolved: TypeAlias = tuple[str, tuple[FusedPart, ...]]
"""`Place.path` and `Place.parts`."""


class Names:
    """The layer names of a file, resolved against the models that they may belong to.

    The methods `dotted`, `first`, `flat`, `bare` and `fused` return the `Place` of a tensor, or `Unused` if no model
    has the layer. Their argument `name` is the canonical name of the tensor.

    Attributes:
        models: component -> paths of its model. `None` to resolve nothing and to accept every name as it is.
        empty: components that the pipeline has room for, but that are not loaded (`None`).
    """

    def __init__(
        self,
        models: Mapping[str, Targets] | None,
        empty: Collection[str] = (),
        *,
        is_for_second: bool = False,
        is_by_head: bool = False,
    ) -> None:
        """
        Args:
            models, empty: see the attributes.
            is_for_second: whether a name without a component means the second denoiser, if there is one.
            is_by_head: whether the file has the rows of some fused layers head by head; see `Family.by_head`.
        """
        self._is_by_head = is_by_head
        self._is_for_second = is_for_second
        self.models = models
        self.empty = empty
        self._aliases_by_component: dict[str, tuple[Aliases, Mapping[str, str]]] = {}
        self._paths_by_component: dict[str, tuple[Mapping[str, str], Mapping[str, str]]] = {}
        self._suggestions_left = 3

    def has(self, component: str) -> bool:
        """Return whether names of this component can be resolved."""
        return self.models is None or component in self.models

    @cached_property
    def denoiser(self) -> str:
        """The component that a name without a component means."""
        if self._is_for_second and self.has(SECOND):
            return SECOND
        # Callers may ask for only the second of two denoisers ("transformer_2").
        names = (*families.DENOISERS, *(name for name in self.models or () if name.startswith(families.DENOISERS)))
        if self.models is not None and len(self.models) == 1 and "model" in self.models:
            return "model"
        return next((name for name in names if self.has(name)), families.DENOISERS[0])

    def owners(self, path: str) -> Sequence[str]:
        """Return the components that may have a layer of the denoiser's original checkpoint.

        Args:
            path: the layer's path in the checkpoint, dotted or flattened.
        """
        flat = path.replace(".", "_")
        own = [component for module, component in _OWN_MODELS.items() if flat.startswith(f"{module}_")]
        return (*own, self.denoiser)

    def dotted(self, component: str, path: str, name: str) -> Verdict:
        """Locate a tensor of the layer at the dotted `path`."""
        return self.first((component,), path, name)

    def first(self, components: Sequence[str], path: str, name: str) -> Verdict:
        """Locate a tensor of the layer at the dotted `path`, in the first of `components` that has it."""
        return self._locate(components, path, name, self._resolve)

    def flat(self, components: Sequence[str], flat: str, name: str) -> Verdict:
        """Locate a tensor of the layer with this flattened path, in the first of `components` that has it.

        Some programs leave an underscore at either end of the path.
        """
        return self._locate(components, flat, name, self._resolve_flat)

    def bare(self, path: str, name: str) -> Verdict:
        """Locate a tensor by a dotted path without a component: in the denoiser, or else in any component."""
        return self.first((self.denoiser, *(self.models or ())), path, name)

    def fused(self, component: str, written: str, paths: Sequence[str], name: str) -> Verdict:
        """Locate a tensor of a layer of the file that consists of several layers of the model.

        Args:
            component: the component of the layer.
            written: its path in the file.
            paths: the paths of the model's layers, in the order of the outputs.
            name: canonical name of the tensor.
        """
        if self.models is None:
            return Place(component, written, name, written)
        if component not in self.models or not all(path in self.models[component].modules for path in paths):
            return self._missing(component, written)
        return Place(component, written, name, written, tuple(FusedPart(path) for path in paths))

    def _locate(
        self, components: Sequence[str], path: str, name: str, resolve: Callable[[str, str], _Resolved | None]
    ) -> Verdict:
        if self.models is None:
            return Place(components[0], path, name, path)
        present = [component for component in components if component in self.models]
        for component in present:
            found = resolve(component, path)
            if found is not None:
                return Place(component, found[0], name, path, found[1])
        missed = next((component for component in components if component in self.empty), None)
        return self._missing(missed or (present or components)[0], path)

    def _resolve(self, component: str, path: str) -> _Resolved | None:
        """Return the layer with a dotted name, which may be the model's own or that of its original layout."""
        assert self.models is not None
        targets = self.models[component]
        found = _carrier(targets, targets.resolve(path))
        # Wan has a norm without weight under a name that its original layout uses for another norm.
        if found is not None and targets.has_weight(found):
            return found, ()
        other = self._by_alias(component, path) or self._fallback(component, path, found, is_flat=False)
        if other is not None:
            return other
        # Some programs write dots for all underscores ("cross_attn.k.img"), or leave some underscores of a flat name.
        return self._resolve_flat(component, path.replace(".", "_"))

    def _resolve_flat(self, component: str, flat: str) -> _Resolved | None:
        """Return the layer with a flattened name, as `_resolve` does."""
        assert self.models is not None
        targets = self.models[component]
        for spelling in (flat, flat.strip("_")):
            found = _carrier(targets, targets.resolve_flat(spelling))
            if found is not None and targets.has_weight(found):
                return found, ()
            name = self._aliases(component)[1].get(spelling)
            if name is not None:
                return self._by_alias(component, name)
            other = self._fallback(component, spelling, found, is_flat=True)
            if other is not None:
                return other
        return None

    def _by_alias(self, component: str, name: str) -> _Resolved | None:
        """Return the layer with a name of the original layout."""
        parts = self._aliases(component)[0].get(name)
        if parts is None:
            return None
        return (parts[0].path, ()) if len(parts) == 1 and not parts[0].swapped else (name, parts)

    def _fallback(self, component: str, spelling: str, found: str | None, *, is_flat: bool) -> _Resolved | None:
        """Return the layer at `found`, which has no weight, or a text encoder's layer inside other outer modules."""
        if found is None and is_text_encoder(component):
            dotted, flattened = self._inner_paths(component)
            found = (flattened if is_flat else dotted).get(_inner_path(spelling))
        return None if found is None else (found, ())

    def _aliases(self, component: str) -> tuple[Aliases, Mapping[str, str]]:
        """Return the names of the original layout, and a map to them from their flattened forms."""
        if component not in self._aliases_by_component:
            assert self.models is not None
            targets = self.models[component]
            layers = {**families.fused(targets), **families.parameters(targets), **families.aliases(targets)}
            if self._is_by_head:
                layers = {**layers, **families.stored_by_head(targets)}
            # Some programs keep the original names and number the parts of a fused layer.
            numbered = {
                f"{name}.{index}": (part,)
                for name, parts in layers.items()
                if len(parts) > 1
                for index, part in enumerate(parts)
            }
            aliases = {**numbered, **layers}
            self._aliases_by_component[component] = aliases, _by_flat(aliases)
        return self._aliases_by_component[component]

    def _inner_paths(self, component: str) -> tuple[Mapping[str, str], Mapping[str, str]]:
        """Return the paths of a text encoder by their unambiguous inner paths, dotted and flattened."""
        if component not in self._paths_by_component:
            assert self.models is not None
            paths: dict[str, list[str]] = {}
            for path in self.models[component].modules:
                paths.setdefault(_inner_path(path), []).append(path)
            unique = {inner: found[0] for inner, found in paths.items() if len(found) == 1}
            flattened = {flat: unique[inner] for flat, inner in _by_flat(unique).items()}
            self._paths_by_component[component] = unique, flattened
        return self._paths_by_component[component]

    def _is_second_denoiser(self, component: str) -> bool:
        """Return whether the component is a further denoiser of a pipeline that has the first one.

        A file for two experts (Wan 2.2) is for another model if the pipeline runs a single one (Wan 2.1).
        """
        stem = component.rstrip("_0123456789")
        return stem in families.DENOISERS and component != stem and stem in (self.models or ())

    def _missing(self, component: str, path: str) -> Unused:
        assert self.models is not None
        if component in self.empty and not self._is_second_denoiser(component):
            return Unused(f"the pipeline has no {component} loaded (it is None)", component, harmless=True, lost=True)
        if component not in self.models:
            return Unused(f"there is no component {component!r} (only {', '.join(self.models)})", component)
        part = families.left_out(self.models[component], path)
        if part is not None:
            return Unused(f"{part}, which this {component} is built without", component, harmless=True, lost=True)
        reason = f"{component} has no layer {path!r}"
        if self._suggestions_left:
            # Each suggestion compares with every path of the model: fine for a typo, too slow for a wrong base model.
            self._suggestions_left -= 1
            targets = self.models[component]
            close = difflib.get_close_matches(
                path, targets.modules if "." in path else targets.flattened, n=1, cutoff=0.8
            )
            if close:
                reason += f"; did you mean {close[0]!r}?"
        return Unused(reason, component)


def _carrier(targets: Targets, path: str | None) -> str | None:
    """Return `path` or, if the module there is no layer but has a matrix called `weight`, the path of the matrix.

    HiDream's gates choose experts by such a weight.
    """
    module = None if path is None else targets.modules.get(path)
    if isinstance(module, nn.Linear) or module is None or module._modules or LayerSpec.of(module) is not None:
        return path
    weight = module._parameters.get("weight")
    return f"{path}.weight" if weight is not None and weight.ndim == 2 else path


def _by_flat(layers: Mapping[str, object]) -> dict[str, str]:
    """Return the names of `layers` by their flattened forms, without those that different layers share."""
    found: dict[str, str] = {}
    ambiguous: set[str] = set()
    for name, layer in layers.items():
        flat = name.replace(".", "_")
        if layers[found.setdefault(flat, name)] != layer:
            ambiguous.add(flat)
    return {flat: name for flat, name in found.items() if flat not in ambiguous}


def _inner_path(path: str) -> str:
    """Return a path in a text encoder, dotted or flattened, without the outer modules."""
    outer = _OUTER_MODULES.match(path)
    return path if outer is None else path[outer.end() :]
