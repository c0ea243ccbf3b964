"""Quantised layers of every backend, made from a float weight. Tests of a backend that is not installed are skipped."""

import contextlib
import importlib
import warnings
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffadapt.weights import gguf_k_quants

OUT, INPUTS = 256, 512


@dataclass(frozen=True)
class Base:
    """A way to store the weight of a linear layer.

    Attributes:
        name: The name in test ids.
        needs: The package that has to be installed; "" for none.
        make: `(weight, bias)` -> the layer.
        error: The maximum relative error of quantisation, also of quantising again.
        merges: Adapters can be merged into it.
    """

    name: str
    needs: str
    make: Callable[[Tensor, Tensor], nn.Module]
    error: float
    merges: bool = True

    def layer(self, seed: int = 0) -> nn.Module:
        """Return a new layer with random values, or skip the test if the backend is not installed."""
        if self.needs:
            with silenced():
                try:
                    importlib.import_module(self.needs)
                except ImportError as error:
                    pytest.skip(f"{self.name}: {self.needs} is not installed ({error})")
        weight, bias = values(seed)
        with silenced():
            return self.make(weight, bias)


def values(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return a random weight (out, in) and bias (out,)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(OUT, INPUTS, generator=generator) / 16, torch.randn(OUT, generator=generator) / 4


@contextlib.contextmanager
def silenced() -> Generator[None, None, None]:
    """Ignore the warnings that backends issue when they are imported and used, which are not our faults."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def float_layer(weight: Tensor, bias: Tensor) -> nn.Linear:
    """Return the float layer that a backend quantises."""
    layer = nn.Linear(INPUTS, OUT)
    layer.weight.data.copy_(weight)
    layer.bias.data.copy_(bias)
    return layer.requires_grad_(False)


def _bitsandbytes_4bit(quant_type: str, nested: bool = False, storage: torch.dtype = torch.uint8) -> Any:
    def make(weight: Tensor, bias: Tensor) -> nn.Module:
        from bitsandbytes.nn import Linear4bit

        layer = Linear4bit(
            INPUTS,
            OUT,
            compute_dtype=torch.float32,
            quant_type=quant_type,
            compress_statistics=nested,
            quant_storage=storage,
        )
        layer.load_state_dict({"weight": weight, "bias": bias})
        return layer.requires_grad_(False).to("cpu")

    return make


def _bitsandbytes_8bit(weight: Tensor, bias: Tensor) -> nn.Module:
    from bitsandbytes.nn import Linear8bitLt

    layer = Linear8bitLt(INPUTS, OUT, has_fp16_weights=False)
    layer.load_state_dict({"weight": weight, "bias": bias})
    return layer.requires_grad_(False).to("cpu")


def _torchao(config: str) -> Any:
    def make(weight: Tensor, bias: Tensor) -> nn.Module:
        from torchao import quantization

        model = nn.Sequential(float_layer(weight, bias))
        quantization.quantize_(model, getattr(quantization, config)())
        return model[0]

    return make


def _quanto(qtype: str) -> Any:
    def make(weight: Tensor, bias: Tensor) -> nn.Module:
        from optimum import quanto

        model = nn.Sequential(float_layer(weight, bias))
        quanto.quantize(model, weights=getattr(quanto, qtype))
        quanto.freeze(model)
        return model[0]

    return make


def _hqq(bits: int) -> Any:
    def make(weight: Tensor, bias: Tensor) -> nn.Module:
        from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

        config = BaseQuantizeConfig(nbits=bits, group_size=64, axis=1)
        return HQQLinear(float_layer(weight, bias), quant_config=config, compute_dtype=torch.float32, device="cpu")

    return make


def _gguf(qtype: str) -> Any:
    def make(weight: Tensor, bias: Tensor) -> nn.Module:
        import gguf
        from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter

        gguf_type = getattr(gguf.GGMLQuantizationType, qtype)
        layer = GGUFLinear(INPUTS, OUT, bias=True, compute_dtype=torch.float32)
        if qtype in gguf_k_quants.NAMES:
            packed = gguf_k_quants.quantise(weight, qtype)
            # The package can read this type, but not write it.
            assert (
                torch.from_numpy(gguf.quants.dequantize(packed.numpy(), gguf_type)).sub(weight).norm()
                < 0.1 * weight.norm()
            )
        else:
            packed = torch.from_numpy(gguf.quants.quantize(weight.numpy(), gguf_type))
        layer.weight = GGUFParameter(packed, quant_type=gguf_type)
        layer.bias = nn.Parameter(bias, requires_grad=False)
        return layer

    return make


def _bfl_fp8(weight: Tensor, bias: Tensor) -> nn.Module:
    from diffusers.quantizers.bfl.utils import BFLFP8RLinear, quantize_fp8r

    layer = BFLFP8RLinear(INPUTS, OUT, bias=True, compute_dtype=torch.float32)
    layer.weight.data, layer.weight_scale = quantize_fp8r(weight)
    layer.bias.data = bias.clone()
    return layer.requires_grad_(False)


def _bfl_nvfp4(weight: Tensor, bias: Tensor) -> nn.Module:
    from diffusers.quantizers.bfl.utils import BFLNVFP4Linear, quantize_nvfp4

    layer = BFLNVFP4Linear(INPUTS, OUT, bias=True, compute_dtype=torch.float32)
    layer.weight.data, layer.weight_scale, layer.weight_scale_2 = quantize_nvfp4(weight)
    layer.input_scale = torch.tensor(1.0)
    layer.bias.data = bias.clone()
    return layer.requires_grad_(False)


class ScaledLinear(nn.Linear):
    """A float8 layer like those of ComfyUI's scaled files: one `scale_weight` for the whole weight."""

    scale_weight: Tensor

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight.to(input.dtype) * self.scale_weight.to(input.dtype)
        return nn.functional.linear(input, weight, self.bias)


def _comfy_scaled(weight: Tensor, bias: Tensor) -> nn.Module:
    layer = ScaledLinear(INPUTS, OUT)
    scale = weight.abs().amax() / torch.finfo(torch.float8_e4m3fn).max
    layer.weight = nn.Parameter((weight / scale).to(torch.float8_e4m3fn), requires_grad=False)
    layer.register_buffer("scale_weight", scale)
    layer.bias.data = bias.clone()
    return layer.requires_grad_(False)


class PackedLinear(nn.Module):
    """A layer with packed integers that only its forward pass can unpack, like those of GPTQ, AWQ and EETQ."""

    qweight: Tensor
    scales: Tensor
    bias: Tensor

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.in_features, self.out_features = INPUTS, OUT
        self.register_buffer("scales", weight.abs().amax(1) / 127)
        self.register_buffer("qweight", (weight / self.scales.unsqueeze(1)).round().to(torch.int8).t().contiguous())
        self.register_buffer("bias", bias.clone())

    def forward(self, input: Tensor) -> Tensor:
        return (input @ self.qweight.to(input.dtype)) * self.scales + self.bias


def _sdnq(dtype: str) -> Any:
    def make(weight: Tensor, bias: Tensor) -> nn.Module:
        from sdnq.quantizer import sdnq_post_load_quant

        model = nn.Sequential(float_layer(weight, bias))
        return sdnq_post_load_quant(model, weights_dtype=dtype, torch_dtype=torch.float32)[0]

    return make


def _modelopt(config: str, compress: bool) -> Any:
    def make(weight: Tensor, bias: Tensor) -> nn.Module:
        import modelopt.torch.quantization as mtq

        model = nn.Sequential(float_layer(weight, bias))
        samples = torch.randn(64, INPUTS, generator=torch.Generator().manual_seed(1))
        mtq.quantize(model, getattr(mtq, config), forward_loop=lambda inner: inner(samples))
        if compress:
            mtq.compress(model)
        return model[0]

    return make


BASES = (
    Base("bitsandbytes nf4", "bitsandbytes", _bitsandbytes_4bit("nf4"), 0.12),
    Base("bitsandbytes fp4, nested", "bitsandbytes", _bitsandbytes_4bit("fp4", nested=True), 0.15),
    Base("bitsandbytes nf4 in bfloat16", "bitsandbytes", _bitsandbytes_4bit("nf4", storage=torch.bfloat16), 0.12),
    Base("bitsandbytes int8", "bitsandbytes", _bitsandbytes_8bit, 0.02),
    Base("torchao int8", "torchao", _torchao("Int8WeightOnlyConfig"), 0.02),
    Base("torchao int8 dynamic", "torchao", _torchao("Int8DynamicActivationInt8WeightConfig"), 0.02),
    Base("torchao float8", "torchao", _torchao("Float8WeightOnlyConfig"), 0.04),
    Base("torchao intx", "torchao", _torchao("IntxWeightOnlyConfig"), 0.02),
    Base("quanto int8", "optimum.quanto", _quanto("qint8"), 0.02),
    Base("quanto int4", "optimum.quanto", _quanto("qint4"), 0.15),
    Base("quanto float8", "optimum.quanto", _quanto("qfloat8"), 0.04),
    Base("hqq 4 bit", "hqq", _hqq(4), 0.15),
    Base("hqq 8 bit", "hqq", _hqq(8), 0.02),
    Base("gguf Q8_0", "gguf", _gguf("Q8_0"), 0.02),
    Base("gguf Q4_0", "gguf", _gguf("Q4_0"), 0.15),
    Base("gguf Q4_K", "gguf", _gguf("Q4_K"), 0.15),
    Base("gguf Q5_K", "gguf", _gguf("Q5_K"), 0.08),
    Base("gguf Q6_K", "gguf", _gguf("Q6_K"), 0.04),
    Base("gguf Q5_1", "gguf", _gguf("Q5_1"), 0.08),
    Base("BFL float8", "", _bfl_fp8, 0.04),
    Base("BFL nvfp4", "", _bfl_nvfp4, 0.15),
    Base("ComfyUI scaled float8", "", _comfy_scaled, 0.04),
    Base("packed", "", PackedLinear, 0.02, merges=False),
    Base("sdnq int8", "sdnq", _sdnq("int8"), 0.02, merges=False),
    Base("sdnq uint4", "sdnq", _sdnq("uint4"), 0.15, merges=False),
    Base("modelopt float8", "modelopt", _modelopt("FP8_DEFAULT_CFG", compress=False), 0.06, merges=False),
    Base("modelopt float8, compressed", "modelopt", _modelopt("FP8_DEFAULT_CFG", compress=True), 0.06, merges=False),
)
