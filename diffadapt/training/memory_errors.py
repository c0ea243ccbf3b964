"""What to do when the memory is too small for a run."""

from collections.abc import Generator
from contextlib import contextmanager

import torch

from diffadapt.errors import UsageError

_ADVICE = (
    "In this order, --cache_latents, --gradient_checkpointing, a smaller --train_batch_size (with more "
    "--gradient_accumulation_steps), --mixed_precision bf16, --base_precision fp8 or nf4, and a smaller --resolution "
    "need less"
)


@contextmanager
def explained_memory_errors() -> Generator[None, None, None]:
    """Raise a `UsageError` that says what to do instead of an error about memory in the `with` block."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise UsageError(f"there is too little memory ({_first_line(error)}). {_ADVICE}") from error
    except RuntimeError as error:
        # torch has no class of its own for an allocation that fails on the CPU.
        if "DefaultCPUAllocator" not in str(error):
            raise
        raise UsageError(f"there is too little memory ({_first_line(error)}). {_ADVICE}") from error


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
