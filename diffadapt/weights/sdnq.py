"""SDNQ layers: integers or floats of few bits, with a dequantiser of their own.

A layer that multiplies in integers may store its weight transposed; its dequantiser knows.
"""

from typing import Any

from torch import Tensor, nn

from diffadapt.errors import AdapterError
from diffadapt.weights.codec import WeightCodec


def _recognises(layer: nn.Module, name: str) -> bool:
    return name == "weight" and hasattr(layer, "sdnq_dequantizer")


def _decode(layer: Any, name: str) -> Tensor:
    from sdnq.utils import get_sdnq_params

    dequantizer = layer.sdnq_dequantizer
    return dequantizer(**get_sdnq_params(layer), skip_quantized_matmul=dequantizer.use_quantized_matmul)


def _parts(layer: Any, name: str) -> dict[str, Tensor]:
    raise AdapterError("SDNQ has no quantiser that keeps the shapes of what it wrote before")


SDNQ = WeightCodec(
    name="SDNQ",
    recognises=_recognises,
    decode=_decode,
    parts=_parts,
    trusted=True,
    remedy="call sdnq.training.convert_sdnq_model_to_training(model) first",
)
