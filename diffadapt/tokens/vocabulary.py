"""Tokens added to a tokenizer of transformers, and taken out again, which transformers itself cannot do.

An added token's id is its place behind the vocabulary, so taking one out moves those behind it.

A token of several vectors is one word of a prompt and several ids. Of diffusers' pipelines most spell prompts out
themselves (`maybe_convert_prompt`) and others, as Stable Diffusion 3's, do not, so the tokenizer does: what is spelled
out it leaves.
"""

import json
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from diffadapt.runtime.class_mixing import Mixin, mixed, own_class

_REST = "_diffadapt_rest"


class _SpellsOut(Mixin):
    """Mixed into the class of a tokenizer that knows tokens of several vectors."""

    def __call__(self, text: Any = None, text_pair: Any = None, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(self._spelled(text), self._spelled(text_pair), *args, **kwargs)  # type: ignore[misc]

    def encode(self, text: Any, text_pair: Any = None, *args: Any, **kwargs: Any) -> Any:
        return super().encode(self._spelled(text), self._spelled(text_pair), *args, **kwargs)  # type: ignore[misc]

    def tokenize(self, text: Any, *args: Any, **kwargs: Any) -> Any:
        return super().tokenize(self._spelled(text), *args, **kwargs)  # type: ignore[misc]

    def _spelled(self, text: Any) -> Any:
        if isinstance(text, (list, tuple)):
            return type(text)(self._spelled(part) for part in text)  # type: ignore[arg-type]
        rest: Mapping[str, tuple[str, ...]] = self.__dict__[_REST]
        # Most prompts have none; tokenizers ignore case or not.
        if not isinstance(text, str) or not any(name.lower() in text.lower() for name in rest):
            return text
        segments = [(name, end) for name, end in self._segments(text) if name is None or name.strip()]
        spelled, start = "", 0
        for position, (name, end) in enumerate(segments):
            names = rest.get(name or "", ())
            if names and tuple(after for after, _ in segments[position + 1 : position + 1 + len(names)]) != names:
                spelled += text[start:end] + "".join(names)
                start = end
        return spelled + text[start:]

    def _segments(self, text: str) -> list[tuple[str | None, int]]:
        """The added tokens in a text and what is between them (`None`, or white space), each with its end."""
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


def names_of(token: str, count: int) -> tuple[str, ...]:
    """The names of a token of several vectors, as diffusers spells a prompt out: `token`, `token_1`, `token_2`."""
    return (token, *(f"{token}_{index}" for index in range(1, count)))


def added(tokenizer: Any) -> dict[str, int]:
    """The ids of all added tokens."""
    return dict(tokenizer.added_tokens_encoder)


def add_(tokenizer: Any, names: Iterable[str]) -> None:
    """Add tokens, one after the other, behind all others."""
    tokenizer.add_tokens(list(names))


def spell_out_(tokenizer: Any, rest: Mapping[str, tuple[str, ...]]) -> None:
    """Make these tokens stand for themselves and the rest of their names wherever they occur in a text."""
    if rest:
        tokenizer.__dict__[_REST] = {**tokenizer.__dict__.get(_REST, {}), **rest}
        tokenizer.__class__ = mixed(own_class(tokenizer), _SpellsOut)


def remove_(tokenizer: Any, names: Collection[str]) -> None:
    """Take added tokens out again; those behind them move up, so that ids have no gaps."""
    if not names:
        return
    if _REST in tokenizer.__dict__:
        rest = tokenizer.__dict__[_REST]
        tokenizer.__dict__[_REST] = left = {name: others for name, others in rest.items() if name not in names}
        if not left:
            del tokenizer.__dict__[_REST]
            tokenizer.__class__ = own_class(tokenizer)
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
