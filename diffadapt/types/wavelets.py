"""Filters of orthogonal wavelets, by the constructions in Daubechies, "Ten Lectures on Wavelets", 1992.

* "db" and "sym" have 2 N elements for N vanishing moments, by spectral factorisation (chapter 6): a root z or its
  inverse is taken for each factor of the product filter. Daubechies' wavelets take the one within the unit circle; for
  symlets, which are less asymmetric, several choices are published, and those here are PyWavelets'.
* "coif" have 6 N elements and 2 N vanishing moments, as does the scaling function (chapter 8.2). The remaining factor
  is a solution of quadratic equations, the one that Newton's method finds from zero.

PEFT has "db1" to "db10", "sym2" to "sym10" and "coif1" to "coif5". Its filters of "coif4" and "coif5" belong to no
wavelet: they are not orthonormal.
"""

import math
from functools import lru_cache

import torch
from torch import Tensor

FAMILIES = ("db", "sym", "coif")
KNOWN: tuple[str, ...] = (
    *(f"db{n}" for n in range(1, 11)),
    *(f"sym{n}" for n in range(2, 11)),
    *(f"coif{n}" for n in range(1, 4)),
)
"""The names of all wavelets."""

_STEPS = 40
_OUTER: dict[int, tuple[int, ...]] = {
    4: (0, 1),
    5: (1, 0),
    6: (1, 0, 1),
    7: (1, 0, 0),
    8: (0, 1, 0, 1),
    9: (0, 1, 1, 0),
    10: (1, 0, 1, 0, 1),
}
"""Moments of a symlet -> whether roots are taken outside the unit circle: real ones first, then pairs of conjugate ones
by absolute value, as roots in y. Those with fewer moments are Daubechies' wavelets."""


def is_known(family: str, number: int) -> bool:
    """Return whether there is a wavelet of this name."""
    return f"{family}{number}" in KNOWN


@lru_cache
def filters(family: str, number: int) -> Tensor:
    """Return the low and the high reconstruction filter of a wavelet, (2, length), in float64."""
    outer = _OUTER.get(number, ()) if family == "sym" else ()
    low = _coiflet(number) if family == "coif" else _factorised(number, outer)
    signs = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(len(low) // 2)
    return torch.stack([low, low.flip(0) * signs])


def _factorised(moments: int, outer: tuple[int, ...]) -> Tensor:
    """Return the low filter with this choice of roots."""
    # The product of the two halves is a polynomial in y = (2 - z - 1 / z) / 4, with these coefficients.
    coefficients = [math.comb(moments - 1 + k, k) for k in range(moments)]
    companion = torch.zeros(moments - 1, moments - 1, dtype=torch.float64)
    if moments > 1:
        companion[1:, :-1] = torch.eye(moments - 2, dtype=torch.float64)
        companion[:, -1] = -torch.tensor(coefficients[:-1], dtype=torch.float64) / coefficients[-1]
    roots: list[complex] = torch.linalg.eigvals(companion).tolist() if moments > 1 else []
    upper = sorted((y for y in roots if y.imag > -1e-9), key=lambda y: (abs(y.imag) > 1e-9, abs(y)))
    low = torch.tensor([2**0.5], dtype=torch.complex128)
    for number, root in enumerate(upper):
        is_outer = number < len(outer) and bool(outer[number])
        for y in (root,) if abs(root.imag) < 1e-9 else (root, root.conjugate()):
            middle = 1 - 2 * y
            pair = [middle + sign * (middle * middle - 1) ** 0.5 for sign in (1, -1)]
            z = max(pair, key=abs) if is_outer else min(pair, key=abs)
            low = _times(low, torch.tensor([1 / (1 - z), -z / (1 - z)], dtype=torch.complex128))
    for _ in range(moments):
        low = _times(low, torch.tensor([0.5, 0.5], dtype=torch.complex128))
    return low.real.contiguous()


def _coiflet(number: int) -> Tensor:
    """Return the low filter of a coiflet.

    It is `sqrt(2) cos^2K [sum of C(K-1+k, k) sin^2k for k < K, plus sin^2K f]`, at half the frequency, for a polynomial
    f of 2 K coefficients.
    """
    cosine, sine = (torch.tensor(part, dtype=torch.float64) / 4 for part in ([1, 2, 1], [-1, 2, -1]))
    one = torch.ones(1, dtype=torch.float64)
    powers = [one]
    for _ in range(number):
        powers.append(_times(powers[-1], sine))
    base = torch.zeros(2 * number - 1, dtype=torch.float64)
    for k in range(number):
        base[number - 1 - k : number + k] += math.comb(number - 1 + k, k) * powers[k]
    factor = powers[number]
    for _ in range(number):
        base, factor = _times(base, cosine), _times(factor, cosine)
    length = 6 * number

    def low(unknown: Tensor) -> Tensor:
        found = torch.zeros(length, dtype=torch.float64)
        found[: len(factor) + 2 * number - 1] += _times(factor, unknown)
        found[1 : 1 + len(base)] += base
        return found * 2**0.5

    unknown = torch.zeros(2 * number, dtype=torch.float64)
    change = torch.stack([low(row) - low(unknown) for row in torch.eye(2 * number, dtype=torch.float64)])
    for _ in range(_STEPS):
        filter = low(unknown)
        error = torch.stack([_overlap(filter, filter, shift) - int(shift == 0) for shift in range(length // 2)])
        slope = torch.stack(
            [
                torch.stack([_overlap(filter, row, shift) + _overlap(row, filter, shift) for row in change])
                for shift in range(length // 2)
            ]
        )
        unknown = unknown - torch.linalg.lstsq(slope, error).solution
    return low(unknown)


def _overlap(one: Tensor, other: Tensor, shift: int) -> Tensor:
    """Return the scalar product of one filter and another one that is shifted by two elements `shift` times."""
    return one[2 * shift :] @ other[: len(other) - 2 * shift]


def _times(one: Tensor, other: Tensor) -> Tensor:
    """Return the product of two polynomials."""
    product = one.new_zeros(len(one) + len(other) - 1)
    for power, coefficient in enumerate(other):
        product[power : power + len(one)] += one * coefficient
    return product
