"""The options of `train_dreambooth.py`, and the checks on them before a model is loaded."""

import dataclasses
import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dreambooth_data import UsageError, read_captions

TRAINING_STATE_FILE = "adapters.safetensors"
"""A folder with this file is a checkpoint."""
CHECKPOINT = re.compile(r"checkpoint-(\d+)")


def option(default: Any = dataclasses.MISSING, help: str = "", aliases: Sequence[str] = ()) -> Any:
    """Return a field of `Arguments`: one command line option.

    Args:
        default: default value; without it the option is required.
        help: help text of the command line.
        aliases: further names of the option.
    """
    return dataclasses.field(default=default, metadata={"help": help, "aliases": list(aliases)})


@dataclass
class Arguments:
    """Every option of the script. Options that diffusers' own training scripts have, too, have the same name here."""

    pretrained_model_name_or_path: str = option(help="folder or hub id of the base pipeline")
    instance_data_dir: str = option(help="folder of training pictures; captions are read from its metadata.jsonl")
    output_dir: str = option("dreambooth-lora", "folder to write weights, checkpoints and validation pictures to")
    instance_prompt: str | None = option(None, "caption of all pictures that metadata.jsonl does not list")
    revision: str | None = option(None, "revision of the base pipeline on the hub")
    variant: str | None = option(None, "file variant of the base pipeline, for example fp16")

    with_prior_preservation: bool = option(False, "also train on class pictures, so that the class is not forgotten")
    class_data_dir: str | None = option(None, "folder of class pictures; missing ones are generated")
    class_prompt: str | None = option(None, "prompt of the class pictures, or a text file with one prompt per line")
    num_class_images: int = option(100, "minimum number of class pictures")
    class_guidance_scale: float | None = option(None, "guidance scale for class pictures; default: the pipeline's own")
    sample_batch_size: int = option(4, "how many class pictures to generate at once")
    prior_loss_weight: float = option(1.0, "weight of the class pictures in the loss")

    adapter_type: Literal["lora", "dora", "loha", "lokr", "oft", "boft"] = option("lora", "adapter type to train")
    rank: int = option(4, "rank of the adapter; not used by oft and boft")
    lora_alpha: float | None = option(None, "alpha of the adapter, which is scaled by alpha / rank; default: the rank")
    lora_dropout: float = option(0.0, "dropout on the input of the adapter, or on the blocks of oft and boft")
    lokr_factor: int = option(-1, "size of the smaller factor of lokr; -1 for factors as square as possible")
    block_size: int = option(4, "size of the rotated blocks of oft and boft")
    lora_layers: str | None = option(
        None, "UNet layers to adapt: all-linear, all-conv, all, or path endings separated by commas; default: attention"
    )
    train_text_encoder: bool = option(False, "also train an adapter on the text encoders")

    max_train_steps: int = option(500, "number of optimizer steps")
    train_batch_size: int = option(4, "pictures per batch and device; with class pictures, as many of those are added")
    gradient_accumulation_steps: int = option(1, "batches per optimizer step")
    gradient_checkpointing: bool = option(False, "recompute activations in the backward pass: less memory, more time")
    mixed_precision: Literal["no", "fp16", "bf16"] | None = option(
        None, "precision of the base model and the forward pass; default: the setting of accelerate"
    )
    resolution: int | None = option(None, "side of the square pictures in pixels; default: the pipeline's own")
    random_flip: bool = option(False, "mirror each picture with a probability of one half")
    caption_dropout: float = option(0.0, "probability that a picture is trained without its caption")
    cache_latents: bool = option(False, "encode every picture once and keep the latents in memory")
    dataloader_num_workers: int = option(0, "number of background processes that read pictures")
    snr_gamma: float | None = option(None, "gamma of Min-SNR loss weighting; 5.0 is usual", ["--min_snr_gamma"])
    seed: int = option(0, "seed of everything random; the same seed repeats the run")

    learning_rate: float = option(1e-4, "learning rate of the UNet's adapter")
    text_encoder_lr: float | None = option(None, "learning rate of the text encoders' adapters; default: learning_rate")
    lr_scheduler: Literal[
        "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"
    ] = option("constant", "how the learning rate changes over the steps")
    lr_warmup_steps: int = option(0, "steps over which the learning rate rises from zero")
    lr_num_cycles: int = option(1, "number of cycles of cosine_with_restarts")
    lr_power: float = option(1.0, "exponent of polynomial")
    adam_beta1: float = option(0.9, "decay rate of AdamW's mean of gradients")
    adam_beta2: float = option(0.999, "decay rate of AdamW's mean of squared gradients")
    adam_weight_decay: float = option(1e-2, "weight decay of AdamW")
    adam_epsilon: float = option(1e-8, "epsilon of AdamW")
    max_grad_norm: float = option(1.0, "norm that gradients are clipped to")

    checkpointing_steps: int = option(500, "save a checkpoint every this many steps")
    checkpoints_total_limit: int | None = option(None, "how many checkpoints to keep; default: all")
    resume_from_checkpoint: str | None = option(
        None, 'folder of the checkpoint to continue from, or "latest" for the newest one in output_dir'
    )
    validation_prompt: str | None = option(None, "prompt to draw during training")
    validation_steps: int = option(100, "draw the validation prompt every this many steps, and at the end")
    num_validation_images: int = option(4, "number of pictures to draw of the validation prompt")
    validation_guidance_scale: float | None = option(None, "guidance scale to draw with; default: the pipeline's own")
    save_format: Literal["diffusers", "kohya"] | None = option(
        None,
        "format of the saved file; default: diffusers for lora and dora, kohya for types that diffusers cannot read",
    )
    save_precision: Literal["fp32", "fp16", "bf16"] = option("fp32", "dtype of the saved tensors")


def check_arguments(args: Arguments) -> None:
    """Raise `UsageError` if options cannot work, with a message that says what to change."""
    for name in (
        "rank",
        "max_train_steps",
        "train_batch_size",
        "gradient_accumulation_steps",
        "num_class_images",
        "block_size",
        "sample_batch_size",
        "checkpointing_steps",
        "validation_steps",
        "num_validation_images",
    ):
        if getattr(args, name) < 1:
            raise UsageError(f"--{name} must be at least 1, not {getattr(args, name)}")
    check_ranges(args)
    if args.adapter_type in ("oft", "boft") and args.lora_alpha is not None:
        raise UsageError(f"--lora_alpha has no effect with --adapter_type {args.adapter_type}")
    if args.adapter_type not in ("lora", "dora") and args.save_format == "diffusers":
        raise UsageError(f"--save_format diffusers cannot hold --adapter_type {args.adapter_type}; leave it out")
    if args.checkpoints_total_limit is not None and args.checkpoints_total_limit < 1:
        raise UsageError("--checkpoints_total_limit must be at least 1; leave it out to keep every checkpoint")
    if args.with_prior_preservation and not (args.class_data_dir and args.class_prompt):
        raise UsageError("--with_prior_preservation needs --class_data_dir and --class_prompt")
    if (args.class_data_dir or args.class_prompt) and not args.with_prior_preservation:
        raise UsageError("--class_data_dir and --class_prompt have no effect without --with_prior_preservation")
    if args.with_prior_preservation:
        class_prompts(args)
    if args.text_encoder_lr is not None and not args.train_text_encoder:
        raise UsageError("--text_encoder_lr has no effect without --train_text_encoder")
    if args.class_data_dir and Path(args.class_data_dir).is_dir():
        read_captions(Path(args.class_data_dir))
    base = Path(args.pretrained_model_name_or_path)
    if base.is_dir() and not (base / "model_index.json").is_file():
        raise UsageError(f"{base} is not a saved pipeline: it has no model_index.json")
    find_checkpoint(args)


def check_ranges(args: Arguments) -> None:
    """Raise `UsageError` if a number is outside the range in which it means something. `None` is the default."""
    ranges: dict[str, tuple[Callable[[float], bool], Sequence[str]]] = {
        "in [0, 1)": (lambda x: 0 <= x < 1, ("lora_dropout", "caption_dropout", "adam_beta1", "adam_beta2")),
        "above 0": (
            lambda x: x > 0,
            (
                "learning_rate",
                "text_encoder_lr",
                "lora_alpha",
                "snr_gamma",
                "adam_epsilon",
                "max_grad_norm",
                "lr_power",
            ),
        ),
        "at least 0": (
            lambda x: x >= 0,
            (
                "prior_loss_weight",
                "class_guidance_scale",
                "validation_guidance_scale",
                "adam_weight_decay",
                "lr_warmup_steps",
                "dataloader_num_workers",
                "seed",
            ),
        ),
        "at least 8": (lambda x: x >= 8, ("resolution",)),
        "at least 1": (lambda x: x >= 1, ("lr_num_cycles",)),
        "at least 1, or -1 for as square as possible": (lambda x: x >= 1 or x == -1, ("lokr_factor",)),
    }
    for expected, (holds, names) in ranges.items():
        for name in names:
            value = getattr(args, name)
            if value is not None and not (math.isfinite(value) and holds(value)):
                raise UsageError(f"--{name} must be {expected}, not {value}")


def class_prompts(args: Arguments) -> list[str]:
    """Return the prompts of the class pictures: the one of `class_prompt`, or those in the file that it names."""
    assert args.class_prompt is not None
    if not os.path.isfile(args.class_prompt):
        return [args.class_prompt]
    lines = Path(args.class_prompt).read_text(encoding="utf-8").splitlines()
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UsageError(f"--class_prompt: there is no prompt in {args.class_prompt}")
    return prompts


def find_checkpoint(args: Arguments) -> Path | None:
    """Return the checkpoint to resume from, if any."""
    if args.resume_from_checkpoint is None:
        return None
    if args.resume_from_checkpoint == "latest":
        return next(reversed(list_checkpoints(Path(args.output_dir))), None)
    path = Path(args.resume_from_checkpoint)
    if not (path / TRAINING_STATE_FILE).is_file():
        raise UsageError(f"--resume_from_checkpoint: {path} is not a checkpoint (it has no {TRAINING_STATE_FILE})")
    checkpoint_step(path)
    return path


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints in `folder`, the oldest first."""
    return sorted(
        (path for path in folder.glob("checkpoint-*") if CHECKPOINT.fullmatch(path.name)), key=checkpoint_step
    )


def checkpoint_step(path: Path) -> int:
    """Return the number of steps after which a checkpoint was saved."""
    match = CHECKPOINT.fullmatch(path.resolve().name)
    if match is None:
        raise UsageError(f"{path}: the folder of a checkpoint has to be named checkpoint-<steps done>")
    return int(match.group(1))
