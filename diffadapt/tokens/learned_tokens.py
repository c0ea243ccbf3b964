"""The learned tokens that an adapter brings to a text encoder: their names and vectors."""

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
"""Name of the child of an adapter that holds its learned tokens. Module paths of models contain no space."""


class Token(NamedTuple):
    """One learned token.

    Attributes:
        name: the word in the prompt.
        written: what files call the text encoder ("clip_l"); "" if the file has only vectors for its output, so that
            the text encoder reads zeros.
        rows: the number of vectors.
        output: what files call the output of the text encoder ("clip_l_out"); "" if there are no vectors for it.
    """

    name: str
    written: str
    rows: int
    output: str = ""


class LearnedTokens(nn.Module):
    """The tokens that one adapter brings to one text encoder.

    Attributes:
        tokens: the tokens, in the order of their rows.
        names: one name for every row; see `vocabulary.names_of`.
        tokenizer: the tokenizer that knows the names while they are installed; `None` if they are not to be installed.
        vectors: the embeddings that the text encoder reads, of shape (rows, width).
        outputs: the vectors that replace the hidden states of the text encoder, of shape (rows, width), with zeros for
            tokens that have none; `None` if no token has any.
        ids: the tokenizer's present ids of the names, of shape (rows,); -1 for a name that it does not know.
        scale: the constant by which the token embedding multiplies what it looks up.
    """

    ids: Tensor
    _has_output: Tensor

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
        has_output = torch.tensor([bool(token.output) for token in tokens for _ in range(token.rows)])
        self.register_buffer("_has_output", has_output.to(vectors.device), persistent=False)
        self._known_ids = [-1] * len(self.names)
        self.register_buffer("ids", torch.full((len(self.names),), -1, device=vectors.device), persistent=False)

    def refresh_ids(self) -> None:
        """Read the ids of the names from the tokenizer."""
        known = vocabulary.added(self.tokenizer)
        ids = [known.get(name, -1) for name in self.names]
        if ids != self._known_ids:
            # In place, since a compiled text encoder is bound to this tensor.
            self.ids.copy_(torch.tensor(ids))
            self._known_ids = ids

    def holds(self, ids: Tensor) -> Tensor:
        """Return a boolean tensor in the shape of `ids` that is true for the ids of these tokens."""
        return (ids.unsqueeze(-1) == self.ids.to(ids.device)).any(-1)

    def forward(self, ids: Tensor, embedded: Tensor) -> Tensor:
        """Return `embedded`, of shape (*ids.shape, width), with the vectors of these tokens at their ids."""
        found = ids.unsqueeze(-1) == self.ids.to(ids.device)
        rows = F.embedding(found.int().argmax(-1), self.vectors.to(embedded.device, embedded.dtype))
        return torch.where(found.any(-1, keepdim=True), rows if self.scale == 1.0 else rows * self.scale, embedded)

    def replaced(self, ids: Tensor, output: Any) -> Any:
        """Return the output of the text encoder for `ids`, with `outputs` in its hidden states at these tokens."""
        if isinstance(output, tuple):
            return tuple(self._replaced_in(ids, value) for value in output)  # type: ignore[misc]
        for name, value in output.items():
            output[name] = self._replaced_in(ids, value)
        return output

    def _replaced_in(self, ids: Tensor, value: Any) -> Any:
        """Return one value of the output, unchanged if it is not a hidden state or a tuple of them."""
        assert self.outputs is not None
        if isinstance(value, tuple):
            # The first hidden state is the embeddings.
            first, *others = value  # type: ignore[misc]
            return (first, *(self._replaced_in(ids, state) for state in others))  # type: ignore[misc]
        if not isinstance(value, Tensor) or value.shape != (*ids.shape, self.outputs.shape[1]):
            return value  # type: ignore[misc]
        found = (ids.unsqueeze(-1) == self.ids.to(ids.device)) & self._has_output.to(ids.device)
        found = found.to(value.device)
        rows = F.embedding(found.int().argmax(-1), self.outputs.to(value.device, value.dtype))
        return torch.where(found.any(-1, keepdim=True), rows, value)

    @property
    def by_token(self) -> dict[Token, tuple[Tensor, Tensor | None]]:
        """The vectors of each token for the text encoder and for its output, of shape (rows, width)."""
        sizes = [token.rows for token in self.tokens]
        outputs = (None,) * len(sizes) if self.outputs is None else self.outputs.detach().split(sizes)
        return {
            token: (vectors, output if token.output else None)
            for token, vectors, output in zip(self.tokens, self.vectors.detach().split(sizes), outputs, strict=True)
        }

    @property
    def state(self) -> dict[tuple[str, str], Tensor]:
        """A copy of the vectors, as they are written to a file; see `AdapterState.embeddings`."""
        found: dict[tuple[str, str], Tensor] = {}
        for token, (vectors, output) in self.by_token.items():
            if token.written:
                found[token.name, token.written] = vectors.clone()
            if output is not None:
                found[token.name, token.output] = output.clone()
        return found

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        # A state dict of the text encoder is that of the base model and contains no adapters.
        if BANK not in prefix.split("."):
            super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def learned_tokens_of(adapter: Adapter) -> LearnedTokens | None:
    """Return the tokens that an adapter brings to its model, or `None` if it brings none."""
    tokens = adapter._modules.get(CHILD)
    return tokens if isinstance(tokens, LearnedTokens) else None


def vectors_by_token(learned: Iterable[LearnedTokens]) -> dict[str, int]:
    """Return the number of vectors of each token name, the largest if text encoders have different numbers."""
    counts: dict[str, int] = {}
    for tokens in learned:
        for token in tokens.tokens:
            counts[token.name] = max(token.rows, counts.get(token.name, 0))
    return counts


def tokens_by_adapter(model: nn.Module) -> dict[str, LearnedTokens]:
    """Return the learned tokens of each adapter of a model that brings any."""
    bank = bank_of(model)
    adapters = {} if bank is None else bank.adapters
    return {name: tokens for name, adapter in adapters.items() if (tokens := learned_tokens_of(adapter)) is not None}
