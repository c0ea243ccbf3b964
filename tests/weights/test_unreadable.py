"""Weights that nobody can decode: refused at load, by path, for types that need them; additive types run."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import diffadapt
from diffadapt import AdapterError, LoadError, weights
from tests.support.bases import BASES, INPUTS, OUT, silenced, values
from tests.support.compare import relative_error
from tests.support.versions import needs

pytestmark = pytest.mark.filterwarnings("ignore")

LORA = {
    "0.lora_A.weight": torch.randn(4, INPUTS, generator=torch.Generator().manual_seed(2)) / 4,
    "0.lora_B.weight": torch.randn(OUT, 4, generator=torch.Generator().manual_seed(3)) / 16,
}
DORA = {**LORA, "0.lora_magnitude_vector": torch.ones(OUT)}


class Packed(nn.Module):
    """A layer of integers whose kernel needs a GPU, as those of GPTQ, AWQ and EETQ."""

    def __init__(self, buffers: dict[str, Tensor]) -> None:
        super().__init__()
        self.in_features, self.out_features, self.on_gpu = INPUTS, OUT, False
        for name, tensor in buffers.items():
            self.register_buffer(name, tensor)
        self.register_buffer("bias", torch.zeros(OUT))

    def forward(self, input: Tensor) -> Tensor:
        if not self.on_gpu:
            raise RuntimeError("its kernel needs CUDA")
        return torch.zeros(*input.shape[:-1], OUT)


class QuantLinear(Packed):
    """Named as GPTQ's."""


class WQLinear_GEMM(Packed):
    """Named as AWQ's."""


class EetqLinear(Packed):
    """Named as EETQ's."""


def _gptq() -> Packed:
    return QuantLinear(
        {
            "qweight": torch.randint(0, 2**31, (INPUTS // 8, OUT), dtype=torch.int32),
            "qzeros": torch.randint(0, 2**31, (INPUTS // 128, OUT // 8), dtype=torch.int32),
            "scales": torch.rand(INPUTS // 128, OUT).half(),
            "g_idx": (torch.arange(INPUTS) // 128).int(),
        }
    )


def _awq() -> Packed:
    return WQLinear_GEMM(
        {
            "qweight": torch.randint(0, 2**31, (INPUTS, OUT // 8), dtype=torch.int32),
            "qzeros": torch.randint(0, 2**31, (INPUTS // 128, OUT // 8), dtype=torch.int32),
            "scales": torch.rand(INPUTS // 128, OUT).half(),
        }
    )


def _eetq() -> Packed:
    return EetqLinear(
        {
            "weight": torch.randint(-128, 127, (INPUTS, OUT), dtype=torch.int8),
            "weight_scales": torch.rand(OUT).half(),
        }
    )


@pytest.mark.parametrize("make", [_gptq, _awq, _eetq])
def test_packed_layers_whose_kernel_is_not_here(make: Any) -> None:
    layer = make()
    model = nn.Sequential(layer)
    with pytest.raises(LoadError, match=rf"0: a dora needs the values .*{type(layer).__name__}"):
        diffadapt.load_adapter(model, DORA)
    assert diffadapt.adapters(model).names == []
    assert diffadapt.load_adapter(model, LORA, "a").used == 2
    layer.on_gpu = True
    input = torch.randn(3, INPUTS)
    expected = input @ LORA["0.lora_A.weight"].T @ LORA["0.lora_B.weight"].T
    assert relative_error(model(input), expected) < 1e-5
    layer.on_gpu = False
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    with pytest.raises(AdapterError, match=r"model\.0: its weight is quantised .* keep it unmerged"):
        diffadapt.adapters(model).merge("a")
    for name, tensor in layer.state_dict().items():
        assert torch.equal(tensor, before[name])


def _opaque(name: str) -> Tensor:
    quantization = pytest.importorskip("torchao.quantization")
    groups = torch.ones(INPUTS // 128, OUT)
    shape, blocks = (OUT, INPUTS), [1, 128]
    if name == "NF4Tensor":
        return quantization.NF4Tensor.from_tensor(values()[0], 64, 256)
    if name == "IntxOpaqueTensor":
        packed = torch.zeros(1000, dtype=torch.uint8)
        return quantization.IntxOpaqueTensor(
            packed, 4, [1, 64], shape, torch.float32, False, False, "opaque_torchao_auto"
        )
    dtype, parts = (torch.uint8, 2) if name == "Int4Tensor" else (torch.int32, 8)
    packed = torch.zeros(OUT, INPUTS // parts, dtype=dtype)
    return getattr(quantization, name)(packed, groups, 0 * groups, blocks, shape)


@pytest.mark.parametrize("name", ["Int4Tensor", "Int4PlainInt32Tensor", "IntxOpaqueTensor", "NF4Tensor"])
def test_tensors_of_torchao_without_a_way_to_decode(name: str) -> None:
    with silenced():
        tensor = _opaque(name)
    model = nn.Sequential(nn.Linear(INPUTS, OUT)).requires_grad_(False)
    model[0].weight = nn.Parameter(tensor, requires_grad=False)
    with pytest.raises(LoadError, match=r"0: a dora needs the values .* cannot be decoded here"):
        diffadapt.load_adapter(model, DORA)
    assert diffadapt.load_adapter(model, LORA, "a").used == 2
    with pytest.raises(AdapterError, match=r"model\.0: its weight is quantised .* keep it unmerged"):
        diffadapt.adapters(model).merge("a")


def test_gguf_weights_outside_linear_layers_are_not_taken_at_face_value() -> None:
    """diffusers puts packed weights into any layer, and unpacks them in linear ones only."""
    gguf: Any = pytest.importorskip("gguf")
    from diffusers.quantizers.gguf.utils import GGUFParameter

    kind = gguf.GGMLQuantizationType.Q8_0
    layer = nn.Embedding(16, 64).requires_grad_(False)
    packed = torch.from_numpy(gguf.quants.quantize(layer.weight.numpy(), kind))
    layer.weight = GGUFParameter(packed, quant_type=kind)
    with pytest.raises(AdapterError, match=r"its own forward does not compute with .outputs of shape"):
        weights.decoded(layer, "weight")
    file = {"0.lora_embedding_A": torch.randn(4, 16), "0.lora_embedding_B": torch.randn(64, 4)}
    model = nn.Sequential(layer)
    with pytest.raises(LoadError, match="0: a dora needs the values"):
        diffadapt.load_adapter(model, {**file, "0.dora_scale": torch.ones(64, 1)})
    diffadapt.load_adapter(model, file, "a")
    with pytest.raises(AdapterError, match=r"model\.0: its weight is quantised .*does not compute with"):
        diffadapt.adapters(model).merge("a")


class Doubled(nn.Conv2d):
    """A convolution that ignores the scale of its weight."""

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.weight.float(), None)


def test_a_convolution_that_ignores_a_scale_is_refused() -> None:
    layer = Doubled(4, 6, 3).requires_grad_(False)
    layer.weight = nn.Parameter(layer.weight.to(torch.float8_e4m3fn), requires_grad=False)
    layer.register_buffer("weight_scale", torch.tensor(2.0))
    with pytest.raises(AdapterError, match="its own forward does not compute with"):
        weights.decoded(layer, "weight")


@pytest.mark.parametrize(
    ("name", "scale"),
    [("Q2_K", (80, 82)), ("Q3_K", (108,)), ("IQ4_NL", (0,)), ("IQ4_XS", (0,)), ("Q4_1", ()), ("Q5_0", ())],
)
def test_every_gguf_type_is_decoded_as_its_package_does(name: str, scale: tuple[int, ...]) -> None:
    gguf: Any = pytest.importorskip("gguf")
    from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter

    kind = getattr(gguf.GGMLQuantizationType, name)
    size, width = gguf.constants.GGML_QUANT_SIZES[kind]
    if not scale:
        packed = torch.from_numpy(gguf.quants.quantize(values()[0].numpy(), kind))
    else:
        # The package cannot write these types: random bytes, and scales at their places in every block.
        blocks = torch.randint(0, 256, (OUT * INPUTS // size, width), generator=torch.Generator().manual_seed(0))
        blocks = blocks.to(torch.uint8)
        for place in scale:
            blocks[:, place : place + 2] = torch.tensor([0.01]).half().view(torch.uint8)
        packed = blocks.view(OUT, -1)
    layer = GGUFLinear(INPUTS, OUT, compute_dtype=torch.float32)
    layer.weight = GGUFParameter(packed, quant_type=kind)
    expected = torch.from_numpy(gguf.quants.dequantize(packed.numpy(), kind))
    # diffusers computes in half precision.
    assert relative_error(weights.decoded(layer, "weight"), expected) < 1e-3
    model = nn.Sequential(layer)
    diffadapt.load_adapter(model, LORA, "a")
    if scale:
        with pytest.raises(AdapterError, match=rf"model\.0: .*cannot quantise to {name}.*nothing was written"):
            diffadapt.adapters(model).merge("a")
        assert torch.equal(layer.weight.data.as_subclass(Tensor), packed)
    else:
        diffadapt.adapters(model).merge("a")
        diffadapt.adapters(model).unmerge()
        assert torch.equal(layer.weight.data.as_subclass(Tensor), packed)


@pytest.mark.parametrize("name", ["transformers float8", "transformers float8 in blocks"])
def test_float8_layers_of_transformers_where_their_kernels_are_missing(name: str) -> None:
    """The kernels need a GPU; what is stored can be read and written without them."""
    base = next(base for base in BASES if base.name == name)
    layer: Any = base.layer()
    expected = base.computed(layer)[0].float()
    del layer.forward
    with pytest.raises(Exception, match=r"kernel|triton|CUDA|GPU|cuda"):
        layer(torch.randn(2, INPUTS))
    assert relative_error(weights.decoded(layer, "weight"), expected) < 1e-6
    model = nn.Sequential(layer)
    before = {key: tensor.clone().view(-1).view(torch.uint8) for key, tensor in layer.state_dict().items()}
    assert diffadapt.load_adapter(model, DORA, "a").used == 3
    diffadapt.adapters(model).merge("a")
    direction = expected + DORA["0.lora_B.weight"] @ DORA["0.lora_A.weight"]
    wanted = direction / direction.norm(dim=1, keepdim=True)
    assert relative_error(weights.decoded(layer, "weight"), wanted) < 0.04
    diffadapt.adapters(model).unmerge()
    for key, tensor in layer.state_dict().items():
        assert torch.equal(tensor.view(-1).view(torch.uint8), before[key])
    # Packed 4-bit numbers are beside a scale of the same name.
    layer.weight = nn.Parameter(torch.zeros(OUT, INPUTS // 2, dtype=torch.int8), requires_grad=False)
    diffadapt.adapters(model).clear()
    with pytest.raises(LoadError, match=r"0: a dora needs the values .*FP8Linear"):
        diffadapt.load_adapter(model, DORA)


@pytest.mark.parametrize("name", ["float8_e8m0fnu", "bfloat16", "float32"])
def test_scales_of_few_bits_are_written_as_they_are_read(name: str) -> None:
    """Powers of two (`scale_fmt="ue8m0"` of transformers) are the scales that the values are divided by."""
    if name == "float8_e8m0fnu":
        needs("torch", "2.7", name)
    dtype = getattr(torch, name)
    layer = nn.Linear(256, 256).requires_grad_(False)
    layer.weight = nn.Parameter(layer.weight.to(torch.float8_e4m3fn), requires_grad=False)
    layer.register_buffer("weight_scale_inv", torch.full((2, 2), 0.5).to(dtype))
    layer.forward = lambda input: input @ weights.decoded(layer, "weight").T  # type: ignore[method-assign]
    codec, wanted = weights.codec_of(layer, "weight"), torch.randn(256, 256) * 7
    assert codec.encode is not None
    weights.write(codec.parts(layer, "weight"), codec.encode(layer, "weight", wanted))
    assert relative_error(weights.decoded(layer, "weight"), wanted) < 0.04


def test_a_scale_of_the_input_is_no_scale_of_the_weight() -> None:
    """ComfyUI's scaled files have one of the input, too."""
    layer = nn.Linear(8, 8).requires_grad_(False)
    layer.weight = nn.Parameter(layer.weight.to(torch.float8_e4m3fn), requires_grad=False)
    layer.register_buffer("scale_input", torch.tensor(5.0))
    layer.register_buffer("scale_weight", torch.tensor([0.5]))
    scaled = layer.weight.float() * 0.5
    layer.forward = lambda input: input @ scaled.T  # type: ignore[method-assign]
    assert torch.equal(weights.decoded(layer, "weight"), scaled)
