"""Leaving `torch.inference_mode`, whose tensors can be neither written nor trained once it has ended."""

from collections.abc import Generator
from contextlib import contextmanager

import torch


@contextmanager
def ordinary_tensors() -> Generator[None, None, None]:
    """Make tensors that are created in this block ordinary ones, also inside `torch.inference_mode`."""
    # A graph is not traced in inference mode, and cannot ask for it.
    if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled():
        yield
        return
    # Leaving inference mode turns gradients on.
    with torch.inference_mode(False), torch.no_grad():
        yield
