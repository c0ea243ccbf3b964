"""The adapter that a run trains: a new one, or one that a file continues."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from diffadapt.errors import AdapterError, UsageError
from diffadapt.management.creation import add_adapter
from diffadapt.pipelines.components import components_of
from diffadapt.pipelines.entry import load_adapter
from diffadapt.pipelines.new_words import add_tokens
from diffadapt.runtime.adapter import Adapter
from diffadapt.runtime.bank import bank_of
from diffadapt.training.families import Pipeline, TrainingFamily
from diffadapt.training.objective import HELPER
from diffadapt.training.options import TrainingOptions
from diffadapt.types import TYPES, for_config
from diffadapt.types.config import AdapterConfig

TEXT_ENCODER_LAYERS = ("q_proj", "k_proj", "v_proj", "out_proj", "o_proj", "SelfAttention.q", "SelfAttention.k",
                       "SelfAttention.v", "SelfAttention.o")  # fmt: skip
_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "to_out", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out",
              "to_qkv", "to_qkv_mlp_proj")  # fmt: skip
_BLOCK = r"up_blocks\.0\.attentions\.{}\..+\.(to_q|to_k|to_v|to_out\.0)"
PRESETS = {"b-lora-content": _BLOCK.format(0), "b-lora-style": _BLOCK.format(1)}
"""The two blocks of SDXL that B-LoRA (Frenkel et al., arXiv 2403.14572) trains."""


def add_adapters(
    options: TrainingOptions, pipe: Pipeline, family: TrainingFamily, encoders: Sequence[str], name: str
) -> dict[str, Adapter]:
    """Add an adapter to the denoisers and, if asked for, to the text encoders; return them by component name.

    Raises:
        UsageError: the options do not suit the model.
    """
    denoisers = list(family.experts(pipe))
    if options.helper_adapter:
        load_adapter(pipe, options.helper_adapter, HELPER)
    if options.init_adapter:
        return _continued(options, pipe, [*denoisers, *encoders], name)
    generator = torch.Generator().manual_seed(options.seed)
    adapters: dict[str, Adapter] = {}
    for component in [*denoisers, *encoders]:
        model = getattr(pipe, component)
        if component in denoisers:
            targets = denoiser_targets(options.lora_layers, model, family)
        elif options.lora_layers in ("all", "all-linear", "all-conv"):
            targets = "all-linear"
        else:
            targets = _present(TEXT_ENCODER_LAYERS, model)
        try:
            adapters[component] = add_adapter(model, adapter_config(options, targets, generator), name)
        except AdapterError as error:
            raise UsageError(f"{component}: {error}") from error
    return adapters


def denoiser_targets(layers: str | None, model: nn.Module, family: TrainingFamily) -> str | list[str]:
    """Return the target modules that `--lora_layers` names."""
    if layers is None:
        return family.targets if isinstance(family.targets, str) else list(family.targets)
    if layers == "all":
        return ".+"
    if layers in ("all-linear", "all-conv"):
        return layers
    if layers == "attention":
        return _present(_ATTENTION, model)
    if layers in PRESETS:
        return PRESETS[layers]
    return [name.strip() for name in layers.split(",")]


def adapter_config(
    options: TrainingOptions, target_modules: str | Sequence[str], generator: torch.Generator
) -> AdapterConfig:
    """Return the settings of the adapter for `--adapter_type` and its options.

    Raises:
        UsageError: there is no such type, or it does not take the settings.
    """
    kinds = {adapter_type.name: adapter_type.config for adapter_type in TYPES if adapter_type.config}
    config_class = kinds.get(options.adapter_type)
    if config_class is None:
        raise UsageError(f"--adapter_type {options.adapter_type} is unknown; use one of {', '.join(kinds)}")
    fields = {entry.name for entry in dataclasses.fields(config_class)}
    settings: dict[str, Any] = {
        "target_modules": target_modules,
        "generator": generator,
        "dropout": options.lora_dropout,
        "rank": options.rank,
        "alpha": options.lora_alpha,
        "factor": options.lokr_factor,
        "block_size": options.block_size,
    }
    settings = {name: value for name, value in settings.items() if name in fields}
    if options.adapter_type in ("oft", "boft"):
        # Rotations of the outputs have a file format that other tools read.
        settings["side"] = "output"
    unknown = options.adapter_args.keys() - fields
    if unknown:
        taken = ", ".join(sorted(fields - {"target_modules", "generator", "init"}))
        raise UsageError(
            f"--adapter_args: {options.adapter_type} has no {', '.join(sorted(unknown))}; it takes {taken}"
        )
    settings |= options.adapter_args
    # Some types share a class of settings, and differ in one of them.
    variants: tuple[dict[str, Any], ...] = ({}, {"use_dora": True}, {"scale_bias": True})
    for further in variants:
        if further.keys() <= fields:
            config = config_class(**{**settings, **further})
            if for_config(config).name == options.adapter_type:
                return config
    raise UsageError(f"--adapter_type {options.adapter_type} cannot be made with these settings")


def add_words(options: TrainingOptions, pipe: Pipeline, adapters: dict[str, Adapter], name: str) -> list[nn.Parameter]:
    """Add new words to the text encoders, as part of the adapters; return their vectors."""
    if not options.new_words:
        return []
    before = {id(p) for adapter in adapters.values() for p in adapter.parameters()}
    found = add_tokens(pipe, options.new_words, name, generator=torch.Generator().manual_seed(options.seed))
    if not isinstance(found, dict):
        found = {component: found for component, model in components_of(pipe).items() if _carries(model, found)}
    adapters.update(found)
    return [p for adapter in found.values() for p in adapter.parameters() if id(p) not in before]


def _carries(model: nn.Module, adapter: Adapter) -> bool:
    bank = bank_of(model)
    return bank is not None and any(other is adapter for other in bank.adapters.values())


def _continued(options: TrainingOptions, pipe: Pipeline, components: Sequence[str], name: str) -> dict[str, Adapter]:
    """Load the adapter of `--init_adapter` and make its parameters trainable."""
    assert options.init_adapter is not None
    load_adapter(pipe, options.init_adapter, name, dtype=torch.float32)
    found: dict[str, Adapter] = {}
    for component, model in components_of(pipe).items():
        bank = bank_of(model)
        adapter = None if bank is None else bank.adapters.get(name)
        if adapter is None:
            continue
        if component not in components:
            raise UsageError(
                f"--init_adapter {options.init_adapter} has layers of {component}, which would be lost: pass "
                "--train_text_encoder, too"
            )
        for layer in adapter.layers.values():
            for key, parameter in layer.named_parameters():
                parameter.requires_grad_(key not in layer.adapter_type.fixed)
        found[component] = adapter
    missing = [component for component in components if component not in found]
    if missing:
        raise UsageError(
            f"--init_adapter {options.init_adapter} has no layers of {', '.join(missing)}, which would be trained"
        )
    return found


def _present(endings: Sequence[str], model: nn.Module) -> list[str]:
    """Return those of `endings` that a layer with a weight ends with."""
    paths = [path for path, module in model.named_modules() if getattr(module, "weight", None) is not None]
    return [end for end in endings if any(path == end or path.endswith(f".{end}") for path in paths)]
