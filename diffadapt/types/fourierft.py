"""FourierFT: a change whose two-dimensional Fourier transform has few elements.

Gao et al., "Parameter-Efficient Fine-Tuning with Discrete Fourier Transform", arXiv 2405.03003, as in PEFT 0.21.2
`tuners/fourierft/layer.py`:

    W' = W + scaling * real(ifft2(S))

S has the shape of the flattened weight, and is `fourierft_spectrum` at `fourierft_indices`. These places follow from a
seed; PEFT does not store them.

| tensor | shape |
|---|---|
| `fourierft_spectrum` | (n) |
| `fourierft_indices` | (2, n), rows and columns, not trained |

A linear layer computes `ifft(S conj(fft(x))) / columns`. Both transforms are of real vectors, so half of the
frequencies is enough: an element of S in the other half counts for the conjugate one.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from diffadapt.errors import AdapterError
from diffadapt.types import patterns
from diffadapt.types.adapter_type import AdapterType, Surroundings, Tensors, Unfinished
from diffadapt.types.config import AdapterConfig, refuse_unless_whole
from diffadapt.types.formulas import checked, rank_of
from diffadapt.types.layer_spec import LayerSpec
from diffadapt.types.sparse import are_places, in_chunks, random_places, scattered, sparse_product
from diffadapt.types.tensor_ops import add, promoted

_SPECTRUM, _INDICES = "fourierft_spectrum", "fourierft_indices"
_ROWS, _COLUMNS, _VALUES, _DELTA = "fourierft_rows", "fourierft_columns", "fourierft_values", "fourierft_delta"


@dataclass(frozen=True, kw_only=True)
class SpectrumConfig(AdapterConfig):
    """Settings that FourierFT and WaveFT have in common.

    Attributes:
        frequencies: n, the number of elements of the spectrum in every layer (`n_frequency` in PEFT).
        frequencies_pattern: the numbers of layers that differ from it, with keys as in `RankedConfig`.
        scaling: the factor of the change.
        seed: the seed of the places (`random_loc_seed` in PEFT).
        init: with `True`, a spectrum of zeros. "peft" is PEFT's random spectrum, which has an effect, as has the one of
            `False`.
    """

    frequencies: int = 1000
    frequencies_pattern: Mapping[str, int] = field(default_factory=dict[str, int])
    scaling: float = 150.0
    seed: int = 777

    def _inits(self) -> tuple[bool | str, ...]:
        return (True, "peft", False)

    def __post_init__(self) -> None:
        super().__post_init__()
        for number in (self.frequencies, *self.frequencies_pattern.values()):
            refuse_unless_whole("frequencies", number)
        refuse_unless_whole("seed", self.seed, least=0)
        if self.scaling == 0:
            raise AdapterError("scaling is 0: the adapter could not learn")

    @property
    def settings(self) -> dict[str, float]:
        """The factor of the change and the seed of the places."""
        return {"scaling": float(self.scaling), "seed": float(self.seed)}

    def at(self, path: str) -> "SpectrumConfig":
        """Return the settings of the layer at `path`, with the number that a pattern gives it."""
        number = patterns.value(self.frequencies_pattern, path)
        return self if number is None else replace(self, frequencies=number, frequencies_pattern={})

    def spectrum(self, spec: LayerSpec, deviation: float, generator: torch.Generator) -> Tensor:
        """Return the initial spectrum, with the standard deviation that PEFT's random ones have."""
        most = spec.out_features * spec.fan_in
        if self.frequencies > most:
            raise AdapterError(f"frequencies is {self.frequencies}, expected at most {most}, the size of the weight")
        return torch.randn(self.frequencies, generator=generator) * (0.0 if self.init is True else deviation)


@dataclass(frozen=True, kw_only=True)
class FourierFTConfig(SpectrumConfig):
    """Settings of a new FourierFT (Gao et al., arXiv 2405.03003)."""


def fit(tensors: Tensors, spec: LayerSpec) -> dict[str, Tensor]:
    """Check the tensors of a file and return them in the shapes of the table above."""
    return fit_spectrum(tensors, spec, _SPECTRUM, _INDICES)


def fit_spectrum(tensors: Tensors, spec: LayerSpec, values: str, places: str) -> dict[str, Tensor]:
    """Check the values and the places of a sparse matrix in the shape of the flattened weight, and return them."""
    number, most = rank_of(tensors, values, 0), spec.out_features * spec.fan_in
    if number > most:
        raise AdapterError(f"{values} has {number} elements, and the weight has {most}")
    found = checked(tensors, {values: (number,), places: (2, number)}, optional=(places,))
    if places in found and not are_places(found[places], spec.out_features, spec.fan_in):
        raise AdapterError(f"{places} are not all in a matrix of shape ({spec.out_features}, {spec.fan_in})")
    return found


def init(
    spec: LayerSpec, config: FourierFTConfig, *, generator: torch.Generator, weight: Callable[[], Tensor]
) -> dict[str, Tensor]:
    """Return a spectrum of zeros, or PEFT's random one."""
    return {_SPECTRUM: config.spectrum(spec, 1.0, generator)}


def complete(layers: Mapping[str, Unfinished]) -> dict[str, Tensors]:
    """Return the tensors with the places, which follow from the seed."""
    return completed(layers, _SPECTRUM, _INDICES)


def completed(layers: Mapping[str, Unfinished], values: str, places: str) -> dict[str, Tensors]:
    """Return the tensors with the places of `values`, drawn from the seed of each layer."""
    found: dict[str, Tensors] = {}
    for path, (tensors, spec, settings, _, *_) in layers.items():
        known = tensors.get(places)
        if known is None:
            count, seed, device = tensors[values].numel(), int(settings["seed"]), tensors[values].device
            known = random_places(spec.out_features, spec.fan_in, count, seed, device)
        found[path] = {**tensors, places: known}
    return found


def prepare(tensors: Tensors, spec: LayerSpec, surroundings: Surroundings) -> Tensors:
    """Return the scaled spectrum as a sparse matrix over the frequencies of real vectors, real and imaginary parts.

    For layers other than linear ones, return the change of the weight.
    """
    spectrum = promoted(tensors[_SPECTRUM]) * surroundings.settings["scaling"]
    rows, columns = tensors[_INDICES].long().unbind(0)
    if spec.kind != "linear":
        delta = transformed_back(rows, columns, spectrum, (spec.out_features, spec.fan_in))
        return {_DELTA: delta.reshape(spec.weight_shape).to(tensors[_SPECTRUM].dtype)}
    out, width = spec.out_features, spec.fan_in
    high_row, high_column = rows > out // 2, columns > width // 2
    own = (rows == 0) | (2 * rows == out)
    # `irfft` counts every frequency but these for its conjugate, too.
    values = spectrum * torch.where(own, 1.0, 0.5).to(spectrum) / width
    sign = torch.where(high_row ^ ~high_column, -1.0, 1.0).to(spectrum)
    rows, columns = torch.where(high_row, out - rows, rows), torch.where(high_column, width - columns, columns)
    return {
        _ROWS: torch.cat([2 * rows, 2 * rows + 1]),
        _COLUMNS: torch.cat([2 * columns, 2 * columns + 1]),
        _VALUES: torch.cat([values, values * sign]),
        _SPECTRUM: spectrum,
        _INDICES: tensors[_INDICES],
    }


def delta_weight(tensors: Tensors, spec: LayerSpec) -> Tensor:
    """Return the transformed spectrum in the canonical weight shape."""
    if _DELTA in tensors:
        return tensors[_DELTA]
    rows, columns = tensors[_INDICES].long().unbind(0)
    shape = spec.out_features, spec.fan_in
    return transformed_back(rows, columns, tensors[_SPECTRUM], shape).reshape(spec.weight_shape)


def transformed_back(rows: Tensor, columns: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    """Return `real(ifft2(S))` for the matrix S of this shape with real `values` at these places.

    It is the transform of the even part of S, which half of the frequencies determine.
    """
    height, width = shape
    half = width // 2 + 1
    mirrored = -rows % height, -columns % width
    rows, columns = torch.cat([rows, mirrored[0]]), torch.cat([columns, mirrored[1]])
    kept = (columns < half).to(values.dtype) / 2
    spectrum = scattered(rows, columns % half, torch.cat([values, values]) * kept, (height, half))
    return torch.fft.irfft2(spectrum.to(torch.promote_types(values.dtype, torch.complex64)), s=shape)


def delta_output(
    tensors: Tensors, spec: LayerSpec, *, input: Tensor, gate: Tensor, onto: Tensor | None = None
) -> Tensor:
    """Return `onto` plus the gated change; in a linear layer by Fourier transforms of the input and the output."""
    if _DELTA in tensors:
        return spec.dense(input, tensors[_DELTA], gate, onto)
    out = spec.out_features

    def transformed(input: Tensor, values: Tensor) -> Tensor:
        frequencies = torch.view_as_real(torch.fft.rfft(input)).flatten(-2)
        product = sparse_product(frequencies, tensors[_ROWS], tensors[_COLUMNS], values, 2 * (out // 2 + 1))
        return torch.fft.irfft(torch.view_as_complex(product.contiguous().unflatten(-1, (-1, 2))), n=out)

    vectors = promoted(input)
    product = in_chunks(transformed, vectors, (tensors[_VALUES] * gate).to(vectors.dtype), out).to(input.dtype)
    return product if onto is None else add(product, onto)


FOURIERFT = AdapterType(
    name="fourierft",
    tensors=(_SPECTRUM, _INDICES),
    identified_by=frozenset({_SPECTRUM}),
    config=FourierFTConfig,
    settings={"scaling": 150.0, "seed": 777.0},
    fixed=frozenset({_INDICES}),
    fit=fit,
    init=init,
    complete=complete,
    prepare=prepare,
    delta_weight=delta_weight,
    delta_output=delta_output,
    in_weight=lambda tensors, spec: True,
)
