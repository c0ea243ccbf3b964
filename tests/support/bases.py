"""Stored weights of every backend, as tests and the compatibility table use them. A backend may not be installed."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tests.support import stored_layers as stored
from tests.support.stored_layers import INPUTS, OUT, SHAPES, Kind, float_layer, silenced
from tests.support.versions import TooOld

__all__ = [
    "BASES",
    "CAST",
    "CONVOLUTIONS",
    "EMBEDDINGS",
    "EVERY",
    "INPUTS",
    "OUT",
    "PLAIN",
    "SHAPES",
    "Base",
    "Kind",
    "float_layer",
    "silenced",
    "values",
]


@dataclass(frozen=True)
class Base:
    """A way to store the weight of a layer.

    Attributes:
        name: The name in test ids.
        needs: The package that has to be installed; "" for none.
        make: `(weight, bias)` -> the layer. An embedding has no bias and gets `None`.
        error: The maximum relative error of quantisation, also of quantising again.
        merges: Adapters can be merged into it.
        kind: The kind of layer.
        exact: Whether the layer computes with exactly its weight. Others also quantise their input.
        config: What torchao quantises with, which peft needs for merging.
    """

    name: str
    needs: str
    make: Callable[[Tensor, Any], nn.Module]
    error: float
    merges: bool = True
    kind: Kind = "linear"
    exact: bool = True
    config: Callable[[], Any] | None = None

    def layer(self, seed: int = 0) -> nn.Module:
        """Return a new layer with random values, or skip the test if the backend is not installed."""
        if self.needs:
            with silenced():
                try:
                    importlib.import_module(self.needs)
                except ImportError as error:
                    raise TooOld(f"{self.name}: {self.needs} is not installed ({error})") from error
        weight, bias = values(seed, self.kind)
        with silenced(), torch.random.fork_rng():
            torch.manual_seed(seed)  # some quantisers draw random numbers
            return self.make(weight, None if self.kind == "embedding" else bias)

    def input(self, seed: int = 2) -> Tensor:
        """Return a random input for the layer."""
        generator = torch.Generator().manual_seed(seed)
        if self.kind == "embedding":
            return torch.randint(SHAPES["embedding"][0], (4, 8), generator=generator)
        shape = (4, 9, INPUTS) if self.kind == "linear" else (2, SHAPES["conv"][1], 6, 6)
        return torch.randn(shape, generator=generator)

    @torch.no_grad()
    def noise(self, layer: nn.Module, size: float = 1.0) -> float:
        """Return the relative error of a layer's outputs to those of a float layer with the weight it computes with.

        Some layers round their input, or compute in fewer bits.

        Args:
            size: Factor for the input. A layer may cut what is larger than the data it was calibrated with.
        """
        input = self.input() if self.kind == "embedding" else size * self.input()
        with silenced():
            found = layer(input).double()
        expected = self.output(input, *self.computed(layer))
        return float((found - expected).norm() / expected.norm())

    def canonical(self, weight: Tensor) -> Tensor:
        """Return a weight as the layer stores it with the outputs first, as formulas have it, or the reverse."""
        return weight.T if self.kind == "embedding" else weight

    @torch.no_grad()
    def computed(self, layer: nn.Module) -> tuple[Tensor, Tensor | None]:
        """Return the canonical weight and the bias that a layer computes with, in float64, from its outputs alone."""
        with silenced():
            if self.kind == "embedding":
                return layer(torch.arange(SHAPES["embedding"][0])).double().T, None
            if self.kind == "linear":
                bias = layer(torch.zeros(1, INPUTS)).double()
                return (layer(torch.eye(INPUTS)).double() - bias).T, bias[0]
            _, channels, *kernel = SHAPES["conv"]
            # An impulse at every place of the kernel whose centre is at (2, 2) of the input, (1, 1) of the output.
            places = torch.eye(channels * 9).view(-1, channels, *kernel)
            impulses = nn.functional.pad(places, (1, 2, 1, 2))
            bias = layer(torch.zeros(1, channels, 6, 6))[0, :, 1, 1].double()
            columns = layer(impulses)[:, :, 1, 1].double() - bias
            return columns.T.reshape(SHAPES["conv"]), bias

    def output(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return what a float layer computes from its canonical weight."""
        if self.kind == "embedding":
            return nn.functional.embedding(input, weight.T)
        input = input.to(weight.dtype)
        if self.kind == "conv":
            return nn.functional.conv2d(input, weight, bias, stride=2, padding=1)
        return nn.functional.linear(input, weight, bias)


def values(seed: int = 0, kind: Kind = "linear") -> tuple[Tensor, Tensor]:
    """Return a random weight, as the layer stores it, and a random bias for every output."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(SHAPES[kind], generator=generator) / 16
    return weight, torch.randn(weight.shape[0], generator=generator) / 4


def _torchao(
    name: str,
    config: str,
    error: float,
    module: str = "torchao.quantization",
    options: Callable[[], Any] = dict,
    kind: Kind = "linear",
    exact: bool = True,
) -> Base:
    def own() -> Any:
        return getattr(importlib.import_module(module), config)(**options())

    def make(weight: Tensor, bias: Tensor | None) -> nn.Module:
        from torchao.quantization import quantize_

        model = nn.Sequential(float_layer(weight, bias))
        quantize_(model, own(), filter_fn=lambda layer, _: layer is model[0])
        return model[0]

    return Base(f"torchao {name}", "torchao", make, error, kind=kind, exact=exact, config=own)


BASES = (
    Base("bitsandbytes nf4", "bitsandbytes", stored.bitsandbytes_4bit("nf4"), 0.12),
    Base("bitsandbytes fp4, nested", "bitsandbytes", stored.bitsandbytes_4bit("fp4", nested=True), 0.15),
    Base(
        "bitsandbytes nf4 in bfloat16",
        "bitsandbytes",
        stored.bitsandbytes_4bit("nf4", storage=torch.bfloat16),
        0.12,
    ),
    Base("bitsandbytes int8", "bitsandbytes", stored.bitsandbytes_8bit, 0.02),
    _torchao("int8", "Int8WeightOnlyConfig", 0.02),
    _torchao("int8 dynamic", "Int8DynamicActivationInt8WeightConfig", 0.02, exact=False),
    _torchao("float8", "Float8WeightOnlyConfig", 0.04),
    _torchao("intx", "IntxWeightOnlyConfig", 0.02),
    _torchao("int4", "IntxWeightOnlyConfig", 0.15, options=stored.four_bits),
    _torchao("nvfp4", "NVFP4WeightOnlyConfig", 0.15, "torchao.prototype.mx_formats"),
    Base("quanto int8", "optimum.quanto", stored.quanto("qint8"), 0.02),
    Base("quanto int4", "optimum.quanto", stored.quanto("qint4"), 0.15),
    Base("quanto float8", "optimum.quanto", stored.quanto("qfloat8"), 0.04),
    Base("hqq 4 bit", "hqq", stored.hqq(4), 0.15),
    Base("hqq 8 bit", "hqq", stored.hqq(8), 0.02),
    Base("gguf Q8_0", "gguf", stored.gguf("Q8_0"), 0.02),
    Base("gguf Q4_0", "gguf", stored.gguf("Q4_0"), 0.15),
    Base("gguf Q4_K", "gguf", stored.gguf("Q4_K"), 0.15),
    Base("gguf Q5_K", "gguf", stored.gguf("Q5_K"), 0.08),
    Base("gguf Q6_K", "gguf", stored.gguf("Q6_K"), 0.04),
    Base("gguf Q5_1", "gguf", stored.gguf("Q5_1"), 0.08),
    Base("gguf BF16", "gguf", stored.gguf("BF16"), 0.004),
    Base("BFL float8", "", stored.bfl_fp8, 0.04),
    Base("BFL nvfp4", "", stored.bfl_nvfp4, 0.15),
    Base("ComfyUI scaled float8", "", stored.comfy_scaled, 0.04),
    Base("transformers float8", "", stored.transformers_fp8(None), 0.04),
    Base("transformers float8 in blocks", "", stored.transformers_fp8((128, 128)), 0.04),
    Base("packed", "", stored.PackedLinear, 0.02, merges=False),
    Base("sdnq int8", "sdnq", stored.sdnq("int8"), 0.02, merges=False),
    Base(
        "sdnq int8, multiplied",
        "sdnq",
        stored.sdnq("int8", use_quantized_matmul=True),
        0.02,
        merges=False,
        exact=False,
    ),
    Base("sdnq uint4", "sdnq", stored.sdnq("uint4"), 0.15, merges=False),
    Base("sdnq uint4 with svd", "sdnq", stored.sdnq("uint4", use_svd=True), 0.15, merges=False),
    Base(
        "modelopt float8",
        "modelopt",
        stored.modelopt("FP8_DEFAULT_CFG", compress=False),
        0.06,
        merges=False,
        exact=False,
    ),
    Base(
        "modelopt float8, compressed",
        "modelopt",
        stored.modelopt("FP8_DEFAULT_CFG", compress=True),
        0.06,
        merges=False,
        exact=False,
    ),
)
"""Quantised linear layers."""

CONVOLUTIONS = (
    Base("quanto int8 convolution", "optimum.quanto", stored.quanto("qint8"), 0.02, kind="conv"),
    Base("quanto int4 convolution", "optimum.quanto", stored.quanto("qint4"), 0.15, kind="conv"),
    Base("quanto float8 convolution", "optimum.quanto", stored.quanto("qfloat8"), 0.04, kind="conv"),
    _torchao("intx convolution", "IntxWeightOnlyConfig", 0.04, kind="conv"),
    Base("sdnq int8 convolution", "sdnq", stored.sdnq("int8"), 0.02, kind="conv", merges=False),
    Base("sdnq uint4 convolution", "sdnq", stored.sdnq("uint4"), 0.15, kind="conv", merges=False),
    Base(
        "modelopt float8 convolution",
        "modelopt",
        stored.modelopt("FP8_DEFAULT_CFG", compress=False),
        0.06,
        kind="conv",
        merges=False,
        exact=False,
    ),
)
"""Quantised convolutions. bitsandbytes, HQQ, GGUF of diffusers and BFL's formats have none that run."""

EMBEDDINGS = (
    Base(
        "bitsandbytes int8 embedding",
        "bitsandbytes",
        stored.bitsandbytes_embedding("Embedding8bit"),
        0.02,
        kind="embedding",
    ),
    Base(
        "bitsandbytes nf4 embedding",
        "bitsandbytes",
        stored.bitsandbytes_embedding("EmbeddingNF4"),
        0.12,
        kind="embedding",
    ),
    Base(
        "bitsandbytes fp4 embedding in bfloat16",
        "bitsandbytes",
        stored.bitsandbytes_embedding("EmbeddingFP4", quant_storage=torch.bfloat16),
        0.15,
        kind="embedding",
    ),
    _torchao("int8 embedding", "Int8WeightOnlyConfig", 0.02, kind="embedding"),
    _torchao("float8 embedding", "Float8WeightOnlyConfig", 0.04, kind="embedding"),
    _torchao("intx embedding", "IntxWeightOnlyConfig", 0.02, kind="embedding"),
    Base("sdnq int8 embedding", "sdnq", stored.sdnq("int8"), 0.02, kind="embedding", merges=False),
    Base("sdnq uint4 embedding", "sdnq", stored.sdnq("uint4"), 0.15, kind="embedding", merges=False),
    Base("transformers float8 embedding", "", stored.transformers_fp8_embedding, 0.04, kind="embedding"),
)
"""Quantised embeddings. quanto, HQQ and GGUF of diffusers have none that run."""

CAST = (
    Base("float8 cast", "", stored.cast(torch.float8_e4m3fn), 0.04),
    Base("float8 cast convolution", "", stored.cast(torch.float8_e4m3fn), 0.04, kind="conv"),
    Base("bfloat16 cast", "", stored.cast(torch.bfloat16), 0.004),
)
"""Plain weights of fewer bits than the layer computes in."""

PLAIN = (Base("float32", "", float_layer, 1e-6),)
"""What the others are compared with."""

EVERY = (*BASES, *CONVOLUTIONS, *EMBEDDINGS, *CAST)
