"""The caption of one draw: one of several, with the trigger word, with tags shuffled or left out, or dropped."""

from collections.abc import Sequence
from dataclasses import dataclass

from diffadapt.training.data.draws import INSTANCE, Draw
from diffadapt.training.randomness import chance

TRIGGER = "[trigger]"


@dataclass(frozen=True)
class CaptionVariants:
    """How captions vary from draw to draw; see the options of the same names. Class pictures keep their captions."""

    seed: int = 0
    trigger_word: str | None = None
    shuffle_tags: bool = False
    keep_tags: int = 0
    tag_dropout: float = 0.0
    caption_dropout: float = 0.0

    def caption(self, captions: Sequence[str], draw: Draw) -> str | None:
        """Return the caption of a draw; `None` if it is dropped."""
        random = chance(self.seed, draw.stream, draw.number, "caption")
        chosen = captions[int(random.integers(len(captions)))] if len(captions) > 1 else captions[0]
        if draw.stream != INSTANCE:
            return chosen
        if self.caption_dropout and random.random() < self.caption_dropout:
            return None
        chosen = self.with_trigger(chosen)
        if not (self.shuffle_tags or self.tag_dropout):
            return chosen
        tags = [tag.strip() for tag in chosen.split(",") if tag.strip()]
        kept, others = tags[: self.keep_tags], tags[self.keep_tags :]
        if self.shuffle_tags:
            others = [others[int(place)] for place in random.permutation(len(others))]
        others = [tag for tag in others if random.random() >= self.tag_dropout]
        return ", ".join(kept + others)

    def with_trigger(self, caption: str) -> str:
        """Return a caption with the trigger word in place of `[trigger]`, or before it if it is nowhere in it."""
        if self.trigger_word is None:
            return caption
        if TRIGGER in caption:
            return caption.replace(TRIGGER, self.trigger_word)
        if self.trigger_word.lower() in caption.lower():
            return caption
        return f"{self.trigger_word}, {caption}" if caption else self.trigger_word

    def all_of(self, captions: Sequence[str]) -> list[str] | None:
        """Return all captions that a picture may have, without the dropped one; `None` if there are too many."""
        if self.shuffle_tags or self.tag_dropout:
            return None
        return [self.with_trigger(caption) for caption in captions]
