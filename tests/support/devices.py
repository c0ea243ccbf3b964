"""Several devices on a machine that has none: tensors that say they are elsewhere, and compute on the CPU.

As on real devices, an operation on tensors of two devices is an error, and moving a tensor is an operation of its own,
which is counted.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

CPU = torch.device("cpu")
FIRST, SECOND = torch.device("lazy:0"), torch.device("lazy:1")
"""Devices of a kind that torch knows by name and that no machine has."""


class OnDevice(Tensor):
    """A tensor on one of the devices."""

    raw: Tensor

    @staticmethod
    def __new__(cls, source: Tensor, device: torch.device | None = None, requires_grad: bool = False) -> "OnDevice":
        # Like `nn.Parameter`, as which accelerate uses the class of a parameter.
        raw = source.raw if isinstance(source, OnDevice) else source
        made: Any = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, raw.shape, strides=raw.stride(), dtype=raw.dtype, device=device or source.device
        )
        made.raw = raw
        return made.requires_grad_(requires_grad)

    def __getitem__(self, index: Any) -> Any:
        places = index if isinstance(index, tuple) else (index,)
        if any(isinstance(place, list) for place in places):
            # torch would make a tensor of a list on the device, without asking here.
            return OnDevice(self.raw[index], self.device)
        return super().__getitem__(index)

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"OnDevice({self.raw}, {self.device})"

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _call(function, args, kwargs or {})


class Devices(TorchDispatchMode):
    """A block in which tensors can be moved to the devices.

    Attributes:
        copies: for every move from one device to another, the number of elements moved.
    """

    def __init__(self) -> None:
        super().__init__()
        self.copies: list[int] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = _call(function, args, kwargs or {})
        before, after = (args[0], output) if args and isinstance(args[0], Tensor) else (None, None)
        if function is torch.ops.aten.copy_.default:
            before, after = args[1], args[0]
        if isinstance(before, Tensor) and isinstance(after, Tensor) and before.device != after.device:
            self.copies.append(before.numel())
        return output


def _call(function: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
    named = kwargs.get("device")
    tensors = [leaf for leaf in tree_leaves((args, dict(kwargs))) if isinstance(leaf, Tensor)]
    # A number may be anywhere, as for torch.
    present = {tensor.device for tensor in tensors if tensor.ndim or tensor.device != CPU}
    if function is torch.ops.aten.copy_.default:
        present, named = {args[0].device}, None
    elif function.overloadpacket.__name__.startswith("_foreach"):
        # Lists of tensors may be on several devices; they only take longer there.
        present, named = set(), None
    if len(present) > 1:
        raise RuntimeError(f"{function}: expected all tensors to be on one device, found {sorted(map(str, present))}")
    device = torch.device(named) if named is not None else next(iter(present), CPU)
    raws = tree_map_only(OnDevice, lambda tensor: tensor.raw, (args, dict(kwargs)))
    options = {**raws[1], **({"device": CPU} if named is not None else {})}
    output = function(*raws[0], **options)
    if device == CPU or output is None:
        return output
    owners = {id(tensor.raw): tensor for tensor in tensors if isinstance(tensor, OnDevice)}
    return tree_map_only(Tensor, lambda raw: owners[id(raw)] if id(raw) in owners else OnDevice(raw, device), output)
