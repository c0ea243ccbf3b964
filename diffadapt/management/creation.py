"""Create new adapters on a model from their settings."""

from functools import partial

import torch
from torch import nn

from diffadapt.errors import AdapterError, naming
from diffadapt.management.snapshot import check_name
from diffadapt.runtime.adapter import Adapter
from diffadapt.runtime.adapter_layer import AdapterLayer, Dropout
from diffadapt.runtime.attach import attach_, refresh_
from diffadapt.runtime.bank import bank_of
from diffadapt.runtime.base_weight import weight_of
from diffadapt.runtime.components import unwrapped
from diffadapt.runtime.foreign_hooks import execution_device
from diffadapt.runtime.inference_mode import ordinary_tensors
from diffadapt.runtime.targets import Targets
from diffadapt.types import for_config
from diffadapt.types.config import AdapterConfig
from diffadapt.types.layer_spec import LayerSpec


def add_adapter(model: nn.Module, config: AdapterConfig, name: str = "default") -> Adapter:
    """Add a new, trainable adapter to `model` and activate it. Untrained, it does not change the output.

    Its parameters are float32, on the device the model runs on. `requires_grad` of the base model stays as it is.

    Args:
        model: a UNet, a transformer, a text encoder or any other module; wrappers of `torch.compile`, data parallelism
            and the like are looked through.
        config: settings of the adapter type you want: `LoraConfig`, `LoHaConfig`, `LoKrConfig`, `OFTConfig`, ...
        name: name of the adapter: printable characters, without slashes.

    Returns:
        The adapter, an `nn.Module` registered in `model`; pass `adapter.parameters()` to an optimiser.

    Raises:
        AdapterError: a pattern that matches no layer, a layer that cannot carry such an adapter, settings that do not
            suit a layer (the message names it), a name in use, or a merged adapter on the model.
    """
    _refuse_arguments(model, config, name)
    model = unwrapped(model)
    bank = bank_of(model)
    if bank is not None and bank.merged:
        raise AdapterError(f"{', '.join(bank.merged)} is merged into the weights; unmerge() before adding an adapter")
    with ordinary_tensors():
        layers, hosts = new_layers(model, config)
        adapter = Adapter(layers)
    attach_(model, name, adapter, hosts)
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
    if not isinstance(config, AdapterConfig):
        raise AdapterError(
            f"add_adapter: the settings are a {type(config).__name__}, expected LoraConfig(...), LoKrConfig(...), ..."
        )
    check_name(name)


def new_layers(model: nn.Module, config: AdapterConfig) -> tuple[dict[str, AdapterLayer], dict[str, nn.Module]]:
    """Return the adapter layers that `add_adapter` would attach, and their host layers, both by module path."""
    adapter_type = for_config(config)
    targets = Targets(model)
    hosts = targets.select(config.target_modules, config.exclude_modules, adapter_type.layers)
    generator = config.generator or torch.Generator().manual_seed(0)
    device = execution_device(targets.all)
    layers: dict[str, AdapterLayer] = {}
    specs: dict[str, LayerSpec] = {}
    for path in sorted(hosts):
        with naming(path):
            specs[path] = targets.spec(path, adapter_type.layers)
    config.refuse_idle(specs)
    for path, spec in specs.items():
        settings = config.at(path)
        with naming(path):
            tensors = adapter_type.init(
                spec, settings, generator=generator, weight=partial(weight_of, hosts[path], spec)
            )
        dropout = Dropout(config.dropout, getattr(config, "rank_dropout", 0.0), config.module_dropout)
        layers[path] = AdapterLayer(
            adapter_type,
            spec,
            {key: tensor.to(device, torch.float32) for key, tensor in tensors.items()},
            settings.alpha_of(),
            settings=settings.settings,
            trainable=True,
            dropout=dropout,
        )
    return layers, hosts
