"""Tokens added to a tokenizer of transformers, and taken out again, which transformers itself cannot do.

An added token's id is its place behind the vocabulary, so taking one out moves those behind it.
"""

import json
from collections.abc import Collection, Iterable
from typing import Any


def names_of(token: str, count: int) -> tuple[str, ...]:
    """The names of a token of several vectors, as diffusers spells a prompt out: `token`, `token_1`, `token_2`."""
    return (token, *(f"{token}_{index}" for index in range(1, count)))


def added(tokenizer: Any) -> dict[str, int]:
    """The ids of all added tokens."""
    return dict(tokenizer.added_tokens_encoder)


def add_(tokenizer: Any, names: Iterable[str]) -> None:
    """Add tokens, one after the other, behind all others."""
    tokenizer.add_tokens(list(names))


def remove_(tokenizer: Any, names: Collection[str]) -> None:
    """Take added tokens out again; those behind them move up, so that ids have no gaps."""
    if not names:
        return
    gone = sorted(index for name, index in added(tokenizer).items() if name in names)

    def moved(index: int) -> int:
        return index - sum(other < index for other in gone)

    if hasattr(tokenizer, "_tokenizer"):
        backend = tokenizer._tokenizer
        content = json.loads(backend.to_str())
        kept = [token for token in content["added_tokens"] if token["id"] not in gone]
        content["added_tokens"] = [{**token, "id": moved(token["id"])} for token in kept]
        tokenizer._tokenizer = type(backend).from_str(json.dumps(content))
        return
    by_id = {moved(index): token for index, token in tokenizer._added_tokens_decoder.items() if index not in gone}
    tokenizer._added_tokens_decoder = by_id
    tokenizer._added_tokens_encoder = {token.content: index for index, token in by_id.items()}
    # The trie that splits a prompt at added tokens can only grow.
    tokenizer.tokens_trie = type(tokenizer.tokens_trie)()
    tokenizer._update_trie()
    tokenizer._update_total_vocab_size()
