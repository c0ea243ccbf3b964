"""C3A: a change of circulant blocks, which the fast Fourier transform applies.

Chen et al., "Parameter-Efficient Fine-Tuning via Circular Convolution", arXiv 2407.19342, as in PEFT 0.21.2
`tuners/c3a/layer.py`. The flattened weight has blocks of b x b; with w the kernel of a block,

    W'[t, s] = W[t, s] + w[(s - t) mod b] / columns

for row t and column s of the block, and the number of columns of the whole weight. There is no alpha.

| tensor | shape |
|---|---|
| `c3a_kernel` | (out / b, in x kernel / b, b) |
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from diffadapt.errors import AdapterError
from diffadapt.types import patterns
from diffadapt.types.adapter_type import AdapterType, Tensors
from diffadapt.types.config import AdapterConfig, refuse_unless_whole
from diffadapt.types.layer_spec import LayerSpec
from diffadapt.types.tensor_ops import add, promoted, scaled, shape_of

_KERNEL = "c3a_kernel"
_ROWS = 512


@dataclass(frozen=True, kw_only=True)
class C3AConfig(AdapterConfig):
    """Settings of a new C3A (Chen et al., arXiv 2407.19342).

    Attributes:
        block_size: b, which must divide the inputs and the outputs.
        block_size_pattern: the block sizes of layers that differ from it, with keys as in `RankedConfig`.
        init: with `True`, kernels of zeros. "xavier_uniform" (PEFT's default), "kaiming_uniform" and "gaussian" are
            PEFT's random starts, which have an effect. With `False` the kernels are random.
    """

    block_size: int
    block_size_pattern: Mapping[str, int] = field(default_factory=dict[str, int])

    def _inits(self) -> tuple[bool | str, ...]:
        return (True, "xavier_uniform", "kaiming_uniform", "gaussian", False)

    def __post_init__(self) -> None:
        super().__post_init__()
        for size in (self.block_size, *self.block_size_pattern.values()):
            refuse_unless_whole("block_size", size)

    def at(self, path: str) -> "C3AConfig":
        """Return the settings of the layer at `path`, with the block size that a pattern gives it."""
        size = patterns.value(self.block_size_pattern, path)
        return self if size is None else replace(self, block_size=size, block_size_pattern={})


def fit(tensors: Tensors, spec: LayerSpec) -> dict[str, Tensor]:
    """Check that the blocks cover the weight, and return the kernels."""
    kernel = tensors[_KERNEL]
    size = kernel.shape[-1] if kernel.ndim == 3 else 0
    if not size or shape_of(kernel) != (spec.out_features / size, spec.fan_in / size, size):
        raise AdapterError(
            f"{_KERNEL} has shape {shape_of(kernel)}, expected ({spec.out_features} / b, {spec.fan_in} / b, b)"
        )
    return {_KERNEL: kernel}


def init(
    spec: LayerSpec, config: C3AConfig, *, generator: torch.Generator, weight: Callable[[], Tensor]
) -> dict[str, Tensor]:
    """Return kernels of zeros, or PEFT's random ones."""
    size, rows, columns = config.block_size, spec.out_features, spec.fan_in
    if rows % size or columns % size:
        raise AdapterError(f"block_size is {size}, which does not divide {rows} outputs and {columns} inputs")
    kernel = torch.zeros(rows // size, columns // size, size)
    if config.init is False or config.init == "gaussian":
        kernel.normal_(generator=generator)
    elif config.init is not True:
        bound = (6 / (rows + columns)) ** 0.5 if config.init == "xavier_uniform" else columns**-0.5
        kernel.uniform_(-bound, bound, generator=generator)
    return {_KERNEL: kernel}


def delta_weight(tensors: Tensors, spec: LayerSpec) -> Tensor:
    """Return the circulant blocks as one matrix, in the canonical weight shape."""
    kernel = tensors[_KERNEL]
    places = torch.arange(kernel.shape[-1], device=kernel.device)
    blocks = kernel[..., (places - places.unsqueeze(1)) % kernel.shape[-1]]
    return blocks.transpose(1, 2).reshape(spec.weight_shape) / spec.fan_in


def delta_output(
    tensors: Tensors, spec: LayerSpec, *, input: Tensor, gate: Tensor, onto: Tensor | None = None
) -> Tensor:
    """Return `onto` plus the gated change; in a linear layer by Fourier transforms, in float32 or wider."""
    if spec.kind != "linear":
        return spec.dense(input, delta_weight(tensors, spec), gate, onto)
    size = tensors[_KERNEL].shape[-1]

    def transformed(input: Tensor, kernel: Tensor) -> Tensor:
        blocks = torch.fft.rfft(input.unflatten(-1, (-1, size)))
        product = torch.einsum("...nf,mnf->...mf", blocks, torch.fft.rfft(kernel).conj())
        return torch.fft.irfft(product, n=size).flatten(-2)

    vectors = promoted(input)
    kernel = (scaled(promoted(tensors[_KERNEL]), gate) / spec.fan_in).to(vectors.dtype)
    if vectors.device.type == "cpu" and vectors.ndim > 1 and not torch.compiler.is_compiling():
        # Spectra of a few rows stay in the processor's cache.
        rows = vectors.reshape(-1, vectors.shape[-1]).split(_ROWS)
        product = torch.cat([transformed(part, kernel) for part in rows]).view(*vectors.shape[:-1], -1)
    else:
        product = transformed(vectors, kernel)
    product = product.to(input.dtype)
    return product if onto is None else add(product, onto)


C3A = AdapterType(
    name="c3a",
    tensors=(_KERNEL,),
    identified_by=frozenset({_KERNEL}),
    config=C3AConfig,
    fit=fit,
    init=init,
    delta_weight=delta_weight,
    delta_output=delta_output,
    in_weight=lambda tensors, spec: spec.kind != "linear" or not torch.is_grad_enabled(),
)
