"""The module paths of a model: which of them a name in a file refers to, and which can carry an adapter."""

import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from diffadapt.errors import AdapterError
from diffadapt.runtime.adapter_layer import BANK
from diffadapt.runtime.foreign_hooks import is_bypassed
from diffadapt.types.layer_spec import LayerKind, LayerSpec
from diffadapt.types.parameter import parameter_spec
from diffadapt.weights.resting import resting_tensor

_CLIP_PREFIX = "text_model."
_CARRIERS: tuple[LayerKind, ...] = ("linear", "conv", "embedding", "norm", "batch_norm", "parameter")
_OUTPUTS = re.compile(r"lm_head|conv_out|(?:\w+_)?proj_out(?:_\d+)?|(?:all_)?final_layer\.(?:[^.]+\.)?linear")
"""Paths of the last layer of a model: of language models, and of the denoisers of diffusers. Trainers leave it alone
(kohya's sd-scripts, ai-toolkit and diffusers' scripts train blocks only), as PEFT does with that of language models.
"""
_OUTPUT_OF_LUMINA = "norm_out.linear_2"
_TOWERS = frozenset(
    {"visual", "vision_tower", "vision_model", "multi_modal_projector", "audio_tower", "embed_vision", "embed_audio"}
)
"""Names of the parts of a text encoder that read pictures or sound, which prompts do not go through."""
_BLOCK = re.compile(r"(?:^|\.)[^.]*[^.\d][^.]*\.(\d+)(?:\.|$)")


def walk(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield every module of `model` with its path, without adapters. A module at two paths is yielded twice."""
    stack = [("", model)]
    while stack:
        prefix, module = stack.pop()
        # The model may get its bank from another thread in the meantime.
        children = module._modules.items() if prefix else list(module._modules.items())
        for name, child in children:
            if child is not None and not (name == BANK and prefix == ""):
                path = f"{prefix}{name}"
                yield path, child
                if child._modules:
                    stack.append((f"{path}.", child))


def refuse_peft(module: nn.Module) -> None:
    """Raise `AdapterError` if `module` stands in the place of a layer that peft has put an adapter on."""
    # The class comes first, because a missing attribute of a module takes ten times as long.
    if type(module).__module__.partition(".")[0] == "peft" and hasattr(module, "base_layer"):
        raise AdapterError(
            "peft has an adapter here (load_lora_weights and add_adapter of diffusers); call unload_lora_weights() "
            "first, then load that adapter with load_adapter(), too"
        )


class Targets:
    """The module paths of one model, against which the names in a file are resolved.

    Attributes:
        model: the model.
        modules: path -> module, for every path of the model.
        weights: path -> the parameter of that name, or `None`, for the same paths.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.modules = dict(walk(model))
        # Read now, while the modules are in the cache of the processor: the walk through a large model takes its time.
        self.weights = {path: module._parameters.get("weight") for path, module in self.modules.items()}
        # The first path of a module at several is its own.
        self._paths = {id(module): path for path, module in reversed(self.modules.items())}

    @property
    def all(self) -> list[nn.Module]:
        """The model and every module in it, without adapters."""
        return [self.model, *self.modules.values()]

    def in_order(self, paths: Iterable[str]) -> list[str]:
        """Return the paths in the order of the model; those that are no module of it, such as parameters, come last."""
        numbers = {path: number for number, path in enumerate(self.modules)}
        return sorted(paths, key=lambda path: numbers.get(path, len(numbers)))

    @cached_property
    def flattened(self) -> dict[str, str]:
        """Path with underscores for dots -> path, for every leaf module whose path alone has this form.

        A wrapper of peft around a leaf module counts as one.

        For example, `down_blocks_0_attentions_0_proj_in` -> `down_blocks.0.attentions.0.proj_in`.
        """
        found: dict[str, str] = {}
        ambiguous: set[str] = set()
        for path, module in self.modules.items():
            if not module._modules or "base_layer" in module._modules:
                flat, own = path.replace(".", "_"), self._paths[id(module)]
                if found.setdefault(flat, own) != own:
                    ambiguous.add(flat)
        for path, module in (("", self.model), *self.modules.items()):
            for name, parameter in module._parameters.items():
                if name not in ("weight", "bias") and parameter is not None and parameter.ndim in (2, 3):
                    own = f"{path}.{name}".removeprefix(".")
                    if found.setdefault(own.replace(".", "_"), own) != own:
                        ambiguous.add(own.replace(".", "_"))
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
        if module is None and self._parameter(path) is not None:
            return path
        # A module at two paths (the convolution of old downsamplers) is one layer, whichever path a file uses.
        return None if module is None else self._paths[id(module)]

    def host(self, path: str) -> nn.Module:
        """Return the module at `path`, or the module that owns the bare parameter there."""
        if path in self.modules:
            return self.modules[path]
        owner = path.rpartition(".")[0]
        return self.modules[owner] if owner else self.model

    def select_parameters(
        self, wanted: Sequence[str], blocks: Collection[int] | None = None, block_lists: str | Sequence[str] = ()
    ) -> list[str]:
        """Return the paths of the bare parameters that end in one of the names `wanted`.

        Args:
            wanted: path endings.
            blocks, block_lists: see `select`.

        Raises:
            AdapterError: a name is that of no parameter, or of one that is no matrix and no list of matrices.
        """
        paths = [f"{path}.{name}" for path, module in self.modules.items() for name in module._parameters]
        chosen: list[str] = []
        for ending in wanted:
            found = [path for path in paths if f".{path}".endswith(f".{ending}") and self._parameter(path) is not None]
            if not found:
                at_root = ending in self.model._parameters
                reason = "is a parameter of the model itself, which cannot be adapted" if at_root else "is no parameter"
                raise AdapterError(f"target_parameters: {ending!r} {reason} of {type(self.model).__name__}")
            chosen += found
        if blocks is None:
            return list(dict.fromkeys(chosen))
        names = [block_lists] if isinstance(block_lists, str) else block_lists
        return list(self._in_blocks({path: self.host(path) for path in chosen}, blocks, names))

    def _parameter(self, path: str) -> Tensor | None:
        """Return the parameter at `path`, or `None` if there is none."""
        owner, _, name = path.rpartition(".")
        module = self.modules.get(owner) if owner else self.model
        return None if module is None else module._parameters.get(name)

    def _parameter_spec(self, path: str, kinds: Collection[LayerKind]) -> LayerSpec:
        """Return the geometry of the bare parameter at `path`. Raise `AdapterError` if it cannot be adapted."""
        parameter = self._parameter(path)
        assert parameter is not None
        spec = parameter_spec(parameter, inputs_first=bool(getattr(self.host(path), "is_transposed", False)))
        if spec is None or spec.kind not in kinds:
            raise AdapterError(f"a parameter of shape {tuple(parameter.shape)} cannot carry this adapter")
        return spec

    def resolve_flat(self, flat: str) -> str | None:
        """Return the model's own path for a path with underscores for dots, or `None` if there is no such leaf."""
        path = self.flattened.get(flat)
        if path is None:
            prefix = _CLIP_PREFIX.replace(".", "_")
            path = self.flattened.get(flat.removeprefix(prefix) if flat.startswith(prefix) else prefix + flat)
        return path

    def is_own_path(self, path: str) -> bool:
        """Return whether this is the path by which the module there is known, and not a second one."""
        return self._paths[id(self.modules[path])] == path

    @property
    def input_embedding(self) -> str:
        """The path of the model's token embedding: the one that it names, or its only one.

        Raises:
            AdapterError: it names none, and has several or none.
        """
        try:
            embedding = self.model.get_input_embeddings()  # type: ignore[operator]
        except (AttributeError, NotImplementedError):
            embedding = None
        own = {id(module): module for module in self.modules.values() if isinstance(module, nn.Embedding)}
        if id(embedding) not in self._paths and len(own) == 1:
            embedding = next(iter(own.values()))
        if id(embedding) not in self._paths:
            name = type(self.model).__name__
            raise AdapterError(f"target_modules is missing, and a {name} does not say which layer embeds its tokens")
        return self._paths[id(embedding)]

    def has_weight(self, path: str) -> bool:
        """Return whether the module at `path` has a weight."""
        module = self.modules.get(path)
        if module is None:
            return self._parameter(path) is not None
        if module._parameters.get("weight") is not None:
            return True
        # Layers that pack their weight may have it under another name.
        return resting_tensor(module, "weight") is not None or LayerSpec.of(module) is not None

    def spec(self, path: str, kinds: Collection[LayerKind] = _CARRIERS) -> LayerSpec:
        """Return the geometry of the layer at `path`, for an adapter whose type can sit on layers of these `kinds`.

        Raises:
            AdapterError: no such adapter can sit there. The message says why, without the path.
        """
        parent_path, _, name = path.rpartition(".")
        if path not in self.modules:
            return self._parameter_spec(path, kinds)
        module = self.modules[path]
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
        *,
        blocks: Collection[int] | None = None,
        block_lists: str | Sequence[str] = (),
    ) -> dict[str, nn.Module]:
        """Return the layers for a new adapter, by path.

        Args:
            wanted: "all-linear", "all-conv", a regular expression for the whole path, or a list of path endings
                that match whole path components. An expression that matches no path is taken as one ending. "all-..."
                leaves out the last layer of the model and the parts of a text encoder that read pictures.
            excluded: a regular expression or a list of path endings; the layers that match are left out.
            kinds: the kinds of layers to choose from.
            blocks: the numbers of the blocks to choose from; defaults to all layers.
            block_lists: the names of the lists that `blocks` counts in; defaults to the first list on each path.

        Raises:
            AdapterError: a pattern matches no layer, a number is that of no block, or no layer is left.
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
            left_out = self._matching(pattern, _CARRIERS, is_regex=isinstance(excluded, str))
            if not left_out:
                raise AdapterError(
                    f"exclude_modules: {pattern!r} matches no layer of {type(self.model).__name__}, so it has no effect"
                )
            for path in left_out:
                chosen.pop(path, None)
        if blocks is not None:
            chosen = self._in_blocks(chosen, blocks, [block_lists] if isinstance(block_lists, str) else block_lists)
        if not chosen:
            raise AdapterError(f"target_modules={wanted!r} without {excluded!r} leaves no layer")
        return chosen

    def _matching(self, pattern: str, kinds: Collection[LayerKind], *, is_regex: bool) -> dict[str, nn.Module]:
        if is_regex and pattern in ("all-linear", "all-conv"):
            kind = pattern.removeprefix("all-")
            found = {
                path: module
                for path, module in self.modules.items()
                if self._kind(path) == kind and not self._is_apart(path)
            }
        elif is_regex:
            found = self._matching_expression(pattern) or self._ending_in(pattern)
        else:
            found = self._ending_in(pattern)
        return {
            path: module
            for path, module in found.items()
            if self._paths[id(module)] == path and (spec := LayerSpec.of(module)) is not None and spec.kind in kinds
        }

    def _is_apart(self, path: str) -> bool:
        """Return whether a layer has to be asked for by its name; see `_OUTPUTS` and `_TOWERS`."""
        if _OUTPUTS.fullmatch(path) or self.modules[path] is self._output_layer:
            return True
        if path == _OUTPUT_OF_LUMINA:
            return "proj_out" not in self.modules
        config = getattr(self.model, "config", None)
        is_multimodal = any(hasattr(config, name) for name in ("vision_config", "audio_config"))
        return is_multimodal and not _TOWERS.isdisjoint(path.split("."))

    @cached_property
    def _output_layer(self) -> Any:
        """The layer that computes the logits of a language model, `None` for other models."""
        try:
            return self.model.get_output_embeddings()  # type: ignore[operator]
        except (AttributeError, NotImplementedError):
            return None

    def _in_blocks(
        self, chosen: dict[str, nn.Module], blocks: Collection[int], names: Sequence[str]
    ) -> dict[str, nn.Module]:
        """Return the chosen layers that are in certain blocks; see `select`."""
        lists = "|".join(map(re.escape, names))
        expression = re.compile(rf"(?:^|\.)(?:{lists})\.(\d+)(?:\.|$)") if names else _BLOCK
        numbers = {path: int(match[1]) for path in chosen if (match := expression.search(path))}
        absent = [number for number in blocks if number not in numbers.values()]
        if absent:
            where = f"in {', '.join(names)}" if names else "of the model"
            present = sorted(set(numbers.values()))
            there = f"{present[0]} to {present[-1]}" if present else "none"
            raise AdapterError(
                f"layers_to_transform: {', '.join(map(str, absent))} is no block {where} with a chosen layer; there "
                f"are {there}"
            )
        for name in names:
            if not any(re.search(rf"(?:^|\.){re.escape(name)}\.\d+(?:\.|$)", path) for path in chosen):
                raise AdapterError(f"layers_pattern: {name!r} is no list of blocks with a chosen layer")
        return {path: module for path, module in chosen.items() if numbers.get(path) in blocks}

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
