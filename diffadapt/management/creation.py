"""Create new adapters on a model from their settings."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import nn

from diffadapt.errors import AdapterError, naming
from diffadapt.management.snapshot import check_name
from diffadapt.runtime.adapter import Adapter
from diffadapt.runtime.adapter_layer import AdapterLayer
from diffadapt.runtime.attach import attach_, refresh_
from diffadapt.runtime.bank import bank_of
from diffadapt.runtime.base_weight import BaseWeight, bias_of
from diffadapt.runtime.components import unwrapped
from diffadapt.runtime.dropout import Dropout
from diffadapt.runtime.foreign_hooks import execution_device
from diffadapt.runtime.gradient_flow import GradientFlow
from diffadapt.runtime.inference_mode import ordinary_tensors
from diffadapt.runtime.targets import Targets
from diffadapt.runtime.ties import add_twins_, with_twins
from diffadapt.tokens.learned_tokens import CHILD, learned_tokens_of
from diffadapt.types import for_config
from diffadapt.types.adapter_type import AdapterType, Unfinished
from diffadapt.types.config import AdapterConfig
from diffadapt.types.layer_spec import LayerSpec
from diffadapt.types.lora import LORA
from diffadapt.types.parameter import PARAMETER
from diffadapt.types.tensor_ops import converted


def add_adapter(model: nn.Module, config: AdapterConfig | Sequence[AdapterConfig], name: str = "default") -> Adapter:
    """Add a new, trainable adapter to `model` and activate it. Untrained, it does not change the output.

    Its parameters are float32, on the device the model runs on. `requires_grad` of the base model stays as it is.

    Args:
        model: a UNet, a transformer, a text encoder or any other module; wrappers of `torch.compile`, data parallelism
            and the like are looked through.
        config: settings of the adapter type you want: `LoraConfig`, `LoHaConfig`, `LoKrConfig`, `OFTConfig`, ... A list
            of settings makes one adapter of several types, each on its own layers.
        name: name of the adapter: printable characters, without slashes. An adapter of this name that consists of new
            words alone (`add_tokens`) becomes part of the new one.

    Returns:
        The adapter, an `nn.Module` registered in `model`; pass `adapter.parameters()` to an optimiser.

    Raises:
        AdapterError: a pattern that matches no layer, a layer that cannot carry such an adapter or that two of the
            settings name, settings that do not suit a layer (the message names it), a name in use, a merged adapter on
            the model, or quantised layers that pass no right gradient on.
    """
    _refuse_arguments(model, config, name)
    model = unwrapped(model)
    bank = bank_of(model)
    if bank is not None and bank.merged:
        raise AdapterError(f"{', '.join(bank.merged)} is merged into the weights; unmerge() before adding an adapter")
    with ordinary_tensors():
        layers, hosts = new_layers(model, config)
        adapter = Adapter(layers)
    GradientFlow(model).refuse_wrong(layers)
    words = None if bank is None or name not in bank.adapters else bank.adapters[name]
    tokens = None if words is None or words.layers else learned_tokens_of(words)
    if tokens is not None:
        adapter._modules[CHILD] = tokens
    attach_(model, name, adapter, hosts, replacing=tokens is not None)
    adapter.active = adapter.outside_slots = True
    refresh_(model)
    return adapter


def _refuse_arguments(model: object, config: object, name: str) -> None:
    """Raise `AdapterError` if `add_adapter` is called with something else than a model, settings and a name."""
    if not isinstance(model, nn.Module):
        components = getattr(model, "components", None) or {}
        models = [f"pipe.{key}" for key, value in components.items() if isinstance(value, nn.Module)]
        instead = f"one of {', '.join(models)}" if models else "a model, such as pipe.unet or pipe.transformer"
        raise AdapterError(f"add_adapter: a {type(model).__name__} is no model; pass {instead}")
    several = isinstance(config, Sequence) and not isinstance(config, str)
    for each in config if several and config else [config]:  # type: ignore[union-attr,misc]
        if not isinstance(each, AdapterConfig):
            raise AdapterError(
                f"add_adapter: the settings are a {type(each).__name__}, expected LoraConfig(...), LoKrConfig(...), "  # type: ignore[misc]
                "..., or a list of them"
            )
    check_name(name)


def new_layers(
    model: nn.Module, config: AdapterConfig | Sequence[AdapterConfig]
) -> tuple[dict[str, AdapterLayer], dict[str, nn.Module]]:
    """Return the adapter layers that `add_adapter` would attach, and their host layers, both by module path."""
    targets = Targets(model)
    layers: dict[str, AdapterLayer] = {}
    for each in [config] if isinstance(config, AdapterConfig) else config:
        new = _layers_of(targets, each)
        twice = sorted(layers.keys() & new.keys())
        if twice:
            raise AdapterError(
                f"{twice[0]} is named by two of the settings ({layers[twice[0]].adapter_type.name} and "
                f"{new[twice[0]].adapter_type.name}); a layer has one type in an adapter, so exclude it from one "
                "(exclude_modules), or add two adapters"
            )
        layers.update(new)
    return layers, {path: targets.host(path) for path in layers}


def _layers_of(targets: Targets, config: AdapterConfig) -> dict[str, AdapterLayer]:
    """Return the adapter layers that one of the settings means, by module path."""
    adapter_type = for_config(config)
    parameters = _parameters_of(targets, config, adapter_type)
    wanted = config.target_modules or ([] if parameters else [targets.input_embedding])
    chosen = (
        {}
        if not wanted
        else targets.select(
            wanted,
            config.exclude_modules,
            adapter_type.layers,
            blocks=config.block_numbers,
            block_lists=config.layers_pattern,
        )
    )
    generator = config.generator or torch.Generator().manual_seed(0)
    device = execution_device(targets.all)
    layers: dict[str, AdapterLayer] = {}
    config.refuse_idle({path: _spec(targets, path, adapter_type) for path in sorted(chosen)} | parameters)
    twins = with_twins(targets, sorted(chosen), tied=config.ensure_weight_tying)
    specs = {path: _spec(targets, path, adapter_type) for path in twins}
    settings_at = {path: _settings(config, [name for name in (path, *twins[path]) if name in chosen]) for path in specs}
    unfinished: dict[str, Unfinished] = {}
    for path, spec in specs.items():
        weight, settings = BaseWeight(targets.modules[path], spec), settings_at[path]
        with naming(path):
            tensors = adapter_type.init(spec, settings, generator=generator, weight=weight)
        bias = partial(bias_of, targets.modules[path])
        own = {**adapter_type.settings, **settings.settings}
        unfinished[path] = Unfinished(tensors, spec, own, weight, bias)
    # Seeds count in the order of the model.
    complete = adapter_type.complete({path: unfinished[path] for path in targets.modules if path in unfinished})
    dropout = Dropout(config.dropout, getattr(config, "rank_dropout", 0.0), config.module_dropout)
    common: dict[int, nn.Parameter] = {}
    for path, spec in specs.items():
        settings = settings_at[path]
        tensors = {key: converted(tensor, torch.float32, device) for key, tensor in complete[path].items()}
        for key in adapter_type.shared & tensors.keys():
            parameter = nn.Parameter(tensors[key], requires_grad=key not in adapter_type.fixed)
            tensors[key] = common.setdefault(id(complete[path][key]), parameter)
        layers[path] = AdapterLayer(
            adapter_type,
            spec,
            tensors,
            settings.alpha_of(),
            settings=settings.settings,
            trainable=True,
            dropout=dropout,
        )
    add_twins_(layers, targets, twins)
    for path, spec in parameters.items():
        settings = config.at(path)
        found = PARAMETER.init(spec, settings, generator=generator, weight=lambda: torch.empty(0))
        tensors = {key: tensor.to(device) for key, tensor in found.items()}
        layers[path] = AdapterLayer(PARAMETER, spec, tensors, settings.alpha_of(), trainable=True, dropout=dropout)
    return layers


def _parameters_of(targets: Targets, config: AdapterConfig, adapter_type: AdapterType) -> dict[str, LayerSpec]:
    """Return the geometry of the bare parameters that the settings name, by path."""
    if not config.target_parameters:
        return {}
    if adapter_type is not LORA or config.dropout:
        raise AdapterError("target_parameters: only a LoRA without dropout of its input can change bare parameters")
    names = [config.target_parameters] if isinstance(config.target_parameters, str) else config.target_parameters
    return {
        path: _spec(targets, path, PARAMETER)
        for path in targets.select_parameters(names, config.block_numbers, config.layers_pattern)
    }


def _spec(targets: Targets, path: str, adapter_type: AdapterType) -> LayerSpec:
    with naming(path):
        return targets.spec(path, adapter_type.layers)


def _settings(config: AdapterConfig, names: Sequence[str]) -> AdapterConfig:
    """Return the settings of a layer that they name by each of `names`, which have to agree."""
    found = [config.at(name) for name in names]
    if any(settings != found[0] for settings in found[1:]):
        raise AdapterError(
            f"{' and '.join(names)} have the same weight and would share one set of parameters, but their settings "
            "differ; use the same ones, or ensure_weight_tying=False"
        )
    return found[0]
