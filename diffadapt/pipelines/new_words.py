"""The public function that adds new words to the text encoders of a pipeline."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from diffadapt.management.owner import Owner
from diffadapt.management.words import add_words_
from diffadapt.pipelines.components import unwrapped
from diffadapt.pipelines.entry import adapters_of
from diffadapt.runtime.adapter import Adapter
from diffadapt.tokens.encoders import token_embedding
from diffadapt.tokens.learned_tokens import tokens_by_adapter
from diffadapt.tokens.new_words import Start
from diffadapt.tokens.vocabulary import Numbering

_ROLE = "text_encoder"


def add_tokens(
    owner: Any,
    words: Mapping[str, Start],
    name: str = "default",
    *,
    components: Iterable[str] | None = None,
    tokenizer: Any = None,
    generator: torch.Generator | None = None,
) -> Adapter | dict[str, Adapter]:
    """Add new words, each with vectors of its own to train, to the text encoders of a pipeline.

    The words are known to the tokenizers from now on, until the adapter is removed. The parameters of the adapter are
    the vectors, (count, width) in float32; the embedding itself stays as it is and is not copied. If the text encoder
    has an adapter of this name already, the words become part of it.

    Args:
        owner: a pipeline, or a text encoder.
        words: new word -> what it starts from: a number of vectors, drawn with the embedding's own mean and spread; a
            known word or a list of them, for one vector, their mean; `(number, word)` for several; or a tensor (count,
            width).
        name: name of the adapter.
        components: the text encoders that get the words; defaults to all.
        tokenizer: the tokenizer of a text encoder that is given alone. Without it, the vectors have the ids after the
            rows of the embedding, in the order of `words`, and cannot start from words.
        generator: draws the vectors that start from no word. Defaults to a new one with seed 0.

    Returns:
        The adapter or, if several text encoders get the words, component -> adapter.

    Raises:
        AdapterError: a word that a tokenizer knows already, a start that it does not know, a name in use, or a merged
            adapter. Nothing has changed then.
    """
    if isinstance(owner, nn.Module):
        model = unwrapped(owner)
        tokenizers = {_ROLE: tokenizer or _numbering(model)}
        models = Owner(lambda: {_ROLE: model}, tokenizers=lambda: tokenizers, qualified=False)
    else:
        models = adapters_of(owner).owner
    found = add_words_(models, words, name, components, generator)
    return next(iter(found.values())) if len(found) == 1 else found


def _numbering(model: nn.Module) -> Numbering:
    """Return what numbers the words of a model without a tokenizer: that of earlier words, or a new one."""
    present = [tokens.tokenizer for tokens in tokens_by_adapter(model).values()]
    return present[0] if present else Numbering(token_embedding(model).num_embeddings)
