"""Copies in the memory of an arena, and scratch memory that is reused."""

import mmap

import pytest
import torch

from diffadapt.merging import memory
from diffadapt.merging.memory import Arena, Scratch


@pytest.mark.parametrize("large_pages", [True, False])
def test_copies_in_an_arena_do_not_overlap(large_pages: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_CHUNK", 1 << 12)
    if not large_pages:
        monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    arena, generator = Arena(), torch.Generator().manual_seed(0)
    shapes = [(3,), (5, 7), (), (0, 4), (2, 3, 2, 2), (90, 90), (1,)]
    dtypes = [torch.float64, torch.bfloat16, torch.float32, torch.float8_e4m3fn]
    sources = [torch.randn(shape, generator=generator).to(dtype) for dtype in dtypes for shape in shapes]
    sources.append(torch.randn(2, 4, 6, 6, generator=generator).to(memory_format=torch.channels_last))
    copies = [arena.copy(source) for source in sources]
    for source, copy in zip(sources, copies, strict=True):
        assert copy.dtype == source.dtype
        assert copy.is_contiguous()
        assert torch.equal(copy.double(), source.double())
    for number, copy in enumerate(copies):
        others = copies[:number] + copies[number + 1 :]
        before = [other.double() for other in others]
        copy.zero_()
        assert not copy.double().any()
        assert all(torch.equal(other.double(), old) for other, old in zip(others, before, strict=True))


def test_scratch_memory_is_reused() -> None:
    scratch = Scratch()
    first, second = scratch.like(torch.zeros(4, 4)), scratch.like(torch.zeros(4, 4), 1)
    assert first.untyped_storage().data_ptr() != second.untyped_storage().data_ptr()
    smaller = scratch.like(torch.zeros(3, 2, dtype=torch.bfloat16))
    assert (smaller.shape, smaller.dtype) == ((3, 2), torch.bfloat16)
    assert smaller.data_ptr() == first.data_ptr()
    assert scratch.like(torch.zeros(8, 8)).shape == (8, 8)
