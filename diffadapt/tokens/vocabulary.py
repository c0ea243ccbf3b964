"""Adding tokens to a tokenizer of transformers, spelling them out, and removing them, which transformers cannot do.

The id of an added token is its position after the vocabulary, so removing one changes the ids of those after it.

A token of several vectors is one word in a prompt but several ids. Most of diffusers' pipelines spell out such a token
before they call the tokenizer (`maybe_convert_prompt`): they replace it by the names of all its vectors. Some do not,
such as Stable Diffusion 3's, so the tokenizer spells out every token that is not spelled out yet.
"""

import json
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from diffadapt.runtime.class_mixing import Mixin, mix_, unmix_

_FURTHER_NAMES = "_diffadapt_rest"
"""Name of the entry in a tokenizer's `__dict__`: token of several vectors -> its further names."""


class _SpellsOut(Mixin):
    """A tokenizer that has tokens of several vectors, and spells them out in every text."""

    def __call__(self, text: Any = None, text_pair: Any = None, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(self._spelled(text), self._spelled(text_pair), *args, **kwargs)  # type: ignore[misc]

    def encode(self, text: Any, text_pair: Any = None, *args: Any, **kwargs: Any) -> Any:
        return super().encode(self._spelled(text), self._spelled(text_pair), *args, **kwargs)  # type: ignore[misc]

    def tokenize(self, text: Any, *args: Any, **kwargs: Any) -> Any:
        return super().tokenize(self._spelled(text), *args, **kwargs)  # type: ignore[misc]

    def _spelled(self, text: Any) -> Any:
        """Return a text, or a list of texts, with the further names of a token after its first name."""
        if isinstance(text, (list, tuple)):
            return type(text)(self._spelled(part) for part in text)  # type: ignore[arg-type]
        further_names: Mapping[str, tuple[str, ...]] = self.__dict__[_FURTHER_NAMES]
        # Most texts contain no such token. Case is ignored here because some tokenizers ignore it.
        if not isinstance(text, str) or not any(name.lower() in text.lower() for name in further_names):
            return text
        segments = [(name, end) for name, end in self._segments(text) if name is None or name.strip()]
        spelled, start = "", 0
        for position, (name, end) in enumerate(segments):
            names = further_names.get(name or "", ())
            if names and tuple(after for after, _ in segments[position + 1 : position + 1 + len(names)]) != names:
                spelled += text[start:end] + "".join(names)
                start = end
        return spelled + text[start:]

    def _segments(self, text: str) -> list[tuple[str | None, int]]:
        """Return the segments of a text, each with its end: added tokens by name, white space, `None` for the rest."""
        by_id = {index: name for name, index in added(self).items()}
        if hasattr(self, "_tokenizer"):
            options = {
                "add_special_tokens": False,
                "return_offsets_mapping": True,
                "truncation": False,
                "verbose": False,
            }
            found = super().__call__(text, **options)  # type: ignore[misc]
            ids, places = found["input_ids"], found["offset_mapping"]
            return [
                (by_id.get(index) or ("" if text[start:end].isspace() else None), end)
                for index, (start, end) in zip(ids, places, strict=True)
            ]
        segments: list[tuple[str | None, int]] = []
        end = 0
        for segment in self.tokens_trie.split(text):  # type: ignore[attr-defined]
            end += len(segment)
            segments.append((segment if segment in added(self) or segment.isspace() else None, end))
        return segments


class Numbering:
    """What stands in for the tokenizer of a model alone: new words have the ids after the rows of its embedding."""

    model_max_length = 1 << 30

    def __init__(self, rows: int) -> None:
        """
        Args:
            rows: the number of rows of the embedding.
        """
        self._rows = rows
        self.added_tokens_encoder: dict[str, int] = {}

    def __len__(self) -> int:
        return self._rows + len(self.added_tokens_encoder)

    def get_vocab(self) -> dict[str, int]:
        """Return the words that were added, the only ones that it knows."""
        return self.added_tokens_encoder

    def add_tokens(self, names: Iterable[str]) -> None:
        """Add words after all others."""
        for name in names:
            self.added_tokens_encoder.setdefault(name, len(self))

    def remove_tokens(self, names: Collection[str]) -> None:
        """Remove words; those after them move up."""
        kept = [name for name in self.added_tokens_encoder if name not in names]
        self.added_tokens_encoder = {}
        self.add_tokens(kept)


def names_of(token: str, count: int) -> tuple[str, ...]:
    """Return the names of a token's vectors, as diffusers spells out the token: `token`, `token_1`, `token_2`, ..."""
    return (token, *(f"{token}_{index}" for index in range(1, count)))


def added(tokenizer: Any) -> dict[str, int]:
    """Return the added tokens of a tokenizer and their ids."""
    return dict(tokenizer.added_tokens_encoder)


def add_(tokenizer: Any, names: Iterable[str]) -> None:
    """Add tokens to a tokenizer, in this order, after all that it has."""
    tokenizer.add_tokens(list(names))


def spell_out_(tokenizer: Any, rest: Mapping[str, tuple[str, ...]]) -> None:
    """Make a tokenizer spell out tokens of several vectors.

    Args:
        rest: token -> its further names, which follow it wherever it occurs in a text.
    """
    if rest and not isinstance(tokenizer, Numbering):
        tokenizer.__dict__[_FURTHER_NAMES] = {**tokenizer.__dict__.get(_FURTHER_NAMES, {}), **rest}
        mix_(tokenizer, _SpellsOut)


def remove_(tokenizer: Any, names: Collection[str]) -> None:
    """Remove added tokens from a tokenizer. Those after them move up, so that ids have no gaps."""
    if not names:
        return
    if _FURTHER_NAMES in tokenizer.__dict__:
        further_names = tokenizer.__dict__[_FURTHER_NAMES]
        left = {name: others for name, others in further_names.items() if name not in names}
        tokenizer.__dict__[_FURTHER_NAMES] = left
        if not left:
            del tokenizer.__dict__[_FURTHER_NAMES]
            unmix_(tokenizer)
    if isinstance(tokenizer, Numbering):
        tokenizer.remove_tokens(names)
        return
    removed = sorted(index for name, index in added(tokenizer).items() if name in names)

    def moved(index: int) -> int:
        return index - sum(other < index for other in removed)

    if hasattr(tokenizer, "_tokenizer"):
        backend = tokenizer._tokenizer
        content = json.loads(backend.to_str())
        kept = [token for token in content["added_tokens"] if token["id"] not in removed]
        content["added_tokens"] = [{**token, "id": moved(token["id"])} for token in kept]
        tokenizer._tokenizer = type(backend).from_str(json.dumps(content))
        return
    by_id = {moved(index): token for index, token in tokenizer._added_tokens_decoder.items() if index not in removed}
    tokenizer._added_tokens_decoder = by_id
    tokenizer._added_tokens_encoder = {token.content: index for index, token in by_id.items()}
    # A trie, which splits texts at added tokens, can only grow, so a new one is built.
    tokenizer.tokens_trie = type(tokenizer.tokens_trie)()
    tokenizer._update_trie()
    tokenizer._update_total_vocab_size()
