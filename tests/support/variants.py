"""Every adapter type in all its variants, and small layers of every kind to put them on."""

from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import pytest
import torch
from diffusers.models.normalization import RMSNorm
from torch import Tensor, nn
from transformers.models.t5.modeling_t5 import T5LayerNorm
from transformers.pytorch_utils import Conv1D

from diffadapt.runtime.adapter import Adapter
from diffadapt.runtime.adapter_layer import AdapterLayer
from diffadapt.runtime.attach import attach_, refresh_
from diffadapt.types import TYPES
from diffadapt.types.adapter_type import AdapterType
from diffadapt.types.layer_spec import LayerSpec

RANK = 4
Variant: TypeAlias = tuple[AdapterType, dict[str, Any]]

OPTIONS: dict[str, list[dict[str, Any]]] = {
    "lora": [{"rank": RANK, "bias": True}, {"rank": RANK, "use_tucker": True}],
    "dora": [{"rank": RANK, "use_dora": True}, {"rank": RANK, "use_dora": True, "dora_axis": "input"}],
    "loha": [{"rank": 2}, {"rank": RANK, "use_tucker": True}],
    "dora-loha": [{"rank": 2, "use_dora": True}, {"rank": RANK, "use_dora": True, "dora_axis": "input"}],
    "lokr": [{"full_matrix": True}, {"rank": 1, "factor": 2}, {"rank": 1, "factor": 2, "decompose_both": True}],
    "dora-lokr": [{"rank": 1, "use_dora": True}, {"rank": 1, "use_dora": True, "dora_axis": "input"}],
    "oft": [
        {"block_size": 2},
        {"num_blocks": 1, "neumann_terms": 0},
        {"num_blocks": 1, "scaled": True},
        {"block_size": 2, "block_share": True, "coft_eps": 0.5},
        {"block_size": 2, "side": "output", "rescale": True},
        {"num_blocks": 2, "side": "output", "constraint": 0.1},
    ],
    "boft": [
        {"block_size": 2},
        {"block_size": 2, "butterfly_factors": 2},
        {"block_size": 2, "side": "output", "rescale": True},
        {"block_size": 4, "butterfly_factors": 2, "side": "output", "rescale": True, "constraint": 0.1},
    ],
    "ia3": [{"scale_bias": True}],
    "ia3-lycoris": [{"side": "output"}, {"side": "input"}],
    "glora": [{"rank": 2}],
    "full": [{"bias": False}, {"bias": True}],
}
"""Settings that the promises are checked with; a type that is not here is checked with its defaults."""

VARIANTS = [(kind, options) for kind in TYPES for options in OPTIONS.get(kind.name, [{}])]


class ScaledEmbedding(nn.Embedding):
    """As in the text encoders of the Gemma family: the layer scales its own output."""

    embed_scale = 3.0

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * self.embed_scale


class NamedInput(nn.Linear):
    """As `LoRACompatibleLinear` of older diffusers: another argument name, and a second argument."""

    def forward(self, hidden_states: Tensor, scale: float = 1.0) -> Tensor:
        return super().forward(hidden_states)


def _vectors(*shape: int) -> Callable[[torch.Generator], Tensor]:
    return lambda generator: torch.randn(*shape, generator=generator, dtype=torch.float64)


def _ids(*shape: int) -> Callable[[torch.Generator], Tensor]:
    return lambda generator: torch.randint(0, 7, shape, generator=generator)


LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[torch.Generator], Tensor]]] = {
    "linear": (lambda: nn.Linear(6, 10), _vectors(3, 5, 6)),
    "linear-no-bias": (lambda: nn.Linear(6, 10, bias=False), _vectors(6)),
    "linear-wide": (lambda: nn.Linear(8, 16), _vectors(2, 8)),
    "linear-subclass": (lambda: NamedInput(6, 10), _vectors(2, 6)),
    "transformers-conv1d": (lambda: Conv1D(10, 6), _vectors(2, 3, 6)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1), _vectors(2, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, padding=1), _vectors(2, 4, 7, 7)),
    "conv2d-wide": (lambda: nn.Conv2d(4, 8, 3, stride=2), _vectors(2, 4, 7, 7)),
    "conv2d-1x1": (lambda: nn.Conv2d(4, 6, 1), _vectors(2, 4, 7, 7)),
    "conv2d-strided-dilated": (lambda: nn.Conv2d(4, 6, (3, 2), (2, 1), (1, 0), (1, 2)), _vectors(2, 4, 9, 8)),
    "conv2d-grouped": (lambda: nn.Conv2d(4, 6, 3, padding=1, groups=2), _vectors(2, 4, 7, 7)),
    "conv2d-depthwise": (lambda: nn.Conv2d(4, 4, 3, padding=1, groups=4), _vectors(2, 4, 7, 7)),
    "conv2d-same": (lambda: nn.Conv2d(4, 6, 3, padding="same"), _vectors(2, 4, 7, 7)),
    "conv2d-reflect": (lambda: nn.Conv2d(4, 6, 3, padding=(1, 2), padding_mode="reflect"), _vectors(2, 4, 7, 7)),
    "conv2d-circular-same": (
        lambda: nn.Conv2d(4, 6, (3, 2), padding="same", padding_mode="circular"),
        _vectors(2, 4, 7, 7),
    ),
    "conv3d": (lambda: nn.Conv3d(4, 6, (1, 3, 3), padding=(0, 1, 1)), _vectors(2, 4, 3, 5, 5)),
    "embedding": (lambda: nn.Embedding(7, 10, padding_idx=0), _ids(2, 5)),
    "embedding-scaled": (lambda: ScaledEmbedding(7, 10), _ids(2, 5)),
    "norm-layer": (lambda: nn.LayerNorm(8), _vectors(3, 5, 8)),
    "norm-group": (lambda: nn.GroupNorm(2, 6), _vectors(2, 6, 5, 7)),
    "norm-rms": (lambda: nn.RMSNorm(8, eps=1e-6), _vectors(3, 8)),
    "norm-rms-diffusers": (lambda: RMSNorm(8, eps=1e-6), _vectors(3, 5, 8)),
    "norm-t5": (lambda: T5LayerNorm(8), _vectors(3, 5, 8)),
}
WITHOUT_BIAS = ("linear-no-bias", "norm-rms", "norm-rms-diffusers", "norm-t5")
IN_FLOAT32 = ("norm-rms-diffusers", "norm-t5")
"""Layers that take their mean square in float32, whatever their input is."""

SPECS = {layer: LayerSpec.of(make()) for layer, (make, _) in LAYERS.items()}


def refuses(kind: AdapterType, options: dict[str, Any], layer: str) -> bool:
    """Layers a variant has no meaning on; everything else has to work."""
    groups = "grouped" in layer or "depthwise" in layer
    on_token_numbers = layer.startswith("embedding") and options.get("side", "input") == "input"
    spec = SPECS[layer]
    assert spec is not None
    if spec.kind not in kind.layers:
        return True
    if kind.name == "oft":
        # No rotation across groups exists; on embeddings PEFT's input side rotates the output.
        return groups
    if kind.name == "boft":
        channels = spec.out_features if options.get("side") == "output" else spec.fan_in
        butterfly = options["block_size"] * 2 ** (options.get("butterfly_factors", 1) - 1)
        return groups or on_token_numbers or channels % butterfly != 0
    if kind.name == "glora":
        return groups or on_token_numbers
    if kind.name == "ia3-lycoris":
        return on_token_numbers
    if layer.startswith("embedding"):
        return options.get("dora_axis") == "input" or bool(options.get("bias"))
    return groups and bool(options.get("use_tucker")) and kind.name == "lora"


def variant_of(kind: str) -> Variant:
    """The first variant of a type."""
    return next(variant for variant in VARIANTS if variant[0].name == kind)


def on_layers(layers: Iterable[str], refused: bool = False) -> pytest.MarkDecorator:
    """A case for every variant and those layers that it goes with, or those that it refuses."""
    found = [
        pytest.param((kind, options), layer, id="-".join([kind.name, *(f"{k}={v}" for k, v in options.items()), layer]))
        for kind, options in VARIANTS
        for layer in layers
        if refuses(kind, options, layer) == refused
    ]
    return pytest.mark.parametrize(("variant", "layer"), found)


class Case:
    """A root with one layer, seeded input, and tensors of a type for it."""

    def __init__(self, variant: Variant, layer: str) -> None:
        self.generator = torch.Generator().manual_seed(7)
        make, draw = LAYERS[layer]
        self.root = nn.Sequential(make()).double()
        for parameter in self.root.parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=self.generator, dtype=torch.float64))
        self.kind, options = variant
        if layer in WITHOUT_BIAS and options.get("bias"):
            options = {**options, "bias": False}
        self.config = self.kind.config(target_modules=["0"], **options)
        self.spec = LayerSpec.of(self.root[0]) or pytest.fail("no adapter can sit here")
        self.input = draw(self.generator)
        self.close = {"rtol": 1e-6, "atol": 1e-6} if layer in IN_FLOAT32 else {"rtol": 1e-10, "atol": 1e-10}

    def initial(self) -> dict[str, Tensor]:
        weight = self.spec.to_stored(self.root[0].weight.detach().clone())
        tensors = self.kind.init(self.spec, self.config, generator=self.generator, weight=lambda: weight)
        return {name: tensor.double() for name, tensor in tensors.items()}

    def random(self) -> dict[str, Tensor]:
        return {
            name: torch.randn(tensor.shape, generator=self.generator, dtype=torch.float64)
            for name, tensor in self.initial().items()
        }

    def layer(self, tensors: dict[str, Tensor]) -> AdapterLayer:
        return AdapterLayer(self.kind, self.spec, tensors, alpha=3.0, settings=self.config.settings, trainable=True)

    def attach(self, tensors: dict[str, Tensor], name: str = "a", strength: float = 0.5) -> Adapter:
        adapter = Adapter({"0": self.layer(tensors)})
        attach_(self.root, name, adapter, {"0": self.root[0]})
        adapter.set_strengths([strength])
        adapter.active = True
        refresh_(self.root)
        return adapter
