"""Attaching what was planned: in all components, or in none."""

from collections.abc import Mapping

from torch import nn

from diffadapt.loading.plan import Plan
from diffadapt.runtime.adapter import Adapter
from diffadapt.runtime.attach import attach_, detach_
from diffadapt.runtime.bank import bank_of
from diffadapt.tokens.installation import install_, uninstall_
from diffadapt.tokens.learned_tokens import learned_tokens_of


def attach_all_(models: Mapping[str, nn.Module], name: str, planned: Plan, *, replacing: bool = False) -> None:
    """Attach a plan's adapters as `name`, and install its tokens: in all components or, if one refuses, in none.

    Args:
        models: the models by component.
        name: the name of the adapter.
        planned: the plan, made for these models.
        replacing: whether to replace the adapter of this name, if there is one; otherwise the name must be free. The
            adapter is also removed from components for which the plan has none.

    Raises:
        AdapterError: a component refuses its adapter or its tokens; see `attach_` and `install_`.
    """
    before = _attached(models, name) if replacing else {}
    tokens_before = {
        component: tokens for component, adapter in before.items() if (tokens := learned_tokens_of(adapter)) is not None
    }
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
        install_(models, name, tokens_before)
        raise
    for component in before.keys() - planned.adapters.keys():
        detach_(models[component], name)


def detach_all_(models: Mapping[str, nn.Module], name: str) -> None:
    """Remove adapter `name` from all components, with its tokens.

    Raises:
        AdapterError: the tokens cannot be removed, in which case nothing has changed, or a model refuses; see
            `uninstall_` and `detach_`.
    """
    uninstall_(models, name)
    for model in models.values():
        detach_(model, name)


def _attached(models: Mapping[str, nn.Module], name: str) -> dict[str, Adapter]:
    """Return the adapter called `name` of each component that has one."""
    banks = {component: bank_of(model) for component, model in models.items()}
    return {c: bank.adapters[name] for c, bank in banks.items() if bank is not None and name in bank.adapters}
