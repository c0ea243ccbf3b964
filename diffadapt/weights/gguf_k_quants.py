"""Quantising to GGUF's K types, which the gguf package reads and does not write.

Layout: ggml `block_q4_K`, `block_q5_K` and `block_q6_K` (ggml-org/llama.cpp, `ggml-common.h`), a super-block of 256
numbers each. Scales are chosen by the range of every sub-block and not by llama.cpp's search, which costs a few percent
of the error.

| type | a number is | numbers with one s | bytes of a super-block |
|---|---|---|---|
| Q4_K | `d s q - m t`, q of 4 bits, s and t of 6 | 32 | d 2, m 2, s and t 12, q 128 |
| Q5_K | the same, q of 5 bits | 32 | d 2, m 2, s and t 12, high bits of q 32, low bits 128 |
| Q6_K | `d s (q - 32)`, q of 6 bits, s of 8 | 16 | low bits of q 128, high bits 64, s 16, d 2 |
"""

import torch
from torch import Tensor

NAMES = frozenset({"Q4_K", "Q5_K", "Q6_K"})
_SUPER_BLOCK = 256


def quantise(values: Tensor, name: str) -> Tensor:
    """Return packed bytes (rows, bytes) of float values (rows, columns); `name` is "Q4_K", "Q5_K" or "Q6_K"."""
    blocks = values.float().reshape(-1, _SUPER_BLOCK)
    packed = _six_bits(blocks) if name == "Q6_K" else _with_minima(blocks, 5 if name == "Q5_K" else 4)
    return packed.reshape(values.shape[0], -1)


def _with_minima(blocks: Tensor, bits: int) -> Tensor:
    subs = blocks.view(-1, 8, 32)
    low = subs.amin(2).clamp_max(0)
    scale, minimum = (subs.amax(2) - low).clamp_min(0) / (2**bits - 1), -low
    d, s = _shared(scale, 63)
    m, t = _shared(minimum, 63)
    step, offset = d.float() * s, m.float() * t
    numbers = _divided(subs + offset.unsqueeze(2), step.unsqueeze(2)).round().clamp(0, 2**bits - 1).to(torch.uint8)
    s, t = s.to(torch.uint8), t.to(torch.uint8)
    first = torch.cat([s[:, :4] | (s[:, 4:] >> 4 << 6), t[:, :4] | (t[:, 4:] >> 4 << 6)], 1)
    scales = torch.cat([first, (s[:, 4:] & 15) | ((t[:, 4:] & 15) << 4)], 1)
    pairs = numbers.view(-1, 4, 2, 32)
    parts = [d.view(torch.uint8), m.view(torch.uint8), scales]
    if bits == 5:
        high = (numbers >> 4) << torch.arange(8, dtype=torch.uint8, device=blocks.device).view(1, 8, 1)
        parts.append(high.sum(1).to(torch.uint8))
    parts.append(((pairs[:, :, 0] & 15) | ((pairs[:, :, 1] & 15) << 4)).flatten(1))
    return torch.cat(parts, 1)


def _six_bits(blocks: Tensor) -> Tensor:
    subs = blocks.view(-1, 16, 16)
    largest = subs.gather(2, subs.abs().argmax(2, keepdim=True)).squeeze(2)
    # The number furthest from zero becomes -32, as there are 32 steps below zero and 31 above.
    scale = largest / -32
    d = (scale.abs().amax(1, keepdim=True) / 127).half()
    s = _divided(scale, d.float()).round().clamp(-128, 127)
    step = (d.float() * s).unsqueeze(2)
    numbers = (_divided(subs, step).round().clamp(-32, 31) + 32).to(torch.uint8).view(-1, 2, 4, 32)
    low = (numbers[:, :, :2] & 15) | ((numbers[:, :, 2:] & 15) << 4)
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=blocks.device).view(1, 1, 4, 1)
    high = ((numbers >> 4) << shifts).sum(2).to(torch.uint8)
    return torch.cat([low.flatten(1), high.flatten(1), s.to(torch.int8).view(torch.uint8), d.view(torch.uint8)], 1)


def _shared(values: Tensor, largest: int) -> tuple[Tensor, Tensor]:
    """Return a float16 factor for every row and integers with which it gives the values."""
    factor = (values.amax(1, keepdim=True) / largest).half()
    return factor, _divided(values, factor.float()).round().clamp(0, largest)


def _divided(values: Tensor, by: Tensor) -> Tensor:
    return torch.where(by == 0, torch.zeros(()), values / torch.where(by == 0, torch.ones(()), by))
