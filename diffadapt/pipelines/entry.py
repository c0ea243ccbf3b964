"""The functions that users call on pipelines and on single models."""

import os
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from diffadapt.errors import AdapterError
from diffadapt.files.checkpoint import Location, Source
from diffadapt.loading.plan import Plan
from diffadapt.loading.report import Report
from diffadapt.management.manager import Adapters
from diffadapt.management.owner import Owner
from diffadapt.pipelines.call_hooks import EncodePromptHook, ProgressBarHook
from diffadapt.pipelines.components import components_of, role_of, tokenizers_of, unwrapped
from diffadapt.strengths.by_prefix import Strength


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
        model = unwrapped(owner)
        try:
            role = role_of(model)
        except AdapterError:
            role = "text_encoder_2"
        # The name under which a saved adapter is loaded again.
        return Adapters(Owner(lambda: {role: model}, qualified=False))
    EncodePromptHook.install(owner)
    return Adapters(
        Owner(
            lambda: components_of(owner),
            tokenizers=lambda: tokenizers_of(owner),
            changed=lambda: EncodePromptHook.install(owner),
            follow=lambda listener: ProgressBarHook.install(owner, listener),
        )
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
    role = component or role_of(model)
    adapters = Adapters(Owner(lambda: {role: unwrapped(model)}, qualified=False))
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
