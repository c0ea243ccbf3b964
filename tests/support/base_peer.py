"""Adapters on stored weights in plain diffusers with peft."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.loaders.peft import PeftAdapterMixin
from diffusers.models.modeling_utils import ModelMixin
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from tests.support.base_bench import Bench, Wrong, bits, check_gradients, same_random_, silent, warm
from tests.support.bases import Base


class OneLayer(ModelMixin, ConfigMixin, PeftAdapterMixin):  # type: ignore[misc]
    """A model of diffusers with one layer, and for training another one below."""

    def __init__(self, layer: nn.Module, below: nn.Module | None = None) -> None:
        super().__init__()
        self.below, self.layer = below, layer

    def forward(self, input: Tensor) -> Tensor:
        return self.layer(input if self.below is None else self.below(input))


def marked(model: Any, base: Base) -> Any:
    """Set on a model what loading a quantised one leaves there, which peft goes by."""
    if base.name.startswith("bitsandbytes"):
        setattr(model, "is_loaded_in_8bit" if "int8" in base.name else "is_loaded_in_4bit", True)
    if base.config is not None:
        own = SimpleNamespace(get_apply_tensor_subclass=base.config)
        model.hf_quantizer = SimpleNamespace(quantization_config=own)
    return model


class Diffusers:
    """The steps with plain diffusers and peft."""

    def __init__(self, bench: Bench, config: Callable[[], Any] | None) -> None:
        self.bench, self.config = bench, config

    def _model(self, layer: nn.Module, below: nn.Module | None = None) -> Any:
        model = OneLayer(layer, below).eval()
        # The float layer of the comparison is not quantised.
        return marked(model, self.bench.base) if type(layer) is not nn.Linear or self.bench.base.config else model

    def _loaded(self, *, slots: bool = False) -> Any:
        model = self._model(warm(self.bench.base))
        if slots:
            model.enable_lora_hotswap(target_rank=8)
        self._load(model, 0)
        if not any(isinstance(module, BaseTunerLayer) for module in model.modules()):
            raise Wrong("drops all keys")
        return model

    def _load(self, model: Any, seed: int, **options: Any) -> None:
        with silent():
            model.load_lora_adapter(self.bench.file(seed), prefix=None, adapter_name="a", **options)

    def _output(self, model: nn.Module) -> Tensor:
        with torch.no_grad(), silent():
            return model(self.bench.input)

    def load(self) -> None:
        self._loaded()

    def run(self) -> None:
        self.bench.check(self._output(self._loaded()), 0)

    def hotswap(self) -> None:
        model = self._loaded(slots=True)
        self._load(model, 1, hotswap=True)
        self.bench.check(self._output(model), 1)

    def merge(self) -> None:
        model = self._loaded()
        running, before = self._output(model), bits(model)
        with silent():
            model.fuse_lora(adapter_names=["a"])
        self.bench.check_merged(self._output(model), 0)
        with silent():
            model.unfuse_lora()
        if not all(map(torch.equal, bits(model), before)) or not torch.equal(self._output(model), running):
            raise Wrong("unmerging does not restore every bit")

    def train(self) -> None:
        if self.config is None:
            raise ValueError("peft has no such type")
        layers = self.bench.base.layer(), self.bench.float_layer()
        models = [self._model(layer, self.bench.below()).train() for layer in layers]
        for model in models:
            with silent():
                model.requires_grad_(False)
                model.add_adapter(self.config(), "a")
        same_random_(*models)
        check_gradients(self.bench, models, models)
