"""Float8, or half-precision, weights with a scale beside them, in whatever class of layer.

| scale | shape | as in |
|---|---|---|
| `weight_scale` | (), (1,), (out,), (out, 1) | Black Forest Labs' fp8 layers in diffusers 0.42.1, compressed-tensors |
| `scale_weight` | (), (1,) | ComfyUI's scaled fp8 files |
| `weight_scale_inv` | (), or (out / b, in / b) for blocks of b x b | transformers' `FP8Linear`, DeepSeek |

In spite of the name, all three are multiplied with the stored values.
"""

import torch
from torch import Tensor, nn

from diffadapt.errors import AdapterError
from diffadapt.weights.codec import WeightCodec
from diffadapt.weights.resting import resting_tensor

SCALES = ("weight_scale", "scale_weight", "weight_scale_inv")
"""Names of the scale in a layer, and in a file after the path of the layer."""


def scale_beside(layer: nn.Module) -> tuple[str, Tensor] | None:
    """Return the name and the tensor of the scale beside a layer's weight; `None` if there is none."""
    for name in SCALES:
        found = resting_tensor(layer, name)
        if isinstance(found, Tensor):
            return name, found
    return None


def _recognises(layer: nn.Module, name: str) -> bool:
    if name != "weight" or scale_beside(layer) is None:
        return False
    tensor = resting_tensor(layer, name)
    return tensor is not None and type(tensor) in (Tensor, nn.Parameter) and tensor.is_floating_point()


def _stored(layer: nn.Module, name: str) -> tuple[Tensor, str, Tensor]:
    """Return the stored weight, and the name and the tensor of its scale."""
    tensor, found = resting_tensor(layer, name), scale_beside(layer)
    if tensor is None or found is None:
        raise ValueError("no weight with a scale")
    return tensor.detach(), found[0], found[1].detach()


def _decode(layer: nn.Module, name: str) -> Tensor:
    stored, _, scale = _stored(layer, name)
    values = stored.float()
    return values * _spread(scale.float(), values)


def _encode(layer: nn.Module, name: str, values: Tensor) -> dict[str, Tensor]:
    """Give every row, block or tensor the scale with which its largest value is the largest of the dtype."""
    before, scale_name, scale = _stored(layer, name)
    largest = torch.finfo(before.dtype).max
    blocks = _largest_by_scale(values.float().abs(), scale)
    new = _rounded((blocks / largest).clamp_min(1e-12).reshape(scale.shape), scale.dtype)
    spread = _spread(new.to(values.device, torch.float32), values)
    stored = (values.float() / spread).clamp(-largest, largest).to(before.dtype)
    return {name: stored, scale_name: new}


def _rounded(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return scales in their dtype; powers of two are rounded up, since smaller ones would cut the largest values."""
    # torch 2.6 has no such dtype.
    if dtype == getattr(torch, "float8_e8m0fnu", None):
        scale = torch.exp2(torch.log2(scale).ceil())
    return scale.to(dtype)


def _spread(scale: Tensor, values: Tensor) -> Tensor:
    """Return a scale in a shape that broadcasts over the weight."""
    rows, columns = values.shape[0], values[0].numel()
    if scale.numel() == 1:
        return scale.reshape(())
    if _is_per_row(scale, rows):
        return scale.reshape(rows, *(1,) * (values.ndim - 1))
    if scale.ndim == 2 and values.ndim == 2:
        height, width = -(-rows // scale.shape[0]), -(-columns // scale.shape[1])
        return scale.repeat_interleave(height, 0)[:rows].repeat_interleave(width, 1)[:, :columns]
    raise AdapterError(
        f"a scale of shape {tuple(scale.shape)} beside a weight of shape {tuple(values.shape)}, expected one for all, "
        "one for each row, or one for each block"
    )


def _is_per_row(scale: Tensor, rows: int) -> bool:
    # There may be as many blocks as rows.
    return scale.shape[0] == scale.numel() == rows


def _largest_by_scale(magnitudes: Tensor, scale: Tensor) -> Tensor:
    """Return the largest magnitude of the elements that share a scale, for every scale."""
    rows = magnitudes.shape[0]
    if scale.numel() == 1:
        return magnitudes.amax()
    if _is_per_row(scale, rows):
        return magnitudes.flatten(1).amax(1)
    height, width = -(-rows // scale.shape[0]), -(-magnitudes.shape[1] // scale.shape[1])
    padding = (0, scale.shape[1] * width - magnitudes.shape[1], 0, scale.shape[0] * height - rows)
    padded = torch.nn.functional.pad(magnitudes, padding)
    return padded.view(scale.shape[0], height, scale.shape[1], width).amax((1, 3))


def _parts(layer: nn.Module, name: str) -> dict[str, Tensor]:
    stored, scale_name, scale = _stored(layer, name)
    return {name: stored, scale_name: scale}


SCALED = WeightCodec(name="float8 with a scale", recognises=_recognises, decode=_decode, parts=_parts, encode=_encode)
