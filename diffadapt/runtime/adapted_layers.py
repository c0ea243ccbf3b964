"""The classes that are mixed into those of a model's layers while they carry adapters or further tokens."""

from typing import Any

from torch import Tensor, nn

from diffadapt.runtime import compose
from diffadapt.runtime.adapter_layer import AdapterLayer
from diffadapt.runtime.class_mixing import Mixin

ACTIVE = "_diffadapt_active"
TOKENS = "_diffadapt_tokens"


class Adapted(Mixin):
    """Mixed into the class of an adapted layer: the layer's own call, then its active adapter layers."""

    _diffadapt_active: tuple[AdapterLayer, ...]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        active = self._diffadapt_active
        if not active:
            return super().__call__(*args, **kwargs)  # type: ignore[misc]
        return compose.run(active, self, super().__call__, args, kwargs)  # type: ignore[misc,arg-type]


class Extended(Adapted):
    """Mixed into the class of a token embedding that has vectors for more tokens than its weight has rows for.

    The weight stays as it is: these ids never get to it, nor to the adapter layers.
    """

    _diffadapt_active = ()
    _diffadapt_tokens: tuple[nn.Module, ...]

    def __call__(self, input: Tensor) -> Tensor:
        known = input
        for more in self._diffadapt_tokens:
            known = known.masked_fill(more.holds(input), 0)  # type: ignore[operator]
        output = super().__call__(known)
        for more in self._diffadapt_tokens:
            output = more(input, output)
        return output
