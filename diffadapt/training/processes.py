"""Several processes that train one adapter: the same numbers as one process with as many batches to accumulate."""

import os
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from diffadapt.errors import UsageError
from diffadapt.training.block_checkpointing import blocks_of


def is_distributed() -> bool:
    """Return whether there are other processes."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def refuse_deepspeed() -> None:
    """Raise `UsageError` if accelerate's config asks for DeepSpeed, whose engine would have to run the whole step.

    It spreads the state of the optimiser over processes, and an adapter has hardly any.
    """
    if _asks_for("ACCELERATE_USE_DEEPSPEED"):
        raise UsageError(
            "accelerate's config asks for DeepSpeed, which the trainer does not support: an adapter has hardly any "
            "optimiser state to spread; run `accelerate config` again and choose multi-GPU, or FSDP to spread the base"
        )


def _asks_for(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("1", "true")


def shard_base(model: nn.Module) -> None:
    """Spread the frozen weights of a model's blocks over the processes if accelerate's config asks for FSDP.

    The adapters are in no block, so they stay whole, and are trained and saved as without FSDP.
    """
    if not _asks_for("ACCELERATE_USE_FSDP") or not is_distributed():
        return
    from torch.distributed.fsdp import fully_shard

    for block in blocks_of(model):
        fully_shard(block)


def sum_gradients(parameters: Sequence[Tensor]) -> None:
    """Add up the gradients of all processes.

    An adapter is small, so this takes one exchange of a flat tensor per step. A parameter without a gradient in every
    process keeps none: its layer had no part in the loss.
    """
    if not is_distributed():
        return
    flat = torch.cat([
        torch.zeros_like(p, dtype=torch.float32).flatten() if p.grad is None else p.grad.float().flatten()
        for p in parameters
    ] + [torch.tensor([float(p.grad is not None) for p in parameters], device=parameters[0].device)])  # fmt: skip
    dist.all_reduce(flat)
    present = flat[-len(parameters) :].tolist()
    first = 0
    for parameter, count in zip(parameters, present, strict=True):
        part = flat[first : first + parameter.numel()].view_as(parameter)
        first += parameter.numel()
        if count:
            parameter.grad = part.to(parameter.dtype)


def sum_of(values: list[float], device: torch.device) -> list[float]:
    """Return the sums of numbers over all processes."""
    if not is_distributed():
        return values
    total = torch.tensor(values, dtype=torch.float32, device=device)
    dist.all_reduce(total)
    return total.tolist()


def mean_of(value: Tensor) -> Tensor:
    """Return the mean of a value over all processes."""
    if not is_distributed():
        return value
    value = value.detach().clone()
    dist.all_reduce(value)
    return value / dist.get_world_size()
