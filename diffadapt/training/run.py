"""A training run from its options to the saved adapter."""

import dataclasses
import time
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from PIL import Image
from tqdm.auto import tqdm

from diffadapt.errors import UsageError
from diffadapt.pipelines.entry import adapters_of
from diffadapt.training import checkpoint, saving
from diffadapt.training.base_model import PRECISIONS, BaseModel, default_resolution
from diffadapt.training.block_checkpointing import checkpoint_blocks
from diffadapt.training.caches import Store, digest
from diffadapt.training.caption_length import note_on_long_captions
from diffadapt.training.data.caption_variants import CaptionVariants
from diffadapt.training.data.draws import CLASS, INSTANCE
from diffadapt.training.data.folders import Example
from diffadapt.training.data.report import contact_sheet, describe
from diffadapt.training.data.samples import PictureOptions, Samples, Stream
from diffadapt.training.data.shapes import Shapes, Size
from diffadapt.training.data_set import DataSet, digest_of, read_data
from diffadapt.training.encodings import Captions, Latents, caption_requests, text_encoders_of
from diffadapt.training.families import Pipeline, family_of
from diffadapt.training.history import History, start_trackers, tracker_names
from diffadapt.training.loop import Loop
from diffadapt.training.memory_errors import explained_memory_errors
from diffadapt.training.new_adapters import add_adapters, add_words
from diffadapt.training.noise_levels import Noising, levels_of
from diffadapt.training.objective import HELPER, Objective
from diffadapt.training.option_checks import check_options, class_prompts
from diffadapt.training.options import TrainingOptions, default_of
from diffadapt.training.previews import draw, ensure_class_pictures, missing_class_pictures
from diffadapt.training.processes import refuse_deepspeed, shard_base
from diffadapt.training.report_page import write_report

DATA_REPORT, CONTACT_SHEET = "data.txt", "contact-sheet.png"
SAVE_PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def train(options: TrainingOptions, pipe: Pipeline | None = None) -> Path:
    """Train and save an adapter; return the path of its file.

    Args:
        options: the options.
        pipe: a pipeline that is loaded already, instead of `pretrained_model_name_or_path`. Its models are frozen, and
            the adapter stays in it.

    The global random generators are as before afterwards. With `dry_run`, only write the report on the data set, and
    return the path of its contact sheet.

    Raises:
        UsageError: an option or a file has to be changed.
        Diverged: the loss is not finite.
        AdapterError: the model cannot be trained.
    """
    check_options(options, has_base=pipe is not None)
    refuse_deepspeed()
    data = read_data(options)
    with torch.random.fork_rng(), explained_memory_errors():
        return Run(options, data, pipe).train()


class Run:
    """A run: the models, the data and everything that the loop needs."""

    def __init__(self, options: TrainingOptions, data: DataSet, pipe: Pipeline | None) -> None:
        """Load the base and make the samples. Nothing is trained yet."""
        self.options = options
        self.data = data
        self.started = time.time()
        self.folder = Path(options.output_dir)
        self.folder.mkdir(parents=True, exist_ok=True)
        trackers = tracker_names(options)
        self.accelerator = Accelerator(
            mixed_precision=options.mixed_precision, log_with=[*trackers] or None, project_dir=str(self.folder / "logs")
        )
        self.trackers = trackers
        self.turn: tuple[int, int] = (self.accelerator.process_index, self.accelerator.num_processes)
        self.device: torch.device = self.accelerator.device
        self.dtype = PRECISIONS[self.accelerator.mixed_precision]
        self.base = BaseModel(options, self.dtype, self.device, pipe)
        self.pipe = self.base.pipe
        self.family = family_of(self.pipe)
        self._refuse_base()
        self.resolution = options.resolution or default_resolution(self.pipe, self.family)
        self.prompts = class_prompts(options) if options.with_prior_preservation else []
        self.samples = self._samples()
        self.checkpoint = checkpoint.find(options)
        if self.checkpoint is not None:
            saved = checkpoint.read_run(self.checkpoint)["options"]
            self.changed = checkpoint.refuse_changes(saved, self.fingerprint(), options.accept_changes, self.checkpoint)

    def train(self) -> Path:
        """Train and save; see `train`."""
        options, main = self.options, self.accelerator.is_main_process
        report = describe(self.samples, [*self.data.notes, *self._notes_on_captions()])
        self.say(report)
        if options.dry_run:
            (self.folder / DATA_REPORT).write_text(report + "\n", encoding="utf-8")
            contact_sheet(self.samples).save(self.folder / CONTACT_SHEET)
            self.say(f"nothing was trained (--dry_run); see {self.folder / CONTACT_SHEET}")
            return self.folder / CONTACT_SHEET
        captions, pictures = self._encoders()
        self.base.load_denoisers()
        noising = Noising(self.pipe, self.family, self._levels())
        encoders = list(text_encoders_of(self.pipe)) if options.train_text_encoder else []
        adapters = add_adapters(options, self.pipe, self.family, encoders, saving.ADAPTER)
        words = add_words(options, self.pipe, adapters, saving.ADAPTER)
        self.format = saving.save_format(options, self.pipe)
        for component in adapters:
            if component not in self.family.experts(self.pipe):
                continue
            model = getattr(self.pipe, component)
            if options.gradient_checkpointing:
                checkpoint_blocks(model)
            shard_base(model)
            if options.compile:
                model.compile_repeated_blocks()
        objective = Objective(
            options, self.pipe, self.family, noising, captions, pictures, self.device, self.dtype,
            self.prompts if options.prior_source == "base" else (),
        )  # fmt: skip
        self._release(captions, pictures)
        history = History()
        loop = Loop(self, objective, adapters, words, history)
        if self.checkpoint is not None:
            loop.resume(self.checkpoint, self.changed)
        elif options.resume_from_checkpoint:
            self.say(f"no checkpoint in {options.output_dir} yet: starting from the first step")
        start_trackers(self.accelerator, options, self.trackers, dataclasses.asdict(options))
        loop.run()
        self.accelerator.wait_for_everyone()
        if options.helper_adapter:
            self.pipe.adapters.remove(HELPER)
        path = self.folder / saving.WEIGHTS_FILE
        if main:
            path = self._save(loop, report)
            self.say(f"saved {path}")
        # Not `end_training`, which would end the processes' connection, too: a program may train several adapters.
        for tracker in self.accelerator.trackers:
            tracker.finish()
        return path

    def say(self, text: str) -> None:
        """Print a text, once for all processes."""
        self.accelerator.print(text)

    def progress(self, items: Iterable[Any], name: str) -> Iterable[Any]:
        """Return items under a progress bar."""
        return tqdm(list(items), name, disable=not self.accelerator.is_local_main_process, leave=False)

    @property
    def trains_text(self) -> bool:
        """Whether something in the text encoders is trained."""
        return self.options.train_text_encoder or bool(self.options.new_words)

    @property
    def steps(self) -> int:
        """The number of optimizer steps."""
        options = self.options
        if options.num_train_epochs is None:
            return options.max_train_steps
        seen = sum(example.repeats for example in self.samples.streams[INSTANCE].examples) * options.num_train_epochs
        size = options.train_batch_size * options.gradient_accumulation_steps * self.turn[1]
        return max(1, -(-seen // size))

    def fingerprint(self) -> dict[str, Any]:
        """Return what a resumed run must have in common with this one."""
        options = self.options
        contents = dict(self.data.digests)
        if CLASS in self.samples.streams:
            contents["class_data_dir"] = digest_of(self.samples.streams[CLASS].examples)
        elif self.prompts:
            contents["class_prompt"] = digest(self.prompts)
        values = checkpoint.fingerprint(options, contents, self.turn[1])
        return {**values, "resolution": self.resolution}

    def draw(self, prompts: list[str], seeds: list[int], *, guidance: float | None) -> list[Image.Image]:
        """Draw one picture per prompt and seed with the pipeline."""
        encoders = {**text_encoders_of(self.pipe), "vae": self.pipe.vae}
        away = {name: part for name, part in encoders.items() if next(part.parameters()).device != self.device}
        for part in away.values():
            part.to(self.device)
        # The helper is for training only, and pictures show what the result alone does.
        has_helper = HELPER in self.pipe.adapters.names
        without_helper = self.pipe.adapters.activated([saving.ADAPTER]) if has_helper else nullcontext()
        try:
            with without_helper:
                return self._draw(prompts, seeds, guidance)
        finally:
            self.base.release(list(away), keep=True)

    def _draw(self, prompts: list[str], seeds: list[int], guidance: float | None) -> list[Image.Image]:
        controls = [e.control for e in self.data.examples if e.control is not None][:1]
        return draw(
            self.pipe,
            prompts,
            seeds,
            resolution=self.resolution,
            guidance=guidance,
            steps=self.options.validation_inference_steps,
            controls=[Image.open(path).convert("RGB") for path in controls] * len(prompts) or None,
        )

    def save(self, folder: Path) -> Path:
        """Write the adapter to a folder."""
        return adapters_of(self.pipe).save(saving.ADAPTER, folder, self.format)

    def _refuse_base(self) -> None:
        reason = self.family.refusal(self.pipe)
        if reason and not self.options.helper_adapter:
            raise UsageError(f"{self.base.source}: {reason} (--helper_adapter)")
        self.family.process(self.pipe)
        if self.options.max_sequence_length is not None and self.family.max_tokens is None:
            raise UsageError(
                f"--max_sequence_length has no effect on a {type(self.pipe).__name__}: "
                "its text encoder has a fixed length"
            )
        low, _ = self.family.references
        # An inpainting model is shown the picture itself.
        if low and not self.family.needs_mask and any(example.control is None for example in self.data.examples):
            raise UsageError(
                f"{type(self.pipe).__name__} edits pictures: pass the pictures to edit with --control_data_dir, or as "
                "name-condlabel.png beside each picture"
            )
        if self.family.encode_references is None and any(example.control for example in self.data.examples):
            raise UsageError(
                f"{type(self.pipe).__name__} edits no pictures; leave out --control_data_dir and -condlabel"
            )
        if self.family.needs_mask and self.options.validation_prompt:
            raise UsageError(
                f"a {type(self.pipe).__name__} cannot draw previews without a mask; leave out --validation_prompt"
            )
        masks = [example for example in self.data.examples if example.mask is not None or example.transparent]
        if self.family.needs_mask and len(masks) < len(self.data.examples):
            raise UsageError(
                f"{type(self.pipe).__name__} paints inside masks: give every picture a mask, name-masklabel.png, or an "
                "alpha channel"
            )

    def _samples(self) -> Samples:
        options = self.options
        shapes = Shapes(
            self.resolution, self.family.divisor(self.pipe), options.aspect_ratio_buckets, options.allow_upscaling
        )
        streams = {INSTANCE: Stream.of(self.data.examples, shapes)}
        self.held_out = Stream.of(self.data.held_out, shapes)
        if options.with_prior_preservation and options.prior_source == "pictures" and not options.dry_run:
            streams[CLASS] = Stream.of(self._class_pictures(), shapes)
        variants = CaptionVariants(
            options.seed, options.trigger_word, options.shuffle_tags, options.keep_tags, options.tag_dropout,
            options.caption_dropout,
        )  # fmt: skip
        pictures = PictureOptions(
            options.seed, options.random_flip, options.random_crop, options.background, options.masked_loss,
            self.family.needs_mask,
        )  # fmt: skip
        return Samples(streams, pictures, variants, self._reference_size)

    def _reference_size(self, reference: Size, target: Size) -> Size:
        height, width = self.family.reference_size(self.pipe, (reference[1], reference[0]), (target[1], target[0]))
        return width, height

    def _notes_on_captions(self) -> list[str]:
        variants, examples = self.samples.variants, self.data.examples
        captions = [variants.with_trigger(caption) for example in examples for caption in example.captions]
        note = note_on_long_captions(self.pipe, captions, self.options.max_sequence_length or self.family.max_tokens)
        return [] if note is None else [note]

    def _class_pictures(self) -> list[Example]:
        options = self.options
        assert options.class_data_dir is not None
        folder = Path(options.class_data_dir)
        if missing_class_pictures(folder, options.num_class_images):
            self.base.load_denoisers()

        def draw_all(prompts: list[str], seeds: list[int]) -> list[Image.Image]:
            return self.draw(prompts, seeds, guidance=options.class_guidance_scale)

        found = ensure_class_pictures(
            folder,
            self.prompts,
            options.num_class_images,
            options.sample_batch_size,
            draw_all,
            turn=self.turn,
            wait=self.accelerator.wait_for_everyone,
            progress=lambda batches: self.progress(batches, "class pictures"),
            seed=options.seed,
        )
        self.data.notes += found.notes
        return found.examples

    def _levels(self) -> Any:
        options = self.options
        return levels_of(
            options.timestep_sampling, self.family.levels, options.logit_mean, options.logit_std,
            shift=options.shift, low=options.min_noise, high=options.max_noise,
        )  # fmt: skip

    def _encoders(self) -> tuple[Captions, Latents]:
        """Return what encodes captions and pictures, with caches filled as far as the options say."""
        options = self.options
        cache = Path(options.cache_dir or self.folder / "cache")
        further = self.prompts if options.prior_source == "base" else []
        requests = None
        if options.cache_text and not self.trains_text:
            requests = caption_requests(
                self.samples, further, dropped=options.caption_dropout > 0, with_pictures=self.family.reads_pictures
            )
            if requests is None:
                self.say("captions vary from draw to draw (tags), so text encoders stay loaded")
        text_store = None if requests is None else Store(cache / "text")
        captions = Captions(
            self.pipe, self.family, text_store, max_tokens=options.max_sequence_length, trained=self.trains_text
        )
        pictures = Latents(
            self.pipe, self.family, self.samples, Store(cache / "latents") if options.cache_latents else None
        )
        if requests is not None:
            captions.fill(requests, self.progress, self.turn)
        if options.cache_latents:
            pictures.fill(self.progress, self.turn)
            self.samples.cached = pictures.cached
        self.accelerator.wait_for_everyone()
        return captions, pictures

    def _release(self, captions: Captions, pictures: Latents) -> None:
        """Free the encoders that are not needed for the steps. For previews, they wait on the CPU."""
        keep = self.options.validation_prompt is not None
        names = list(text_encoders_of(self.pipe)) if captions.store is not None else []
        names += ["vae"] if pictures.store is not None and not self.data.held_out else []
        if not keep or self.device.type != "cpu":
            self.base.release(names, keep=keep)

    def _save(self, loop: Loop, report: str) -> Path:
        options = self.options
        thumbnail = loop.last_preview
        saving.add_metadata(
            loop.adapters, options, self.pipe, self.family, self.samples,
            steps=self.steps, resolution=self.resolution, started=self.started, thumbnail=thumbnail,
        )  # fmt: skip
        for adapter in loop.adapters.values():
            adapter.to(SAVE_PRECISIONS[options.save_precision])
        path = self.save(self.folder)
        shown = loop.history.previews[-1]["file"] if loop.history.previews else None
        saving.write_card(self.folder, options, path, self.samples, self.steps, shown)
        changed = {
            entry.name: getattr(options, entry.name)
            for entry in dataclasses.fields(options)
            if getattr(options, entry.name) != default_of(entry.name)
        }
        write_report(
            self.folder,
            loop.history,
            title=self.folder.resolve().name,
            data=report,
            options=changed,
            files=[path, self.folder / saving.CARD_FILE, *checkpoint.list_checkpoints(self.folder)],
            contact_sheet=contact_sheet(self.samples),
        )
        return path
