"""What a weight codec is: how one backend stores the values of a layer's weight."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class WeightCodec:
    """How one backend stores a weight. Adding a backend is one of these in a file beside this one.

    "Values" are the numbers that the layer computes with, in the orientation of the float layer that the quantised one
    stands for: `(out, in)` of a linear layer, `(count, width)` of an embedding.

    Attributes:
        name: the name in messages ("bitsandbytes 4-bit").
        recognises: whether this codec reads parameter `name` of a layer.
        decode: returns the values, exactly as the layer's own forward makes them, in any floating-point dtype and maybe
            in the memory of the layer. Raises if they are out of reach, for example on the meta device.
        parts: the tensors that hold the values, by name: packed integers, scales, zero points. They can be copied and
            written in place.
        encode: values -> new contents of `parts`, by the backend's own quantiser; `None` where it has none. Contents
            have the shapes and dtypes of the parts.
        layout: returns what else describes the parts, where a backend changes their shapes in use; `None` where it does
            not. Holds none of the parts.
        lay_out: gives the weight a layout that `layout` returned, with the contents of the parts that belong to it.
        trusted: whether the backend is known to compute with the decoded values. Others are compared with what a layer
            of their class computes, once for each class and storage; see `probe`.
        remedy: what to do about layers that pass no right gradient to their input, as the end of a message; "" if
            nothing special is known.
    """

    name: str
    recognises: Callable[[nn.Module, str], bool]
    decode: Callable[[nn.Module, str], Tensor]
    parts: Callable[[nn.Module, str], Mapping[str, Tensor]]
    encode: Callable[[nn.Module, str, Tensor], Mapping[str, Tensor]] | None = None
    layout: Callable[[nn.Module, str], Any] | None = None
    lay_out: Callable[[nn.Module, str, Any, Mapping[str, Tensor]], None] | None = None
    trusted: bool = False
    remedy: str = ""


def class_names(instance: Any) -> set[str]:
    """Return the names of an object's class and its bases, which tell a backend without importing it."""
    return {base.__name__ for base in type(instance).__mro__}


def inner_tensors(tensor: Tensor) -> dict[str, Tensor]:
    """Return the plain tensors that a tensor subclass wraps, by attribute, nested ones joined with a dot."""
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is None:
        return {"": tensor.detach()}
    found: dict[str, Tensor] = {}
    for attribute in flatten()[0]:
        for name, inner in inner_tensors(getattr(tensor, attribute)).items():
            found[f"{attribute}.{name}".rstrip(".")] = inner
    return found
