"""Attaching what was planned: in all components, or in none."""

from collections.abc import Generator, Mapping
from contextlib import contextmanager

from torch import nn

from diffadapt.loading.plan import Plan
from diffadapt.runtime.adapter import Adapter
from diffadapt.runtime.attach import attach_, detach_, refresh_
from diffadapt.runtime.bank import bank_of
from diffadapt.tokens.installation import install_, uninstall_
from diffadapt.tokens.learned_tokens import learned_tokens_of


def attach_all_(models: Mapping[str, nn.Module], name: str, planned: Plan, *, replacing: bool = False) -> None:
    """Attach a plan's adapters as `name`, and install its tokens: in all components or, if one refuses, in none.

    Args:
        models: the models by component.
        name: the name of the adapter.
        planned: the plan, made for these models.
        replacing: whether to replace the adapter of this name, if there is one, which includes removing it from
            components for which the plan has none. Otherwise the name must be free in the plan's components.

    Raises:
        AdapterError: a component refuses its adapter or its tokens; see `attach_` and `install_`.
    """
    with _all_or_nothing(models, name):
        uninstall_(models, name)
        for component, adapter in planned.adapters.items():
            attach_(models[component], name, adapter, planned.hosts(component), replacing=replacing)
        install_(models, name, planned.tokens)
        for component in _attached(models, name).keys() - planned.adapters.keys() if replacing else ():
            detach_(models[component], name)


def detach_all_(models: Mapping[str, nn.Module], name: str) -> None:
    """Remove adapter `name` from all components, with its tokens, or, if one refuses, from none.

    Raises:
        AdapterError: the tokens cannot be removed, or a model refuses; see `uninstall_` and `detach_`.
    """
    with _all_or_nothing(models, name):
        uninstall_(models, name)
        for model in models.values():
            detach_(model, name)


@contextmanager
def _all_or_nothing(models: Mapping[str, nn.Module], name: str) -> Generator[None, None, None]:
    """If the body raises, attach exactly the adapters called `name` that were attached before, with their tokens."""
    before = _attached(models, name)
    tokens = {component: found for component, adapter in before.items() if (found := learned_tokens_of(adapter))}
    try:
        yield
    except BaseException:
        uninstall_(models, name)
        for component, model in models.items():
            old, new = before.get(component), _attached({component: model}, name).get(component)
            if old is None:
                detach_(model, name)
            elif old is not new:
                hosts = {path: layer.host for path, layer in old.layers.items()}
                attach_(model, name, old, hosts, replacing=True)
        install_(models, name, tokens)
        for model in models.values():
            refresh_(model)
        raise


def _attached(models: Mapping[str, nn.Module], name: str) -> dict[str, Adapter]:
    """Return the adapter called `name` of each component that has one."""
    banks = {component: bank_of(model) for component, model in models.items()}
    return {c: bank.adapters[name] for c, bank in banks.items() if bank is not None and name in bank.adapters}
