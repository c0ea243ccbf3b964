"""New words with vectors to train: what they start from, and their tokens in the tokenizer of a text encoder."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from diffadapt.errors import AdapterError
from diffadapt.runtime.base_weight import BaseWeight
from diffadapt.runtime.foreign_hooks import execution_device
from diffadapt.tokens.encoders import token_embedding
from diffadapt.tokens.learned_tokens import LearnedTokens, Token, tokens_by_adapter
from diffadapt.tokens.plan import Draft
from diffadapt.tokens.vocabulary import Numbering
from diffadapt.types.layer_spec import LayerSpec

Words: TypeAlias = str | Sequence[str]
Start: TypeAlias = int | Words | tuple[int, Words] | Tensor
"""What a new word starts from:

* a number: so many vectors, drawn with the mean and the spread that each feature has in the embedding;
* a word, or several: one vector, the mean of the vectors of their tokens;
* (a number, a word or several): so many such vectors;
* a tensor (count, width): these vectors.
"""


def new_words(
    component: str,
    model: nn.Module,
    tokenizer: Any,
    words: Mapping[str, Start],
    written: str,
    generator: torch.Generator,
) -> LearnedTokens:
    """Return new words for a text encoder, with trainable float32 vectors, not installed yet.

    Args:
        component: the component of the text encoder, for messages.
        model: the text encoder.
        tokenizer: its tokenizer.
        words: new word -> what it starts from.
        written: what files call the text encoder ("clip_l").
        generator: draws the vectors that start from no word.

    Raises:
        AdapterError: a word that the tokenizer knows, or a start that it does not know or that has another width.
    """
    embedding = token_embedding(model)
    spec = LayerSpec.of(embedding)
    assert spec is not None
    starts = _Starts(component, model, tokenizer, BaseWeight(embedding, spec), embedding.num_embeddings, generator)
    draft = Draft.of(component, model, {component: tokenizer}, None)
    for word, start in words.items():
        _refuse_known(component, tokenizer, word)
        vectors = starts.vectors(word, start, embedding.embedding_dim)
        draft.add([Token(word, written, len(vectors))], vectors, None)
    device = execution_device(list(model.modules()))
    learned = draft.finished(lambda _, vectors: vectors.to(device, torch.float32))
    learned.vectors.requires_grad_()
    return learned


class _Starts:
    """The vectors that new words of one text encoder start from."""

    def __init__(
        self,
        component: str,
        model: nn.Module,
        tokenizer: Any,
        weight: BaseWeight,
        count: int,
        generator: torch.Generator,
    ) -> None:
        self._component, self._tokenizer = component, tokenizer
        self._weight, self._count, self._generator = weight, count, generator
        self._learned = tokens_by_adapter(model).values()
        self._moments: tuple[Tensor, Tensor] | None = None

    def vectors(self, word: str, start: Start, width: int) -> Tensor:
        """Return the vectors (count, width) that `word` starts from."""
        if isinstance(start, Tensor):
            if start.ndim != 2 or start.shape[1] != width or not len(start):
                raise AdapterError(
                    f"{word!r}: vectors of shape {tuple(start.shape)}, expected (count, {width}) for {self._component}"
                )
            return start.detach().clone().float()
        count, known = _parsed(word, start)
        if known is None:
            mean, deviation = self._mean_and_deviation()
            drawn = torch.randn(count, width, generator=self._generator, device=self._generator.device)
            return mean + deviation * drawn.to(mean)
        return torch.stack([self._of_word(word, each) for each in known]).mean(0).expand(count, -1).clone()

    def _of_word(self, word: str, start: str) -> Tensor:
        """Return the mean of the vectors that the text encoder has for a word."""
        if isinstance(self._tokenizer, Numbering):
            raise AdapterError(
                f"{word!r} starts from {start!r}, which only a tokenizer knows; pass the pipeline, or tokenizer="
            )
        ids = _ids(self._tokenizer, start)
        unknown = getattr(self._tokenizer, "unk_token_id", None)
        end = getattr(self._tokenizer, "eos_token_id", None)
        if not ids or (unknown in ids and (unknown != end or ids == [unknown])):
            raise AdapterError(
                f"{word!r} starts from {start!r}, which the tokenizer of {self._component} does not know"
            )
        return torch.stack([self._of_id(index) for index in ids]).mean(0)

    def _of_id(self, index: int) -> Tensor:
        for learned in self._learned:
            found = (learned.ids == index).nonzero()
            if len(found):
                return learned.vectors.detach()[found[0, 0]].float().cpu()
        if index >= self._count:
            raise AdapterError(f"token {index} of {self._component} has no vector to start from")
        return self._weight.rows(torch.tensor([index]))[0].float().cpu()

    def _mean_and_deviation(self) -> tuple[Tensor, Tensor]:
        """Return the mean and the standard deviation of each feature over the embedding, of shape (width)."""
        if self._moments is None:
            total = squares = torch.zeros(())
            for rows in self._weight.chunks():
                rows = rows.double().cpu()
                total, squares = total + rows.sum(0), squares + rows.square().sum(0)
            mean = total / self._count
            self._moments = mean.float(), (squares / self._count - mean.square()).clamp_min(0).sqrt().float()
        return self._moments


def _ids(tokenizer: Any, word: str) -> list[int]:
    """Return the ids of a word inside a prompt: some tokenizers have other ids for a word after a space."""
    found: list[list[int]] = [
        list(tokenizer(text, add_special_tokens=False).input_ids) for text in (f" {word.strip()}", word.strip())
    ]
    return min(found, key=len)


def _parsed(word: str, start: Any) -> tuple[int, list[str] | None]:
    """Return the number of vectors, and the words whose mean they start from; `None` for none.

    Raises:
        AdapterError: `start` is no `Start`.
    """
    count, known = (1, start)
    if _is_count(start):
        count, known = start, None
    elif isinstance(start, tuple) and len(start) == 2 and _is_count(start[0]):  # type: ignore[arg-type]
        count, known = start  # type: ignore[misc]
    if count < 1:  # type: ignore[operator]
        raise AdapterError(f"{word!r}: {count!r} vectors, expected a whole number of at least 1")
    listed: Any = [known] if isinstance(known, str) else known
    is_list = isinstance(listed, Sequence) and bool(listed) and all(isinstance(each, str) for each in listed)  # type: ignore[misc]
    if known is not None and not is_list:
        raise AdapterError(
            f"{word!r} starts from {start!r}; expected a number of vectors, a word, a list of words, or (number, word)"
        )
    return count, None if known is None else list(listed)  # type: ignore[return-value]


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _refuse_known(component: str, tokenizer: Any, word: object) -> None:
    """Raise `AdapterError` if a new word is no word, or is one token already."""
    if not isinstance(word, str) or not word or word != word.strip():
        raise AdapterError(f"{word!r} is no new word: expected text without spaces around it, such as '<cat>'")
    known = tokenizer.get_vocab().get(word)
    ids = [] if isinstance(tokenizer, Numbering) else _ids(tokenizer, word)
    if known is None and len(ids) == 1 and ids[0] != getattr(tokenizer, "unk_token_id", None):
        # Tokenizers have a word of the vocabulary under another name, with a mark for the space.
        known = ids[0]
    if known is not None:
        raise AdapterError(
            f"the tokenizer of {component} knows {word!r} already (id {known}); choose another word, or retrain this "
            f"one: add_adapter(pipe.{component}, TokensConfig(token_indices=[{known}]))"
        )
