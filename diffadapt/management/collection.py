"""The adapters of some models as a collection by name."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

from torch import nn

from diffadapt.errors import AdapterError
from diffadapt.management.activation import activate_
from diffadapt.management.call_forms import Names, names_of, plain
from diffadapt.management.continuing import rename_adapter_, train_adapter_
from diffadapt.management.owner import Owner, exclusive_method
from diffadapt.management.showing import as_html
from diffadapt.management.snapshot import LoadedAdapter
from diffadapt.merging.undo_by_parts import lost_by_rounding
from diffadapt.strengths.by_prefix import Strength


class AdapterCollection:
    """Adapters by name, in the order of loading. `print` shows them as a table."""

    def __init__(self, owner: Owner) -> None:
        self._owner = owner

    @property
    def owner(self) -> Owner:
        """The models that the adapters are on."""
        return self._owner

    @property
    def names(self) -> list[str]:
        """Names of all loaded adapters, in the order of loading."""
        return list(self._owner.snapshot().adapters)

    @property
    def active(self) -> dict[str, Strength]:
        """Name -> strength of every active adapter, as it was set."""
        return self._owner.snapshot().active

    @property
    def merged(self) -> list[str]:
        """Names of the adapters that are merged into the weights."""
        return list(self._owner.snapshot().merged)

    def __contains__(self, name: object) -> bool:
        return name in self._owner.snapshot().adapters

    def __len__(self) -> int:
        return len(self._owner.snapshot().adapters)

    def __iter__(self) -> Iterator[str]:
        return iter(self._owner.snapshot().adapters)

    def __getitem__(self, name: str) -> LoadedAdapter:
        found = self._owner.snapshot()[name]
        return replace(found, rescale=partial(self._rescale, name), retrain=partial(self._retrain, name))

    def __str__(self) -> str:
        return str(self._owner.snapshot())

    def __repr__(self) -> str:
        return self._owner.snapshot().line

    def _repr_html_(self) -> str:
        """Return the table for a notebook, with a map for each adapter of where it acts."""
        return as_html(self._owner.snapshot())

    @property
    def undo_bytes(self) -> int:
        """Bytes of memory that are kept to undo merges."""
        return self._owner.snapshot().undo_bytes

    @property
    def requantisation_errors(self) -> dict[str, float]:
        """Path of each quantised layer with merged adapters -> what rounding lost there.

        That is the norm of the difference that rounding to the layer's storage made, as a share of the norm of the
        adapters' change. From about 1 on, the adapters have lost their effect: keep them unmerged.
        """
        return lost_by_rounding(self._owner.models().values())

    def models(self) -> list[nn.Module]:
        """Return the models of the pipeline, or the one model."""
        return list(self._owner.models().values())

    @exclusive_method
    def deactivate(self, *names: Names) -> None:
        """Make adapters inactive. Without names, make all inactive. They stay loaded.

        Raises:
            AdapterError: no such adapter, or a merged adapter. Nothing has changed then.
        """
        leaving = names_of("deactivate", names) if names else self.names
        activate_(self._owner, self._owner.snapshot().active_without(leaving), self._owner.follow)

    @exclusive_method
    def rename(self, old: str, new: str) -> None:
        """Give adapter `old` the name `new`. Nothing else about it changes.

        Raises:
            AdapterError: no such adapter, or the new name is in use or is none.
        """
        rename_adapter_(self._owner, old, new)

    @exclusive_method
    def _retrain(self, name: str) -> None:
        """Make an adapter trainable; see `train_adapter_`."""
        train_adapter_(self._owner, name)

    @exclusive_method
    def _rescale(self, name: str, strength: Strength) -> None:
        """Give an active adapter another strength; the others keep theirs."""
        strength = plain(strength)
        active = self._owner.snapshot().active
        if name not in active:
            raise AdapterError(f"adapter {name!r} is not active; call activate({{{name!r}: {strength!r}}})")
        activate_(self._owner, {**active, name: strength}, self._owner.follow)
