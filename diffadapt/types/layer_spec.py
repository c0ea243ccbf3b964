"""Geometry of the layers an adapter can sit on: Linear, Conv1d-3d, Embedding, norms.

A type's formula is written once against `LayerSpec`, whatever the layer. Weights here are *canonical*:
`(out, in / groups, *kernel)`. Layers that store the transpose (`nn.Embedding`, transformers' `Conv1D`) are
canonical too, and only `to_stored` knows the difference.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, TypeAlias, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffadapt.types.tensor_ops import add, can_accumulate, scaled

LayerKind: TypeAlias = Literal["linear", "conv", "embedding", "norm"]

_CONVOLUTIONS: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """What a formula needs to know of one layer, and the two operations formulas are built from.

    Attributes:
        kind: "linear", "conv", "embedding" or "norm" (layer, group or RMS norm with a weight).
        out_features: rows of the canonical weight (output channels; embedding dimension).
        in_features: columns of the canonical weight before grouping (input channels; number of embeddings).
        kernel: spatial kernel of a convolution, empty otherwise.
        transposed: the layer stores its weight as `(in, out)`.
        output_scale: constant the layer multiplies its own output with (scaled word embeddings).
        norm_groups: of a group norm; 0 for a layer norm, -1 for an RMS norm.
        eps: of a norm.
    """

    kind: LayerKind
    out_features: int
    in_features: int
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] | str = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    padding_mode: str = "zeros"
    transposed: bool = False
    output_scale: float = 1.0
    norm_groups: int = 0
    eps: float = 0.0

    @classmethod
    def of(cls, module: nn.Module) -> "LayerSpec | None":
        """The geometry of `module`, or `None` if no adapter can sit on it."""
        if isinstance(module, nn.Linear):
            # Sizes come from the attributes and not from the weight, which quantised layers pack.
            return _linear(module.out_features, module.in_features)
        if isinstance(module, nn.Embedding):
            return cls(
                "embedding",
                module.embedding_dim,
                module.num_embeddings,
                transposed=True,
                output_scale=_embedding_scale(module),
            )
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            return cls(
                "conv",
                module.out_channels,
                module.in_channels,
                tuple(module.kernel_size),
                tuple(module.stride),
                module.padding if isinstance(module.padding, str) else tuple(module.padding),
                tuple(module.dilation),
                module.groups,
                module.padding_mode,
            )
        norm = _norm(module)
        if norm is not None:
            size, groups, eps = norm
            return cls("norm", size, size, norm_groups=groups, eps=eps)
        if _is_transposed_linear(module):
            rows, columns = cast(Tensor, module.weight).shape
            return cls("linear", int(columns), int(rows), transposed=True)
        features: Any = (getattr(module, "out_features", None), getattr(module, "in_features", None))
        if all(type(n) is int for n in features) and _is_leaf(module):
            return _linear(*features)
        return None

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Canonical `(out, in / groups, *kernel)`; `(out,)` for a norm."""
        if self.kind == "norm":
            return (self.out_features,)
        return (self.out_features, self.in_features // self.groups, *self.kernel)

    @property
    def has_kernel(self) -> bool:
        """Whether the layer sees more than one position at once."""
        return any(size > 1 for size in self.kernel)

    @property
    def fan_in(self) -> int:
        """Columns of the canonical weight flattened to two dimensions."""
        columns = self.in_features // self.groups
        for size in self.kernel:
            columns *= size
        return columns

    def to_stored(self, weight: Tensor) -> Tensor:
        """A canonical weight in the orientation the layer stores."""
        return weight.t() if self.transposed else weight

    def op(self, input: Tensor, weight: Tensor) -> Tensor:
        """What the layer computes from `input`, with a canonical `weight` and without bias.

        `weight` may have any number of rows: a rank-sized factor is applied just like the layer's own weight.
        """
        if self.kind == "linear":
            return F.linear(input, weight)
        if self.kind == "embedding":
            output = F.embedding(input, weight.t())
            return output if self.output_scale == 1.0 else output * self.output_scale
        if self.kind == "norm":
            return self._normalised(input, weight)
        padding: Any = self.padding
        if self.padding_mode != "zeros":
            input = F.pad(input, self._pad_widths(), mode=self.padding_mode)
            padding = 0
        convolve = _CONVOLUTIONS[len(self.kernel)]
        return convolve(input, weight, None, self.stride, padding, self.dilation, self.groups)

    def expand(self, hidden: Tensor, weight: Tensor, onto: Tensor | None = None) -> Tensor:
        """`onto + weight @ hidden` at every position: from rank space to the layer's output.

        Args:
            hidden: `(..., rank)`, or `(batch, rank, *space)` for a convolution.
            weight: `(out, rank / groups)`, or `(out / blocks, rank)`: then `hidden` is `(..., blocks, rank)`, or
                `(batch x blocks, rank, *space)`, and blocks are joined where there is an `onto`.
            onto: `(..., out)`; it may be overwritten when gradients are disabled.

        Under autograd the sum is accumulated into the product, which is ours and which no backward needs;
        without it the product is accumulated straight into `onto`, which saves one pass over the output.
        """
        convolves = self.kind == "conv"
        if onto is not None and can_accumulate(onto, hidden, weight) and self.groups == 1:
            if convolves:
                columns = hidden.reshape(-1, weight.shape[1], math.prod(hidden.shape[-len(self.kernel) :]))
                onto.view(-1, weight.shape[0], columns.shape[2]).baddbmm_(weight.expand(len(columns), -1, -1), columns)
            else:
                onto.view(-1, weight.shape[0]).addmm_(hidden.reshape(-1, hidden.shape[-1]), weight.t())
            return onto
        if convolves:
            pointwise = weight.view(*weight.shape, *(1,) * len(self.kernel))
            product = _CONVOLUTIONS[len(self.kernel)](hidden, pointwise, groups=self.groups)
        else:
            # Contiguous, as the product for the weight's gradient is slow the other way round.
            product = torch.matmul(hidden, weight.t().contiguous())
        return product if onto is None else add(product, onto.reshape(product.shape)).reshape(onto.shape)

    def low_rank(self, input: Tensor, down: Tensor, up: Tensor, gate: Tensor, onto: Tensor | None = None) -> Tensor:
        """`onto + gate * op(input, product(down, up))` without building the product.

        The gate is applied in rank space, where that is cheapest.

        Args:
            down: `(rank, in / groups, *kernel)`.
            up: `(out, rank)`, or `(out, rank / groups)` if every group has its own part of `down`.
            gate: 0-d, or one number per rank, or (samples, rank) for as many samples as `input` has.
            onto: see `expand`.
        """
        hidden = self.op(input, self._per_group(down, up))
        gate = gate if gate.ndim == 0 else self.along_channels(gate, hidden.ndim)
        return self.expand(scaled(hidden, gate), up, onto)

    def dense(self, input: Tensor, weight: Tensor, gate: Tensor, onto: Tensor | None = None) -> Tensor:
        """`onto + gate * op(input, weight)`, for changes that are cheapest as a whole; arguments as for `low_rank`."""
        product = scaled(self.op(input, weight), gate)
        return product if onto is None else add(product, onto)

    def product(self, down: Tensor, up: Tensor) -> Tensor:
        """`up @ down`, group by group, in the canonical weight shape; arguments as for `low_rank`."""
        down = self._per_group(down, up)
        blocks = torch.bmm(
            up.reshape(self.groups, self.out_features // self.groups, -1),
            down.reshape(self.groups, down.shape[0] // self.groups, -1),
        )
        return blocks.reshape(self.weight_shape)

    @property
    def channel_axis(self) -> int:
        """Axis of the channels in what the layer takes and gives, counted from the end."""
        return -1 - len(self.kernel)

    def along_channels(self, values: Tensor, dimensions: int = 0) -> Tensor:
        """One value per channel, so that it broadcasts over what the layer takes or gives.

        Args:
            values: (channels,), or (samples, channels).
            dimensions: of what the layer takes or gives, which has to be known for a norm and for samples. Channels are
                the second of those that a group norm gives, and the last one that other norms give.
        """
        after = (1,) * (dimensions - 2 if self.norm_groups > 0 else len(self.kernel))
        if values.ndim == 1:
            return values.view(-1, *after)
        samples, channels = values.shape
        return values.view(samples, *(1,) * (dimensions - 2 - len(after)), channels, *after)

    def _normalised(self, input: Tensor, weight: Tensor) -> Tensor:
        if self.norm_groups > 0:
            return F.group_norm(input, self.norm_groups, weight, None, self.eps)
        if self.norm_groups == 0:
            return F.layer_norm(input, (self.out_features,), weight, None, self.eps)
        wide = input.float() if input.dtype in (torch.float16, torch.bfloat16) else input
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).to(input.dtype) * weight

    def _per_group(self, down: Tensor, up: Tensor) -> Tensor:
        if self.groups == 1 or up.shape[1] != down.shape[0]:
            return down
        return down.repeat(self.groups, *(1,) * (down.ndim - 1))

    def _pad_widths(self) -> list[int]:
        """`F.pad` widths, last dimension first, for padding modes that convolutions do not take themselves."""
        widths: list[int] = []
        for axis in reversed(range(len(self.kernel))):
            if self.padding == "same":
                total = self.dilation[axis] * (self.kernel[axis] - 1)
                widths += [total // 2, total - total // 2]
            else:
                side = 0 if self.padding == "valid" else int(self.padding[axis])
                widths += [side, side]
        return widths


def layer_of(out: int, columns: int, kernel: tuple[int, ...] = ()) -> LayerSpec:
    """The plainest layer of this shape: linear, or a convolution with stride 1 where there is a kernel."""
    ones = (1,) * len(kernel)
    return LayerSpec("conv" if kernel else "linear", out, columns, kernel, ones, (0,) * len(kernel), ones)


@lru_cache
def _linear(out_features: int, in_features: int) -> LayerSpec:
    """One object for all layers of a size: a model has hundreds, and making one is slow."""
    return LayerSpec("linear", out_features, in_features)


def _is_transposed_linear(module: nn.Module) -> bool:
    """transformers' `Conv1D`, told by its attributes so that transformers need not be imported."""
    weight = getattr(module, "weight", None)
    return hasattr(module, "nf") and isinstance(weight, Tensor) and weight.ndim == 2


def _norm(module: nn.Module) -> tuple[int, int, float] | None:
    """Size, groups and eps of a norm with a weight vector; RMS norms go by name: every library has its own."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 1:
        return None
    if isinstance(module, nn.GroupNorm):
        return weight.numel(), module.num_groups, module.eps
    if isinstance(module, nn.LayerNorm):
        return weight.numel(), 0, module.eps
    name = type(module).__name__
    if name.endswith("RMSNorm") or name == "T5LayerNorm":
        eps = getattr(module, "eps", getattr(module, "variance_epsilon", None))
        return weight.numel(), -1, torch.finfo(torch.float32).eps if eps is None else float(eps)
    return None


def _is_leaf(module: nn.Module) -> bool:
    return next(module.children(), None) is None


def _embedding_scale(module: nn.Module) -> float:
    """Factor that scaled word embeddings (Gemma, T5Gemma, ...) put on their own output."""
    scale = getattr(module, "scalar_embed_scale", None)
    if scale is None:
        scale = getattr(module, "embed_scale", 1.0)
    return float(scale)
