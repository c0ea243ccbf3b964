"""The module paths of a model: which of them a name in a file refers to, and which can carry an adapter."""

import re
from collections.abc import Collection, Iterator, Sequence
from functools import cached_property

from torch import nn

from diffadapt.errors import AdapterError
from diffadapt.runtime.adapter_layer import BANK
from diffadapt.runtime.foreign_hooks import is_bypassed
from diffadapt.types.layer_spec import LayerKind, LayerSpec
from diffadapt.weights.resting import resting_tensor

_CLIP_PREFIX = "text_model."
_CARRIERS: tuple[LayerKind, ...] = ("linear", "conv", "embedding", "norm")


def walk(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield every module of `model` with its path, without adapters. A module at two paths is yielded twice."""
    stack = [("", model)]
    while stack:
        prefix, module = stack.pop()
        for name, child in module._modules.items():
            if child is not None and not (prefix == "" and name == BANK):
                path = f"{prefix}{name}"
                yield path, child
                stack.append((f"{path}.", child))


def refuse_peft(module: nn.Module) -> None:
    """Raise `AdapterError` if `module` stands in the place of a layer that peft has put an adapter on."""
    if hasattr(module, "base_layer") and type(module).__module__.partition(".")[0] == "peft":
        raise AdapterError(
            "peft has an adapter here (load_lora_weights and add_adapter of diffusers); call unload_lora_weights() "
            "first, then load that adapter with load_adapter(), too"
        )


class Targets:
    """The module paths of one model, against which the names in a file are resolved.

    Attributes:
        model: the model.
        modules: path -> module, for every path of the model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.modules = dict(walk(model))
        self._paths: dict[int, str] = {}
        for path, module in self.modules.items():
            self._paths.setdefault(id(module), path)

    @property
    def all(self) -> list[nn.Module]:
        """The model and every module in it, without adapters."""
        return [self.model, *self.modules.values()]

    @cached_property
    def flattened(self) -> dict[str, str]:
        """Path with underscores for dots -> path, for every leaf module whose path alone has this form.

        For example, `down_blocks_0_attentions_0_proj_in` -> `down_blocks.0.attentions.0.proj_in`.
        """
        found: dict[str, str] = {}
        ambiguous: set[str] = set()
        for path, module in self.modules.items():
            if not module._modules:
                flat, own = path.replace(".", "_"), self._paths[id(module)]
                if found.setdefault(flat, own) != own:
                    ambiguous.add(flat)
        return {flat: path for flat, path in found.items() if flat not in ambiguous}

    def resolve(self, path: str) -> str | None:
        """Return the model's own path for a dotted path in a file, or `None` if the model has no such module.

        The paths in CLIP text encoders start with `text_model.` in transformers 4 and mostly do not in 5. Files have
        either.
        """
        module = self.modules.get(path)
        if module is None:
            other = path.removeprefix(_CLIP_PREFIX) if path.startswith(_CLIP_PREFIX) else _CLIP_PREFIX + path
            module = self.modules.get(other)
        # A module at two paths (the convolution of old downsamplers) is one layer, whichever path a file uses.
        return None if module is None else self._paths[id(module)]

    def resolve_flat(self, flat: str) -> str | None:
        """Return the model's own path for a path with underscores for dots, or `None` if there is no such leaf."""
        path = self.flattened.get(flat)
        if path is None:
            prefix = _CLIP_PREFIX.replace(".", "_")
            path = self.flattened.get(flat.removeprefix(prefix) if flat.startswith(prefix) else prefix + flat)
        return path

    def has_weight(self, path: str) -> bool:
        """Return whether the module at `path` has a weight."""
        module = self.modules[path]
        # Layers that pack their weight may have it under another name.
        return resting_tensor(module, "weight") is not None or LayerSpec.of(module) is not None

    def spec(self, path: str, kinds: Collection[LayerKind] = _CARRIERS) -> LayerSpec:
        """Return the geometry of the layer at `path`, for an adapter whose type can sit on layers of these `kinds`.

        Raises:
            AdapterError: no such adapter can sit there. The message says why, without the path.
        """
        module = self.modules[path]
        parent_path, _, name = path.rpartition(".")
        parent = self.modules.get(parent_path, self.model)
        if isinstance(parent, nn.MultiheadAttention):
            raise AdapterError(f"nn.MultiheadAttention reads the weight of {name} without calling the layer")
        if is_bypassed(parent, name):
            raise AdapterError("its projections are fused, so it is never called; call unfuse_qkv_projections() first")
        refuse_peft(module)
        spec = LayerSpec.of(module)
        if spec is None or spec.kind not in kinds:
            raise AdapterError(f"a {type(module).__name__} cannot carry {'an' if spec is None else 'this'} adapter")
        return spec

    def select(
        self,
        wanted: str | Sequence[str],
        excluded: str | Sequence[str] = (),
        kinds: Collection[LayerKind] = _CARRIERS,
    ) -> dict[str, nn.Module]:
        """Return the layers for a new adapter, by path.

        Args:
            wanted: "all-linear", "all-conv", a regular expression for the whole path, or a list of path endings
                that match whole path components. An expression that matches no path is taken as one ending.
            excluded: a regular expression or a list of path endings; the layers that match are left out.
            kinds: the kinds of layers to choose from.

        Raises:
            AdapterError: a pattern in `wanted` matches no layer, or no layer is left.
        """
        chosen: dict[str, nn.Module] = {}
        for pattern in [wanted] if isinstance(wanted, str) else wanted:
            matched = self._matching(pattern, kinds, is_regex=isinstance(wanted, str))
            if not matched:
                for module in self.modules.values():
                    refuse_peft(module)
                raise AdapterError(
                    f"target_modules: {pattern!r} matches no layer of {type(self.model).__name__}; "
                    f"its layers end in {', '.join(self._endings(kinds))}"
                )
            chosen.update(matched)
        for pattern in [excluded] if isinstance(excluded, str) else excluded:
            for path in self._matching(pattern, kinds, is_regex=isinstance(excluded, str)):
                chosen.pop(path, None)
        if not chosen:
            raise AdapterError(f"target_modules={wanted!r} without {excluded!r} leaves no layer")
        return chosen

    def _matching(self, pattern: str, kinds: Collection[LayerKind], *, is_regex: bool) -> dict[str, nn.Module]:
        if is_regex and pattern in ("all-linear", "all-conv"):
            kind = pattern.removeprefix("all-")
            found = {path: module for path, module in self.modules.items() if self._kind(path) == kind}
        elif is_regex:
            found = self._matching_expression(pattern) or self._ending_in(pattern)
        else:
            found = self._ending_in(pattern)
        return {
            path: module
            for path, module in found.items()
            if self._paths[id(module)] == path and (spec := LayerSpec.of(module)) is not None and spec.kind in kinds
        }

    def _matching_expression(self, pattern: str) -> dict[str, nn.Module]:
        try:
            expression = re.compile(pattern)
        except re.error as error:
            raise AdapterError(f"target_modules: {pattern!r} is no regular expression ({error})") from error
        return {path: module for path, module in self.modules.items() if expression.fullmatch(path)}

    def _ending_in(self, ending: str) -> dict[str, nn.Module]:
        return {path: module for path, module in self.modules.items() if path == ending or path.endswith(f".{ending}")}

    def _kind(self, path: str) -> str | None:
        try:
            return self.spec(path).kind
        except AdapterError:
            return None

    def _endings(self, kinds: Collection[LayerKind]) -> list[str]:
        specs = ((path, LayerSpec.of(module)) for path, module in self.modules.items())
        endings = {path.rsplit(".", 1)[-1] for path, spec in specs if spec is not None and spec.kind in kinds}
        return sorted(ending for ending in endings if not ending.isdigit())
