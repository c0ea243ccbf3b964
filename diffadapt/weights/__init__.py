"""What stored weights mean: one codec for each backend. Adding a backend is one file beside this one and one line here.

Reading a base weight goes through `decoded`, whoever asks: DoRA norms, rotations of patches, merging, `to_lora`, slots,
input layers. Storage that nobody knows is never taken at face value: the layer itself is asked what it computes.
"""

from collections.abc import Hashable, Mapping

import torch
from torch import Tensor, nn

from diffadapt.errors import AdapterError
from diffadapt.weights.bitsandbytes import EIGHT_BIT, FOUR_BIT
from diffadapt.weights.by_forward import BY_FORWARD
from diffadapt.weights.codec import WeightCodec
from diffadapt.weights.gguf import GGUF
from diffadapt.weights.hqq import HQQ
from diffadapt.weights.modelopt import MODELOPT
from diffadapt.weights.nvfp4 import NVFP4
from diffadapt.weights.plain import PLAIN
from diffadapt.weights.probe import disagreement
from diffadapt.weights.resting import is_brought_for_calls, resting_tensor
from diffadapt.weights.scaled import SCALED
from diffadapt.weights.sdnq import SDNQ
from diffadapt.weights.tensor_subclass import TENSOR_SUBCLASS

CODECS: tuple[WeightCodec, ...] = (
    # Those that go by the layer come before those that go by its tensors.
    HQQ,
    SDNQ,
    MODELOPT,
    NVFP4,
    FOUR_BIT,
    EIGHT_BIT,
    GGUF,
    SCALED,
    PLAIN,
    TENSOR_SUBCLASS,
    BY_FORWARD,
)

_PROBED: dict[Hashable, str | None] = {}
"""What the probe said, by class of layer, codec and storage."""


_BROUGHT: set[Hashable] = set()
"""Classes of layers, codecs and storages that were read from the layer's own forward, because it is offloaded."""


def codec_of(layer: nn.Module, name: str) -> WeightCodec:
    """Return the codec that reads parameter `name` of a layer.

    Raises:
        AdapterError: none does.
    """
    for codec in CODECS:
        if codec.recognises(layer, name):
            return codec
    raise AdapterError(f"the {name} of a {_class(layer).__name__} is stored in a way that is not known here")


def decoded(layer: nn.Module, name: str) -> Tensor:
    """Return parameter `name` of a layer as numbers, in the orientation that the layer stores: float32 or float64.

    The result is never the parameter itself.

    Raises:
        AdapterError: the numbers are out of reach (on the meta device, or quantised without a way back), or the layer
            does not compute with them.
    """
    tensor, codec = resting_tensor(layer, name), codec_of(layer, name)
    away = AdapterError(f"the {name} of the {_class(layer).__name__} is on the meta device; load the weights first")
    try:
        if tensor is not None and tensor.device.type == "meta":
            raise away
        values = _values(codec, layer, name)
        if values.device.type == "meta":
            raise away
    except AdapterError:
        # Not all that such a layer consists of can be read between calls, but accelerate brings it for a call.
        if not (is_brought_for_calls(layer) and BY_FORWARD.recognises(layer, name)):
            raise
        values = _values(BY_FORWARD, layer, name)
        _BROUGHT.add(_storage(codec, layer, name))
        return values
    problem = _probed(codec, layer, name, values)
    if problem is not None:
        raise AdapterError(problem)
    return values


def unreadable(layer: nn.Module, name: str) -> str | None:
    """Say why `decoded` would refuse; `None` if it would not. Decodes one weight for each class and storage only."""
    tensor = resting_tensor(layer, name)
    try:
        codec = codec_of(layer, name)
        key = _storage(codec, layer, name)
        if key in _BROUGHT and is_brought_for_calls(layer):
            return None
        if (tensor is not None and tensor.device.type == "meta") or key not in _PROBED:
            decoded(layer, name)
    except AdapterError as error:
        return str(error)
    return _PROBED.get(key)


def _values(codec: WeightCodec, layer: nn.Module, name: str) -> Tensor:
    try:
        values = codec.decode(layer, name).detach()
    except AdapterError:
        raise
    except Exception as error:  # which errors a foreign decoder raises depends on the backend
        raise AdapterError(
            f"the {name} of a {_class(layer).__name__} ({codec.name}) cannot be decoded here ({error})"
        ) from error
    return values if values.dtype == torch.float64 else values.to(torch.float32)


def _probed(codec: WeightCodec, layer: nn.Module, name: str, values: Tensor) -> str | None:
    """Return what is wrong with decoded values, from the first layer of this class and storage that was asked."""
    key = _storage(codec, layer, name)
    if key not in _PROBED:
        known = codec.trusted or (codec is PLAIN and _class(layer).forward in _FORWARDS)
        linear = values.ndim == 2 and getattr(layer, "in_features", None) == values.shape[1]
        # Subclasses of plain convolutions and embeddings do more than multiply: they pad, drop or scale.
        other = codec is not PLAIN and isinstance(layer, (nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d))
        _PROBED[key] = disagreement(layer, values) if not known and name == "weight" and (linear or other) else None
    return _PROBED[key]


def _storage(codec: WeightCodec, layer: nn.Module, name: str) -> Hashable:
    tensor = resting_tensor(layer, name)
    return _class(layer), codec.name, name, type(tensor), None if tensor is None else tensor.dtype


def _class(layer: nn.Module) -> type[nn.Module]:
    """Return the class of a layer without what adapters mix into it."""
    return vars(type(layer)).get("_diffadapt_base", type(layer))


_FORWARDS = frozenset({nn.Linear.forward})


@torch.no_grad()
def write(parts: Mapping[str, Tensor], contents: Mapping[str, Tensor]) -> None:
    """Write contents into the tensors that hold a weight, in place."""
    for name, part in parts.items():
        # Some backends quantise under inference mode, outside of which such tensors cannot be written.
        with torch.inference_mode(part.is_inference()):
            part.copy_(contents[name])
