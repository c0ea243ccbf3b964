"""The tokens that an adapter brings to a text encoder: their names and vectors."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffadapt.runtime.adapter import Adapter
from diffadapt.runtime.adapter_layer import BANK
from diffadapt.runtime.bank import bank_of
from diffadapt.tokens import vocabulary

CHILD = "learned tokens"
"""Name of an adapter's child that holds its tokens; no module path of a model has such a part."""


class Token(NamedTuple):
    """One token: its name, what files call its text encoder, and its number of rows.

    Attributes:
        written: "" for a token that the text encoder reads zeros for.
        output: what files call the text encoder's output, "" for a token that has no vectors for it.
    """

    name: str
    written: str
    rows: int
    output: str = ""


class LearnedTokens(nn.Module):
    """The tokens that one adapter brings to one text encoder.

    Attributes:
        tokens: in the order of their rows.
        tokenizer: that knows them while they are installed; `None` where there is only a file.
        vectors: (rows, width), a row for every name.
        outputs: the same for the output of the text encoder, `None` where no token has any.
        ids: (rows,), the tokenizer's present ids of the names, -1 for one that it does not know.
        scale: constant that the embedding multiplies with what it looks up.
    """

    ids: Tensor
    _replaced: Tensor

    def __init__(
        self,
        tokens: Sequence[Token],
        vectors: Tensor,
        outputs: Tensor | None = None,
        tokenizer: Any = None,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.scale = scale
        self.tokens = tuple(tokens)
        self.tokenizer = tokenizer
        self.names = tuple(name for token in tokens for name in vocabulary.names_of(token.name, token.rows))
        self.vectors = nn.Parameter(vectors, requires_grad=False)
        self.outputs = None if outputs is None else nn.Parameter(outputs, requires_grad=False)
        replaced = torch.tensor([bool(token.output) for token in tokens for _ in range(token.rows)])
        self.register_buffer("_replaced", replaced.to(vectors.device), persistent=False)
        self._numbers = [-1] * len(self.names)
        self.register_buffer("ids", torch.full((len(self.names),), -1, device=vectors.device), persistent=False)

    def number(self) -> None:
        """Read the ids from the tokenizer."""
        known = vocabulary.added(self.tokenizer)
        numbers = [known.get(name, -1) for name in self.names]
        if numbers != self._numbers:
            # In place, as a compiled text encoder holds the tensor.
            self.ids.copy_(torch.tensor(numbers))
            self._numbers = numbers

    def holds(self, ids: Tensor) -> Tensor:
        """Whether each of `ids` is one of these."""
        return (ids.unsqueeze(-1) == self.ids.to(ids.device)).any(-1)

    def forward(self, ids: Tensor, embedded: Tensor) -> Tensor:
        """`embedded` (*ids.shape, width) with the vectors of these tokens where `ids` are theirs."""
        found = ids.unsqueeze(-1) == self.ids.to(ids.device)
        rows = F.embedding(found.int().argmax(-1), self.vectors.to(embedded.device, embedded.dtype))
        return torch.where(found.any(-1, keepdim=True), rows if self.scale == 1.0 else rows * self.scale, embedded)

    def replaced(self, ids: Tensor, output: Any) -> Any:
        """What a text encoder gives for `ids`, its hidden states with the vectors of these tokens in their places."""
        if isinstance(output, tuple):
            return tuple(self._replaced_in(ids, value) for value in output)  # type: ignore[misc]
        for name, value in output.items():
            output[name] = self._replaced_in(ids, value)
        return output

    def _replaced_in(self, ids: Tensor, value: Any) -> Any:
        assert self.outputs is not None
        if isinstance(value, tuple):
            # The first of the hidden states are the embeddings.
            first, *others = value  # type: ignore[misc]
            return (first, *(self._replaced_in(ids, state) for state in others))  # type: ignore[misc]
        if not isinstance(value, Tensor) or value.shape != (*ids.shape, self.outputs.shape[1]):
            return value  # type: ignore[misc]
        found = (ids.unsqueeze(-1) == self.ids.to(ids.device)) & self._replaced.to(ids.device)
        found = found.to(value.device)
        rows = F.embedding(found.int().argmax(-1), self.outputs.to(value.device, value.dtype))
        return torch.where(found.any(-1, keepdim=True), rows, value)

    @property
    def by_token(self) -> dict[Token, tuple[Tensor, Tensor | None]]:
        """The vectors of each token, (rows, width), for the text encoder and for its output."""
        sizes = [token.rows for token in self.tokens]
        given = (None,) * len(sizes) if self.outputs is None else self.outputs.detach().split(sizes)
        return {
            token: (vectors, output if token.output else None)
            for token, vectors, output in zip(self.tokens, self.vectors.detach().split(sizes), given, strict=True)
        }

    @property
    def state(self) -> dict[tuple[str, str], Tensor]:
        """What a file would say of them, as in `AdapterState.embeddings`."""
        found: dict[tuple[str, str], Tensor] = {}
        for token, (vectors, output) in self.by_token.items():
            if token.written:
                found[token.name, token.written] = vectors.clone()
            if output is not None:
                found[token.name, token.output] = output.clone()
        return found

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        # A state dict of the text encoder is the base model's and says nothing of adapters.
        if BANK not in prefix.split("."):
            super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def learned_tokens_of(adapter: Adapter) -> LearnedTokens | None:
    """The tokens that an adapter brings to its model."""
    tokens = adapter._modules.get(CHILD)
    return tokens if isinstance(tokens, LearnedTokens) else None


def vectors_by_token(learned: Iterable[LearnedTokens]) -> dict[str, int]:
    """Token -> its number of vectors, in the text encoder where it has most."""
    counts: dict[str, int] = {}
    for tokens in learned:
        for token in tokens.tokens:
            counts[token.name] = max(token.rows, counts.get(token.name, 0))
    return counts


def tokens_by_adapter(model: nn.Module) -> dict[str, LearnedTokens]:
    """Tokens by adapter."""
    bank = bank_of(model)
    adapters = {} if bank is None else bank.adapters
    return {name: tokens for name, adapter in adapters.items() if (tokens := learned_tokens_of(adapter)) is not None}
