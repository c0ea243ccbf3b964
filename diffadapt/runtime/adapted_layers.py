"""Mixins for the classes of a model's layers: `Adapted` runs adapter layers, `Extended` also looks up learned tokens.

`attach.py` mixes them into the classes of layers and sets the tuples that they read.
"""

from typing import Any

import torch
from torch import Tensor, nn

from diffadapt.runtime import compose
from diffadapt.runtime.adapter_layer import AdapterLayer
from diffadapt.runtime.base_weight import is_plain
from diffadapt.runtime.class_mixing import Mixin, mix_, unmix_

ACTIVE = "_diffadapt_active"
"""Name of the tuple in a layer's `__dict__` with the adapter layers that run on it."""

TOKENS = "_diffadapt_tokens"
"""Name of the tuple in a token embedding's `__dict__` with the learned tokens that it looks up."""


class Adapted(Mixin):
    """A layer that carries adapter layers: a call runs the layer's own call and its active adapter layers."""

    # Empty, because a class that someone derived from this one stays with the layer after its adapters are removed.
    _diffadapt_active: tuple[AdapterLayer, ...] = ()

    @torch.compiler.assume_constant_result
    def _has_plain_weight(self) -> bool:
        # A method, since older versions of torch take no module as an argument of a constant function.
        return is_plain(self)  # type: ignore[arg-type]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the layer's output with its active adapter layers."""
        active = self._diffadapt_active
        if not active:
            return super().__call__(*args, **kwargs)  # type: ignore[misc]
        return compose.run(active, self, super().__call__, args, kwargs)  # type: ignore[misc,arg-type]


class Extended(Adapted):
    """A token embedding that has vectors for more tokens than its weight has rows.

    The weight keeps its shape. Ids of learned tokens reach neither the weight nor the adapter layers.
    """

    _diffadapt_tokens: tuple[nn.Module, ...] = ()

    def __call__(self, input: Tensor) -> Tensor:
        """Return the vectors for the ids `input`, those of learned tokens included."""
        known = input
        for tokens in self._diffadapt_tokens:
            known = known.masked_fill(tokens.holds(input), 0)  # type: ignore[operator]
        output = super().__call__(known)
        for tokens in self._diffadapt_tokens:
            output = tokens(input, output)
        return output


def carry_(host: nn.Module, mixin: type[Adapted] = Adapted) -> None:
    """Make a layer able to carry adapter layers.

    Raises:
        TypeError: the class of the layer cannot be changed.
    """
    if not isinstance(host, mixin):
        mix_(host, mixin)
    host.__dict__.setdefault(ACTIVE, ())


def release_(host: nn.Module) -> None:
    """Undo `carry_`. A class that someone else gave to the layer since then is left alone."""
    host.__dict__.pop(ACTIVE, None)
    if not isinstance(host, Extended):
        unmix_(host)
