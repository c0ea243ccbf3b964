"""Adapters on diffusers pipelines: the two names pipelines get, the scale they pass to their text encoders, and whom
their schedulers tell of their steps.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import inspect
import os
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import nn

from diffadapt.attach import Bank, bank_of
from diffadapt.clock import Listener, follow, is_scheduler
from diffadapt.errors import AdapterError
from diffadapt.hooks import diffusers_scales_with_peft
from diffadapt.io import Location, Source
from diffadapt.load import Plan
from diffadapt.manager import Adapters
from diffadapt.report import Report
from diffadapt.scales import Strength
from diffadapt.textual_inversion import is_extended, refresh_

_OWNERS = {
    "diffusers.pipelines.pipeline_utils": "DiffusionPipeline",
    "diffusers.modular_pipelines.modular_pipeline": "ModularPipeline",
}


def load_adapter(
    pipe: Any,
    source: Source | Plan,
    name: str | None = None,
    *,
    scale: Strength = 1.0,
    components: Iterable[str] | None = None,
    weight_name: str | None = None,
    subfolder: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    strict: bool = True,
    dtype: torch.dtype | None = None,
    activate: bool = True,
    allow_recompile: bool = False,
    format: str | None = None,
) -> Report:
    """Load an adapter into this pipeline; it joins those already active.

    Args:
        source: path of a file or folder, hub id, or a state dict, whose tensors are not changed, and not copied where
            dtype and device fit: do not write into them afterwards. Or what `pipe.adapters.prefetch` returned.
        name: default: from the file name, or "default_0", ... A name in use raises. Of learned vectors whose file does
            not say their token, it is the token.
        scale: strength, or strengths by prefix as in `pipe.adapters.activate`.
        components: load into these only, and leave the rest of the file aside.
        weight_name, subfolder, revision, token, cache_dir, local_files_only: as in `huggingface_hub`.
        strict: raise unless every tensor of the file can be used.
        dtype: of the adapter's parameters; default the dtype each component computes in.
        activate: `False` to only load it.
        allow_recompile: after `prepare_hotswap`, if there is no room for it: run beside the slots instead of raising.
        format: of the file ("kohya", "diffusers", ...); default what its names tell.

    Returns:
        What was used, and what was not and why.

    Raises:
        AdapterError: the file cannot be read or applied, or a tokenizer has one of its tokens already. The pipeline is
            exactly as before.
    """
    where = Location(weight_name, subfolder, revision, token, cache_dir, local_files_only)
    return adapters_of(pipe).load(
        source,
        name,
        scale=scale,
        components=components,
        where=where,
        strict=strict,
        dtype=dtype,
        activate=activate,
        allow_recompile=allow_recompile,
        format=format,
    )


def adapters_of(owner: Any) -> Adapters:
    """The adapters of a pipeline or of a single model: what `pipe.adapters` gives."""
    if isinstance(owner, nn.Module):
        model = _unwrapped(owner)
        try:
            role = _role(model)
        except AdapterError:
            role = "text_encoder_2"
        # The name under which a saved adapter is loaded again.
        return Adapters(lambda: {role: model}, qualified=False)
    _EncodePrompt.install(owner)
    return Adapters(
        lambda: components_of(owner),
        tokenizers=lambda: _tokenizers_of(owner),
        changed=lambda: _EncodePrompt.install(owner),
        follow=lambda listener: _ProgressBar.install(owner, listener),
    )


def load_adapter_into_model(
    model: nn.Module,
    source: Source,
    name: str | None = None,
    *,
    component: str | None = None,
    scale: Strength = 1.0,
    weight_name: str | None = None,
    subfolder: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    strict: bool = True,
    dtype: torch.dtype | None = None,
    activate: bool = True,
    format: str | None = None,
) -> Report:
    """Load an adapter into one model without a pipeline. Arguments as for `pipe.load_adapter`, and:

    Args:
        component: which part of a file for a whole pipeline is meant ("unet", "text_encoder_2", ...); default: what
            the model's class says. The rest of the file is left aside.
    """
    where = Location(weight_name, subfolder, revision, token, cache_dir, local_files_only)
    role = component or _role(model)
    adapters = Adapters(lambda: {role: _unwrapped(model)}, qualified=False)
    return adapters.load(
        source,
        name,
        scale=scale,
        where=where,
        strict=strict,
        dtype=dtype,
        activate=activate,
        components=[role],
        format=format,
    )


def components_of(pipe: Any) -> dict[str, nn.Module]:
    """The models of a pipeline by component name, out of the wrappers of `torch.compile` and data parallelism."""
    found: dict[str, nn.Module] = {}
    for name, component in pipe.components.items():
        if isinstance(component, nn.Module):
            model = _unwrapped(component)
            if all(model is not other for other in found.values()):
                found[name] = model
    return found


def _tokenizers_of(pipe: Any) -> dict[str, Any]:
    """The tokenizers of a pipeline by their text encoders."""
    parts: Mapping[str, Any] = pipe.components
    paired = {name: parts.get(name.replace("text_encoder", "tokenizer")) for name in parts if "text_encoder" in name}
    return {name: tokenizer for name, tokenizer in paired.items() if hasattr(tokenizer, "add_tokens")}


def install() -> None:
    """Give `DiffusionPipeline` and `ModularPipeline` the names `load_adapter` and `adapters`.

    Pipelines take a second to import, so classes that are not there yet get them when they are.
    """
    waiting = {module: owner for module, owner in _OWNERS.items() if module not in sys.modules}
    for module, owner in _OWNERS.items():
        if module not in waiting:
            _extend(getattr(sys.modules[module], owner))
    if waiting:
        sys.meta_path.insert(0, _Finder(waiting))


def _extend(owner: type) -> None:
    for name, value in (("load_adapter", load_adapter), ("adapters", property(adapters_of))):
        existing = vars(owner).get(name)
        if getattr(owner, name, None) is None:
            setattr(owner, name, value)
        elif existing is not load_adapter and getattr(existing, "fget", None) is not adapters_of:
            warnings.warn(
                f"{owner.__name__} has its own {name!r} in this version of diffusers, which stays as it is; "
                f"use diffadapt.{'adapters(pipe)' if name == 'adapters' else 'load_adapter(pipe, ...)'}",
                stacklevel=2,
            )


class _Finder(importlib.abc.MetaPathFinder):
    """Calls `_extend` on a class right after its module has been imported, and then gets out of the way."""

    def __init__(self, waiting: dict[str, str]) -> None:
        self.waiting = waiting

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        owner = self.waiting.pop(fullname, None)
        if owner is None:
            return None
        if not self.waiting:
            sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                _extend(getattr(module, owner))

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


_IMAGES = ("num_images_per_prompt", "num_videos_per_prompt")
_HANDED = frozenset({"lora_scale", *_IMAGES})


class _EncodePrompt:
    """Stands in for an `encode_prompt` of diffusers and hands its `lora_scale` to the text encoders' adapters, and the
    number of images per prompt to all others.

    diffusers keeps that scale for peft, and without peft it crashes on the text encoders of transformers 5. Learned
    tokens look at their tokenizers here, which diffusers' own textual inversions may have changed in the meantime.
    """

    def __init__(self, pipe: Any, owner: Any) -> None:
        self.pipe = pipe
        self.owner = owner

    @classmethod
    def install(cls, pipe: Any) -> None:
        """Put it on `pipe` while one of its models carries adapters, and take it away afterwards."""
        models = components_of(pipe).values()
        adapted = any(bank_of(model) is not None for model in models)
        has_tokens = any(is_extended(model) for model in models)
        for owner in _prompt_encoders(pipe):
            present = owner.__dict__.get("encode_prompt")
            if not adapted and isinstance(present, cls):
                del owner.__dict__["encode_prompt"]
            elif adapted and present is None:
                if has_tokens or _HANDED.intersection(inspect.signature(owner.encode_prompt).parameters):
                    owner.__dict__["encode_prompt"] = cls(pipe, owner)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        kind = type(self.owner)
        # A method of pipelines, a static method of modular blocks.
        encode = inspect.getattr_static(kind, "encode_prompt").__get__(self.owner, kind)
        bound = inspect.signature(encode).bind(*args, **kwargs)
        scale = bound.arguments.get("lora_scale")
        if scale is not None and not diffusers_scales_with_peft():
            bound.arguments["lora_scale"] = None
        models = components_of(self.pipe).items()
        for _, model in models:
            if is_extended(model):
                refresh_(model)
        images = next((number for name in _IMAGES if (number := bound.arguments.get(name)) is not None), 1)
        banks: list[Bank] = []
        for name, model in models:
            bank = bank_of(model)
            if bank is not None and name.startswith("text_encoder"):
                banks.append(bank)
            elif bank is not None and bank.call.asks_images:
                bank.call.images = images
        value = None if scale is None else torch.as_tensor(scale, dtype=torch.float32)
        for bank in banks:
            bank.call.outer = bank.call.value = value
        try:
            return encode(*bound.args, **bound.kwargs)
        finally:
            for bank in banks:
                bank.call.outer = bank.call.value = None


class _ProgressBar:
    """Stands in for the `progress_bar` of a pipeline, which it calls right before its loop: by then it may have got
    another scheduler.
    """

    def __init__(self, pipe: Any, listener: Listener) -> None:
        self.pipe = pipe
        self.listener = listener

    @classmethod
    def install(cls, pipe: Any, listener: Listener | None) -> None:
        """Make the schedulers of `pipe` tell `listener` of every step; `None`: nobody any more."""
        for scheduler in filter(is_scheduler, pipe.components.values()):
            follow(scheduler, pipe, listener)
        present = pipe.__dict__.get("progress_bar")
        if listener is None and isinstance(present, cls):
            del pipe.__dict__["progress_bar"]
        elif listener is not None and present is None and hasattr(type(pipe), "progress_bar"):
            pipe.__dict__["progress_bar"] = cls(pipe, listener)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        for scheduler in filter(is_scheduler, self.pipe.components.values()):
            follow(scheduler, self.pipe, self.listener, running=True)
        return type(self.pipe).progress_bar(self.pipe, *args, **kwargs)


def _prompt_encoders(pipe: Any) -> Iterator[Any]:
    """The pipeline and, if it is modular, its blocks, as far as they encode prompts."""
    waiting = [pipe, getattr(pipe, "_blocks", None)]
    while waiting:
        owner = waiting.pop()
        if hasattr(type(owner), "encode_prompt"):
            yield owner
        if owner is not pipe:
            waiting.extend((getattr(owner, "sub_blocks", None) or {}).values())


def _unwrapped(model: nn.Module) -> nn.Module:
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def _role(model: nn.Module) -> str:
    """The component name that files use for a model of this class."""
    kind = type(_unwrapped(model)).__name__
    if kind.startswith("UNet"):
        return "unet"
    if "Transformer" in kind:
        return "transformer"
    if "CLIPTextModelWithProjection" in kind:
        raise AdapterError(f"{kind} is text_encoder_2 of SDXL and text_encoder of SD3: pass component=")
    return "text_encoder" if type(_unwrapped(model)).__module__.startswith("transformers.") else "model"
