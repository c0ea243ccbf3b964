"""The parts of an `AdapterType` that follow from one function, for types whose change is two factors or a matrix."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TypedDict

import torch
from torch import Tensor

from diffadapt.errors import AdapterError
from diffadapt.types.adapter_type import DeltaOutput, Tensors, Unfinished
from diffadapt.types.layer_spec import LayerSpec
from diffadapt.types.tensor_ops import shape_of


class ByFactors(TypedDict):
    """The functions of an additive type that is two factors; see `AdapterType`."""

    delta_weight: Callable[[Tensors, LayerSpec], Tensor]
    delta_output: DeltaOutput
    as_low_rank: Callable[[Tensors, LayerSpec], tuple[Tensor, Tensor] | None]


class ByMatrix(TypedDict):
    """The functions of an additive type that is one matrix; see `AdapterType`."""

    in_weight: Callable[[Tensors, LayerSpec], bool]
    delta_weight: Callable[[Tensors, LayerSpec], Tensor]
    delta_output: DeltaOutput


def by_factors(factors: Callable[[Tensors, LayerSpec], tuple[Tensor, Tensor]]) -> ByFactors:
    """Return the functions of a type whose change is `up @ down`.

    Args:
        factors: returns `down` (rank, in / groups, *kernel) and `up` (out, rank) for prepared tensors.
    """

    def delta_weight(tensors: Tensors, spec: LayerSpec) -> Tensor:
        return spec.product(*factors(tensors, spec))

    def delta_output(
        tensors: Tensors, spec: LayerSpec, *, input: Tensor, gate: Tensor, onto: Tensor | None = None
    ) -> Tensor:
        return spec.low_rank(input, *factors(tensors, spec), gate, onto)

    return {"delta_weight": delta_weight, "delta_output": delta_output, "as_low_rank": factors}


def by_matrix(matrix: Callable[[Tensors, LayerSpec], Tensor]) -> ByMatrix:
    """Return the functions of a type whose change is cheapest as one matrix.

    Args:
        matrix: returns the change of the weight in the canonical shape, for prepared tensors.
    """

    def delta_output(
        tensors: Tensors, spec: LayerSpec, *, input: Tensor, gate: Tensor, onto: Tensor | None = None
    ) -> Tensor:
        return spec.dense(input, matrix(tensors, spec), gate, onto)

    return {"delta_weight": matrix, "delta_output": delta_output, "in_weight": lambda tensors, spec: True}


def checked(tensors: Tensors, shapes: Mapping[str, Sequence[int]], optional: Sequence[str] = ()) -> dict[str, Tensor]:
    """Return the tensors of a file in the given shapes, which may lack axes of size 1 or have more of them.

    Args:
        tensors: the tensors of the file.
        shapes: tensor name -> the shape that the layer needs.
        optional: the names that the file may leave out.

    Raises:
        AdapterError: a tensor is missing or has another shape.
    """
    missing = [name for name in shapes if name not in tensors and name not in optional]
    if missing:
        raise AdapterError(f"{', '.join(missing)} missing, only {', '.join(sorted(tensors))} found")
    found: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        if name not in tensors:
            continue
        tensor = tensors[name]
        if [n for n in tensor.shape if n != 1] != [n for n in shape if n != 1] or 0 in tensor.shape:
            raise AdapterError(f"{name} has shape {shape_of(tensor)}, expected {tuple(shape)}")
        found[name] = tensor if shape_of(tensor) == tuple(shape) else tensor.reshape(tuple(shape))
    return found


def rank_of(tensors: Tensors, name: str, axis: int) -> int:
    """Return the size of a tensor of the file along an axis; 0 if the file has no such tensor or axis."""
    tensor = tensors.get(name)
    return tensor.shape[axis] if tensor is not None and -tensor.ndim <= axis < tensor.ndim else 0


def uniform(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Return uniform numbers within `1 / sqrt(n)`, for n columns: PyTorch's Kaiming initialisation with `a=sqrt(5)`."""
    bound = 1 / math.sqrt(math.prod(shape[1:]))
    return torch.empty(tuple(shape)).uniform_(-bound, bound, generator=generator)


def flat(tensor: Tensor, spec: LayerSpec) -> Tensor:
    """Return rows over the flattened columns of the weight as rows in the shape of the canonical weight."""
    return tensor.view(-1, *spec.weight_shape[1:])


def unified(layers: Mapping[str, Unfinished], names: Sequence[str]) -> dict[str, Tensors]:
    """Return the tensors of every layer, with one object for a tensor that has the same values in several of them."""
    return unified_in(layers, names, dict.fromkeys(layers, ""))


def unified_in(layers: Mapping[str, Unfinished], names: Sequence[str], groups: Mapping[str, str]) -> dict[str, Tensors]:
    """Return what `unified` does, within groups of layers, which are given as path -> name of the group."""
    common: dict[tuple[str, str], list[Tensor]] = {}
    found: dict[str, Tensors] = {}
    for path, layer in layers.items():
        tensors = dict(layer.tensors)
        for name in names:
            own, known = tensors[name], common.setdefault((groups[path], name), [])
            same = next((tensor for tensor in known if tensor is own or _are_equal(tensor, own)), None)
            if same is None:
                known.append(own)
            tensors[name] = own if same is None else same
        found[path] = tensors
    return found


def _are_equal(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype or one.device != other.device:
        return False
    return one.is_meta or torch.equal(one, other)
