"""Tensor operations shared by the formulas of several adapter types."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

FLOAT8: frozenset[torch.dtype] = frozenset(
    getattr(torch, name)
    for name in ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu")
    if hasattr(torch, name)
)
"""The float8 dtypes of the installed PyTorch version."""


def shape_of(tensor: Tensor) -> tuple[int, ...]:
    """Return the shape as a plain tuple, which is easier to read in error messages than `torch.Size`."""
    return tuple(tensor.shape)


def promoted(tensor: Tensor) -> Tensor:
    """Return the tensor in float32, or unchanged if its dtype is wider."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def converted(tensor: Tensor, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Tensor:
    """Return the tensor in `dtype` and on `device`; integers, which are positions, keep their dtype."""
    return tensor.to(device, dtype if tensor.is_floating_point() else None)


def narrowed(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the tensor in `dtype`, or unchanged if that would lose more than rounding does.

    Below the smallest normal number, rounding errors are no longer relative: products of small numbers vanish.
    """
    if tensor.dtype == dtype or not tensor.is_floating_point():
        return tensor
    result = tensor.to(dtype)
    lost = torch.linalg.vector_norm(result.to(tensor.dtype) - tensor)
    return result if lost <= torch.finfo(dtype).eps * torch.linalg.vector_norm(tensor) else tensor


def take_rows(tensor: Tensor, rows: Sequence[range]) -> Tensor:
    """Return the given rows of a tensor, in the given order. The result may be a view of the tensor."""
    slices = [tensor[part.start : part.stop] for part in rows]
    return slices[0] if len(slices) == 1 else torch.cat(slices)


def scaled(hidden: Tensor, gate: Tensor) -> Tensor:
    """Return `hidden * gate` in the dtype of `hidden`, without first rounding a float32 `gate` to half precision."""
    if hidden.dtype in (torch.float32, torch.float64):
        return hidden * gate
    return (hidden.float() * gate).to(hidden.dtype)


def add(product: Tensor, onto: Tensor) -> Tensor:
    """Return `onto + product` in the dtype of `onto`, rounded once. May overwrite `product`."""
    if torch.promote_types(product.dtype, onto.dtype) == product.dtype:
        return product.add_(onto).to(onto.dtype)
    return onto + product.to(onto.dtype)


def can_accumulate(onto: Tensor, hidden: Tensor, weight: Tensor) -> bool:
    """Return whether a product of `hidden` and `weight` may be added to `onto` in place."""
    return (
        not torch.is_grad_enabled()
        and onto.dtype == hidden.dtype == weight.dtype
        and onto.device == hidden.device
        and onto.is_contiguous()
    )


def along(vectors: Tensor, matrix: Tensor, axis: int) -> Tensor:
    """Return the product of `matrix` and every vector along an axis of `vectors`."""
    axis %= vectors.ndim
    if axis == vectors.ndim - 1:
        return F.linear(vectors, matrix)
    columns = torch.matmul(matrix, vectors.flatten(axis + 1))
    return columns.unflatten(-1, vectors.shape[axis + 1 :])


def apply_blocks(vectors: Tensor, blocks: Tensor, axis: int, onto: Tensor | None = None) -> Tensor:
    """Multiply one axis of `vectors` by a block-diagonal matrix.

    Each run of b consecutive elements along `axis`, taken as a row vector, is multiplied by its own block.

    Args:
        vectors: a tensor of any shape with n x b elements along `axis`.
        blocks: the diagonal blocks, of shape (n, b, b).
        axis: the axis to map; it may be negative.
        onto: a tensor in the shape of `vectors` to add the product to, often `vectors` itself. Defaults to zero.

    Returns:
        A new tensor in the shape of `vectors`.
    """
    if axis % vectors.ndim < vectors.ndim - 1:
        columns = vectors.unflatten(axis, blocks.shape[:2]).flatten(axis % vectors.ndim + 2)
        product = torch.matmul(blocks.transpose(1, 2), columns)
        return (product if onto is None else add(product, onto.reshape(product.shape))).reshape(vectors.shape)
    if torch.compiler.is_compiling():
        product = torch.einsum("...nb,nbc->...nc", vectors.unflatten(-1, blocks.shape[:2]), blocks).flatten(-2)
        return product if onto is None else onto + product
    if onto is None or onto is vectors:
        return cast(Tensor, _ApplyBlocks.apply(vectors, blocks, onto is vectors))
    return add(cast(Tensor, _ApplyBlocks.apply(vectors, blocks, False)), onto)


class _ApplyBlocks(torch.autograd.Function):
    """`apply_blocks` on the last axis.

    It writes the products in place. PyTorch's own differentiable products cannot do that.
    """

    @staticmethod
    def forward(vectors: Tensor, blocks: Tensor, add_vectors: bool) -> Tensor:
        """Return the mapped vectors, plus the vectors themselves if `add_vectors` is true."""
        result = torch.empty_like(vectors, memory_format=torch.contiguous_format)
        for rows, result_rows in _row_chunks(blocks, vectors, result):
            if add_vectors:
                result_rows.copy_(rows)
            torch.baddbmm(result_rows, rows, blocks, beta=int(add_vectors), out=result_rows)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Save the vectors and the blocks for `backward`."""
        vectors, blocks, ctx.add_vectors = inputs
        ctx.save_for_backward(vectors, blocks)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """Return the gradients of the vectors (through the transposed blocks) and of the blocks (outer products)."""
        (grad,), (vectors, blocks) = grad_outputs, ctx.saved_tensors
        vectors_grad = blocks_grad = None
        if ctx.needs_input_grad[0]:
            vectors_grad = cast(Tensor, _ApplyBlocks.apply(grad, blocks.mT, ctx.add_vectors))
        if ctx.needs_input_grad[1]:
            products = [torch.bmm(rows.mT, grad_rows) for rows, grad_rows in _row_chunks(blocks, vectors, grad)]
            blocks_grad = torch.stack(products).sum(0)
        return vectors_grad, blocks_grad, None


def _row_chunks(blocks: Tensor, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield the tensors in the shape (n, rows, b); on a CPU, in chunks of rows that fit its cache."""
    by_block = [tensor.reshape(-1, *blocks.shape[:2]).transpose(0, 1) for tensor in tensors]
    rows = 512 if blocks.device.type == "cpu" else max(by_block[0].shape[1], 1)
    return zip(*(tensor.split(rows, 1) for tensor in by_block), strict=True)


def recomputed(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """Return `function(*inputs)`, of which the backward pass keeps the inputs alone and computes the rest again.

    Args:
        function: a function that depends on nothing else that is trained, is always the same, and returns a new tensor.
        inputs: what it is called with.
    """
    if (
        not torch.is_grad_enabled()
        or not any(tensor.requires_grad for tensor in inputs)
        or torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch.is_autocast_enabled(inputs[0].device.type)
    ):
        return function(*inputs)
    return cast(Tensor, _Recomputed.apply(function, *inputs))


class _Recomputed(torch.autograd.Function):
    """See `recomputed`."""

    @staticmethod
    def forward(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """Return `function(*inputs)`."""
        return function(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Save the inputs."""
        ctx.function, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of the inputs, which can be differentiated again."""
        again, needed = torch.is_grad_enabled(), ctx.needs_input_grad[1:]
        inputs = ctx.saved_tensors
        if not again:
            inputs = [tensor.detach().requires_grad_(needs) for tensor, needs in zip(inputs, needed, strict=True)]
        with torch.enable_grad():
            output = ctx.function(*inputs)
        wanted = [tensor for tensor, needs in zip(inputs, needed, strict=True) if needs]
        found = iter(torch.autograd.grad(output, wanted, grad_outputs[0], create_graph=again))
        return None, *(next(found) if needs else None for needs in needed)


def whole(tensor: Tensor) -> Tensor:
    """Return all of a tensor that FSDP2 has spread over processes, which must all call this; others as they are."""
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()
