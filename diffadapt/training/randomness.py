"""Random numbers as a function of the seed and the running number of a sample.

Nothing random depends on what was drawn before. So processes, accumulation, caches, background workers and resumed runs
agree without saved generators.
"""

import hashlib

import numpy as np
import torch
from torch import Tensor


def seed_of(*key: object) -> int:
    """Return a seed of 63 bits for a key: the seed of the run, a number, the purpose, ..."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def chance(*key: object) -> np.random.Generator:
    """Return a generator of numbers for a key."""
    return np.random.default_rng(seed_of(*key))


def generator(*key: object) -> torch.Generator:
    """Return a generator of tensors on the CPU for a key."""
    return torch.Generator().manual_seed(seed_of(*key))


def normal(shape: torch.Size | tuple[int, ...], *key: object) -> Tensor:
    """Return standard normal noise, float32, on the CPU: the same on every device, whatever the memory format."""
    return torch.randn(shape, generator=generator(*key))


def uniform(*key: object) -> float:
    """Return a number in [0, 1) for a key."""
    return float(chance(*key).random())
