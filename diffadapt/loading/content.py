"""What a file says of one of its layers: its tensors by name, and the same checked against the layer of the model."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from diffadapt.errors import AdapterError
from diffadapt.families.fused_parts import FusedPart
from diffadapt.types import named
from diffadapt.types.adapter_type import AdapterType, Tensors
from diffadapt.types.layer_spec import LayerSpec
from diffadapt.types.layer_state import scale_of


@dataclass
class Group:
    """The tensors that a file has for one layer, by canonical name, and the keys they came under.

    Attributes:
        written: the layer's path as the file has it.
        pieces: see `Place.pieces`.
    """

    written: str
    parts: tuple[FusedPart, ...] = ()
    keys: dict[str, str] = field(default_factory=dict[str, str])
    tensors: dict[str, Tensor] = field(default_factory=dict[str, Tensor])

    @property
    def values(self) -> Iterator[tuple[str, Tensor]]:
        """Key and tensor for all but alpha."""
        return ((self.keys[name], tensor) for name, tensor in self.tensors.items() if name != "alpha")


@dataclass(frozen=True)
class Content:
    """What a file says of one of its layers, checked by shapes and dtypes.

    Attributes:
        path: of the layer.
        pieces: see `Place.pieces`.
        spec: the geometry that the tensors have the shapes for.
        bias: what the file has in the place of the type's own change of the bias: a change that no alpha scales, or a
            new bias. It is among the tensors already, as it is.
        rest: places (2, count) in the flat weight and values (count) of a sparse change to be added, at the same scale.
    """

    path: str
    parts: tuple[FusedPart, ...]
    adapter_type: AdapterType
    spec: LayerSpec
    tensors: Tensors
    alpha: float | None
    settings: Mapping[str, float]
    bias: Literal["change", "new"] | None = None
    rest: tuple[Tensor, Tensor] | None = None

    @property
    def paths(self) -> tuple[str, ...]:
        """Of the model's layers that it is for."""
        return tuple(part.path for part in self.parts) or (self.path,)

    @cached_property
    def plain(self) -> "Content":
        """The same additive change as a LoRA or, where that is no saving, as the matrix; in float32 or wider."""
        adapter_type, layer, wide = self.adapter_type, self.spec, self._wide
        bias = adapter_type.delta_bias(wide)
        factors = adapter_type.as_low_rank(wide, layer) if layer.groups == 1 else None
        if factors is None:
            return self.with_rest(torch.zeros(()))
        lora = {"lora_down": factors[0], "lora_up": factors[1], **({} if bias is None else {"lora_bias": bias})}
        return replace(
            self, adapter_type=named("lora"), tensors=lora, alpha=self.scale * factors[0].shape[0], settings={}
        )

    def with_rest(self, rest: Tensor) -> "Content":
        """The same additive change plus another, canonical one at the same scale, as the matrix."""
        adapter_type, layer, scale, wide = self.adapter_type, self.spec, self.scale, self._wide
        bias = adapter_type.delta_bias(wide)
        full = {"diff": layer.to_stored((adapter_type.delta_weight(wide, layer) + rest) * scale)}
        if bias is not None:
            full["diff_b"] = bias * scale
        return replace(self, adapter_type=named("full"), tensors=full, alpha=None, settings={}, rest=None)

    def with_bias(self, own: Tensor | None) -> "Content":
        """With the type's own change of the bias, which is scaled like its factors.

        Args:
            own: the model's bias, if the tensor is a new one.
        """
        name = bias_name(self.adapter_type)
        given = self.tensors[name]
        change = given if own is None else given.to(own) - own
        if self.scale != 1:
            change = change.double().div(self.scale).to(change.dtype)
        return replace(self, tensors={**self.tensors, name: change}, bias=None)

    @property
    def scale(self) -> float:
        """`alpha / rank`; see `scale_of`."""
        return scale_of(self.alpha, self.adapter_type.rank(self.tensors), self.settings)

    @property
    def _wide(self) -> Tensors:
        return {name: t if t.dtype == torch.float64 else t.float() for name, t in self.tensors.items()}


def part_of(content: Content, rows: Sequence[range]) -> Content:
    """What belongs to some rows of the layer; as a plain change of them where the tensors cannot be taken apart."""
    adapter_type, tensors, layer = content.adapter_type, content.tensors, content.spec
    stages = adapter_type.stages(tensors, layer)
    limit = content.settings.get(adapter_type.alpha_is or "", 0.0)
    if limit > 0 and "output" in stages and sum(map(len, rows)) < layer.out_features:
        raise AdapterError(
            f"its {adapter_type.alpha_is} is over all outputs, which are in different layers of the model"
        )
    cut = adapter_type.rows(tensors, layer, rows)
    if cut is None and stages == ("add",):
        return part_of(content.plain, rows)
    if cut is None:
        raise AdapterError(f"its {adapter_type.name} joins outputs that are in different layers of the model")
    rank, was = adapter_type.rank(cut), adapter_type.rank(tensors)
    alpha = content.alpha
    if alpha is not None and rank and was:
        # A part may do with fewer ranks than the whole, at the same scale.
        alpha = alpha * rank / was
    # What the parts have in common becomes a parameter of each.
    own = {name: tensor.clone() if tensor is tensors.get(name) else tensor for name, tensor in cut.items()}
    return replace(content, tensors=own, alpha=alpha)


def narrowed(part: Content, dtypes: set[torch.dtype]) -> Content:
    """What had to be computed in a wider dtype, in the one of the file; not where more than rounding would be lost."""
    if len(dtypes) != 1:
        return part
    (dtype,) = dtypes
    tensors: dict[str, Tensor] = {}
    for name, wide in part.tensors.items():
        if wide.dtype == dtype:
            tensors[name] = wide
            continue
        narrow = wide.to(dtype)
        # Below the smallest normal number rounding is no longer relative: products of small numbers become zero.
        lost = torch.linalg.vector_norm(narrow.to(wide.dtype) - wide)
        tensors[name] = narrow if lost <= torch.finfo(dtype).eps * torch.linalg.vector_norm(wide) else wide
    return replace(part, tensors=tensors)


def bias_name(adapter_type: AdapterType) -> str:
    """The name of the change of a bias, for types that have one."""
    return "lora_bias" if "lora_bias" in adapter_type.tensors else "diff_b"
