"""The content of one layer of a file: the tensors as stored (`Group`), and fitted to the layer (`Content`)."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from diffadapt.errors import AdapterError, Fault
from diffadapt.families.fused_parts import FusedPart
from diffadapt.types import TYPES, named
from diffadapt.types.adapter_type import AdapterType, Surroundings, Tensors
from diffadapt.types.layer_spec import LayerSpec
from diffadapt.types.layer_state import scale_of
from diffadapt.types.tensor_ops import narrowed

AlphaSource: TypeAlias = Literal["tensor", "header", "none"]


@dataclass(eq=False)
class Group:
    """The tensors that a file contains for one layer.

    Attributes:
        component, path, written, parts: the layer; see `Place`.
        keys: canonical tensor name -> the tensor's key in the file.
        tensors: canonical tensor name -> the tensor.
    """

    component: str
    path: str
    written: str
    parts: tuple[FusedPart, ...] = ()
    keys: dict[str, str] = field(default_factory=dict[str, str])
    tensors: dict[str, Tensor] = field(default_factory=dict[str, Tensor])

    @property
    def values(self) -> Iterator[tuple[str, Tensor]]:
        """The key and the tensor of everything but alpha, which may be infinite where it has no effect."""
        return (
            (key, self.tensors[name]) for name, key in self.keys.items() if name in self.tensors and name != "alpha"
        )

    def faults(self, error: AdapterError) -> list[Fault]:
        """Return one fault for each of the tensors, with the layer and the error as the reason."""
        return [Fault(key, f"{self.component}.{self.path}: {error}") for key in self.keys.values()]


@dataclass(eq=False)
class Content:
    """What a file contains for one of its layers, checked against the layer by shapes and dtypes.

    Attributes:
        component, path, parts: the layer; see `Place`.
        spec: the geometry of the layer as the file has it: with the outputs of all `parts`.
        tensors: the tensors of the adapter type, fitted to `spec`.
        alpha: the alpha, or `None` if the file gives none or it is one of the settings.
        settings: see `AdapterType.settings`.
        alpha_from: where the alpha comes from: a "tensor" of the file or its "header"; "none" if the scale is 1 because
            neither has one.
        bias: what the tensor `bias_name(adapter_type)` is, unless it is what the type defines, a change that the scale
            applies to: a "change" that no scale applies to, or the "new" bias. `with_bias` converts it.
        start: what was taken out of the weight before training, for tensors that are not the change: "pissa" or
            "olora"; `loading.starts.without_start` converts them.
        rest: a sparse change of the weight that is added at the same scale: its positions in the matrix (out, fan_in),
            of shape (2, count), and its values, of shape (count,). `with_rest` adds it.
    """

    component: str
    path: str
    parts: tuple[FusedPart, ...]
    adapter_type: AdapterType
    spec: LayerSpec
    tensors: Tensors
    alpha: float | None
    settings: Mapping[str, float]
    alpha_from: AlphaSource = "none"
    bias: Literal["change", "new"] | None = None
    rest: tuple[Tensor, Tensor] | None = None
    start: str | None = None

    @property
    def paths(self) -> tuple[str, ...]:
        """The paths of the model's layers that the file's layer consists of."""
        return tuple(part.path for part in self.parts) if self.parts else (self.path,)

    @property
    def scale(self) -> float:
        """`alpha / rank`; see `scale_of`."""
        return scale_of(self.alpha, self.adapter_type.rank(self.tensors), self.settings)

    @cached_property
    def plain(self) -> "Content | None":
        """The same change with its additive part as a LoRA or, if that saves nothing, as a matrix; in float32 or wider.

        `None` if the type has no additive part or can do without.
        """
        if self.adapter_type.additive is not None:
            return self._plain_inside
        adapter_type, spec = self.adapter_type, self.spec
        if adapter_type.stages(self._promoted, spec) != ("add",):
            return None
        tensors = self._prepared
        bias = adapter_type.delta_bias(tensors)
        factors = adapter_type.as_low_rank(tensors, spec) if spec.groups == 1 else None
        if factors is None:
            return self.with_rest(torch.zeros(()))
        lora = {"lora_down": factors[0], "lora_up": factors[1], **({} if bias is None else {"lora_bias": bias})}
        return replace(
            self, adapter_type=named("lora"), tensors=lora, alpha=self.scale * factors[0].shape[0], settings={}
        )

    @property
    def _plain_inside(self) -> "Content":
        """The same content of a type that extends an additive one, whose change becomes a plain one."""
        inner = self.adapter_type.additive
        assert inner is not None
        further = {name: tensor for name, tensor in self.tensors.items() if name not in inner.tensors}
        change = {name: tensor for name, tensor in self.tensors.items() if name in inner.tensors}
        plain = replace(self, adapter_type=inner, tensors=change).plain
        assert plain is not None
        tensors = plain.tensors
        if plain.adapter_type.name == "full":
            # A matrix is the Kronecker product of the number 1 and itself, and no scale applies to whole factors.
            matrix = self.spec.to_stored(tensors["diff"])
            plain = replace(plain, adapter_type=named("lokr"))
            tensors = {"lokr_w1": matrix.new_ones(1, 1), "lokr_w2": matrix}
        outer = next(outer for outer in TYPES if outer.additive is plain.adapter_type)
        return replace(plain, adapter_type=outer, tensors={**tensors, **further})

    def with_rest(self, rest: Tensor) -> "Content":
        """Return the additive change plus `rest`, a canonical change at the same scale, as one matrix."""
        adapter_type, spec, scale, tensors = self.adapter_type, self.spec, self.scale, self._prepared
        bias = adapter_type.delta_bias(tensors)
        full = {"diff": spec.to_stored((adapter_type.delta_weight(tensors, spec) + rest) * scale)}
        if bias is not None:
            full["diff_b"] = bias * scale
        return replace(self, adapter_type=named("full"), tensors=full, alpha=None, settings={}, rest=None)

    def with_bias(self, own: Tensor | None) -> "Content":
        """Return the content with the tensor described by `bias` converted to a change that the scale applies to.

        Args:
            own: the model's bias if the tensor is a new bias, `None` if it is a change.
        """
        name = bias_name(self.adapter_type)
        given = self.tensors[name]
        change = given if own is None else given.to(own) - own
        if self.scale != 1:
            change = change.double().div(self.scale).to(change.dtype)
        return replace(self, tensors={**self.tensors, name: change}, bias=None)

    @property
    def _prepared(self) -> Tensors:
        """What the functions of the adapter type take; see `AdapterType.prepare`.

        Raises:
            AdapterError: it depends on the weights of all layers of the model that this one consists of.
        """
        adapter_type = self.adapter_type
        if not adapter_type.is_prepared:
            return self._promoted

        def weight() -> Tensor:
            raise AdapterError(f"its {adapter_type.name} depends on the weights of several layers of the model")

        settings = {**adapter_type.settings, **self.settings}
        return adapter_type.prepare(self._promoted, self.spec, Surroundings(settings, self.scale, weight))

    @property
    def _promoted(self) -> Tensors:
        # `torch.promote_types` refuses float8.
        return {
            n: t.float() if t.is_floating_point() and t.dtype != torch.float64 else t for n, t in self.tensors.items()
        }


def part_of(content: Content, rows: Sequence[range]) -> Content:
    """Return the content for some rows of the layer's weight.

    A change whose tensors cannot be cut becomes a plain one (`Content.plain`), if it is additive.

    Raises:
        AdapterError: the content is not additive, and what it does to these rows depends on others.
    """
    adapter_type, tensors, spec = content.adapter_type, content.tensors, content.spec
    if sum(map(len, rows)) < spec.out_features:
        tensors, settings = adapter_type.unlimited(tensors, spec, content.settings)
        content = replace(content, tensors=tensors, settings=settings)
    cut = adapter_type.rows(tensors, spec, rows)
    if cut is None and content.plain is not None:
        return part_of(content.plain, rows)
    if cut is None:
        raise AdapterError(f"its {adapter_type.name} joins outputs that are in different layers of the model")
    alpha, rank, part_rank = content.alpha, adapter_type.rank(tensors), adapter_type.rank(cut)
    if alpha is not None and rank and part_rank:
        # A part may need fewer ranks than the whole; the scale stays the same.
        alpha = alpha * part_rank / rank
    # A tensor that the parts share becomes a parameter of each.
    own = {name: tensor.clone() if tensor is tensors.get(name) else tensor for name, tensor in cut.items()}
    return replace(content, tensors=own, alpha=alpha)


def rounded(content: Content, dtypes: set[torch.dtype]) -> Content:
    """Return the content with tensors that were computed in a wider dtype rounded to the dtype of the file.

    A tensor that would lose more than rounding does keeps its dtype. So do all tensors if the file's `dtypes` differ.
    """
    if len(dtypes) != 1:
        return content
    (dtype,) = dtypes
    return replace(content, tensors={name: narrowed(tensor, dtype) for name, tensor in content.tensors.items()})


def bias_name(adapter_type: AdapterType) -> str:
    """Return the name of the tensor that changes the bias, for types that have one."""
    return "lora_bias" if "lora_bias" in adapter_type.tensors else "diff_b"
