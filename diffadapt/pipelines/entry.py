"""The public functions that load adapters into pipelines and single models, or return the loaded ones."""

import os
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from diffadapt.errors import AdapterError
from diffadapt.files.checkpoint import Location, Source
from diffadapt.loading.plan import Plan
from diffadapt.loading.report import Report
from diffadapt.management.activation import follow_schedules
from diffadapt.management.manager import Adapters
from diffadapt.management.owner import Owner
from diffadapt.pipelines.call_hooks import EncodePromptHook, ProgressBarHook
from diffadapt.pipelines.components import (
    components_of,
    empty_components_of,
    feeds_control,
    likely_role_of,
    role_of,
    tokenizers_of,
    unwrapped,
)
from diffadapt.pipelines.served_classes import serve_diffusers_methods
from diffadapt.runtime.bank import bank_of
from diffadapt.strengths.by_prefix import Strength, is_scheduled


def load_adapter(
    pipe: Any,
    source: Source | Plan,
    name: str | None = None,
    scale: Strength = 1.0,
    *,
    adapter_name: str | None = None,
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
    trainable: bool = False,
) -> Report:
    """Load an adapter into this pipeline. It joins the adapters that are active already.

    Args:
        source: path of a file or folder, hub id, link to the hub, or a state dict. Tensors of a state dict are not
            changed, but not copied either where dtype and device fit, so do not write into them afterwards. Or a `Plan`
            that `pipe.adapters.prefetch` returned.
        name: name of the adapter; defaults to the file name, or to "default_0", "default_1", ... for a state dict. If
            the file has a learned token without a name (a textual inversion), the token gets this name.
        adapter_name: the same as `name`, as diffusers calls it.
        scale: strength of the adapter: a number, a schedule, or prefix -> number or schedule ("unet.up_blocks": 0.5);
            see `pipe.adapters.activate`.
        components: load into these components only ("unet", "text_encoder", ...) and ignore the rest of the file;
            defaults to all.
        weight_name: name of the file in a folder or hub repository with several.
        subfolder: folder of the file in a hub repository or local folder.
        revision: branch, tag or commit of a hub repository.
        token: access token for the hub, as in `huggingface_hub`.
        cache_dir: folder for downloads; defaults to the cache of `huggingface_hub`.
        local_files_only: whether to use files in the cache only and download nothing.
        strict: raise an error unless every tensor of the file can be used; with `False`, load what can be used.
        dtype: dtype of the adapter's parameters; defaults to the dtype each component computes in.
        activate: whether the adapter acts at once; with `False` it is only loaded.
        allow_recompile: after `prepare_hotswap`, if the slots have no room for the adapter, run it outside the slots,
            which recompiles a compiled model, instead of raising an error.
        format: format of the file ("kohya", "diffusers", ...); recognised by default.
        trainable: whether to train the adapter on: its parameters are float32 and require gradients, and the dropout
            that the file was trained with acts in training mode.

    Returns:
        Which tensors of the file are used, and why others are not.

    Raises:
        AdapterError: the file cannot be read or applied, the name is in use, the slots have no room, or a tokenizer has
            one of the tokens already. The pipeline is exactly as it was before.
    """
    where = Location(weight_name, subfolder, revision, token, cache_dir, local_files_only)
    return adapters_of(pipe).load(
        source,
        name,
        adapter_name=adapter_name,
        scale=scale,
        components=components,
        where=where,
        strict=strict,
        dtype=dtype,
        activate=activate,
        allow_recompile=allow_recompile,
        format=format,
        trainable=trainable,
    )


def adapters_of(owner: Any) -> Adapters:
    """Return the adapters of a pipeline or of a single model, as `pipe.adapters` does.

    Args:
        owner: a pipeline, or a model; wrappers of `torch.compile` and data parallelism are looked through.

    Raises:
        AdapterError: `owner` is neither.
    """
    serve_diffusers_methods(adapters_of)
    if isinstance(owner, nn.Module):
        model = unwrapped(owner)
        role = likely_role_of(model)
        # The component name matters for saving: a file is loaded again by it.
        return Adapters(Owner(lambda: {role: model}, qualified=False))
    if not hasattr(owner, "components"):
        raise AdapterError(f"a {type(owner).__name__} carries no adapters, expected a pipeline or a model (nn.Module)")
    EncodePromptHook.install(owner)
    found = Owner(
        lambda: components_of(owner),
        tokenizers=lambda: tokenizers_of(owner),
        empty=lambda: empty_components_of(owner),
        changed=lambda: EncodePromptHook.install(owner),
        counts_prompts=True,
        feeds_control=feeds_control(owner),
        follow=lambda listener: ProgressBarHook.install(owner, listener, _owner_of),
        pipeline=owner,
    )
    if not ProgressBarHook.is_on(owner) and any(map(_has_schedule, components_of(owner).values())):
        # A second pipeline over the same models may have a scheduler of its own.
        follow_schedules(found, found.follow)
    return Adapters(found)


def _has_schedule(model: nn.Module) -> bool:
    """Return whether the strength of an active adapter of `model` is a schedule."""
    bank = bank_of(model)
    return bank is not None and any(one.active and is_scheduled(one.strength) for one in bank.adapters.values())


def _owner_of(pipe: Any) -> Owner:
    return adapters_of(pipe).owner


def load_adapter_into_model(
    model: Any,
    source: Source | Plan,
    name: str | None = None,
    scale: Strength = 1.0,
    *,
    adapter_name: str | None = None,
    component: str | None = None,
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
    trainable: bool = False,
) -> Report:
    """Load an adapter into a single model, or into a pipeline. It joins the adapters that are active already.

    For a pipeline this is `pipe.load_adapter`, in a form that type checkers know.

    Args:
        model: a UNet, a transformer, a text encoder, ..., or a pipeline.
        source: path of a file or folder, hub id, or a state dict. Tensors of a state dict are not changed, but not
            copied either where dtype and device fit, so do not write into them afterwards.
        name: name of the adapter; defaults to the file name, or to "default_0", "default_1", ... for a state dict.
        adapter_name: the same as `name`, as diffusers calls it.
        component: the part of a file for a whole pipeline that is loaded ("unet", "text_encoder_2", ...); defaults to
            the one that models of this class are, and to all of a pipeline. The rest of the file is ignored.
        scale: strength of the adapter: a number, or module path prefix -> number ("up_blocks": 0.5).
        weight_name: name of the file in a folder or hub repository with several.
        subfolder: folder of the file in a hub repository or local folder.
        revision: branch, tag or commit of a hub repository.
        token: access token for the hub, as in `huggingface_hub`.
        cache_dir: folder for downloads; defaults to the cache of `huggingface_hub`.
        local_files_only: whether to use files in the cache only and download nothing.
        strict: raise an error unless every tensor of the component can be used; with `False`, load what can be used.
        dtype: dtype of the adapter's parameters; defaults to the dtype the model computes in.
        activate: whether the adapter acts at once; with `False` it is only loaded.
        format: format of the file ("kohya", "diffusers", ...); recognised by default.
        trainable: whether to train the adapter on: its parameters are float32 and require gradients, and the dropout
            that the file was trained with acts in training mode.

    Returns:
        Which tensors of the file are used, and why others are not.

    Raises:
        AdapterError: the file cannot be read or applied, the name is in use, the slots have no room, or the component
            cannot be told from the class of the model. The model is exactly as it was before.
    """
    where = Location(weight_name, subfolder, revision, token, cache_dir, local_files_only)
    if isinstance(model, nn.Module):
        role = component or role_of(model)
        components = [role]
        serve_diffusers_methods(adapters_of)
        adapters = Adapters(Owner(lambda: {role: unwrapped(model)}, qualified=False))
    else:
        components = None if component is None else [component]
        adapters = adapters_of(model)
    return adapters.load(
        source,
        name,
        adapter_name=adapter_name,
        scale=scale,
        where=where,
        strict=strict,
        dtype=dtype,
        activate=activate,
        components=components,
        format=format,
        trainable=trainable,
    )
