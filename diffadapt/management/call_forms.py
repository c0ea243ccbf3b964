"""The forms in which users name adapters and their strengths, brought into one."""

from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from typing import Any, TypeAlias, cast

from torch import Tensor

from diffadapt.errors import AdapterError
from diffadapt.management.snapshot import Chosen, LoadedAdapter
from diffadapt.strengths.by_prefix import SharedStrengths, Strength
from diffadapt.strengths.schedules import Schedule

Names: TypeAlias = str | Iterable[str]
"""One name, or several."""

Strengths: TypeAlias = Strength | Sequence[Strength]
"""One strength, or one for each adapter."""


def names_of(action: str, names: Iterable[Any]) -> list[str]:
    """Return the names in the arguments of a method that takes names, in any number of arguments or in a list.

    Raises:
        AdapterError: an argument is neither a name nor several.
    """
    found: list[str] = []
    for name in names:
        if isinstance(name, (int, float, Real, Mapping)):
            raise AdapterError(
                f"{action}: {name!r} is no name of an adapter, and {action} takes no strengths; set those before, with "
                "activate(...) or pipe.adapters['ink'].scale = 0.5"
            )
        if isinstance(name, LoadedAdapter):
            found.append(name.name)
        elif isinstance(name, str):
            found.append(name)
        elif isinstance(name, Iterable):
            found += names_of(action, cast(Iterable[Any], name))
        else:
            raise AdapterError(f"{action}: {name!r} is no name of an adapter; pass names, such as 'ink'")
    return list(dict.fromkeys(found))


def chosen_of(action: str, adapters: Any, strengths: Strengths | None) -> Chosen:
    """Return the adapters and strengths that the arguments of `activate` mean.

    Raises:
        AdapterError: `adapters` are no names, or `strengths` do not fit them.
    """
    if isinstance(adapters, Mapping):
        if strengths is not None:
            raise AdapterError(f"{action}: the strengths are in the mapping already; leave out {strengths!r}")
        return {name: plain(strength) for name, strength in cast(Mapping[str, Strength], adapters).items()}
    if isinstance(adapters, (int, float, Real)):
        raise AdapterError(f"{action}: {adapters!r} is no name of an adapter; pass names, such as 'ink'")
    names = names_of(action, [adapters])
    strengths = plain(strengths)
    if strengths is None:
        return names
    if isinstance(strengths, str):
        raise AdapterError(f"{action}: {strengths!r} is no strength; pass several names as a list, [{names[0]!r}, ...]")
    if isinstance(strengths, (int, float, Schedule, Mapping)):
        return dict.fromkeys(names, cast(Strength, strengths))
    try:
        amounts = list(strengths)
    except TypeError:
        raise AdapterError(f"{action}: {strengths!r} is no strength, expected a number") from None
    if len(amounts) != len(names):
        raise AdapterError(
            f"{action}: {len(amounts)} strengths for {len(names)} adapters, expected one, or one for each"
        )
    return dict(zip(names, map(plain, amounts), strict=True))


def plain(strength: Any) -> Any:
    """Return a strength with the numbers of NumPy and torch in it as those of Python; anything else as it is."""
    if isinstance(strength, Tensor) and strength.ndim == 0:
        return float(strength)
    if isinstance(strength, Real) and not isinstance(strength, (bool, int, float)):
        return float(strength)
    if isinstance(strength, Mapping):
        amounts = cast(Mapping[str, Any], strength)
        numbers = {prefix: plain(amount) for prefix, amount in amounts.items()}
        return SharedStrengths(numbers) if isinstance(amounts, SharedStrengths) else numbers
    return strength


def name_and_scale(name: Any, adapter_name: str | None, scale: Strength) -> tuple[str | None, Strength]:
    """Return the name and the strength of a new adapter.

    Args:
        name: a name; or a strength in its place, as in `load_adapter(file, 0.8)`.
        adapter_name: the name, as diffusers calls it.
        scale: the strength.

    Raises:
        AdapterError: two names, two strengths, or something that is neither.
    """
    name, scale = plain(name), plain(scale)
    if isinstance(name, (int, float, Schedule, Mapping)) and not isinstance(name, bool):
        if scale != 1.0:
            raise AdapterError(f"load_adapter: {name!r} and scale={scale!r} are two strengths; pass one of them")
        name, scale = adapter_name, cast(Strength, name)
    elif adapter_name is not None:
        if name is not None and name != adapter_name:
            raise AdapterError(f"load_adapter: {name!r} and adapter_name={adapter_name!r} are two names; pass one")
        name = adapter_name
    if name is not None and not isinstance(name, str):
        raise AdapterError(f"load_adapter: {name!r} is no name for an adapter, expected text such as 'ink'")
    return name, scale
