"""The options of `train_dreambooth.py`, and what can be wrong with them before a model is loaded."""

import dataclasses
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dreambooth_data import UsageError, read_captions

TRAINING_STATE_FILE = "adapters.safetensors"
"""What tells a checkpoint from any other folder."""
CHECKPOINT = re.compile(r"checkpoint-(\d+)")


def option(default: Any = dataclasses.MISSING, help: str = "", aliases: Sequence[str] = ()) -> Any:
    """A field of `Arguments`: one command line option."""
    return dataclasses.field(default=default, metadata={"help": help, "aliases": list(aliases)})


@dataclass
class Arguments:
    """Every option of the script; names are those of diffusers' own training scripts where it has them."""

    pretrained_model_name_or_path: str = option(help="folder or hub id of the base pipeline")
    instance_data_dir: str = option(help="folder of training pictures; metadata.jsonl in it gives captions")
    output_dir: str = option("dreambooth-lora", "where weights, checkpoints and validation pictures go")
    instance_prompt: str | None = option(None, "caption of every picture that metadata.jsonl does not list")
    revision: str | None = option(None, "revision of the base pipeline on the hub")
    variant: str | None = option(None, "file variant of the base pipeline, for example fp16")

    with_prior_preservation: bool = option(False, "train on class pictures too, so that the class is kept")
    class_data_dir: str | None = option(None, "folder of class pictures; what is missing is generated")
    class_prompt: str | None = option(None, "prompt of the class pictures, or a text file of prompts, one a line")
    num_class_images: int = option(100, "number of class pictures there have to be")
    class_guidance_scale: float | None = option(None, "guidance scale to generate them with")
    sample_batch_size: int = option(4, "how many of them to generate at once")
    prior_loss_weight: float = option(1.0, "weight of the class pictures in the loss")

    adapter_type: Literal["lora", "dora", "loha", "lokr", "oft", "boft"] = option("lora", "what to train")
    rank: int = option(4, "rank of the adapter; not for oft and boft")
    lora_alpha: float | None = option(None, "alpha; the strength is alpha / rank, and the default is the rank")
    lora_dropout: float = option(0.0, "dropout on the input of the adapter, or on the blocks of oft and boft")
    lokr_factor: int = option(-1, "size of the smaller factor of lokr; -1 for as square as possible")
    block_size: int = option(4, "of the rotated blocks of oft and boft")
    lora_layers: str | None = option(
        None, "UNet layers: path endings with commas between, all-linear, all-conv or all; default: attention"
    )
    train_text_encoder: bool = option(False, "train a LoRA on the text encoders too")

    max_train_steps: int = option(500, "number of optimizer steps")
    train_batch_size: int = option(4, "pictures per step and device; as many class pictures come on top")
    gradient_accumulation_steps: int = option(1, "batches per optimizer step")
    gradient_checkpointing: bool = option(False, "less memory for more time")
    mixed_precision: Literal["no", "fp16", "bf16"] | None = option(None, "default: what accelerate is set to")
    resolution: int | None = option(None, "side of the square pictures; default: the pipeline's own")
    random_flip: bool = option(False, "mirror half of the pictures")
    caption_dropout: float = option(0.0, "share of pictures shown without their caption")
    cache_latents: bool = option(False, "encode every picture once and keep the result in memory")
    dataloader_num_workers: int = option(0, "background processes that read pictures")
    snr_gamma: float | None = option(None, "Min-SNR loss weighting (5.0 is usual)", ["--min_snr_gamma"])
    seed: int = option(0, "the same seed gives the same run")

    learning_rate: float = option(1e-4, "of the UNet's LoRA")
    text_encoder_lr: float | None = option(None, "of the text encoders' LoRA; default: learning_rate")
    lr_scheduler: Literal[
        "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"
    ] = option("constant", "how the learning rate changes over the steps")
    lr_warmup_steps: int = option(0, "steps over which the learning rate rises from zero")
    lr_num_cycles: int = option(1, "restarts of cosine_with_restarts")
    lr_power: float = option(1.0, "power of polynomial")
    adam_beta1: float = option(0.9, "AdamW: decay of the mean of gradients")
    adam_beta2: float = option(0.999, "AdamW: decay of the mean of squared gradients")
    adam_weight_decay: float = option(1e-2, "AdamW: weight decay")
    adam_epsilon: float = option(1e-8, "AdamW: epsilon")
    max_grad_norm: float = option(1.0, "gradients are clipped to this norm")

    checkpointing_steps: int = option(500, "save a checkpoint every so many steps")
    checkpoints_total_limit: int | None = option(None, "how many checkpoints to keep")
    resume_from_checkpoint: str | None = option(None, 'a checkpoint folder, or "latest" in output_dir')
    validation_prompt: str | None = option(None, "prompt to draw while training")
    validation_steps: int = option(100, "draw it every so many steps, and at the end")
    num_validation_images: int = option(4, "how many pictures to draw of it")
    validation_guidance_scale: float | None = option(None, "guidance scale to draw it with")
    save_format: Literal["diffusers", "kohya"] | None = option(
        None, "naming of the saved tensors; default: diffusers for lora and dora, which it can read, and else kohya"
    )
    save_precision: Literal["fp32", "fp16", "bf16"] = option("fp32", "dtype of the saved tensors")


def check_arguments(args: Arguments) -> None:
    """Refuse options that cannot work, with what to do instead."""
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
    if args.adapter_type in ("oft", "boft") and args.lora_alpha is not None:
        raise UsageError(f"--lora_alpha has no effect with --adapter_type {args.adapter_type}")
    if args.adapter_type not in ("lora", "dora") and args.save_format == "diffusers":
        raise UsageError(f"--save_format diffusers cannot hold --adapter_type {args.adapter_type}; leave it out")
    for name in ("lora_dropout", "caption_dropout"):
        if not 0 <= getattr(args, name) < 1:
            raise UsageError(f"--{name} must be in [0, 1), not {getattr(args, name)}")
    if args.seed < 0:
        raise UsageError(f"--seed must not be negative, and is {args.seed}")
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


def class_prompts(args: Arguments) -> list[str]:
    """The prompt of the class pictures, or those of the file it names."""
    assert args.class_prompt is not None
    if not os.path.isfile(args.class_prompt):
        return [args.class_prompt]
    lines = Path(args.class_prompt).read_text(encoding="utf-8").splitlines()
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UsageError(f"--class_prompt: there is no prompt in {args.class_prompt}")
    return prompts


def find_checkpoint(args: Arguments) -> Path | None:
    """The checkpoint to resume from, if any."""
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
    """The complete checkpoints in `folder`, the oldest first."""
    return sorted(
        (path for path in folder.glob("checkpoint-*") if CHECKPOINT.fullmatch(path.name)), key=checkpoint_step
    )


def checkpoint_step(path: Path) -> int:
    """The number of steps that were done when this checkpoint was saved."""
    match = CHECKPOINT.fullmatch(path.resolve().name)
    if match is None:
        raise UsageError(f"{path}: a checkpoint's folder has to be named checkpoint-<steps done>")
    return int(match.group(1))
