"""WaveFT: a change with few coefficients of a two-dimensional wavelet transform.

Bilican et al., "Exploring Sparsity for Parameter Efficient Fine Tuning Using Wavelets", arXiv 2505.12532, as in PEFT
0.21.2 `tuners/waveft/layer.py`: `W' = W + scaling * idwt2(C)`. C has the shape of the flattened weight, plus a margin
for longer filters, and is `waveft_spectrum` at `waveft_indices`, which follow from a seed as in FourierFT. Its
quadrants are the coefficients of one level: with low (l) and high (h) filters along rows and columns,
`[[ll, hl], [lh, hh]]`, the first letter for the filter along the outputs. Without wavelets, C itself is the change.

| tensor | shape |
|---|---|
| `waveft_spectrum` | (n) |
| `waveft_indices` | (2, n), rows and columns in the weight, not trained |

Filters are those of `wavelets.py`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from diffadapt.errors import AdapterError
from diffadapt.types.adapter_type import AdapterType, Surroundings, Tensors, Unfinished
from diffadapt.types.config import refuse_unless_whole
from diffadapt.types.fourierft import SpectrumConfig, completed, fit_spectrum
from diffadapt.types.layer_spec import LayerSpec
from diffadapt.types.sparse import in_chunks, scattered, sparse_product
from diffadapt.types.tensor_ops import add, promoted
from diffadapt.types.wavelets import FAMILIES, KNOWN, filters, is_known

_SPECTRUM, _INDICES = "waveft_spectrum", "waveft_indices"
_ROWS, _COLUMNS, _VALUES, _DELTA, _FILTERS = (
    "waveft_rows",
    "waveft_columns",
    "waveft_values",
    "waveft_delta",
    "waveft_filters",
)


@dataclass(frozen=True, kw_only=True)
class WaveFTConfig(SpectrumConfig):
    """Settings of a new WaveFT (Bilican et al., arXiv 2505.12532).

    Attributes:
        family: the family of the wavelet: "db" (Daubechies), "sym" (symlets) or "coif" (coiflets).
        moments: the number of the wavelet in its family, 1 (Haar) to 10 of Daubechies', 2 to 10 of the symlets, 1 to 3
            of the coiflets; 0 to train elements of the weight itself.
    """

    frequencies: int = 2592
    scaling: float = 25.0
    family: Literal["db", "sym", "coif"] = "db"
    moments: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_unless_whole("moments", self.moments, least=0)
        if self.moments and not is_known(self.family, self.moments):
            raise AdapterError(f"{self.family}{self.moments} is no wavelet here, expected one of {', '.join(KNOWN)}")

    @property
    def settings(self) -> dict[str, float]:
        """The factor of the change, the seed of the places, and the wavelet."""
        family = FAMILIES.index(self.family) if self.moments else 0
        return {**super().settings, "family": float(family), "moments": float(self.moments)}


def fit(tensors: Tensors, spec: LayerSpec) -> dict[str, Tensor]:
    """Check the tensors of a file and return them in the shapes of the table above."""
    return fit_spectrum(tensors, spec, _SPECTRUM, _INDICES)


def init(
    spec: LayerSpec, config: WaveFTConfig, *, generator: torch.Generator, weight: Callable[[], Tensor]
) -> dict[str, Tensor]:
    """Return a spectrum of zeros, or PEFT's random one."""
    return {_SPECTRUM: config.spectrum(spec, 0.01 if config.init == "peft" else 1.0, generator)}


def complete(layers: Mapping[str, Unfinished]) -> dict[str, Tensors]:
    """Return the tensors with the places, which follow from the seed."""
    return completed(layers, _SPECTRUM, _INDICES)


def prepare(tensors: Tensors, spec: LayerSpec, surroundings: Surroundings) -> Tensors:
    """Return the scaled coefficients as a sparse matrix over the bands of rows and columns, and the filters.

    For layers other than linear ones, return the change of the weight.
    """
    settings = surroundings.settings
    values, moments = promoted(tensors[_SPECTRUM]) * settings["scaling"], int(settings["moments"])
    rows, columns = tensors[_INDICES].long().unbind(0)
    taps = values.new_zeros(2, 0)
    if moments:
        taps = filters(FAMILIES[int(settings["family"])], moments).to(values)
        # Haar's transforms are sums and differences; their factors are cheaper on the coefficients.
        values = values / 2 if taps.shape[1] == 2 else values
        (half_rows, first_row), (half_columns, first_column) = (
            _bands(size, taps.shape[1]) for size in (spec.out_features, spec.fan_in)
        )
        rows, columns = rows + first_row, columns + first_column
        # The high band of the rows is at the right, that of the columns at the bottom.
        low, right = rows >= half_rows, columns >= half_columns
        rows = rows % half_rows + half_rows * right
        columns = columns % half_columns + half_columns * low
    prepared = {_ROWS: rows, _COLUMNS: columns, _VALUES: values, _FILTERS: taps}
    if spec.kind == "linear":
        return prepared
    return {_DELTA: delta_weight(prepared, spec).to(tensors[_SPECTRUM].dtype)}


def delta_weight(tensors: Tensors, spec: LayerSpec) -> Tensor:
    """Return the transformed coefficients in the canonical weight shape."""
    if _DELTA in tensors:
        return tensors[_DELTA]
    out, width, filters = spec.out_features, spec.fan_in, tensors[_FILTERS]
    if not filters.numel():
        return scattered(tensors[_ROWS], tensors[_COLUMNS], tensors[_VALUES], (out, width)).view(spec.weight_shape)
    shape = 2 * _bands(out, filters.shape[1])[0], 2 * _bands(width, filters.shape[1])[0]
    matrix = scattered(tensors[_ROWS], tensors[_COLUMNS], tensors[_VALUES], shape)
    return _synthesis(_synthesis(matrix, filters, width).t(), filters, out).t().reshape(spec.weight_shape)


def delta_output(
    tensors: Tensors, spec: LayerSpec, *, input: Tensor, gate: Tensor, onto: Tensor | None = None
) -> Tensor:
    """Return `onto` plus the gated change; in a linear layer, the transforms apply to the input and the output."""
    if _DELTA in tensors:
        return spec.dense(input, tensors[_DELTA], gate, onto)
    vectors, out = promoted(input), spec.out_features
    filters, values = tensors[_FILTERS].to(vectors.dtype), (tensors[_VALUES] * gate).to(vectors.dtype)

    def transformed(input: Tensor, values: Tensor) -> Tensor:
        size = 2 * _bands(out, filters.shape[1])[0]
        product = sparse_product(_analysis(input, filters), tensors[_ROWS], tensors[_COLUMNS], values, size)
        return _synthesis(product, filters, out)

    if filters.numel():
        product = in_chunks(transformed, vectors, values, out)
    else:
        product = sparse_product(vectors, tensors[_ROWS], tensors[_COLUMNS], values, out)
    product = product.to(input.dtype)
    return product if onto is None else add(product, onto)


def _bands(size: int, length: int) -> tuple[int, int]:
    """Return the number of coefficients in each band for vectors of this size, and how far places are shifted.

    Args:
        size: the size of the vectors.
        length: the number of elements of a filter.
    """
    padded = size + length - 2
    padded += padded % 2
    return padded // 2, (padded - size) // 2


def _synthesis(bands: Tensor, filters: Tensor, size: int) -> Tensor:
    """Return the vectors (..., size) with the coefficients (..., 2 n): `sum over k of c[k] f[t - 2 k]`, both bands."""
    length = filters.shape[1]
    if length == 2:
        low, high = bands.unflatten(-1, (2, -1)).unbind(-2)
        return torch.stack([low + high, low - high], -1).flatten(-2)[..., :size]
    margin = length // 2 - 1
    padded = F.pad(bands.unflatten(-1, (2, -1)), (margin, margin))
    count = padded.shape[-1] - margin
    phases: list[Tensor] = []
    for phase in (0, 1):
        parts = [
            filters[band, tap] * padded[..., band, margin - tap // 2 : margin - tap // 2 + count]
            for tap in range(phase, length, 2)
            for band in (0, 1)
        ]
        phases.append(_sum(parts))
    return torch.stack(phases, -1).flatten(-2)[..., length - 2 : length - 2 + size]


def _analysis(vectors: Tensor, filters: Tensor) -> Tensor:
    """Return the coefficients (..., 2 n) that `_synthesis`, transposed, has for vectors (..., size)."""
    length, size = filters.shape[1], vectors.shape[-1]
    count = _bands(size, length)[0]
    margins = length - 2, 2 * count - size
    phases = (F.pad(vectors, margins) if any(margins) else vectors).unflatten(-1, (-1, 2))
    if length == 2:
        even, odd = phases.unbind(-1)
        return torch.cat([even + odd, even - odd], -1)
    bands = [
        _sum([filters[band, tap] * phases[..., tap // 2 : tap // 2 + count, tap % 2] for tap in range(length)])
        for band in (0, 1)
    ]
    return torch.cat(bands, -1)


def _sum(parts: list[Tensor]) -> Tensor:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


WAVEFT = AdapterType(
    name="waveft",
    tensors=(_SPECTRUM, _INDICES),
    identified_by=frozenset({_SPECTRUM}),
    config=WaveFTConfig,
    settings={"scaling": 25.0, "seed": 777.0, "family": 0.0, "moments": 1.0},
    fixed=frozenset({_INDICES}),
    fit=fit,
    init=init,
    complete=complete,
    prepare=prepare,
    delta_weight=delta_weight,
    delta_output=delta_output,
    in_weight=lambda tensors, spec: True,
)
