"""What acted in a call whose blocks are computed anew in the backward pass, which must be the same then."""

from collections.abc import Iterable

import torch

from diffadapt.errors import AdapterError
from diffadapt.runtime.adapter import Adapter
from diffadapt.runtime.regions.fields import Regions


class Acting:
    """The adapters that act on a model, with their gates, and the masks they have."""

    def __init__(self, adapters: Iterable[Adapter], regions: Regions | None) -> None:
        """
        Args:
            adapters: the adapters that act, merged ones among them.
            regions: their masks.
        """
        self._adapters = list(adapters)
        gates = (adapter.gates.detach() for adapter in self._adapters)
        # Their versions are compared first, because comparing their content waits for the device.
        self._gates = [(own, own._version, own.clone()) for own in gates]
        self._regions = regions

    def __bool__(self) -> bool:
        return bool(self._adapters)

    def refuse_changed(self, now: "Acting") -> None:
        """Raise `AdapterError` if something else acts now: gradients would be those of another model."""
        same = self._regions is now._regions and self._adapters == now._adapters
        if same and all(_equal(*pair) for pair in zip(self._gates, now._gates, strict=True)):
            return
        raise AdapterError(
            "adapters or their strengths have changed between a call with gradient checkpointing and its backward "
            "pass, which computes the blocks of that call anew; call backward() before they change, for example "
            "inside the `with` block"
        )


def _equal(one: tuple[torch.Tensor, int, torch.Tensor], other: tuple[torch.Tensor, int, torch.Tensor]) -> bool:
    """Return whether gates are equal, each given with its version and a copy of its content at that time."""
    (gates, version, content), (gates_now, version_now, content_now) = one, other
    if gates.data_ptr() == gates_now.data_ptr() and version == version_now:
        return True
    return torch.equal(content, content_now.to(content.device))
