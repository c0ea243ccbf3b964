"""Attach what was planned: in all components, or in none."""

from collections.abc import Mapping

from torch import nn

from diffadapt.loading.plan import Plan
from diffadapt.runtime.adapter import Adapter
from diffadapt.runtime.attach import attach_, detach_
from diffadapt.runtime.bank import bank_of
from diffadapt.tokens.installation import install_, uninstall_
from diffadapt.tokens.learned_tokens import learned_tokens_of


def attach_all_(models: Mapping[str, nn.Module], name: str, planned: Plan, *, replacing: bool = False) -> None:
    """Attach a plan's adapters and install its tokens under `name`: all, or, if one component refuses, none.

    Args:
        replacing: see `attach_`. The adapter of this name is removed from components that the plan has none for.
    """
    before: dict[str, Adapter] = {}
    for component, model in models.items():
        bank = bank_of(model)
        if bank is not None and name in bank.adapters and replacing:
            before[component] = bank.adapters[name]
    tokens = {component: held for component, old in before.items() if (held := learned_tokens_of(old)) is not None}
    uninstall_(models, name)
    attached: list[str] = []
    try:
        for component, adapter in planned.adapters.items():
            attach_(models[component], name, adapter, planned.hosts(component), replacing=replacing)
            attached.append(component)
        install_(models, name, planned.tokens)
    except BaseException:
        uninstall_(models, name)
        for component in attached:
            if component not in before:
                detach_(models[component], name)
            else:
                hosts = {path: layer.host for path, layer in before[component].layers.items()}
                attach_(models[component], name, before[component], hosts, replacing=True)
        install_(models, name, tokens)
        raise
    for component in before.keys() - planned.adapters.keys():
        detach_(models[component], name)


def detach_all_(models: Mapping[str, nn.Module], name: str) -> None:
    """Remove adapter `name` with its tokens.

    Raises:
        AdapterError: the tokens cannot be removed. Nothing has changed then.
    """
    uninstall_(models, name)
    for model in models.values():
        detach_(model, name)
