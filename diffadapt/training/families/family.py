"""What the trainer has to know about a family of pipelines.

Notation: x0 are clean latents in the space in which noise is mixed, n is noise, and x is their mixture.

* Flow matching: `x = (1 - s) x0 + s n` with a level s in 0..1; the prediction is `v = n - x0`.
* Diffusion: `x = a x0 + b n` with `a^2 = scheduler.alphas_cumprod[t]`, `a^2 + b^2 = 1` and a level t, an integer step;
  the prediction is n ("epsilon") or `a n - b x0` ("v").

Latents and predictions are float32 of shape (batch, channels, rows, columns) in every family, whatever its denoiser
takes.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from diffadapt.errors import AdapterError
from diffadapt.runtime.foreign_hooks import compute_dtype
from diffadapt.training.families.drawing import Drawing, usual

Pipeline: TypeAlias = Any
"""A diffusers pipeline. Its components differ between families, so its attributes have no types."""

Process: TypeAlias = Literal["flow", "epsilon", "v"]
"""What the denoiser predicts, see the module docstring."""

Tensors: TypeAlias = dict[str, Tensor]

Size: TypeAlias = tuple[int, int]
"""Height and width in pixels."""


@dataclass(frozen=True)
class Caption:
    """A caption to be encoded.

    Attributes:
        text: the caption.
        max_tokens: the pipeline's `max_sequence_length`. Text encoders of a fixed length ignore it.
        pictures: the reference pictures of the caption, pixels in -1..1 of shape (3, height, width), for text encoders
            that read them.
    """

    text: str
    max_tokens: int = 0
    pictures: Sequence[Tensor] = ()


@dataclass(frozen=True)
class Step:
    """A batch that the denoiser is called with, in the terms of the trainer.

    Attributes:
        pipe: the pipeline, for the configs of its components. Its VAE and text encoders are not called.
        noisy: x, float32, of shape (batch, channels, rows, columns).
        level: the noise level of each sample, of shape (batch,): s as float32 for flow, t as int64 for diffusion.
        conditions: what `TrainingFamily.collate` returned.
        dtype: the dtype that the denoiser computes in.
        guidance: the guidance scale that a guidance-distilled denoiser is told.
        sizes: pixels, of shape (batch, 6): height and width of the original picture, top and left of the crop, height
            and width of the crop; `None` for pictures that were not cropped.
        references: what `TrainingFamily.encode_references` returned.
    """

    pipe: Pipeline
    noisy: Tensor
    level: Tensor
    conditions: Mapping[str, Tensor]
    dtype: torch.dtype
    guidance: float = 1.0
    sizes: Tensor | None = None
    references: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])

    @property
    def x(self) -> Tensor:
        """x in the dtype of the denoiser."""
        return self.noisy.to(self.dtype)

    def __getitem__(self, name: str) -> Tensor:
        """Return a condition, or a part of the references, on the device of x; numbers in the dtype of the denoiser."""
        value = self.conditions[name] if name in self.conditions else self.references[name]
        return value.to(self.noisy.device, self.dtype if value.is_floating_point() else None)

    def __contains__(self, name: str) -> bool:
        return name in self.conditions or name in self.references

    def mask(self, name: str) -> Tensor:
        """Return which tokens of a condition are real: bool, of shape (batch, tokens)."""
        padded = self.padding_mask(name)
        shape = self.conditions[name].shape[:2]
        return torch.ones(shape, dtype=torch.bool, device=self.noisy.device) if padded is None else padded

    def padding_mask(self, name: str) -> Tensor | None:
        """Return `mask`, or `None` if there is no padding. Attention without a mask is faster."""
        return self[f"{name}_mask"] if f"{name}_mask" in self else None

    def told_guidance(self) -> Tensor:
        """Return the guidance scale of each sample, float32, of shape (batch,)."""
        return torch.full((len(self.noisy),), self.guidance, device=self.noisy.device, dtype=torch.float32)

    def told_sizes(self, factor: int) -> Tensor:
        """Return `sizes`, float32, for latents whose pixels are `factor` pixels wide."""
        if self.sizes is not None:
            return self.sizes.to(self.noisy.device, torch.float32)
        height, width = factor * self.noisy.shape[2], factor * self.noisy.shape[3]
        row = torch.tensor([[height, width, 0, 0, height, width]], device=self.noisy.device, dtype=torch.float32)
        return row.expand(len(self.noisy), -1)


@dataclass(frozen=True)
class LevelSampling:
    """The usual distribution of noise levels, before they are shifted.

    Attributes:
        distribution: "uniform", or "logit-normal": the sigmoid of a normal variable.
        mean: the mean of that normal variable. Positive values favour noisy levels.
        std: its standard deviation.
    """

    distribution: Literal["uniform", "logit-normal"] = "logit-normal"
    mean: float = 0.0
    std: float = 1.0


def _flow(pipe: Pipeline) -> Process:
    return "flow"


def _only_transformer(pipe: Pipeline) -> dict[str, tuple[float, float]]:
    return {"transformer": (0.0, 1.0)}


def _unshifted(pipe: Pipeline, latents: Tensor) -> float:
    return 1.0


def _as_it_is(step: Step, output: Any) -> Tensor:
    return output


def _like_target(pipe: Pipeline, reference: Size, target: Size) -> Size:
    return target


def _accepted(pipe: Pipeline) -> str | None:
    return None


@dataclass(frozen=True, kw_only=True)
class TrainingFamily:
    """A family of pipelines that share an architecture.

    All functions call the pipeline's components as the pipeline does while it draws, and never change them. None of
    them switches autograd off or on, so that text encoders can be trained: callers wrap what needs no gradient in
    `torch.no_grad()`. Families call components in the mode they are in; the base model belongs in eval mode, because
    T5 has dropout and HiDream another output in training mode.

    Attributes:
        name: the name in messages and in configs ("flux").
        pipelines: names of diffusers' pipeline classes.
        encode: `(pipe, caption)` -> what the denoiser is told about one caption, see `encode_caption`.
        encode_pictures: `(pipe, pixels)` -> latents of pictures, to be cached: `mean` and, if the family samples from
            the VAE's distribution, `std`; both float32, normalised, of the shape of x0. `latents` returns x0. `pixels`
            are in -1..1, of shape (batch, 3, height, width), both multiples of `divisor(pipe)`.
        inputs: `step` -> the arguments of the denoiser.
        read: `(step, output)` -> the prediction in the output of the denoiser.
        divisor: `pipe` -> the number of pixels of which height and width must be multiples.
        targets: the usual layers of the denoiser, for `target_modules`.
        process: `pipe` -> what the denoiser predicts. It raises `AdapterError` if the model cannot be trained at all.
        experts: `pipe` -> names of the components that denoise, each with the range of levels of a flow in which the
            pipeline uses it. Only Wan 2.2 has two.
        levels: the usual distribution of noise levels.
        shift: `(pipe, x0)` -> k. Levels of a flow are shifted to `k s / (1 + (k - 1) s)`, see `schedules.shifted`.
        guidance: the guidance scale that a guidance-distilled denoiser is told in training; `None` if the family has no
            such denoiser.
        tokens: names of conditions whose first dimension counts tokens, so that `collate` may pad them.
        mixed_lengths: whether captions of different lengths may share a batch. If not, the other captions of a batch
            would change the prediction for a caption.
        max_tokens: the usual `max_sequence_length`; `None` if the text encoder has a fixed length.
        encode_empty: encodes a dropped caption (with the text ""), if the result is not that of `encode`.
        reads_pictures: whether the text encoder reads the reference pictures, too.
        encode_references: `(pipe, pictures, mask)` -> what the denoiser is told about reference pictures, to be cached,
            as tensors with a batch dimension; `None` if the family takes no references. `pictures` are batches of
            pixels in -1..1, of shape (batch, 3, height, width); `mask` is 1 where an inpainting model paints, of shape
            (batch, 1, height, width), `None` otherwise.
        references: the smallest and the largest number of reference pictures that the denoiser accepts.
        needs_mask: whether `encode_references` needs a mask.
        reference_size: `(pipe, reference, target)` -> the size that a reference picture of size `reference` has to be
            resized to, for a picture that is trained at size `target`.
        drawing: the arguments with which the pipeline draws what was trained.
        autocast: whether the denoiser may run under autocast. Families cast all inputs to the dtype of the denoiser, so
            that it is never needed; but under it, adapters in float32 compute in half precision, which is faster.
        refusal: `pipe` -> the reason why this model must not be trained without a frozen helper adapter (it is
            distilled), or `None`.
    """

    name: str
    pipelines: tuple[str, ...]
    encode: Callable[[Pipeline, Caption], Tensors]
    encode_pictures: Callable[[Pipeline, Tensor], Tensors]
    inputs: Callable[[Step], dict[str, Any]]
    divisor: Callable[[Pipeline], int]
    targets: str | tuple[str, ...]
    read: Callable[[Step, Any], Tensor] = _as_it_is
    process: Callable[[Pipeline], Process] = _flow
    experts: Callable[[Pipeline], dict[str, tuple[float, float]]] = _only_transformer
    levels: LevelSampling = field(default_factory=LevelSampling)
    shift: Callable[[Pipeline, Tensor], float] = _unshifted
    guidance: float | None = None
    tokens: tuple[str, ...] = ()
    mixed_lengths: bool = True
    max_tokens: int | None = None
    encode_empty: Callable[[Pipeline, Caption], Tensors] | None = None
    reads_pictures: bool = False
    encode_references: Callable[[Pipeline, Sequence[Tensor], Tensor | None], Tensors] | None = None
    references: tuple[int, int] = (0, 0)
    needs_mask: bool = False
    reference_size: Callable[[Pipeline, Size, Size], Size] = _like_target
    drawing: Drawing = usual
    autocast: bool = True
    refusal: Callable[[Pipeline], str | None] = _accepted

    def encode_caption(
        self, pipe: Pipeline, text: str, *, pictures: Sequence[Tensor] = (), max_tokens: int | None = None
    ) -> Tensors:
        """Return what the denoiser is told about one caption: tensors without a batch dimension, to be cached.

        Captions are encoded one at a time, so that the result does not depend on what else is in a batch. Padding is
        left out where this is exact.

        Args:
            pipe: The pipeline.
            text: The caption.
            pictures: The reference pictures of the caption, pixels in -1..1 of shape (3, height, width). Families with
                `reads_pictures` use them, others ignore them.
            max_tokens: The pipeline's `max_sequence_length`. Defaults to that of the family.
        """
        return self.encode(pipe, Caption(text, max_tokens or self.max_tokens or 0, pictures))

    def encode_dropped(
        self, pipe: Pipeline, *, pictures: Sequence[Tensor] = (), max_tokens: int | None = None
    ) -> Tensors:
        """Return the conditions of a sample whose caption is dropped, like `encode_caption`."""
        encode = self.encode_empty or self.encode
        return encode(pipe, Caption("", max_tokens or self.max_tokens or 0, pictures))

    def collate(self, rows: Sequence[Mapping[str, Tensor]]) -> Tensors:
        """Return the conditions of a batch.

        Args:
            rows: What `encode_caption` returned for each sample.

        Returns:
            Every tensor with a batch dimension. Those in `tokens` are padded with zeros at the end. What is padded has
            a mask `<name>_mask`: bool, of shape (batch, tokens), true for real tokens.

        Raises:
            AdapterError: captions have different lengths, and the family cannot mix them in a batch.
        """
        batch: Tensors = {}
        for name in rows[0]:
            tensors = [row[name] for row in rows]
            if name not in self.tokens:
                batch[name] = torch.stack(tensors)
                continue
            lengths = torch.tensor([len(tensor) for tensor in tensors])
            if not self.mixed_lengths and lengths.unique().numel() > 1:
                raise AdapterError(
                    f"{self.name}: one batch has captions of {' and '.join(map(str, sorted(set(lengths.tolist()))))} "
                    "tokens, but this model has no mask for padding, so that captions would change each other's "
                    "predictions; batch captions of equal length, or use a batch size of 1"
                )
            batch[name] = torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True)
            if lengths.unique().numel() == 1:
                continue
            places = torch.arange(batch[name].shape[1])
            batch[f"{name}_mask"] = (places < lengths[:, None]).to(tensors[0].device)
        return batch

    def predict(
        self,
        pipe: Pipeline,
        denoiser: Callable[..., Any],
        noisy: Tensor,
        level: Tensor,
        conditions: Mapping[str, Tensor],
        *,
        guidance: float | None = None,
        sizes: Tensor | None = None,
        references: Mapping[str, Tensor] | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Return the denoiser's prediction for a batch, float32, of the shape of `noisy`.

        Args:
            pipe: The pipeline, for the configs of its components.
            denoiser: The denoiser, or whatever wraps it: a compiled or a distributed model.
            noisy: See `Step`.
            level: See `Step`.
            conditions: What `collate` returned.
            guidance: The guidance scale that a guidance-distilled denoiser is told. Defaults to that of the family.
            sizes: See `Step`. Only SDXL and CogView4 are told sizes.
            references: What `encode_references` returned.
            dtype: The dtype that the denoiser computes in, if known. Looking it up takes some time.
        """
        if dtype is None:
            dtype = compute_dtype(list(getattr(pipe, next(iter(self.experts(pipe)))).modules()))
        step = Step(
            pipe,
            noisy,
            level,
            conditions,
            dtype,
            guidance or self.guidance or 1.0,
            sizes,
            references or {},
        )
        kept = nullcontext() if self.autocast else torch.autocast(noisy.device.type, enabled=False)
        with kept:
            output = denoiser(**self.inputs(step), return_dict=False)[0]
        return self.read(step, output).float()


def latents(encoded: Mapping[str, Tensor], noise: Tensor | None = None) -> Tensor:
    """Return x0 of encoded pictures, float32, of shape (batch, channels, rows, columns).

    Args:
        encoded: What `TrainingFamily.encode_pictures` returned.
        noise: Standard normal noise of the shape of `encoded["mean"]`; `None` for the most likely latents. Without a
            distribution (no `std`) it is ignored.
    """
    mean, std = encoded["mean"], encoded.get("std")
    return mean if noise is None or std is None else mean + std * noise
