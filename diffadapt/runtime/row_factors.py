"""The low-rank changes of a batch whose samples have few of many adapters each: every row meets only its own factors.

Side by side in one product, the factors of all adapters cost every row the ranks of all of them. Here the factors of
the adapters of each row are picked first, and the product is one per row, so a batch of mixed adapters costs about as
much arithmetic as one with a single adapter.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from diffadapt.runtime.adapter_layer import PreparedLayer
from diffadapt.types.layer_spec import LayerSpec
from diffadapt.types.tensor_ops import add, can_accumulate, scaled

Factors = tuple[Tensor, Tensor]


def add_by_row(shared: Sequence[tuple[PreparedLayer, Factors]], input: Tensor, output: Tensor) -> Tensor | None:
    """Return `output` plus the low-rank changes of `shared`; `None` if picking factors is no gain or not possible here.

    Args:
        shared: adapter layers of one dtype on a layer without groups, each with its factors (down, up).
        input: the input of the layer.
        output: the output of the layer; it may be overwritten.
    """
    layer = shared[0][0].layer
    if layer.spec.kind not in ("linear", "conv") or not layer.call.samples or torch.compiler.is_compiling():
        return None
    samples: list[frozenset[int]] = []
    for p, _ in shared:
        if p.layer.samples is None or p.gate.ndim != 1 or p.field is not None:
            return None
        samples.append(p.layer.samples)
    picks = _picks(tuple(samples), layer.call.samples)
    if picks is None:
        return None
    index = layer.call.spread(torch.tensor(picks, device=output.device), len(input))
    gate = torch.stack([p.gate for p, _ in shared], 1).gather(1, index)
    rank = max(len(down) for _, (down, _) in shared)
    downs = torch.stack([_padded(down.flatten(1), rank) for _, (down, _) in shared])
    ups = torch.stack([_padded(up.t(), rank) for _, (_, up) in shared])
    chosen = index.flatten()
    # (rows, adapters of a row x rank, columns)
    down = downs.index_select(0, chosen).view(len(index), -1, downs.shape[-1])
    up = ups.index_select(0, chosen).view(len(index), -1, ups.shape[-1])
    return _low_rank(layer.spec, shared[0][0].adapter_input(input), down, up, gate.repeat_interleave(rank, 1), output)


def _low_rank(spec: LayerSpec, input: Tensor, down: Tensor, up: Tensor, gate: Tensor, onto: Tensor) -> Tensor:
    """Return `onto` plus the low-rank change of every row, whose factors are (rank, in x kernel) and (rank, out)."""
    rows = len(input)
    if spec.kind == "linear":
        hidden = scaled(torch.bmm(input.reshape(rows, -1, input.shape[-1]), down.transpose(1, 2)), gate.unsqueeze(1))
        factors, shape = (hidden, up), (rows, -1, spec.out_features)
    else:
        hidden = spec.op_by_row(input, down)
        hidden = scaled(hidden.flatten(2), gate.unsqueeze(2))
        factors, shape = (up.transpose(1, 2), hidden), (rows, spec.out_features, -1)
    if can_accumulate(onto, hidden, up):
        onto.view(shape).baddbmm_(*factors)
        return onto
    return add(torch.bmm(*factors), onto.reshape(shape)).reshape(onto.shape)


def _padded(factor: Tensor, rank: int) -> Tensor:
    """Return a factor (rank, columns) with rows of zeros up to `rank`."""
    return factor if len(factor) == rank else F.pad(factor, (0, 0, 0, rank - len(factor)))


@lru_cache(maxsize=256)
def _picks(samples: tuple[frozenset[int], ...], count: int) -> list[list[int]] | None:
    """Return the numbers of the adapters of every sample, equally many for each; `None` if they are more than half.

    A sample with fewer adapters than others gets some that are not its own, whose gate is 0 there.

    Args:
        samples: for every adapter, the samples that have it in their mix.
        count: the number of samples.
    """
    own = [[number for number, having in enumerate(samples) if sample in having] for sample in range(count)]
    most = max(1, *map(len, own))
    if 2 * most > len(samples):
        return None
    others = ([number for number in range(len(samples)) if number not in numbers] for numbers in own)
    return [(numbers + rest)[:most] for numbers, rest in zip(own, others, strict=True)]
