"""Every adapter type in all its variants, and small layers of every kind to attach them to."""

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
from diffadapt.types.adapter_type import AdapterType, Unfinished
from diffadapt.types.layer_spec import LayerSpec
from diffadapt.types.tensor_ops import converted
from tests.support.cases import Test, for_each

RANK = 4
Variant: TypeAlias = tuple[AdapterType, dict[str, Any]]

OPTIONS: dict[str, list[dict[str, Any]]] = {
    "lora": [{"rank": RANK, "bias": True}, {"rank": RANK, "use_tucker": True}],
    "started_lora": [{"rank": 2, "init": "pissa"}, {"rank": 2, "init": "olora", "alpha": 3.0, "bias": True}],
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
    "miss": [{"rank": 4}, {"rank": 3, "variant": "mini", "mini_rank": 2}, {"rank": 2, "variant": "bat"}],
    "gralora": [{"rank": 4, "hybrid_rank": 1}],
    "delora": [{"rank": 2}],
    "hira": [{"rank": 2}],
    "deft": [{"rank": 2, "alpha": 3.0}, {"rank": 2, "alpha": 3.0, "projection": "qr"}],
    "road": [{"variant": 1, "group_size": 2}, {"variant": 4, "group_size": 2}],
    "hra": [{"rank": 2}, {"rank": 3, "gram_schmidt": True, "init": "peft"}],
    "psoft": [
        {"rank": 2, "orthogonal": False, "split": "pissa"},
        {"rank": 3, "neumann_terms": 4, "neumann_limit": 0.9},
    ],
    "c3a": [{"block_size": 2}],
    "fourierft": [{"frequencies": 9, "scaling": 30.0}],
    "waveft": [
        {"frequencies": 12, "scaling": 2.0, "moments": 2},
        {"frequencies": 12, "scaling": 2.0, "moments": 0},
    ],
    "shira": [{"rank": 1}],
    "vera": [{"rank": 3}],
    "pvera": [{"rank": 3}],
    "randlora": [{"rank": 2}],
    "vblora": [{"rank": 2, "vectors": 6, "length": 1}],
    "adalora": [{"rank": 3, "target_rank": 2, "alpha": 3.0}],
    "peanut": [{"rank": 2, "depth": 1, "activation": "tanh"}],
    "supertuning": [{"sparsity": 0.8, "rank": 2}],
    "glora-peft": [{"weight": "vector", "bias_by_input": "lora", "bias_by_output": "vector"}],
    "unilora": [{"rank": 2, "length": 8}],
    "tinylora": [{"rank": 2, "length": 5}],
    "osf": [{"kept": 0.5}, {"kept": 0.9}],
    "tlora": [{"rank": 2, "alpha": 3.0, "vectors": "middle"}],
    "frod": [{"density": 0.1}],
    "adamss": [{"rank": 3, "clusters": 3, "cluster_rank": 2}],
    "dylora": [{"rank": 4, "block_size": 2}],
    "full": [{"bias": False}, {"bias": True}],
    "tokens": [{"token_indices": [4, 1]}],
    "lora-parameter": [{"rank": 2}],
}
"""Settings that each adapter type is tested with; a type that is not listed is tested with its defaults."""

OF_PEFT_ALONE = frozenset(
    "adalora adamss c3a deft delora fourierft frod glora-peft gralora hira hra miss osf peanut psoft pvera randlora "
    "road shira supertuning tinylora unilora vblora vera waveft".split()
)
"""Types that only PEFT trains elsewhere. Their files and training are tested in `test_parity_peft_methods.py`."""

TESTED_APART = OF_PEFT_ALONE | {"batch-norm", "dylora", "lora-parameter", "started_lora", "tlora", "tokens"}
"""These, and types that are on particular layers or, like started LoRAs, in no file. They have tests of their own."""

VARIANTS: list[Variant] = [
    (adapter_type, options) for adapter_type in TYPES for options in OPTIONS.get(adapter_type.name, [{}])
]


class ScaledEmbedding(nn.Embedding):
    """An embedding that scales its own output, as in the text encoders of the Gemma family."""

    embed_scale = 3.0

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * self.embed_scale


class NamedInput(nn.Linear):
    """A layer with another argument name and a second argument, like `LoRACompatibleLinear` of older diffusers."""

    def forward(self, hidden_states: Tensor, scale: float = 1.0) -> Tensor:
        return super().forward(hidden_states)


def _vectors(*shape: int) -> Callable[[torch.Generator], Tensor]:
    return lambda generator: torch.randn(*shape, generator=generator, dtype=torch.float64)


def _ids(*shape: int) -> Callable[[torch.Generator], Tensor]:
    return lambda generator: torch.randint(0, 7, shape, generator=generator)


LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[torch.Generator], Tensor]]] = {
    "linear": (lambda: nn.Linear(6, 10), _vectors(3, 5, 6)),
    "linear-no-bias": (lambda: nn.Linear(6, 10, bias=False), _vectors(6)),
    "linear-8-to-16": (lambda: nn.Linear(8, 16), _vectors(2, 8)),
    "linear-subclass": (lambda: NamedInput(6, 10), _vectors(2, 6)),
    "transformers-conv1d": (lambda: Conv1D(10, 6), _vectors(2, 3, 6)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1), _vectors(2, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, padding=1), _vectors(2, 4, 7, 7)),
    "conv2d-4-to-8": (lambda: nn.Conv2d(4, 8, 3, stride=2), _vectors(2, 4, 7, 7)),
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
"""Name -> how the layer is built, and how its input is drawn."""

WITHOUT_BIAS = ("linear-no-bias", "norm-rms", "norm-rms-diffusers", "norm-t5")
IN_FLOAT32 = ("norm-rms-diffusers", "norm-t5")
"""Layers that compute their mean square in float32, whatever the dtype of their input."""

SPECS = {layer: LayerSpec.of(make()) for layer, (make, _) in LAYERS.items()}


def refuses(adapter_type: AdapterType, options: dict[str, Any], layer: str) -> bool:
    """Return whether a variant has no meaning on a layer; it has to work on all others."""
    has_groups = "grouped" in layer or "depthwise" in layer
    on_ids = layer.startswith("embedding") and options.get("side", "input") == "input"
    spec = SPECS[layer]
    assert spec is not None
    if spec.kind not in adapter_type.layers:
        return True
    if adapter_type.name == "oft":
        # No rotation across groups exists; on embeddings PEFT's input side rotates the output.
        return has_groups
    if adapter_type.name == "boft":
        channels = spec.out_features if options.get("side") == "output" else spec.fan_in
        butterfly = options["block_size"] * 2 ** (options.get("butterfly_factors", 1) - 1)
        return has_groups or on_ids or channels % butterfly != 0
    if adapter_type.name == "glora":
        return has_groups or on_ids
    if adapter_type.name == "started_lora" and has_groups:
        return True
    if adapter_type.name == "ia3-lycoris":
        return on_ids
    if adapter_type.name in ("deft", "road", "psoft"):
        # They act on outputs of all groups.
        return has_groups
    if adapter_type.name == "tokens":
        # Rows of a transposed weight are no tokens.
        return layer == "transformers-conv1d"
    if adapter_type.name == "hra":
        return has_groups or on_ids
    if adapter_type.name in ("gralora", "c3a") or options.get("variant") == "bat":
        return spec.fan_in % 2 != 0
    if layer.startswith("embedding"):
        return options.get("dora_axis") == "input" or bool(options.get("bias"))
    return has_groups and bool(options.get("use_tucker")) and adapter_type.name == "lora"


def variant_of(name: str) -> Variant:
    """Return the first variant of an adapter type."""
    return next(variant for variant in VARIANTS if variant[0].name == name)


def on_layers(
    layers: Iterable[str], *, refused: bool = False, variants: Iterable[Variant] = VARIANTS
) -> Callable[[Test], Test]:
    """Return a decorator that makes one test of each variant, with its layers as the cases.

    Args:
        layers: Names in `LAYERS`.
        refused: Take the layers that the variant refuses instead of those that it works on.
    """
    layers = list(layers)

    def chosen(variant: Variant) -> list[str]:
        return [layer for layer in layers if refuses(*variant, layer) == refused]

    def name(variant: Variant) -> str:
        adapter_type, options = variant
        return "-".join([adapter_type.name, *(f"{option}={value}" for option, value in options.items())])

    def decorate(test: Test) -> Test:
        looped = for_each(layer=lambda given: chosen(given["variant"]))(test)
        return pytest.mark.parametrize("variant", list(filter(chosen, variants)), ids=name)(looped)

    return decorate


class Case:
    """A root with one layer, a seeded input for it, and tensors of an adapter type that fit it."""

    def __init__(self, variant: Variant, layer: str) -> None:
        self.generator = torch.Generator().manual_seed(7)
        make, draw = LAYERS[layer]
        self.root = nn.Sequential(make()).double().eval()
        for parameter in self.root.parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=self.generator, dtype=torch.float64))
        self.adapter_type, options = variant
        if layer in WITHOUT_BIAS and options.get("bias"):
            options = {**options, "bias": False}
        if layer in WITHOUT_BIAS and "bias_by_output" in options:
            options = {**options, "bias_by_input": "none", "bias_by_output": "none"}
        self.config = self.adapter_type.config(target_modules=["0"], **options)
        self.spec = LayerSpec.of(self.root[0]) or pytest.fail("no adapter can sit here")
        self.input = draw(self.generator)
        self.close = {"rtol": 1e-6, "atol": 1e-6} if layer in IN_FLOAT32 else {"rtol": 1e-10, "atol": 1e-10}

    def initial(self) -> dict[str, Tensor]:
        """Return the tensors of a new adapter."""
        weight = self.spec.to_stored(self.root[0].weight.detach().clone())
        bias = getattr(self.root[0], "bias", None)
        tensors = self.adapter_type.init(self.spec, self.config, generator=self.generator, weight=lambda: weight)
        settings = {**self.adapter_type.settings, **self.config.settings}
        complete = self.adapter_type.complete(
            {"0": Unfinished(tensors, self.spec, settings, lambda: weight, lambda: bias)}
        )["0"]
        return {name: converted(tensor, torch.float64) for name, tensor in complete.items()}

    def random(self) -> dict[str, Tensor]:
        """Return random tensors, different ones for every call."""
        return {
            name: torch.randn(tensor.shape, generator=self.generator, dtype=torch.float64)
            if tensor.is_floating_point()
            else tensor
            for name, tensor in self.initial().items()
        }

    def layer(self, tensors: dict[str, Tensor]) -> AdapterLayer:
        settings = self.config.settings
        return AdapterLayer(self.adapter_type, self.spec, tensors, alpha=3.0, settings=settings, trainable=True)

    def attach(self, tensors: dict[str, Tensor], name: str = "a", strength: float = 0.5) -> Adapter:
        """Attach an active adapter with these tensors to the root."""
        adapter = Adapter({"0": self.layer(tensors)})
        attach_(self.root, name, adapter, {"0": self.root[0]})
        adapter.set_strengths([strength])
        adapter.active = True
        refresh_(self.root)
        return adapter
