"""Layers that store their weight in the way of a backend, made from a float weight.

A function here takes the weight and the bias, or returns a function that does; an embedding has no bias.
"""

import contextlib
import warnings
from collections.abc import Generator
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from diffadapt.weights import gguf_k_quants
from tests.support.versions import needs

OUT, INPUTS = 256, 512

Kind: TypeAlias = Literal["linear", "conv", "embedding"]
SHAPES: dict[Kind, tuple[int, ...]] = {"linear": (OUT, INPUTS), "conv": (64, 32, 3, 3), "embedding": (160, 128)}
"""Shapes of the weights as the layers store them; convolutions have a padding of 1 and a stride of 2."""


@contextlib.contextmanager
def silenced() -> Generator[None, None, None]:
    """Ignore the warnings that backends issue when they are imported and used, which are not our faults."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def float_layer(weight: Tensor, bias: Tensor | None) -> nn.Module:
    """Return the float layer that a backend quantises."""
    layer: Any
    if bias is None:
        layer = nn.Embedding(*weight.shape)
    elif weight.ndim == 4:
        layer = nn.Conv2d(weight.shape[1], weight.shape[0], 3, stride=2, padding=1)
    else:
        layer = nn.Linear(weight.shape[1], weight.shape[0])
    layer.weight = nn.Parameter(weight.clone())
    if bias is not None:
        layer.bias = nn.Parameter(bias.clone())
    return layer.requires_grad_(False)


def bitsandbytes_4bit(quant_type: str, nested: bool = False, storage: torch.dtype = torch.uint8) -> Any:
    def make(weight: Tensor, bias: Tensor) -> nn.Module:
        from bitsandbytes.nn import Linear4bit

        layer = Linear4bit(
            weight.shape[1],
            weight.shape[0],
            compute_dtype=torch.float32,
            quant_type=quant_type,
            compress_statistics=nested,
            quant_storage=storage,
        )
        layer.load_state_dict({"weight": weight, "bias": bias})
        return layer.requires_grad_(False).to("cpu")

    return make


def bitsandbytes_8bit(weight: Tensor, bias: Tensor) -> nn.Module:
    from bitsandbytes.nn import Linear8bitLt

    layer = Linear8bitLt(*weight.shape[::-1], has_fp16_weights=False)
    layer.load_state_dict({"weight": weight, "bias": bias})
    return layer.requires_grad_(False).to("cpu")


def bitsandbytes_embedding(cls: str, **options: Any) -> Any:
    def make(weight: Tensor, _: None) -> nn.Module:
        import bitsandbytes.nn

        layer = getattr(bitsandbytes.nn, cls)(*weight.shape, **options)
        layer.load_state_dict({"weight": weight})
        return layer.requires_grad_(False).to("cpu")

    return make


def four_bits() -> dict[str, Any]:
    from torchao.quantization import PerGroup

    return {"weight_dtype": torch.int4, "granularity": PerGroup(64)}


def quanto(qtype: str) -> Any:
    def make(weight: Tensor, bias: Tensor) -> nn.Module:
        from optimum import quanto

        model = nn.Sequential(float_layer(weight, bias))
        quanto.quantize(model, weights=getattr(quanto, qtype))
        quanto.freeze(model)
        return model[0]

    return make


def hqq(bits: int) -> Any:
    def make(weight: Tensor, bias: Tensor) -> nn.Module:
        from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

        config = BaseQuantizeConfig(nbits=bits, group_size=64, axis=1)
        return HQQLinear(float_layer(weight, bias), quant_config=config, compute_dtype=torch.float32, device="cpu")

    return make


def gguf(qtype: str) -> Any:
    def make(weight: Tensor, bias: Tensor) -> nn.Module:
        import gguf
        from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter

        gguf_type = getattr(gguf.GGMLQuantizationType, qtype)
        layer = GGUFLinear(*weight.shape[::-1], bias=True, compute_dtype=torch.float32)
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


def bfl_fp8(weight: Tensor, bias: Tensor) -> nn.Module:
    needs("diffusers", "0.42", "BFLFP8RLinear")
    from diffusers.quantizers.bfl.utils import BFLFP8RLinear, quantize_fp8r

    layer = BFLFP8RLinear(*weight.shape[::-1], bias=True, compute_dtype=torch.float32)
    layer.weight.data, layer.weight_scale = quantize_fp8r(weight)
    layer.bias.data = bias.clone()
    return layer.requires_grad_(False)


def bfl_nvfp4(weight: Tensor, bias: Tensor) -> nn.Module:
    needs("diffusers", "0.42", "BFLNVFP4Linear")
    from diffusers.quantizers.bfl.utils import BFLNVFP4Linear, quantize_nvfp4

    layer = BFLNVFP4Linear(*weight.shape[::-1], bias=True, compute_dtype=torch.float32)
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


def comfy_scaled(weight: Tensor, bias: Tensor) -> nn.Module:
    layer = ScaledLinear(*weight.shape[::-1])
    scale = weight.abs().amax() / torch.finfo(torch.float8_e4m3fn).max
    layer.weight = nn.Parameter((weight / scale).to(torch.float8_e4m3fn), requires_grad=False)
    layer.register_buffer("scale_weight", scale)
    layer.bias.data = bias.clone()
    return layer.requires_grad_(False)


def cast(dtype: torch.dtype) -> Any:
    """Follow diffusers' layerwise casting."""

    def make(weight: Tensor, bias: Tensor | None) -> nn.Module:
        from diffusers.hooks.layerwise_casting import apply_layerwise_casting_hook

        layer = float_layer(weight, bias)
        apply_layerwise_casting_hook(layer, dtype, torch.float32, non_blocking=False)
        return layer.to(dtype)

    return make


def transformers_fp8(blocks: tuple[int, int] | None) -> Any:
    def make(weight: Tensor, bias: Tensor) -> nn.Module:
        needs("transformers", "5.4", "FP8Linear")
        from transformers.integrations import finegrained_fp8

        layer: Any = finegrained_fp8.FP8Linear(*weight.shape[::-1], blocks, has_bias=True)
        height, width = blocks or weight.shape
        grid = weight.view(weight.shape[0] // height, height, weight.shape[1] // width, width)
        scale = grid.abs().amax((1, 3), keepdim=True) / torch.finfo(torch.float8_e4m3fn).max
        layer.weight.data = (grid / scale).view_as(weight).to(torch.float8_e4m3fn)
        layer.weight_scale_inv.data = scale.view(-1).squeeze() if blocks is None else scale[:, 0, :, 0].clone()
        layer.bias.data = bias.clone()

        def forward(input: Tensor) -> Tensor:
            # Its kernels need a GPU. This is what its backward pass computes with, without rounding the input.
            own = finegrained_fp8._dequantize_fp8_weight(layer.weight, layer.weight_scale_inv, blocks, input.dtype)
            return nn.functional.linear(input, own, layer.bias)

        layer.forward = forward
        return layer.requires_grad_(False)

    return make


def transformers_fp8_embedding(weight: Tensor, _: None) -> nn.Module:
    needs("transformers", "5.4", "FP8Embedding")
    from transformers.integrations.finegrained_fp8 import FP8Embedding

    layer = FP8Embedding(*weight.shape)
    layer.weight_scale.data = (weight.abs().amax() / torch.finfo(torch.float8_e4m3fn).max).view(1)
    layer.weight.data = (weight / layer.weight_scale).to(torch.float8_e4m3fn)
    return layer.requires_grad_(False)


class PackedLinear(nn.Module):
    """A layer with packed integers that only its forward pass can unpack, like those of GPTQ, AWQ and EETQ."""

    qweight: Tensor
    scales: Tensor
    bias: Tensor

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.register_buffer("scales", weight.abs().amax(1) / 127)
        self.register_buffer("qweight", (weight / self.scales.unsqueeze(1)).round().to(torch.int8).t().contiguous())
        self.register_buffer("bias", bias.clone())

    def forward(self, input: Tensor) -> Tensor:
        return (input @ self.qweight.to(input.dtype)) * self.scales + self.bias


def sdnq(dtype: str, **options: Any) -> Any:
    def make(weight: Tensor, bias: Tensor | None) -> nn.Module:
        from sdnq.quantizer import sdnq_post_load_quant

        model = nn.Sequential(float_layer(weight, bias))
        options.update(quant_conv=True, quant_embedding=True)
        return sdnq_post_load_quant(model, weights_dtype=dtype, torch_dtype=torch.float32, **options)[0]

    return make


def modelopt(config: str, compress: bool) -> Any:
    def make(weight: Tensor, bias: Tensor) -> nn.Module:
        import modelopt.torch.quantization as mtq

        model = nn.Sequential(float_layer(weight, bias))
        size = (64, weight.shape[1]) if weight.ndim == 2 else (4, weight.shape[1], 6, 6)
        samples = torch.randn(size, generator=torch.Generator().manual_seed(1))
        mtq.quantize(model, getattr(mtq, config), forward_loop=lambda inner: inner(samples))
        if compress:
            mtq.compress(model)
        return model[0]

    return make
