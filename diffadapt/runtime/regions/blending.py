"""Sums that are weighted by position, exact where the weight is 0 or 1."""

import torch
from torch import Tensor


def blended(start: Tensor, end: Tensor, field: Tensor) -> Tensor:
    """Return `start + field * (end - start)`, computed in float32 or wider.

    Where the field is 0, the result is `start`, and where it is 1, it is `end`, bit for bit.
    """
    dtype = torch.promote_types(start.dtype, end.dtype)
    wide = torch.promote_types(dtype, torch.float32)
    # `lerp` starts from the end that is closer.
    return torch.lerp(start.to(wide), end.to(wide), field.to(wide)).to(dtype)


def advanced(total: Tensor, before: Tensor, after: Tensor, field: Tensor | None) -> Tensor:
    """Return `total + field * (after - before)`; a field of `None` is 1 everywhere.

    Where the field is 1 and `total` is `before`, the result is `after`, bit for bit. So is a sequence of steps.
    """
    end = after if total is before else torch.where(total == before, after, total + (after - before))
    return end if field is None else blended(total, end, field)
