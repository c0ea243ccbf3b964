"""Products with matrices that have few elements, at places drawn from a seed or chosen by hand."""

import warnings
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor

_TOKENS, _TOKENS_OF_CHAIN = 512, 128
"""Rows that are multiplied at once on a CPU, so that they stay in its cache: by one matrix, and by several."""
_DENSITY, _DENSITY_OF_CSR = 1 / 128, 1 / 20
"""Shares of the elements of a matrix above which a product with all of it is faster, measured on a CPU."""


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


def scattered_onto(weight: Tensor, rows: Tensor, columns: Tensor, values: Tensor) -> Tensor:
    """Return a weight of any shape with these values added at these places of the flattened weight, as a new tensor."""
    places = rows.long() * (weight.numel() // len(weight)) + columns
    return weight.flatten().index_add(0, places, values.to(weight)).view(weight.shape)


def is_sparse(values: Tensor, rows: int, columns: int) -> bool:
    """Return whether `sparse_product` is faster than a product with all `rows` x `columns` elements of the matrix."""
    return values.numel() <= (_DENSITY_OF_CSR if _has_csr(values) else _DENSITY) * rows * columns


def sparse_product(input: Tensor, rows: Tensor, columns: Tensor, values: Tensor, size: int) -> Tensor:
    """Return `input @ M'` for the matrix M, of `size` rows, with `values` at (`rows`, `columns`).

    Args:
        input: (..., columns of M).
        rows, columns: the places, of integers, (count,). The values at equal places add up.
        values: the values there, (count,).
        size: the number of rows of M.
    """
    flat = input.reshape(-1, input.shape[-1])
    if torch.compiler.is_compiling():
        output = _product(flat, rows, columns, values, size)
    elif _has_csr(flat) and values.dtype == flat.dtype:
        output = cast(Tensor, _CsrProduct.apply(flat, rows, columns, values, size))
    else:
        output = cast(Tensor, _SparseProduct.apply(flat, rows, columns, values, size))
    return output.view(*input.shape[:-1], size)


def in_chunks(product: Callable[[Tensor, Tensor], Tensor], input: Tensor, values: Tensor, size: int) -> Tensor:
    """Return `product(input, values)`, computed for a few rows of the input at once.

    What `product` makes on the way is not kept for the backward pass, which calls it again.

    Args:
        product: returns (rows, size) for (rows, columns) and the values. It is linear in each of both.
        input: (..., columns).
        values: what gradients are computed of besides the input.
        size: the number of columns of the product.
    """
    flat = input.reshape(-1, input.shape[-1])
    if torch.compiler.is_compiling():
        output = product(flat, values)
    else:
        output = cast(Tensor, _InChunks.apply(flat, values, product, size))
    return output.view(*input.shape[:-1], size)


class _InChunks(torch.autograd.Function):
    """`in_chunks` of a matrix of rows."""

    @staticmethod
    def forward(input: Tensor, values: Tensor, product: Callable[[Tensor, Tensor], Tensor], size: int) -> Tensor:
        """Return the product, (tokens, size)."""
        output = input.new_empty(len(input), size)
        for part, result in _chunks(input, output, most=_TOKENS_OF_CHAIN):
            result.copy_(product(part, values))
        return output

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Save the input and the values for `backward`."""
        input, values, ctx.product, _ = inputs
        ctx.save_for_backward(input, values)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        """Return the gradients of the input and of the values."""
        (grad,), (input, values) = grad_outputs, ctx.saved_tensors
        needs_input, needs_values = ctx.needs_input_grad[:2]
        input_grad = torch.empty_like(input) if needs_input else None
        values_grad = torch.zeros_like(values) if needs_values else None
        for number, (part, grad_part) in enumerate(_chunks(input, grad, most=_TOKENS_OF_CHAIN)):
            own, leaf = part.detach().requires_grad_(needs_input), values.detach().requires_grad_(needs_values)
            with torch.enable_grad():
                result = ctx.product(own, leaf)
            wanted = [tensor for tensor in (own, leaf) if tensor.requires_grad]
            found = list(torch.autograd.grad(result, wanted, grad_part))
            if values_grad is not None:
                values_grad += found.pop()
            if input_grad is not None:
                input_grad.narrow(0, number * _rows(input, _TOKENS_OF_CHAIN), len(part)).copy_(found.pop())
        return input_grad, values_grad, None, None


def _product(input: Tensor, rows: Tensor, columns: Tensor, values: Tensor, size: int) -> Tensor:
    """Return the product with the tokens last, where gathering and adding work on contiguous memory."""
    gathered = input.t().index_select(0, columns) * values.unsqueeze(1)
    return torch.zeros(size, len(input), dtype=input.dtype, device=input.device).index_add(0, rows, gathered).t()


def _rows(tensor: Tensor, most: int) -> int:
    """Return how many rows are computed at once: on a CPU at most as many as fit its cache, elsewhere all of them."""
    return most if tensor.device.type == "cpu" else max(len(tensor), 1)


def _chunks(*tensors: Tensor, most: int = _TOKENS) -> Iterator[tuple[Tensor, ...]]:
    """Yield rows of the tensors; see `_rows`."""
    return zip(*(tensor.split(_rows(tensors[0], most)) for tensor in tensors), strict=True)


def _has_csr(tensor: Tensor) -> bool:
    """Return whether PyTorch has fast products of sparse matrices with this tensor."""
    return tensor.device.type == "cpu" and tensor.dtype in (torch.float32, torch.float64) and _is_built_with_csr()


@lru_cache
def _is_built_with_csr() -> bool:
    # PyTorch warns about the first sparse matrix of a process, and builds without MKL have no such products.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            matrix = _csr(torch.tensor([0, 1]), torch.tensor([0, 0]), torch.ones(2), (2, 1))
            torch.sparse.sampled_addmm(matrix, matrix @ torch.ones(1, 1), torch.ones(1, 1), beta=0.0)
        except (RuntimeError, NotImplementedError):
            return False
    return torch.backends.mkl.is_available()


def _csr(rows: Tensor, columns: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    """Return a matrix in compressed rows, for places that are sorted by row."""
    starts = torch.searchsorted(rows.contiguous(), torch.arange(shape[0] + 1, dtype=rows.dtype))
    return torch.sparse_csr_tensor(starts, columns.to(starts.dtype), values, shape, check_invariants=False)


def _sorted_csr(rows: Tensor, columns: Tensor, values: Tensor, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Return a matrix in compressed rows, and the order of the values in it."""
    order = rows.argsort(stable=True)
    return _csr(rows[order], columns[order], values[order], shape), order


class _ProductFunction(torch.autograd.Function):
    """A way to compute `sparse_product` that keeps the input and the matrix for the backward pass, and nothing else."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Save the input and the matrix for `backward`."""
        *tensors, _ = inputs
        ctx.save_for_backward(*tensors)


class _CsrProduct(_ProductFunction):
    """`sparse_product` by PyTorch's products with sparse matrices."""

    @staticmethod
    def forward(input: Tensor, rows: Tensor, columns: Tensor, values: Tensor, size: int) -> Tensor:
        """Return the product, (tokens, size)."""
        matrix, _ = _sorted_csr(rows, columns, values, (size, input.shape[1]))
        output = input.new_empty(len(input), size)
        for part, result in _chunks(input, output):
            result.copy_((matrix @ part.t()).t())
        return output

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, None, None, Tensor | None, None]:
        """Return the gradients of the input (the product with the transposed matrix) and of the values."""
        (grad,), (input, rows, columns, values) = grad_outputs, ctx.saved_tensors
        input_grad = values_grad = None
        if ctx.needs_input_grad[0]:
            input_grad = cast(Tensor, _CsrProduct.apply(grad, columns, rows, values, input.shape[1]))
        if ctx.needs_input_grad[3]:
            pattern, order = _sorted_csr(rows, columns, values, (grad.shape[1], input.shape[1]))
            total = torch.zeros_like(values)
            for part, grad_part in _chunks(input, grad):
                total += torch.sparse.sampled_addmm(pattern, grad_part.t(), part, beta=0.0).values()
            values_grad = torch.empty_like(values).index_copy(0, order, total)
        return input_grad, None, None, values_grad, None


class _SparseProduct(_ProductFunction):
    """`sparse_product` in chunks of tokens, without keeping what was gathered for the backward pass."""

    @staticmethod
    def forward(input: Tensor, rows: Tensor, columns: Tensor, values: Tensor, size: int) -> Tensor:
        """Return the product, (tokens, size)."""
        output = input.new_empty(len(input), size)
        for part, result in _chunks(input, output):
            result.copy_(_product(part, rows, columns, values, size))
        return output

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
