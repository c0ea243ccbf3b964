"""A stored layer with the reference for one adapter type, and comparisons with it."""

import contextlib
import logging
from collections.abc import Generator
from typing import Any

import torch
from torch import Tensor, nn

from tests.support import formulas
from tests.support.bases import Base, float_layer, silenced
from tests.support.compare import relative_error

BELOW, LAYER = "below", "layer"
"""Names of the layers of a model: the stored one, and in training a float layer below it."""

TOLERANCE = 0.01
"""Share of the change that may differ: diffusers and peft run adapters in half precision on some layers."""


class Wrong(Exception):
    """A result that is not what it should be."""


class Bench:
    """A base with the reference for one adapter type, a variant of `formulas.VARIANTS`."""

    def __init__(self, base: Base, variant: str) -> None:
        self.base, self.variant = base, variant
        layer = warm(base)
        self.weight, self.bias = base.computed(layer)
        self.input = base.input()
        with torch.no_grad(), silenced():
            self.plain = layer(self.input).double()
        self.layer, self.noise = layer, base.noise(layer)

    def content(self, seed: int) -> formulas.Content | None:
        if self.base.kind == "embedding" and self.variant == "oft-peft":
            # Ids cannot be rotated.
            return None
        torch.manual_seed(seed)
        return formulas.VARIANTS[self.variant][1](self.weight, self.bias)

    def file(self, seed: int) -> dict[str, Tensor]:
        content = self.content(seed)
        assert content is not None
        tensors = {name: tensor.float() for name, tensor in content.tensors.items()}
        if self.base.kind == "embedding":
            if "diff" in tensors:
                tensors["diff"] = self.base.canonical(tensors["diff"])
            for name in "A", "B":
                if f"lora_{name}.weight" in tensors:
                    tensors[f"lora_embedding_{name}"] = tensors.pop(f"lora_{name}.weight")
        return {f"{LAYER}.{name}": tensor.contiguous() for name, tensor in tensors.items()}

    def wanted(self, seed: int) -> tuple[Tensor, Tensor]:
        """Return the output with an adapter at strength 1, and the change that the adapter makes of it."""
        content = self.content(seed)
        assert content is not None
        after = self.base.output(self.input, content.weight, content.bias)
        return after, after - self.base.output(self.input, self.weight, self.bias)

    def check(self, output: Tensor, seed: int, strength: float = 1.0) -> None:
        """Raise `Wrong` if an output is not that of a running adapter."""
        after, change = self.wanted(seed)
        found = output.double() - self.plain
        error = relative_error(found, strength * change)
        if not error < TOLERANCE + self._rounding(after) / float(strength * change.norm()):
            share = float((found * change).sum() / change.square().sum()) / strength
            raise Wrong(f"{share:.0%} of the change, an error of {error:.0%} of it")

    def check_merged(self, output: Tensor, seed: int) -> None:
        """Raise `Wrong` if an output is not that of a merged adapter, given what rounding may lose."""
        after, change = self.wanted(seed)
        found = output.double()
        share = float(((found - self.plain) * change).sum() / change.square().sum())
        error = relative_error(found, after)
        limit = 1.3 * self.base.error + TOLERANCE + self._rounding(after) / float(after.norm())
        if not (0.8 < share < 1.2 and error < limit):
            raise Wrong(f"{share:.0%} of the change, an error of {error:.0%} of the output")

    def _rounding(self, output: Tensor) -> float:
        """Return how far an output may be off because the layer rounds; adapters may enlarge its input."""
        size = max(1.0, float(output.norm() / self.plain.norm()))
        noise = self.noise if size == 1.0 else max(self.noise, self.base.noise(self.layer, size))
        return 3 * noise * size * float(self.plain.norm())

    def below(self) -> nn.Module | None:
        """Return a float layer whose adapter can only learn from the gradient to the input of the one above."""
        if self.base.kind == "embedding":
            return None
        torch.manual_seed(5)
        size = self.input.shape[-1 if self.base.kind == "linear" else 1]
        return nn.Linear(size, size) if self.base.kind == "linear" else nn.Conv2d(size, size, 1)

    def float_layer(self) -> nn.Module:
        """Return the float layer with the weight that the stored layer computes with."""
        return float_layer(self.base.canonical(self.weight).float(), None if self.bias is None else self.bias.float())


def warm(base: Base) -> nn.Module:
    """Return a layer that has been called once, since bitsandbytes rounds its scales at the first call."""
    layer = base.layer().eval()
    with torch.no_grad(), silenced():
        layer(base.input())
    return layer


def same_random_(one: nn.Module, other: nn.Module) -> None:
    """Give the trainable parameters of two adapters the same random values."""
    pairs = [[(name, p) for name, p in owner.named_parameters() if p.requires_grad] for owner in (one, other)]
    if [name for name, _ in pairs[0]] != [name for name, _ in pairs[1]] or not pairs[0]:
        raise Wrong("other parameters are trained than on a float layer")
    generator = torch.Generator().manual_seed(3)
    for (_, left), (_, right) in zip(*pairs, strict=True):
        random = left.detach() + 0.05 * torch.randn(left.shape, generator=generator)
        for parameter in left, right:
            parameter.data.copy_(random)


def check_gradients(bench: Bench, models: list[Any], trained: list[Any]) -> None:
    """Raise `Wrong` if the gradients of the first of two models are not those of the second."""
    found: list[dict[str, Tensor | None]] = []
    for model, owner in zip(models, trained, strict=True):
        with silent():
            output = model(bench.input)
            output.square().sum().backward()
        found.append({name: p.grad for name, p in owner.named_parameters() if p.requires_grad})
    for name, expected in found[1].items():
        own = found[0][name]
        if own is None:
            raise Wrong("no gradient")
        assert expected is not None
        error = relative_error(own, expected)
        if not error < 2 * TOLERANCE + 4 * bench.noise:
            where = "of an adapter below" if BELOW in name else "of the adapter"
            raise Wrong(f"the gradient {where} is off by {error:.0%}")


def bits(model: nn.Module) -> list[Tensor]:
    """Return copies of everything that is stored, as bytes."""
    found: list[Tensor] = []
    for module in model.modules():
        if type(module).__module__.startswith("diffadapt"):
            continue
        tensors = [*module._parameters.values(), *module._buffers.values()]
        for tensor in tensors:
            if tensor is not None and not isinstance(tensor, nn.UninitializedParameter):
                found += [part.clone() for part in _plain(tensor)]
    return found


def _plain(tensor: Any) -> list[Tensor]:
    """Return the bytes of the plain tensors that a tensor consists of."""
    state, parts = getattr(tensor, "quant_state", None), [tensor]
    parts += [part for part in (getattr(state, "absmax", None), getattr(tensor, "SCB", None)) if part is not None]
    found: list[Tensor] = []
    for part in parts:
        if hasattr(part, "__tensor_flatten__"):
            found += [each for name in part.__tensor_flatten__()[0] for each in _plain(getattr(part, name))]
        else:
            plain = part.detach().as_subclass(Tensor).contiguous()
            found.append(plain.view(-1).view(torch.uint8))
    return found


@contextlib.contextmanager
def silent() -> Generator[None, None, None]:
    """Silence what peers log and warn of."""
    logging.disable(logging.CRITICAL)
    try:
        with silenced():
            yield
    finally:
        logging.disable(logging.NOTSET)
