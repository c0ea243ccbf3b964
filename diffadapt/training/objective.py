"""The loss of a batch: what is mixed, predicted, compared and preserved."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffadapt.training.data.draws import INSTANCE
from diffadapt.training.data.samples import Encoded, Sample
from diffadapt.training.encodings import Captions, Latents, control_digest
from diffadapt.training.families import Pipeline, TrainingFamily, latents
from diffadapt.training.loss import cover_of, squared_errors, weighting
from diffadapt.training.noise_levels import Noising
from diffadapt.training.options import TrainingOptions
from diffadapt.training.randomness import normal


@dataclass
class Noised:
    """A sample as the denoiser sees it.

    Attributes:
        sample: the sample.
        noisy: x, of shape (1, channels, rows, columns), float32.
        level: the noise level, 0-d.
        target: what should be predicted, of the shape of `noisy`.
        cover: weights of the latent pixels, see `cover_of`.
        references: the encoded picture to edit, with a batch dimension.
    """

    sample: Sample
    noisy: Tensor
    level: Tensor
    target: Tensor
    cover: Tensor | None
    references: Encoded | None


@dataclass
class Losses:
    """The loss of a batch.

    Attributes:
        total: what is minimised, 0-d.
        samples: the unweighted loss of each picture that is learned, detached.
        levels: the noise level of each, from 0 to 1.
        prior: the loss of preservation, detached; `None` without it.
    """

    total: Tensor
    samples: Tensor
    levels: Tensor
    prior: Tensor | None = None


class Objective:
    """The loss of batches of samples."""

    def __init__(
        self,
        options: TrainingOptions,
        pipe: Pipeline,
        family: TrainingFamily,
        noising: Noising,
        captions: Captions,
        pictures: Latents,
        device: torch.device,
        dtype: torch.dtype,
        class_prompts: Sequence[str] = (),
    ) -> None:
        """Make the objective.

        Args:
            options: the options of the run.
            pipe: the pipeline.
            family: its family.
            noising: the noise process.
            captions: encodes captions.
            pictures: encodes pictures.
            device: where the denoiser is.
            dtype: the dtype that adapters may compute in.
            class_prompts: prompts whose base prediction is preserved.
        """
        self.options = options
        self.pipe = pipe
        self.family = family
        self.noising = noising
        self.captions = captions
        self.pictures = pictures
        self.device = device
        self.dtype = dtype
        self.class_prompts = class_prompts
        self.weight = weighting(options.loss_weighting, options.snr_gamma, noising.process)
        self.experts = family.experts(pipe)

    def __call__(self, samples: Sequence[Sample]) -> Losses:
        """Return the loss of a batch."""
        noised = [self.noised(sample) for sample in samples]
        prompts = [sample.caption for sample in samples]
        # Before anything that is differentiated: switching adapters off writes their gates in place.
        kept = self._kept(noised) if self.class_prompts else None
        errors = self.errors(noised, prompts, [entry.target for entry in noised])
        level = torch.stack([entry.level for entry in noised])
        own = torch.tensor([sample.draw.stream == INSTANCE for sample in samples])
        weights = self.weight(self.noising, level).to(errors)
        weighted = errors * weights * torch.tensor([sample.weight for sample in samples]).to(errors)
        total = weighted[own.to(errors.device)].mean()
        prior = None
        if not own.all():
            prior = weighted[~own.to(errors.device)].mean()
        elif kept is not None:
            prior = (self.errors([_uncovered(entry) for entry in noised], *kept) * weights).mean()
        if prior is not None:
            total = total + self.options.prior_loss_weight * prior
        shares = self.noising.noise_share(level)
        return Losses(
            total, errors.detach()[own.to(errors.device)], shares[own], None if prior is None else prior.detach()
        )

    def noised(self, sample: Sample, share: float | None = None) -> Noised:
        """Return a sample with its noise; at a given share of noise, or at a random level."""
        key = (self.options.seed, sample.draw.stream, sample.draw.number)
        encoded = sample.latents
        if encoded is None:
            assert sample.pixels is not None
            encoded = self.pictures.encode(sample.pixels)
        batch = {name: tensor[None].to(self.device, torch.float32) for name, tensor in encoded.items()}
        shape = batch["mean"].shape
        clean = latents(batch, normal(shape, *key, "latents").to(self.device))
        level = self.noising.draw(clean, *key, "level") if share is None else self.noising.at(share, clean)
        noisy, target = self.noising.mix(clean, normal(shape, *key, "noise").to(self.device), level[None])
        cover = None
        if sample.mask is not None and self.options.masked_loss:
            cover = cover_of(sample.mask, shape, self.options.unmasked_weight)
        references = sample.references
        if references is None and sample.pixels is not None:
            references = self.pictures.references_of(sample.pixels, sample.mask, sample.control)
        return Noised(sample, noisy, level, target, None if cover is None else cover.to(self.device), references)

    def errors(self, noised: Sequence[Noised], prompts: Sequence[str | None], targets: Sequence[Tensor]) -> Tensor:
        """Return the error of each sample, of shape (batch,)."""
        errors: list[Tensor | None] = [None] * len(noised)
        for places, predictions in self.predictions(noised, prompts):
            cover = None
            if any(noised[place].cover is not None for place in places):
                parts = (noised[place] for place in places)
                cover = torch.cat(
                    [torch.ones_like(entry.noisy[:, :1]) if entry.cover is None else entry.cover for entry in parts]
                )
            target = torch.cat([targets[place] for place in places])
            for place, error in zip(places, squared_errors(predictions, target, cover).unbind(), strict=True):
                errors[place] = error
        return torch.stack([error for error in errors if error is not None])

    def predictions(self, noised: Sequence[Noised], prompts: Sequence[str | None]) -> list[tuple[list[int], Tensor]]:
        """Return the predictions for samples, in groups that can share a call: positions, and their predictions."""
        rows = [self._row(entry.sample, prompt) for entry, prompt in zip(noised, prompts, strict=True)]
        groups: dict[Any, list[int]] = {}
        for place, (entry, row) in enumerate(zip(noised, rows, strict=True)):
            lengths = () if self.family.mixed_lengths else tuple(len(row[name]) for name in self.family.tokens)
            shapes = None if entry.references is None else tuple(t.shape for t in entry.references.values())
            groups.setdefault((entry.noisy.shape, self._expert(entry.level), lengths, shapes), []).append(place)
        found: list[tuple[list[int], Tensor]] = []
        for (_, expert, _, _), places in groups.items():
            conditions = self.family.collate(
                [{name: tensor.to(self.device) for name, tensor in rows[place].items()} for place in places]
            )
            references = None
            if noised[places[0]].references is not None:
                parts: list[Encoded] = [noised[place].references or {} for place in places]
                references = {name: torch.cat([part[name].to(self.device) for part in parts]) for name in parts[0]}
            with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
                prediction = self.family.predict(
                    self.pipe,
                    getattr(self.pipe, expert),
                    torch.cat([noised[place].noisy for place in places]),
                    torch.stack([noised[place].level for place in places]).to(self.device),
                    conditions,
                    guidance=self.options.guidance,
                    sizes=torch.tensor([noised[place].sample.sizes for place in places], device=self.device),
                    references=references,
                    dtype=self.dtype,
                )
            found.append((places, prediction))
        return found

    def _kept(self, noised: Sequence[Noised]) -> tuple[list[str], list[Tensor]]:
        """Return class prompts, and the base model's own predictions for them, which are to be preserved."""
        prompts = [self.class_prompts[entry.sample.draw.number % len(self.class_prompts)] for entry in noised]
        targets: list[Tensor] = [entry.target for entry in noised]
        with self.base(), torch.no_grad():
            for places, predictions in self.predictions(noised, prompts):
                for place, prediction in zip(places, predictions.split(1), strict=True):
                    targets[place] = prediction
        return prompts, targets

    def base(self) -> AbstractContextManager[Any]:
        """Return a context in which the base model runs: without adapters, except for the helper."""
        helpers = [name for name in self.pipe.adapters.names if name == HELPER]
        return self.pipe.adapters.activated(helpers) if helpers else self.pipe.adapters.disabled()

    def _row(self, sample: Sample, prompt: str | None) -> Encoded:
        if not self.family.reads_pictures:
            return self.captions.row(prompt)
        view = self.pictures.samples.view(sample.draw)
        example = self.pictures.samples.streams[sample.draw.stream].examples[sample.draw.picture]
        key = control_digest(example.digest, view)
        control = sample.control
        if control is None and (
            self.captions.store is None or self.captions.store.get(self.captions.key(prompt, key)) is None
        ):
            control = self.pictures.samples.load(sample.draw.stream, sample.draw.picture, view)[2]
        return self.captions.row(prompt, control, key)

    def _expert(self, level: Tensor) -> str:
        share = float(self.noising.noise_share(level))
        for name, (low, high) in self.experts.items():
            if low <= share <= high:
                return name
        raise AssertionError(f"no denoiser for the noise level {share}")


def _uncovered(entry: Noised) -> Noised:
    return Noised(entry.sample, entry.noisy, entry.level, entry.target, None, entry.references)


HELPER = "training-helper"
"""Name of the frozen adapter that is active while training."""
