"""Random LoRA for real layers, and pipelines with the same changes added to their weights."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

if TYPE_CHECKING:
    # diffusers 0.33 has none.
    from diffusers import ModularPipeline

ATTENTION = r"(to_[qkv]|to_out\.0|[qkv]_proj|out_proj)"

P = TypeVar("P", DiffusionPipeline, "ModularPipeline")


@dataclass(frozen=True)
class Factors:
    """The LoRA of one layer.

    Attributes:
        down: The first factor, of shape (rank, in, *kernel).
        up: The second factor, of shape (out, rank).
        alpha: `None` means the rank.
    """

    down: Tensor
    up: Tensor
    alpha: float | None = None

    @property
    def delta(self) -> Tensor:
        """The change of the weight, in float64."""
        rank = self.down.shape[0]
        scale = 1.0 if self.alpha is None else self.alpha / rank
        product = self.up.double() @ self.down.double().flatten(1)
        return scale * product.view(self.up.shape[0], *self.down.shape[1:])


Layer = nn.Linear | nn.Conv2d
Alpha = Callable[[int], float | None]
"""Number of a layer -> its alpha."""

Parts = Mapping[str, Mapping[str, Factors]]
"""Component -> path of a layer -> its factors."""


def no_alpha(number: int) -> None:
    return None


def varied_alpha(number: int) -> float:
    """Return alphas that differ between neighbouring layers."""
    return (1.0, 2.0, 8.0, 3.0)[number % 4]


def factors_for(layers: Mapping[str, Layer], rank: int = 4, alpha: Alpha = no_alpha) -> dict[str, Factors]:
    """Return random factors for layers by path, large enough to change what a pipeline draws."""
    generator = torch.Generator().manual_seed(2)
    made: dict[str, Factors] = {}
    for number, (path, layer) in enumerate(layers.items()):
        out, *fan_in = layer.weight.shape
        down = torch.randn(rank, *fan_in, generator=generator) * 0.3
        made[path] = Factors(down, torch.randn(out, rank, generator=generator) * 0.3, alpha(number))
    return made


def layers_of(model: nn.Module, pattern: str = ATTENTION) -> dict[str, Layer]:
    """Return the linear layers and convolutions whose path ends in names that match a regular expression."""
    expression = re.compile(rf"(?:.*\.)?(?:{pattern})")
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, Layer) and expression.fullmatch(path)
    }


def parts_for(
    pipe: "DiffusionPipeline | ModularPipeline",
    components: tuple[str, ...] = ("unet", "text_encoder"),
    pattern: str = ATTENTION,
    rank: int = 4,
    alpha: Alpha = no_alpha,
) -> dict[str, dict[str, Factors]]:
    """Return random factors for the layers of several components of a pipeline."""
    return {name: factors_for(layers_of(getattr(pipe, name), pattern), rank, alpha) for name in components}


def bake(pipe: P, parts: Parts, strength: float | Mapping[str, float] = 1.0) -> P:
    """Add the changes to the weights of a pipeline: an adapter has to be equal to that."""
    for component, layers in parts.items():
        amount = strength[component] if isinstance(strength, Mapping) else strength
        for path, factors in layers.items():
            weight = getattr(pipe, component).get_submodule(path).weight
            delta = amount * factors.delta
            weight.data.add_(delta.reshape(weight.shape).to(weight.dtype))
    return pipe
