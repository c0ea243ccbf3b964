"""Products with matrices that have few elements, at places drawn from a seed or chosen by hand."""

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor

_TOKENS = 512
"""Rows that are multiplied at once on a CPU, so that they stay in its cache."""


def random_places(rows: int, columns: int, count: int, seed: int, device: torch.device) -> Tensor:
    """Return `count` different places in a matrix, (2, count): those that PEFT draws from a seed.

    On the meta device, the places have no values.
    """
    if device.type == "meta":
        return torch.empty(2, count, dtype=torch.int64, device=device)
    drawn = torch.randperm(rows * columns, generator=torch.Generator().manual_seed(seed))[:count]
    return torch.stack([drawn // columns, drawn % columns]).to(device)


def are_places(places: Tensor, rows: int, columns: int) -> bool:
    """Return whether all places are in a matrix of this shape; true for places without values."""
    if places.is_meta or not places.numel():
        return True
    largest = torch.tensor([rows, columns], device=places.device).view(2, 1)
    return bool((places >= 0).all() and (places < largest).all())


def scattered(rows: Tensor, columns: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    """Return the matrix of this shape with these values at these places."""
    return values.new_zeros(shape).index_put((rows.long(), columns.long()), values, accumulate=True)


def sparse_product(input: Tensor, rows: Tensor, columns: Tensor, values: Tensor, size: int) -> Tensor:
    """Return `input @ M'` for the matrix M, of `size` rows, with `values` at (`rows`, `columns`).

    Args:
        input: (..., columns of M).
        rows, columns: the places, of integers, (count,).
        values: the values there, (count,).
        size: the number of rows of M.
    """
    flat = input.reshape(-1, input.shape[-1])
    if torch.compiler.is_compiling():
        output = _product(flat, rows, columns, values, size)
    else:
        output = cast(Tensor, _SparseProduct.apply(flat, rows, columns, values, size))
    return output.view(*input.shape[:-1], size)


def _product(input: Tensor, rows: Tensor, columns: Tensor, values: Tensor, size: int) -> Tensor:
    """Return the product with the tokens last, where gathering and adding work on contiguous memory."""
    gathered = input.t().index_select(0, columns) * values.unsqueeze(1)
    return torch.zeros(size, len(input), dtype=input.dtype, device=input.device).index_add(0, rows, gathered).t()


def _chunks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield rows of the tensors: on a CPU as many as fit its cache, elsewhere all of them."""
    rows = _TOKENS if tensors[0].device.type == "cpu" else max(len(tensors[0]), 1)
    return zip(*(tensor.split(rows) for tensor in tensors), strict=True)


class _SparseProduct(torch.autograd.Function):
    """`sparse_product` in chunks of tokens, without keeping what was gathered for the backward pass."""

    @staticmethod
    def forward(input: Tensor, rows: Tensor, columns: Tensor, values: Tensor, size: int) -> Tensor:
        """Return the product, (tokens, size)."""
        output = input.new_empty(len(input), size)
        for part, result in _chunks(input, output):
            result.copy_(_product(part, rows, columns, values, size))
        return output

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Save the input and the matrix for `backward`."""
        *tensors, _ = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, None, None, Tensor | None, None]:
        """Return the gradients of the input (the product with the transposed matrix) and of the values."""
        (grad,), (input, rows, columns, values) = grad_outputs, ctx.saved_tensors
        input_grad = values_grad = None
        if ctx.needs_input_grad[0]:
            input_grad = cast(Tensor, _SparseProduct.apply(grad, columns, rows, values, input.shape[1]))
        if ctx.needs_input_grad[3]:
            values_grad = torch.zeros_like(values)
            for part, grad_part in _chunks(input, grad):
                values_grad += (part.t().index_select(0, columns) * grad_part.t().index_select(0, rows)).sum(1)
        return input_grad, None, None, values_grad, None
