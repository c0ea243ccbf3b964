"""Operations on tensors that the formulas of several types are built from."""

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor

FLOAT8: frozenset[torch.dtype] = frozenset(
    getattr(torch, name)
    for name in ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu")
    if hasattr(torch, name)
)


def pick(tensor: Tensor, rows: Sequence[range]) -> Tensor:
    """These rows of a tensor, in this order."""
    parts = [tensor[part.start : part.stop] for part in rows]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def blockwise(vectors: Tensor, blocks: Tensor, axis: int, onto: Tensor | None = None) -> Tensor:
    """`onto` plus a block-diagonal map of one axis: every stretch of b numbers along it, as a row, times its block.

    Args:
        vectors: any shape, with n x b numbers along `axis`.
        blocks: (n, b, b).
        onto: as `vectors`, and often the same tensor.
    """
    if axis % vectors.ndim < vectors.ndim - 1:
        stretches = vectors.unflatten(axis, blocks.shape[:2]).flatten(axis % vectors.ndim + 2)
        product = torch.matmul(blocks.transpose(1, 2), stretches)
        return (product if onto is None else add(product, onto.reshape(product.shape))).reshape(vectors.shape)
    if torch.compiler.is_compiling():
        product = torch.einsum("...nb,nbc->...nc", vectors.unflatten(-1, blocks.shape[:2]), blocks).flatten(-2)
        return product if onto is None else onto + product
    if onto is None or onto is vectors:
        return cast(Tensor, _Blockwise.apply(vectors, blocks, onto is vectors))
    return add(cast(Tensor, _Blockwise.apply(vectors, blocks, False)), onto)


class _Blockwise(torch.autograd.Function):
    """`blockwise` of the last axis: written in place, which the products of PyTorch that differentiate cannot."""

    @staticmethod
    def forward(vectors: Tensor, blocks: Tensor, with_vectors: bool) -> Tensor:
        """The map of the vectors, plus the vectors themselves if asked."""
        result = torch.empty_like(vectors, memory_format=torch.contiguous_format)
        for rows, into in _stretches(blocks, vectors, result):
            if with_vectors:
                into.copy_(rows)
            torch.baddbmm(into, rows, blocks, beta=int(with_vectors), out=into)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Keep the vectors and the blocks."""
        vectors, blocks, ctx.with_vectors = inputs
        ctx.save_for_backward(vectors, blocks)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """The transposed map, and the outer products of every block."""
        (grad,), (vectors, blocks) = grad_outputs, ctx.saved_tensors
        of_vectors = of_blocks = None
        if ctx.needs_input_grad[0]:
            of_vectors = cast(Tensor, _Blockwise.apply(grad, blocks.mT, ctx.with_vectors))
        if ctx.needs_input_grad[1]:
            products = [torch.bmm(rows.mT, columns) for rows, columns in _stretches(blocks, vectors, grad)]
            of_blocks = torch.stack(products).sum(0)
        return of_vectors, of_blocks, None


def _stretches(blocks: Tensor, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The tensors as (n, rows, b), on a CPU in pieces that stay in its cache."""
    stretches = [tensor.reshape(-1, *blocks.shape[:2]).transpose(0, 1) for tensor in tensors]
    rows = 512 if blocks.device.type == "cpu" else max(stretches[0].shape[1], 1)
    return zip(*(stretch.split(rows, 1) for stretch in stretches), strict=True)


def shape_of(tensor: Tensor) -> tuple[int, ...]:
    """Shape as a tuple, which reads better in messages."""
    return tuple(tensor.shape)


def scaled(hidden: Tensor, gate: Tensor) -> Tensor:
    """`hidden * gate` in the dtype of `hidden`, without rounding a float32 `gate` to half precision first."""
    if hidden.dtype in (torch.float32, torch.float64):
        return hidden * gate
    return (hidden.float() * gate).to(hidden.dtype)


def add(product: Tensor, onto: Tensor) -> Tensor:
    """`onto + product` in the dtype of `onto`, rounded once; `product` may be overwritten."""
    if torch.promote_types(product.dtype, onto.dtype) == product.dtype:
        return product.add_(onto).to(onto.dtype)
    return onto + product.to(onto.dtype)


def can_accumulate(onto: Tensor, hidden: Tensor, weight: Tensor) -> bool:
    """Whether a product of the other two may be added to `onto` in place."""
    return (
        not torch.is_grad_enabled()
        and onto.dtype == hidden.dtype == weight.dtype
        and onto.device == hidden.device
        and onto.is_contiguous()
    )
