"""Tokenizers of a few words, which cut the pipelines' templates into as many tokens as the real ones do."""

from typing import Any

import torch
from PIL import Image
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import BatchFeature, PreTrainedTokenizerFast

from tests.support.versions import transformers

_SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>", "<|im_start|>", "<|im_end|>")
_PICTURE = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
_WORDS = (
    "a an the of on at in to and with sks dog cat fox critter photo picture red blue green black white big small beach "
    "system user assistant Describe the image by detailing color shape size texture quantity text describe prompt . , :"
)
_IDS = {word: place for place, word in enumerate(dict.fromkeys([*_SPECIAL, *_PICTURE, "\n", *_WORDS.split()]))}
VOCABULARY = len(_IDS)
IMAGE_TOKEN, VIDEO_TOKEN, VISION_START = (_IDS[name] for name in ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>"))

_CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}{{ c['text'] }}{% endfor %}"
    "{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tokenizer(length: int = 512, adds: str = "$A", pad: str = "<pad>") -> PreTrainedTokenizerFast:
    """Return a tokenizer of words, punctuation and line ends.

    Args:
        length: Its `model_max_length`.
        adds: What it makes of a text $A by itself, for example "<bos> $A <eos>".
        pad: The token it pads with.
    """
    words = Tokenizer(models.WordLevel(_IDS, unk_token="<unk>"))
    pattern = Regex(r"<\|\w+\|>|<\w+>|\n|\),|'s|\w+|[^\w\s]")
    words.pre_tokenizer = pre_tokenizers.Split(pattern, behavior="removed", invert=True)
    words.post_processor = processors.TemplateProcessing(
        single=adds, special_tokens=[(token, _IDS[token]) for token in ("<bos>", "<eos>")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token=pad,
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
        model_max_length=length,
        model_input_names=["input_ids", "attention_mask"],
        chat_template=_CHAT,
    )


class TinyProcessor:
    """A processor of text and pictures as the pipelines of Qwen-Image call it. The real one needs torchvision."""

    def __init__(self, patch: int, largest: int) -> None:
        self.tokenizer = tokenizer()
        self.pictures = transformers.Qwen2VLImageProcessorPil(
            patch_size=patch, merge_size=2, size={"shortest_edge": (2 * patch) ** 2, "longest_edge": largest}
        )

    def apply_chat_template(self, messages: Any, **options: Any) -> list[Any]:
        return [self.tokenizer.apply_chat_template(messages, **options)]

    def __call__(
        self, text: list[str], images: Any = None, padding: bool = True, padding_side: str = "right", **options: Any
    ) -> BatchFeature:
        pictures = [images] if isinstance(images, Image.Image) else images or []
        seen: dict[str, Any] = dict(self.pictures(images=pictures, return_tensors="pt")) if pictures else {}
        grids = iter(seen.get("image_grid_thw", torch.zeros(0, 3)).prod(dim=1) // 4)
        expanded = ["".join(self._expanded(part, grids) for part in self._parts(each)) for each in text]
        tokens = self.tokenizer(expanded, padding=padding, padding_side=padding_side, **options)
        return BatchFeature({**tokens, **seen, "mm_token_type_ids": (tokens["input_ids"] == IMAGE_TOKEN).int()})

    def _parts(self, text: str) -> list[str]:
        pieces = text.split("<|image_pad|>")
        return [part for piece in pieces[:-1] for part in (piece, "<|image_pad|>")] + pieces[-1:]

    def _expanded(self, part: str, grids: Any) -> str:
        return part * int(next(grids)) if part == "<|image_pad|>" else part
