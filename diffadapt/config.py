"""Settings of new adapters, with the literature's parameter names, and the function that applies them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from diffadapt.adapter import Adapter, AdapterLayer
from diffadapt.attach import attach_, bank_of, refresh_
from diffadapt.errors import AdapterError
from diffadapt.hooks import execution_device
from diffadapt.targets import Targets
from diffadapt.types import named


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """LoRA for new adapters (Hu et al., arXiv 2106.09685).

    Attributes:
        rank: of the factors, at least 1.
        alpha: scale is `alpha / rank`; default the rank. Not zero: that adapter could not learn.
        target_modules: "all-linear", "all-conv", a regular expression for whole paths, or a list of path endings.
        exclude_modules: the same, taken out again.
        dropout: probability, on the adapter's input while training.
        rank_stabilized: scale `alpha / sqrt(rank)` (Kalajdzievski, arXiv 2312.03732).
        bias: also train a bias change in every adapted layer.
        generator: draws the initial `down`; default a fresh one seeded with 0, never the global one.
    """

    rank: int
    target_modules: str | Sequence[str]
    alpha: float | None = None
    exclude_modules: str | Sequence[str] = ()
    dropout: float = 0.0
    rank_stabilized: bool = False
    bias: bool = False
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise AdapterError(f"rank is {self.rank}, expected at least 1")
        if self.alpha == 0:
            raise AdapterError("alpha is 0, which makes the scale 0: the adapter could not learn; leave it out")
        if not 0 <= self.dropout < 1:
            raise AdapterError(f"dropout is {self.dropout}, expected 0 <= dropout < 1")


def add_adapter(model: nn.Module, config: LoraConfig, name: str = "default") -> Adapter:
    """Add a new, trainable adapter to `model` and activate it. At first it changes nothing.

    Its parameters are float32, on the device the model runs on. `requires_grad` of the base model stays as it is.

    Returns:
        The adapter, an `nn.Module` registered in `model`: `adapter.parameters()` is what an optimiser needs.

    Raises:
        AdapterError: a pattern that matches nothing, a layer that cannot carry an adapter, a name in use.
    """
    targets = Targets(model)
    hosts = targets.select(config.target_modules, config.exclude_modules)
    kind = named("lora")
    generator = config.generator or torch.Generator().manual_seed(0)
    device = execution_device(targets.all)
    alpha = config.rank if config.alpha is None else config.alpha
    if config.rank_stabilized:
        alpha *= config.rank**0.5
    layers: dict[str, AdapterLayer] = {}
    for path in sorted(hosts):
        try:
            spec = targets.spec(path)
            if config.bias and spec.kind == "embedding":
                raise AdapterError("an embedding has no bias; set bias=False or exclude it")
            tensors = kind.init(spec, config.rank, generator, config.bias)
        except AdapterError as error:
            raise AdapterError(f"{path}: {error}") from error
        on_device = {key: tensor.to(device) for key, tensor in tensors.items()}
        layers[path] = AdapterLayer(kind, spec, on_device, alpha, trainable=True, dropout=config.dropout)
    bank = bank_of(model)
    if bank is not None and bank.merged:
        raise AdapterError(f"{', '.join(bank.merged)} is merged into the weights; unmerge() before adding an adapter")
    adapter = Adapter(layers)
    attach_(model, name, adapter, hosts)
    adapter.active = True
    refresh_(model)
    return adapter
