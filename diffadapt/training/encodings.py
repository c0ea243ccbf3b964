"""What the denoiser is told and shown: captions and pictures, encoded once and cached, or for every step."""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import diffusers
import torch
import transformers
from torch import Tensor, nn

from diffadapt.runtime.components import is_text_encoder
from diffadapt.training.caches import Store, digest, fingerprint
from diffadapt.training.data.samples import Encoded, Samples, View
from diffadapt.training.families import Pipeline, TrainingFamily

_RECENT = 256

Progress: TypeAlias = Callable[[Iterable[int], str], Iterable[int]]


class Captions:
    """Encoded captions.

    Attributes:
        max_tokens: the pipeline's `max_sequence_length`; `None` if its text encoder has a fixed length.
        trained: whether text encoders are trained, so that captions are encoded in every step, with gradients.
    """

    def __init__(
        self,
        pipe: Pipeline,
        family: TrainingFamily,
        store: Store | None,
        *,
        max_tokens: int | None = None,
        trained: bool = False,
    ) -> None:
        self.pipe = pipe
        self.family = family
        self.max_tokens = max_tokens or family.max_tokens
        self.store = None if trained else store
        self.trained = trained
        self._encoders = "" if self.store is None else _encoders_fingerprint(pipe, family)
        self._recent: OrderedDict[str, Encoded] = OrderedDict()

    def key(self, caption: str | None, control: str | None) -> str:
        """Return the key of a caption; of an edit, with the digest of the picture to edit."""
        return digest("text", self._encoders, caption, control if self.family.reads_pictures else None, self.max_tokens)

    def encode(self, caption: str | None, control: Tensor | None) -> Encoded:
        """Encode a caption; `None` stands for a dropped one."""
        pictures = () if control is None else [control]
        if caption is None:
            return self.family.encode_dropped(self.pipe, pictures=pictures, max_tokens=self.max_tokens)
        return self.family.encode_caption(self.pipe, caption, pictures=pictures, max_tokens=self.max_tokens)

    def row(self, caption: str | None, control: Tensor | None = None, control_key: str | None = None) -> Encoded:
        """Return an encoded caption, from the cache if it is there."""
        if self.trained:
            return self.encode(caption, control)
        key = self.key(caption, control_key) if control is None or control_key is not None else None
        if key is not None and self.store is not None and (cached := self.store.get(key)) is not None:
            return cached
        if key is not None and key in self._recent:
            self._recent.move_to_end(key)
            return self._recent[key]
        with torch.no_grad():
            found = self.encode(caption, control)
        if key is not None:
            self._recent[key] = found
            if len(self._recent) > _RECENT:
                self._recent.popitem(last=False)
        return found

    def fill(
        self,
        requests: Sequence[tuple[str | None, str | None, Callable[[], Tensor | None]]],
        progress: Progress,
        turn: tuple[int, int],
    ) -> None:
        """Cache captions.

        Args:
            requests: caption, digest of the picture to edit, and a function that returns that picture.
            progress: wraps the positions of what has to be encoded.
            turn: which part of the work is this process's.
        """
        assert self.store is not None

        @torch.no_grad()
        def make(position: int) -> Encoded:
            caption, _, control = requests[position]
            return self.encode(caption, control())

        keys = [self.key(caption, control) for caption, control, _ in requests]
        self.store.fill(keys, make, progress=lambda items: progress(items, "captions"), turn=turn)


class Latents:
    """Encoded pictures, one at a time, so that the result does not depend on what else is in a batch."""

    def __init__(self, pipe: Pipeline, family: TrainingFamily, samples: Samples, store: Store | None) -> None:
        self.pipe = pipe
        self.family = family
        self.samples = samples
        self.store = store
        self._vae = "" if store is None else digest(family.name, fingerprint(pipe.vae), diffusers.__version__)

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Encoded:
        """Return the encoded picture, without a batch dimension."""
        return {name: tensor[0] for name, tensor in self.family.encode_pictures(self.pipe, pixels[None]).items()}

    @torch.no_grad()
    def references_of(self, pixels: Tensor, mask: Tensor | None, control: Tensor | None) -> Encoded | None:
        """Return what the denoiser is shown besides the noisy picture, with a batch dimension; `None` for nothing.

        That is the picture to edit or, for an inpainting model, what is outside the mask that it paints: of the picture
        to edit if there is one, else of the picture itself.
        """
        encode = self.family.encode_references
        if encode is None:
            return None
        if self.family.needs_mask:
            mask = torch.ones_like(pixels[:1]) if mask is None else mask
            return encode(self.pipe, [(pixels if control is None else control)[None]], mask[None])
        return None if control is None else encode(self.pipe, [control[None]], None)

    def key(self, stream: str, index: int, view: View) -> str:
        """Return the key of a picture and how it is seen."""
        example = self.samples.streams[stream].examples[index]
        return digest("latents", self._vae, example.digest, view, self.samples.options.background)

    def cached(self, stream: str, index: int, view: View) -> tuple[Encoded, Encoded | None]:
        """Return the encoded picture and picture to edit, from the cache if they are there."""
        assert self.store is not None
        found = self.store.get(self.key(stream, index, view))
        if found is None:
            found = self._make(stream, index, view)
            self.store.put(self.key(stream, index, view), found)
        references = {name[len(_REFERENCE) :]: t for name, t in found.items() if name.startswith(_REFERENCE)}
        return {name: t for name, t in found.items() if not name.startswith(_REFERENCE)}, references or None

    def fill(self, progress: Progress, turn: tuple[int, int]) -> None:
        """Cache all pictures, as they are seen without random crops."""
        assert self.store is not None
        wanted = [(name, index, view) for name in self.samples.streams for index, view in self.samples.views(name)]
        keys = [self.key(*entry) for entry in wanted]
        self.store.fill(
            keys, lambda n: self._make(*wanted[n]), progress=lambda items: progress(items, "latents"), turn=turn
        )

    def _make(self, stream: str, index: int, view: View) -> Encoded:
        pixels, mask, control = self.samples.load(stream, index, view)
        references = self.references_of(pixels, mask, control) or {}
        return self.encode(pixels) | {_REFERENCE + name: tensor for name, tensor in references.items()}


_REFERENCE = "reference."


def caption_requests(
    samples: Samples, further: Sequence[str], *, dropped: bool, with_pictures: bool
) -> list[tuple[str | None, str | None, Callable[[], Tensor | None]]] | None:
    """Return everything that captions may be in a run, for `Captions.fill`; `None` if that cannot be listed.

    Args:
        samples: the samples.
        further: further captions, of preservation.
        dropped: whether captions may be dropped.
        with_pictures: whether the text encoder reads the picture to edit.
    """
    found: dict[tuple[str | None, str | None], Callable[[], Tensor | None]] = {}
    for name, stream in samples.streams.items():
        for index, view in samples.views(name):
            example = stream.examples[index]
            captions: list[str] | None = list(example.captions)
            if name == "instance":
                captions = samples.variants.all_of(example.captions)
            if captions is None:
                return None
            control_key, control = None, _nothing
            if with_pictures and example.control is not None:
                control_key = control_digest(example.digest, view)
                control = _loader(samples, name, index, view)
            for caption in [*captions, *([None] if dropped and name == "instance" else [])]:
                found[caption, control_key] = control
            if with_pictures:
                found |= {(caption, control_key): control for caption in further}
    if not with_pictures:
        found |= {(caption, None): _nothing for caption in further}
    return [(caption, key, control) for (caption, key), control in found.items()]


def control_digest(picture: str, view: View) -> str:
    """Return the digest of a picture to edit as it is seen."""
    return digest(picture, view)


def _nothing() -> Tensor | None:
    return None


def _loader(samples: Samples, stream: str, index: int, view: View) -> Callable[[], Tensor | None]:
    return lambda: samples.load(stream, index, view)[2]


def text_encoders_of(pipe: Pipeline) -> dict[str, nn.Module]:
    """Return the text encoders of a pipeline, by component name."""
    parts: Mapping[str, Any] = pipe.components
    return {name: part for name, part in parts.items() if is_text_encoder(name) and isinstance(part, nn.Module)}


def _encoders_fingerprint(pipe: Pipeline, family: TrainingFamily) -> str:
    encoders = {name: fingerprint(part) for name, part in text_encoders_of(pipe).items()}
    vocabularies = {
        name: digest(sorted(part.get_vocab().items()), getattr(part, "chat_template", None))
        for name, part in pipe.components.items()
        if hasattr(part, "get_vocab")
    }
    versions = (diffusers.__version__, transformers.__version__)
    settings = {name: value for name, value in pipe.config.items() if not name.startswith("_")}
    return digest(family.name, type(pipe).__name__, settings, encoders, vocabularies, versions)
