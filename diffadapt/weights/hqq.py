"""HQQ layers, which are no `nn.Linear` and keep their packed weight as `W_q`."""

from typing import Any

from torch import Tensor, nn

from diffadapt.weights.codec import WeightCodec, class_names

_STATISTICS = ("scale", "zero")


def _recognises(layer: nn.Module, name: str) -> bool:
    return name == "weight" and "HQQLinear" in class_names(layer)


def _decode(layer: Any, name: str) -> Tensor:
    return layer.dequantize()


def _parts(layer: Any, name: str) -> dict[str, Tensor]:
    """Return the packed weight and its statistics, as far as they are tensors of their own."""
    found = {key: layer.meta[key] for key in _STATISTICS if isinstance(layer.meta.get(key), Tensor)}
    return {"W_q": layer.W_q.data, **found}


def _encode(layer: Any, name: str, values: Tensor) -> dict[str, Tensor]:
    from hqq.core.quantize import Quantizer

    config = {**layer.quant_config["weight_quant_params"], "compute_dtype": layer.compute_dtype}
    packed, meta = Quantizer.quantize(values, device=str(values.device), **config)
    return {"W_q": packed, **{key: meta[key] for key in _STATISTICS if isinstance(meta.get(key), Tensor)}}


HQQ = WeightCodec(name="HQQ", recognises=_recognises, decode=_decode, parts=_parts, encode=_encode, trusted=True)
