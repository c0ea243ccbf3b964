"""New adapters on a model, from their settings."""

from functools import partial

import torch
from torch import nn

from diffadapt.adapter import Adapter, AdapterLayer, Dropout, weight_of
from diffadapt.attach import attach_, bank_of, refresh_
from diffadapt.config import AdapterConfig
from diffadapt.errors import AdapterError, naming
from diffadapt.hooks import execution_device
from diffadapt.layer import LayerSpec
from diffadapt.targets import Targets
from diffadapt.types import for_config


def add_adapter(model: nn.Module, config: AdapterConfig, name: str = "default") -> Adapter:
    """Add a new, trainable adapter to `model` and activate it. At first it changes nothing.

    Its parameters are float32, on the device the model runs on. `requires_grad` of the base model stays as it is.

    Args:
        config: of the type you want: `LoraConfig`, `LoHaConfig`, `LoKrConfig`, `OFTConfig`, ...

    Returns:
        The adapter, an `nn.Module` registered in `model`: `adapter.parameters()` is what an optimiser needs.

    Raises:
        AdapterError: a pattern that matches nothing, a layer that cannot carry such an adapter, settings that do not
            suit a layer (the error names it), a name in use.
    """
    bank = bank_of(model)
    if bank is not None and bank.merged:
        raise AdapterError(f"{', '.join(bank.merged)} is merged into the weights; unmerge() before adding an adapter")
    layers, hosts = new_layers(model, config)
    adapter = Adapter(layers)
    attach_(model, name, adapter, hosts)
    adapter.active = adapter.beside = True
    refresh_(model)
    return adapter


def new_layers(model: nn.Module, config: AdapterConfig) -> tuple[dict[str, AdapterLayer], dict[str, nn.Module]]:
    """The adapter layers that `add_adapter` would attach, and the layers of the model they are for, by module path."""
    kind = for_config(config)
    targets = Targets(model)
    hosts = targets.select(config.target_modules, config.exclude_modules, kind.layers)
    generator = config.generator or torch.Generator().manual_seed(0)
    device = execution_device(targets.all)
    layers: dict[str, AdapterLayer] = {}
    specs: dict[str, LayerSpec] = {}
    for path in sorted(hosts):
        with naming(path):
            specs[path] = targets.spec(path, kind.layers)
    config.refuse_idle(specs)
    for path, spec in specs.items():
        settings = config.at(path)
        with naming(path):
            tensors = kind.init(spec, settings, generator, partial(weight_of, hosts[path], spec))
        dropout = Dropout(config.dropout, getattr(config, "rank_dropout", 0.0), config.module_dropout)
        layers[path] = AdapterLayer(
            kind,
            spec,
            {key: tensor.to(device, torch.float32) for key, tensor in tensors.items()},
            settings.alpha_of(),
            settings=settings.settings,
            trainable=True,
            dropout=dropout,
        )
    return layers, hosts
