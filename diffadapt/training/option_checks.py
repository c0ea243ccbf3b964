"""Checks of the options before anything is read or loaded."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from diffadapt.errors import UsageError
from diffadapt.training.checkpoint import find
from diffadapt.training.data.pictures import check_colour
from diffadapt.training.history import tracker_names
from diffadapt.training.new_adapters import adapter_config
from diffadapt.training.optimisers import check_optimizer
from diffadapt.training.option_sources import check_kinds
from diffadapt.training.options import TrainingOptions, default_of

_AT_LEAST_ONE = (
    "rank", "max_train_steps", "num_train_epochs", "train_batch_size", "gradient_accumulation_steps",
    "num_class_images",
    "block_size", "sample_batch_size", "checkpointing_steps", "validation_steps", "num_validation_images",
    "validation_inference_steps",
    "lr_num_cycles", "max_sequence_length",
)  # fmt: skip
_RANGES: dict[str, tuple[Callable[[float], bool], Sequence[str]]] = {
    "in [0, 1)": (
        lambda x: 0 <= x < 1,
        ("lora_dropout", "caption_dropout", "tag_dropout", "adam_beta1", "adam_beta2", "ema_decay", "min_noise"),
    ),
    "in [0, 1]": (lambda x: 0 <= x <= 1, ("unmasked_weight", "max_noise")),
    "above 0": (
        lambda x: x > 0,
        (
            "learning_rate", "text_encoder_lr", "lora_alpha", "snr_gamma", "adam_epsilon", "max_grad_norm", "lr_power",
            "logit_std", "shift", "loraplus_lr_ratio", "token_lr",
        ),
    ),
    "at least 0": (
        lambda x: x >= 0,
        (
            "prior_loss_weight", "class_guidance_scale", "validation_guidance_scale", "adam_weight_decay",
            "lr_warmup_steps", "dataloader_num_workers", "seed", "keep_tags", "held_out_pictures", "guidance",
        ),
    ),
    "at least 8": (lambda x: x >= 8, ("resolution",)),
    "a finite number": (lambda x: True, ("logit_mean",)),
    "at least 1, or -1 for as square as possible": (lambda x: x >= 1 or x == -1, ("lokr_factor",)),
}  # fmt: skip


def check_options(options: TrainingOptions, *, has_base: bool = False) -> None:
    """Raise `UsageError` if options cannot work, with a message that says what to change.

    Args:
        options: the options.
        has_base: whether the pipeline is loaded already.
    """
    if not has_base and not options.pretrained_model_name_or_path:
        raise UsageError("--pretrained_model_name_or_path is missing: the folder or hub id of the base pipeline")
    if not options.folder_options:
        raise UsageError("--instance_data_dir is missing: the folder of training pictures")
    check_kinds(options)
    _check_numbers(options)
    _check_combinations(options)
    check_optimizer(options)
    tracker_names(options)
    check_colour(options.background)
    adapter_config(options, ["to_q"], torch.Generator())
    if options.adapter_type not in ("lora", "dora") and options.save_format == "diffusers":
        raise UsageError(f"--save_format diffusers cannot hold --adapter_type {options.adapter_type}; leave it out")
    base = Path(options.pretrained_model_name_or_path)
    if not has_base and base.is_dir() and not (base / "model_index.json").is_file():
        raise UsageError(f"{base} is not a saved pipeline: it has no model_index.json")
    for name in ("init_adapter", "helper_adapter"):
        source = getattr(options, name)
        if source and Path(source).suffix and not Path(source).exists():
            raise UsageError(f"--{name}: there is no file {source}")
    for name in ("output_dir", "cache_dir"):
        _check_folder(name, getattr(options, name))
    find(options)


def _check_folder(name: str, value: str | None) -> None:
    """Raise `UsageError` if there can be no folder of this name."""
    if value is None:
        return
    if not str(value).strip():
        raise UsageError(f"--{name} is missing: the folder to write to")
    path = Path(value).absolute()
    existing = next(folder for folder in (path, *path.parents) if folder.exists())
    if not existing.is_dir():
        raise UsageError(f"--{name} {value} cannot be a folder: {existing} is a file")


def _check_numbers(options: TrainingOptions) -> None:
    for name in _AT_LEAST_ONE:
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name} must be at least 1, not {value}")
    for expected, (holds, names) in _RANGES.items():
        for name in names:
            value = getattr(options, name)
            if value is not None and not (math.isfinite(value) and holds(value)):
                raise UsageError(f"--{name} must be {expected}, not {value}")
    if options.min_noise >= options.max_noise:
        raise UsageError(f"--min_noise {options.min_noise} must be below --max_noise {options.max_noise}")
    for folder in options.folders:
        if folder.repeats < 1:
            raise UsageError(f"folders: repeats of {folder.path} must be at least 1, not {folder.repeats}")
        if not (math.isfinite(folder.weight) and folder.weight >= 0):
            raise UsageError(f"folders: weight of {folder.path} must be at least 0, not {folder.weight}")


def _check_combinations(options: TrainingOptions) -> None:
    if options.lora_alpha is not None and not _has_alpha(options):
        raise UsageError(f"--lora_alpha has no effect with --adapter_type {options.adapter_type}")
    for name, scheduler in (("lr_num_cycles", "cosine_with_restarts"), ("lr_power", "polynomial")):
        if _is_set(options, name) and options.lr_scheduler != scheduler:
            raise UsageError(f"--{name} has no effect without --lr_scheduler {scheduler}")
    if options.snr_gamma is not None and options.loss_weighting not in (None, "min_snr"):
        raise UsageError(f"--snr_gamma has no effect with --loss_weighting {options.loss_weighting}")
    if options.lora_layers is not None and not options.lora_layers.strip(" ,"):
        raise UsageError("--lora_layers names no layers; leave it out for those usual for the family")
    if options.checkpoints_total_limit is not None and options.checkpoints_total_limit < 1:
        raise UsageError("--checkpoints_total_limit must be at least 1; leave it out to keep every checkpoint")
    if options.text_encoder_lr is not None and not options.train_text_encoder:
        raise UsageError("--text_encoder_lr has no effect without --train_text_encoder")
    if options.token_lr is not None and not options.new_words:
        raise UsageError("--token_lr has no effect without --new_words")
    if options.new_words and options.init_adapter:
        raise UsageError("--new_words cannot be added to --init_adapter; train them in a run of their own")
    if options.random_crop and options.cache_latents:
        raise UsageError("--random_crop cannot be used with --cache_latents: every crop has other latents")
    if options.keep_tags and not (options.shuffle_tags or options.tag_dropout):
        raise UsageError("--keep_tags has no effect without --shuffle_tags or --tag_dropout")
    if options.unmasked_weight and not options.masked_loss:
        raise UsageError("--unmasked_weight has no effect without --masked_loss")
    if options.allow_upscaling and not options.aspect_ratio_buckets:
        raise UsageError("--allow_upscaling has no effect without --aspect_ratio_buckets; squares are enlarged anyway")
    if options.timestep_sampling != "logit_normal" and (options.logit_mean != 0 or options.logit_std != 1):
        raise UsageError("--logit_mean and --logit_std have no effect without --timestep_sampling logit_normal")
    if options.accept_changes and options.resume_from_checkpoint is None:
        raise UsageError("--accept_changes has no effect without --resume_from_checkpoint")
    _check_prior(options)


def _has_alpha(options: TrainingOptions) -> bool:
    config = adapter_config(options, ["to_q"], torch.Generator())
    return any(entry.name == "alpha" for entry in dataclasses.fields(config))


def _is_set(options: TrainingOptions, name: str) -> bool:
    return getattr(options, name) != default_of(name)


def _check_prior(options: TrainingOptions) -> None:
    if not options.with_prior_preservation:
        if options.class_data_dir or options.class_prompt:
            raise UsageError("--class_data_dir and --class_prompt have no effect without --with_prior_preservation")
        for name in ("prior_source", "prior_loss_weight", "num_class_images", "class_guidance_scale"):
            if _is_set(options, name):
                raise UsageError(f"--{name} has no effect without --with_prior_preservation")
        return
    if options.prior_source == "base":
        if options.class_data_dir:
            raise UsageError("--class_data_dir has no effect with --prior_source base, which needs no pictures")
        if not options.class_prompt:
            raise UsageError("--prior_source base needs --class_prompt")
    elif not (options.class_data_dir and options.class_prompt):
        raise UsageError("--with_prior_preservation needs --class_data_dir and --class_prompt")
    class_prompts(options)


def class_prompts(options: TrainingOptions) -> list[str]:
    """Return the prompts of the class: the one of `class_prompt`, or those in the file that it names."""
    assert options.class_prompt is not None
    path = Path(options.class_prompt)
    try:
        if not path.is_file():
            return [options.class_prompt]
        text = path.read_bytes().decode("utf-8-sig")
    except (OSError, ValueError) as error:
        if isinstance(error, UnicodeDecodeError):
            raise UsageError(f"--class_prompt: {path} is not in UTF-8 ({error})") from error
        return [options.class_prompt]  # A prompt may be too long for a file name.
    prompts = [line.strip() for line in text.split("\n") if line.strip()]
    if not prompts:
        raise UsageError(f"--class_prompt: there is no prompt in {path}")
    return prompts
