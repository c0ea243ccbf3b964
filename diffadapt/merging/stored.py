"""A base weight or bias as merging reads and writes it: ordinary numbers, or the packed parts of a quantised weight."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from diffadapt.errors import AdapterError
from diffadapt.weights import codec_of, decoded, unreadable, write
from diffadapt.weights.by_forward import BY_FORWARD
from diffadapt.weights.codec import WeightCodec, class_names
from diffadapt.weights.plain import PLAIN
from diffadapt.weights.resting import resting_tensor


class Rounding(NamedTuple):
    """What rounding to quantised storage made of the change of merged adapters.

    Attributes:
        error: the norm of the difference that rounding made, as a share of the norm of the change.
        left: the part of the change that is left: the component of the rounded change along it, as a share.
    """

    error: float
    left: float


NO_ROUNDING = Rounding(error=0.0, left=1.0)


@dataclass(frozen=True)
class Stored:
    """A parameter of a layer of the model, which adapters can be merged into.

    Attributes:
        where: component and module path of the layer, for messages.
        tensor: the tensor that stands for the parameter. It holds the values only of a plain parameter.
        codec: the codec of a quantised parameter, `None` for a plain one.
    """

    host: nn.Module
    where: str
    name: str
    tensor: Tensor
    codec: WeightCodec | None

    @classmethod
    def of(cls, host: nn.Module, where: str, name: str) -> "Stored":
        """Return the parameter `name` of `host`.

        Raises:
            AdapterError: the parameter does not exist, is out of reach, or is stored in a way that cannot be written.
        """
        tensor = resting_tensor(host, name)
        if tensor is None and not BY_FORWARD.recognises(host, name):
            raise AdapterError(f"{where}: the adapter changes the {name}, but the layer has none; keep it unmerged")
        if tensor is not None:
            _refuse_out_of_reach(host, where, name, tensor)
        try:
            codec = codec_of(host, name)
            parts = codec.parts(host, name)
            problem = None if codec.encode else f"no quantiser for {codec.name} is known here"
            if any(part.device.type == "meta" for part in parts.values()):
                problem = "it is offloaded, and its parts are on the meta device"
        except Exception as error:  # which errors a codec raises depends on its backend
            codec, problem = None, str(error)
        is_plain = codec is PLAIN
        problem = problem or unreadable(host, name)
        if problem is not None or tensor is None:
            kind = "" if is_plain else f" is quantised ({_kind(tensor)}) and"
            raise AdapterError(f"{where}: its {name}{kind} cannot be written: {problem}; keep it unmerged")
        return cls(host, where, name, tensor, None if is_plain else codec)

    def values(self) -> Tensor:
        """Return the present values: the tensor of a plain parameter itself, or decoded ones."""
        return self.tensor.detach() if self.codec is None else decoded(self.host, self.name)

    def encode_(self, values: Tensor, original: Tensor) -> Rounding:
        """Write values into a quantised parameter with the quantiser of its backend.

        Args:
            original: the values before any merging.

        Raises:
            AdapterError: the backend cannot hold the values; they may have been written all the same.
        """
        assert self.codec is not None
        assert self.codec.encode is not None
        try:
            contents = self.codec.encode(self.host, self.name, values)
            parts = self.codec.parts(self.host, self.name)
        except Exception as error:  # which errors a quantiser raises depends on the backend
            raise self._refusal(f"cannot be quantised again ({error})") from error
        self._refuse_contents(parts, contents)
        write(parts, contents)
        found, change = decoded(self.host, self.name), values - original
        lost, size = torch.linalg.vector_norm(found - values), torch.linalg.vector_norm(change)
        if not lost.isfinite():
            raise self._refusal("would have values that its storage cannot hold")
        if not size:
            return NO_ROUNDING
        return Rounding(float(lost / size), float(torch.sum((found - original) * (change / size)) / size))

    def _refuse_contents(self, parts: Mapping[str, Tensor], contents: Mapping[str, Tensor]) -> None:
        """Raise `AdapterError` if the contents do not suit the parts, which `Tensor.copy_` would not notice."""
        for name, part in parts.items():
            content = contents[name]
            if (content.shape, content.dtype) != (part.shape, part.dtype):
                found, expected = ((tuple(t.shape), t.dtype) for t in (content, part))
                raise self._refusal(f"was quantised in another way than its backend does now ({found}, {expected})")

    def _refusal(self, problem: str) -> AdapterError:
        return AdapterError(
            f"{self.where}: with the merged adapters, its quantised {self.name} {problem}; nothing was written; keep "
            "them unmerged"
        )


def _refuse_out_of_reach(host: nn.Module, where: str, name: str, tensor: Tensor) -> None:
    """Raise `AdapterError` if writing to the tensor would not change what the layer computes with, now and later."""
    if "DTensor" in class_names(tensor):
        raise AdapterError(
            f"{where}: its {name} is spread over several devices (DTensor); merge before the model is sharded, or keep "
            "it unmerged"
        )
    if tensor.device.type == "meta":
        raise AdapterError(f"{where}: its {name} is on the meta device; load the weights before merging")
    if _is_computed(host, name):
        raise AdapterError(
            f"{where}: its {name} is no parameter but computed from others (a parametrisation such as weight_norm, "
            "pruning, or FSDP); remove that (torch.nn.utils.parametrize.remove_parametrizations), or keep it unmerged"
        )


def _is_computed(host: nn.Module, name: str) -> bool:
    """Return whether a parameter is a property of the layer, or an attribute that something else sets."""
    if getattr(host, name, None) is None or name in host._parameters or name in host._buffers:
        return False
    # HQQ keeps its bias as an attribute. Old weight norm and pruning have parameters weight_g, weight_v or weight_orig
    # beside it; FSDP sets views.
    own = host.__dict__.get(name)
    return own is None or own._base is not None or any(other.startswith(f"{name}_") for other in host._parameters)


def _kind(tensor: Tensor | None) -> str:
    return "in tensors of other names" if tensor is None else f"{type(tensor).__name__}, {tensor.dtype}"
