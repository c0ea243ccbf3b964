"""Measure what training a few tokens costs: memory and time of a step, against the frozen text encoder.

    python -m scripts.bench_tokens                       # a T5-XXL-shaped embedding of 32128 x 4096, 8 tokens
    python -m scripts.bench_tokens --rows 250000 --width 768 --tokens 16

The reference is the same step without tokens: forward and backward through the embedding and one block, whose input
requires a gradient, so that both steps run the same backward pass.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

import diffadapt


class Encoder(nn.Module):
    """An embedding and one feed-forward block, as in a text encoder."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(rows, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, ids: Tensor, shift: Tensor) -> Tensor:
        hidden = self.embedding(ids) + shift
        return hidden + self.down(torch.relu(self.up(hidden)))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=32128)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--length", type=int, default=128, help="tokens of a prompt")
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()

    torch.manual_seed(0)
    model = Encoder(options.rows, options.width).requires_grad_(False)
    ids = torch.randint(options.rows, (1, options.length))
    trained = ids[0, : options.tokens].unique().tolist()
    shift = torch.zeros(options.width, requires_grad=True)

    def step(optimizer: torch.optim.Optimizer | None) -> None:
        model(ids, shift).square().mean().backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()
        shift.grad = None

    config = diffadapt.TokensConfig(target_modules=["embedding"], token_indices=trained)
    adapter = diffadapt.add_adapter(model, config)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-3)
    step(optimizer)
    step(None)
    added = added_bytes(adapter, optimizer)
    gradients = sum(p.numel() * p.element_size() for p in adapter.parameters())
    print(f"{len(trained)} tokens of {options.width} features in an embedding of {options.rows} rows")
    print(f"parameters, gradients and optimiser state: {(added + gradients) / 2**20:.3f} MiB")

    adapters = diffadapt.adapters(model)
    frozen: list[float] = []
    training: list[float] = []
    for _ in range(options.repeats):
        # Both in turn, so that a busy machine slows down both.
        adapters.deactivate()
        frozen.append(seconds(lambda: step(None)))
        adapters.activate("default")
        training.append(seconds(lambda: step(optimizer)))
    print(
        f"step: {min(training) * 1000:.1f} ms, frozen {min(frozen) * 1000:.1f} ms, ratio {ratio(training, frozen):.3f}"
    )


def added_bytes(adapter: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Return the bytes of parameters, buffers and optimiser state."""
    state = [value for found in optimizer.state.values() for value in found.values() if isinstance(value, Tensor)]
    tensors = [*adapter.parameters(), *adapter.buffers(), *state]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def seconds(run: Callable[[], None]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def ratio(first: list[float], second: list[float]) -> float:
    """Return the median of the ratios of pairs measured one after the other."""
    return statistics.median(a / b for a, b in zip(first, second, strict=True))


if __name__ == "__main__":
    main()
