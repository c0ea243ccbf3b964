"""Starts of a LoRA that follow from data: what a layer reads, or the gradient of its weight.

| `init` | start |
|---|---|
| "eva" | `down`: the principal directions of the inputs; `up`: zero |
| "corda", "corda_kpm" | the largest, or smallest, components of the weight seen through the inputs' covariance |
| "lora_ga" | singular vectors of the gradient |
| "loftq" | the largest components of what quantisation took from the weight |

EVA: Paischer et al., arXiv 2410.07170. CorDA: Yang et al., arXiv 2406.05223. LoRA-GA: Wang et al., arXiv 2407.05000.
LoftQ: Li et al., arXiv 2310.08659.

EVA's start changes nothing. CorDA's and LoRA-GA's are subtracted; see `started_lora.py`. LoftQ's is meant to have an
effect: it brings a quantised layer closer to the original.
"""

import torch
from torch import Tensor

FROM_DATA = ("eva", "corda", "corda_kpm", "lora_ga", "loftq")
SUBTRACTED = ("corda", "corda_kpm", "lora_ga")

_DAMPING, _MOST_DAMPING = 0.01, 1e6
_STABILITY = 16.0
"""The constant gamma of LoRA-GA, as in the paper's experiments."""


class Spectrum:
    """The principal components of rows that come in batches, without keeping the rows.

    It is the incremental singular value decomposition of Ross et al., "Incremental Learning for Robust Visual
    Tracking" (2008), with the mean subtracted.

    Attributes:
        count: the number of rows.
        total: the sum of their squared distances from the mean.
    """

    def __init__(self, components: int) -> None:
        """
        Args:
            components: how many components to keep.
        """
        self._most = components
        self.count = 0
        self.total = 0.0
        self._mean = torch.zeros(0)
        self._scaled = torch.zeros(0, 0)

    def add(self, rows: Tensor) -> None:
        """Take rows (count, features) into account."""
        rows = rows.double()
        mean = rows.mean(0)
        centred = rows - mean
        self._join(len(rows), mean, centred, float(centred.square().sum()))

    def include(self, state: tuple[int, Tensor, Tensor, float]) -> None:
        """Take the rows of another spectrum into account, given its `state`."""
        self._join(*state)

    @property
    def state(self) -> tuple[int, Tensor, Tensor, float]:
        """The number of rows, their mean, the components times their singular values, and `total`."""
        return self.count, self._mean, self._scaled, self.total

    def _join(self, count: int, mean: Tensor, centred: Tensor, total: float) -> None:
        if not count:
            return
        if self.count:
            weight = (self.count * count / (self.count + count)) ** 0.5
            shift = weight * (self._mean - mean)
            stacked = torch.cat([self._scaled, centred, shift.unsqueeze(0)])
            self.total += total + float(shift.square().sum())
            self._mean = (self.count * self._mean + count * mean) / (self.count + count)
        else:
            stacked, self.total, self._mean = centred, total, mean
        self.count += count
        if stacked.shape[0] > stacked.shape[1]:
            # The same singular values and right vectors, from a smaller matrix.
            stacked = torch.linalg.qr(stacked).R
        _, values, right = torch.linalg.svd(stacked, full_matrices=False)
        self._scaled = values[: self._most].unsqueeze(1) * right[: self._most]

    @property
    def directions(self) -> Tensor:
        """The unit vectors of the components, (components, features), the largest first."""
        norms = self._scaled.norm(dim=1, keepdim=True)
        return self._scaled / norms.clamp_min(torch.finfo(norms.dtype).tiny)

    @property
    def explained(self) -> Tensor:
        """The share of the variance that each component explains."""
        return self._scaled.square().sum(1) / (self.total or 1.0)


def ranks_by_variance(explained: dict[str, Tensor], rank: int, most: int) -> dict[str, int]:
    """Return the rank of every layer: those components of all layers that explain most of their layer's inputs.

    Args:
        explained: path -> the share of the variance that each component of the layer explains.
        rank: the mean rank.
        most: the largest rank of a layer.
    """
    ranked = [(float(share), path) for path, shares in explained.items() for share in shares[:most]]
    # Paths break ties, so that all processes agree.
    chosen = sorted(ranked, key=lambda pair: (-pair[0], pair[1]))[: rank * len(explained)]
    ranks = dict.fromkeys(explained, 0)
    for _, path in chosen:
        ranks[path] += 1
    return ranks


def corda(weight: Tensor, covariance: Tensor, rank: int, scale: float, *, smallest: bool) -> tuple[Tensor, Tensor]:
    """Return `down` and `up` of the components of `W C`, mapped back with the inverse of C.

    Args:
        weight: the weight, (out, in), in float32 or float64.
        covariance: the mean of the inputs' outer products, (in, in). It is damped until it can be inverted.
        rank: the number of components.
        scale: `alpha / rank`.
        smallest: whether to take the smallest components, which keeps what the inputs use (KPM), rather than the
            largest (IPM).
    """
    weight, covariance = weight.double(), covariance.double()
    identity = torch.eye(len(covariance), dtype=torch.float64, device=covariance.device)
    damping = _DAMPING
    while True:
        damped = covariance + damping * covariance.diagonal().mean().clamp_min(1e-30) * identity
        inverse, failed = torch.linalg.inv_ex(damped)
        if (not int(failed) and float((damped @ inverse - identity).norm()) < 0.05) or damping > _MOST_DAMPING:
            break
        damping *= 2
    left, values, right = torch.linalg.svd(weight @ damped, full_matrices=False)
    kept = slice(len(values) - rank, None) if smallest else slice(rank)
    roots = (values[kept] / scale).sqrt()
    return roots.unsqueeze(1) * (right[kept] @ inverse), left[:, kept] * roots


def lora_ga(gradient: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return `down`, the first right singular vectors of a gradient, and `up`, its next left ones, of the paper's size.

    Args:
        gradient: the gradient of the weight, (out, in). Its smaller side is at least twice the rank.
        rank: the rank.
    """
    left, _, right = torch.linalg.svd(gradient.double(), full_matrices=False)
    size = gradient.shape[0] ** 0.25 / _STABILITY**0.5
    return size * right[:rank], size * left[:, rank : 2 * rank]


def loftq(original: Tensor, quantised: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """Return `down` and `up` of the part of rank `rank` of a quantised weight's error that is largest.

    Args:
        original: the weight before quantisation, (out, in).
        quantised: the weight that the layer computes with, (out, in).
        rank: the rank.
        scale: `alpha / rank`.
    """
    left, values, right = torch.linalg.svd(original.double() - quantised.double(), full_matrices=False)
    roots = (values[:rank] / scale).sqrt()
    return roots.unsqueeze(1) * right[:rank], left[:, :rank] * roots
