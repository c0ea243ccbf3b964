"""State dicts of models in the layout in which they were published."""

import torch
from torch import Tensor, nn

from tests.support.dialects import original_names


def in_original_layout(model: nn.Module, prefix: str) -> dict[str, Tensor]:
    """Return a model's state dict with the names and fused layers of its original layout."""
    state, found = model.state_dict(), dict[str, Tensor]()
    for name, (parts, swapped) in original_names(model).items():
        for kind in ("weight", "bias"):
            tensors = [state.pop(key) for part in parts if (key := f"{part}.{kind}") in state]
            if tensors:
                joined = torch.cat(tensors)
                found[f"{prefix}{name}.{kind}"] = joined.roll(len(joined) // 2, 0) if swapped else joined
    return found | {prefix + key: tensor for key, tensor in state.items()}
