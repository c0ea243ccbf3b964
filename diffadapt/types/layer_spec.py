"""The geometry of a layer that an adapter can sit on: linear, 1-d to 3-d convolution, embedding, norm or batch norm.

Each adapter type writes its formula once, against `LayerSpec`, for all kinds of layers. Weights are *canonical* here:
they have the shape `(out, in / groups, *kernel)`. Some layers store the transpose (`nn.Embedding`, transformers'
`Conv1D`); only `LayerSpec.to_stored` deals with that.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal, TypeAlias, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffadapt.types.tensor_ops import add, can_accumulate, scaled

LayerKind: TypeAlias = Literal["linear", "conv", "embedding", "norm", "batch_norm", "parameter"]

_CONVOLUTIONS: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """The geometry of one layer, with the operations that formulas are built from.

    Attributes:
        kind: "linear", "conv", "embedding", "norm" (a layer, group or RMS norm with a weight), "batch_norm", or
            "parameter" for a bare parameter of a module.
        out_features: rows of the canonical weight: the output channels, or the embedding dimension.
        in_features: columns of the canonical weight before grouping: the input channels, or the number of embeddings.
        kernel: spatial kernel size of a convolution; empty for other layers.
        stride: stride of a convolution, per kernel dimension.
        padding: padding of a convolution, per kernel dimension, or "same" or "valid".
        dilation: dilation of a convolution, per kernel dimension.
        groups: number of groups of a convolution.
        padding_mode: how a convolution pads its input, as in `nn.Conv2d`.
        transposed: whether the layer stores its weight as `(in, out)`.
        output_scale: constant by which the layer multiplies its own output (scaled word embeddings).
        norm_groups: number of groups of a group norm; 0 for a layer norm, -1 for an RMS norm.
        eps: the constant a norm adds to the variance or mean square.
        experts: number of matrices that a bare parameter has; 0 if it is one matrix.
        inputs_first: whether a bare parameter has the inputs of an expert before its outputs.
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
    experts: int = 0
    inputs_first: bool = False

    @classmethod
    def of(cls, module: nn.Module) -> "LayerSpec | None":
        """Return the geometry of `module`, or `None` if no adapter can sit on it."""
        if isinstance(module, nn.Linear):
            # The sizes come from the attributes, not from the weight, because quantised layers pack their weights.
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
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            size = module.num_features
            return None if module.running_mean is None else cls("batch_norm", size, size, norm_groups=1, eps=module.eps)
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
        """The canonical shape `(out, in / groups, *kernel)`, or `(out,)` for a norm."""
        if self.kind in ("norm", "batch_norm"):
            return (self.out_features,)
        if self.kind == "parameter":
            return (*([self.experts] if self.experts else []), self.out_features, self.in_features)
        return (self.out_features, self.in_features // self.groups, *self.kernel)

    @property
    def has_kernel(self) -> bool:
        """Whether the layer has a kernel larger than one, so that an output depends on several positions."""
        return any(size > 1 for size in self.kernel)

    @property
    def fan_in(self) -> int:
        """The number of columns of the canonical weight, flattened to two dimensions."""
        columns = self.in_features // self.groups
        for size in self.kernel:
            columns *= size
        return columns

    def to_stored(self, weight: Tensor) -> Tensor:
        """Return a canonical weight in the orientation that the layer stores, or a stored one as canonical."""
        return weight.t() if self.transposed else weight

    def op(self, input: Tensor, weight: Tensor) -> Tensor:
        """Return what the layer computes from `input` with the canonical `weight` and without a bias.

        `weight` may have any number of rows, so the `down` factor of a low-rank change can take its place.
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
        """Return `onto + weight @ hidden` at every position, going from rank space to the layer's output.

        Under autograd the sum is accumulated into the product, a temporary tensor that no backward pass needs. Without
        autograd the product is accumulated directly into `onto`, which saves one pass over the output.

        Args:
            hidden: activations in rank space, `(..., rank)`, or `(batch, rank, *space)` for a convolution.
            weight: the factor that leads to the output, `(out, rank / groups)`. It may also be `(out / blocks, rank)`,
                to be applied to every block of `hidden`, which is then `(..., blocks, rank)` or
                `(batch x blocks, rank, *space)`. The output joins the blocks if `onto` is given.
            onto: the tensor to add to, `(..., out)`. It may be overwritten when gradients are disabled. Defaults to
                zero.
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
            # Contiguous, because the product for the weight's gradient is slow on a transposed view.
            product = torch.matmul(hidden, weight.t().contiguous())
        return product if onto is None else add(product, onto.reshape(product.shape)).reshape(onto.shape)

    def op_by_row(self, input: Tensor, weights: Tensor) -> Tensor:
        """Return what a convolution without groups computes from every row of `input` with weights of its own.

        Args:
            input: (rows, in, *space).
            weights: (rows, outputs, in x kernel), with any number of outputs.

        Returns:
            (rows, outputs, *space).
        """
        # The rows become the groups of one convolution.
        grouped = replace(self, groups=len(input), in_features=len(input) * self.in_features)
        kernels = weights.reshape(-1, self.in_features, *self.kernel)
        return grouped.op(input.reshape(1, -1, *input.shape[2:]), kernels).unflatten(1, weights.shape[:2]).squeeze(0)

    def low_rank_by_row(self, input: Tensor, down: Tensor, up: Tensor, gate: Tensor, onto: Tensor) -> Tensor:
        """Return `onto` plus the low-rank change of every row, for a linear layer or a convolution without groups.

        Args:
            input: the input of the layer.
            down: the first factors, `(rows, rank, in x kernel)`.
            up: the second factors, `(rows, rank, out)`.
            gate: one number per row and component of the rank, `(rows, rank)`.
            onto: the tensor to add to. It may be overwritten when gradients are disabled.
        """
        rows = len(input)
        if self.kind == "linear":
            hidden = scaled(torch.bmm(input.reshape(rows, -1, input.shape[-1]), down.mT), gate.unsqueeze(1))
            factors, shape = (hidden, up), (rows, -1, self.out_features)
        else:
            hidden = scaled(self.op_by_row(input, down).flatten(2), gate.unsqueeze(2))
            factors, shape = (up.mT, hidden), (rows, self.out_features, -1)
        if can_accumulate(onto, hidden, up):
            onto.view(shape).baddbmm_(*factors)
            return onto
        return add(torch.bmm(*factors), onto.reshape(shape)).reshape(onto.shape)

    def low_rank(self, input: Tensor, down: Tensor, up: Tensor, gate: Tensor, onto: Tensor | None = None) -> Tensor:
        """Return `onto + gate * op(input, product(down, up))` without computing the product.

        The gate is applied in rank space, where that is cheapest.

        Args:
            input: the input of the layer.
            down: the first factor, `(rank, in / groups, *kernel)`.
            up: the second factor, `(out, rank)`, or `(out, rank / groups)` if every group has its own rows of `down`.
            gate: one number (0-d), one per component of the rank `(rank,)`, one per row of the input and component
                `(rows, rank)`, or one per position, in a shape that broadcasts over the activations in rank space.
            onto: see `expand`.
        """
        hidden = self.op(input, self._per_group(down, up))
        gate = gate if gate.ndim in (0, hidden.ndim) else self.along_channels(gate, hidden.ndim)
        return self.expand(scaled(hidden, gate), up, onto)

    def dense(self, input: Tensor, weight: Tensor, gate: Tensor, onto: Tensor | None = None) -> Tensor:
        """Return `onto + gate * op(input, weight)`, for a change that is cheapest as one matrix.

        Args:
            input: the input of the layer.
            weight: the change of the weight, in the canonical shape.
            gate: a 0-d tensor.
            onto: a tensor in the shape of the output. It is not overwritten. Defaults to zero.
        """
        product = scaled(self.op(input, weight), gate)
        return product if onto is None else add(product, onto)

    def product(self, down: Tensor, up: Tensor) -> Tensor:
        """Return `up @ down`, group by group, in the canonical weight shape. See `low_rank` for the shapes."""
        down = self._per_group(down, up)
        blocks = torch.bmm(
            up.reshape(self.groups, self.out_features // self.groups, -1),
            down.reshape(self.groups, down.shape[0] // self.groups, -1),
        )
        return blocks.reshape(self.weight_shape)

    @property
    def channel_axis(self) -> int:
        """The axis of the channels in the layer's input and output, counted from the end."""
        return -1 - len(self.kernel)

    def along_channels(self, values: Tensor, dimensions: int = 0) -> Tensor:
        """Return one value per channel, reshaped to broadcast over the layer's input or output.

        The channels of a group norm are on the second axis, those of other norms on the last.

        Args:
            values: the values, `(channels,)`, or `(rows, channels)` if every row of the input has its own.
            dimensions: number of dimensions of the layer's input or output; needed only for a norm and for values per
                row.
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
        values = input.float() if input.dtype in (torch.float16, torch.bfloat16) else input
        return (values * torch.rsqrt(values.pow(2).mean(-1, keepdim=True) + self.eps)).to(input.dtype) * weight

    def _per_group(self, down: Tensor, up: Tensor) -> Tensor:
        """Repeat `down` for every group if the groups share it."""
        if self.groups == 1 or up.shape[1] != down.shape[0]:
            return down
        return down.repeat(self.groups, *(1,) * (down.ndim - 1))

    def _pad_widths(self) -> list[int]:
        """Return the widths for `F.pad`, last dimension first, for padding modes that `F.conv2d` does not support."""
        widths: list[int] = []
        for axis in reversed(range(len(self.kernel))):
            if self.padding == "same":
                total = self.dilation[axis] * (self.kernel[axis] - 1)
                widths += [total // 2, total - total // 2]
            else:
                side = 0 if self.padding == "valid" else int(self.padding[axis])
                widths += [side, side]
        return widths


def plain_spec(out: int, columns: int, kernel: tuple[int, ...] = ()) -> LayerSpec:
    """Return the spec of a linear layer, or of an unpadded convolution with stride 1 if a kernel is given."""
    ones = (1,) * len(kernel)
    return LayerSpec("conv" if kernel else "linear", out, columns, kernel, ones, (0,) * len(kernel), ones)


@lru_cache
def _linear(out_features: int, in_features: int) -> LayerSpec:
    """Return one shared spec for all linear layers of a size: a model has hundreds, and creating a spec is slow."""
    return LayerSpec("linear", out_features, in_features)


def _is_transposed_linear(module: nn.Module) -> bool:
    """Return whether this is transformers' `Conv1D`, judged by its attributes so as not to import transformers."""
    weight = getattr(module, "weight", None)
    return hasattr(module, "nf") and isinstance(weight, Tensor) and weight.ndim == 2


def _norm(module: nn.Module) -> tuple[int, int, float] | None:
    """Return the size, groups and eps of a norm with a weight vector; `None` for other modules.

    RMS norms are recognised by their class name, since every library defines its own.
    """
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
    """Return the factor by which scaled word embeddings (Gemma, T5Gemma, ...) multiply their own output."""
    scale = getattr(module, "scalar_embed_scale", None)
    if scale is None:
        scale = getattr(module, "embed_scale", 1.0)
    return float(scale)
