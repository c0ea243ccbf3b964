"""Captions that are longer than what the text encoders read: the rest of them has no influence on the training."""

from collections.abc import Iterable
from typing import Any

from diffadapt.training.families import Pipeline

_UNLIMITED = 10**6
"""transformers gives tokenizers without a length of their own a very large one."""


def note_on_long_captions(pipe: Pipeline, captions: Iterable[str], max_tokens: int | None) -> str | None:
    """Return a sentence on the captions that are cut off; `None` if there are none.

    A pipeline with several text encoders reads as much of a caption as the one that reads most.

    Args:
        captions: the captions, with the trigger word.
        max_tokens: the pipeline's `max_sequence_length`; `None` if its text encoder has a fixed length.
    """
    limits = [(found, _limit(found, max_tokens)) for found in _tokenizers(pipe)]
    if not limits:
        return None
    tokenizer, most = max(limits, key=lambda found: found[1])
    lengths = {caption: _length(tokenizer, caption) for caption in dict.fromkeys(captions)}
    long = {caption: length for caption, length in lengths.items() if length > most}
    if not long:
        return None
    first, length = next(iter(long.items()))
    more = "" if max_tokens is None else ", or raise --max_sequence_length"
    return (
        f"{len(long)} of {len(lengths)} captions are cut off, because the text encoder reads {most} tokens: {first!r} "
        f"has {length}; shorten {'it' if len(long) == 1 else 'them'}{more}"
    )


def _tokenizers(pipe: Pipeline) -> list[Any]:
    parts = [part for name, part in pipe.components.items() if name.startswith("tokenizer") and part is not None]
    # A processor of text and pictures has a tokenizer.
    return parts or [part.tokenizer for part in pipe.components.values() if hasattr(part, "tokenizer")]


def _limit(tokenizer: Any, max_tokens: int | None) -> int:
    own = getattr(tokenizer, "model_max_length", None) or _UNLIMITED
    # CLIP reads its own length, whatever the pipeline is told.
    return own if max_tokens is None or own < max_tokens else max_tokens


def _length(tokenizer: Any, caption: str) -> int:
    """Return the number of tokens, without the warning of transformers that this is more than a model takes."""
    return len(tokenizer(caption, truncation=False, verbose=False)["input_ids"])
