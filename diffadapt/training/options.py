"""The options of a training run: one set of dataclasses for config files, the command line and Python.

Every field is a key of the config file and an option `--key value` of the command line. Options that the training
scripts of diffusers have, too, have the same name here.
"""

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast


def option(
    default: Any = None, help: str = "", aliases: Sequence[str] = (), path: Literal["always", "perhaps"] | None = None
) -> Any:
    """Return a field of the options.

    Args:
        default: the default value; a list or dict is copied for each instance.
        help: the help text.
        aliases: further names on the command line.
        path: whether the value is a path, which a config file gives relative to its own folder; "perhaps" if it may
            also be a hub id or a prompt.
    """
    metadata = {"help": help, "aliases": list(aliases), "path": path}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(kw_only=True)
class FolderOptions:
    """One folder of pictures.

    Attributes:
        path: the folder. Sub-folders belong to it. Kohya's names like `10_sks dog` stand for 10 repeats and a caption.
        prompt: the caption of pictures without one of their own; defaults to `instance_prompt`.
        repeats: how often each picture is seen in an epoch.
        weight: the weight of the folder's pictures in the loss.
        control: a folder with the pictures to edit, under the same names, for edit models.
    """

    path: str = option("", path="always")
    prompt: str | None = None
    repeats: int = 1
    weight: float = 1.0
    control: str | None = option(None, path="always")


@dataclass(kw_only=True)
class BaseOptions:
    """The base model."""

    pretrained_model_name_or_path: str = option(
        "", "folder, hub id or single file of the base pipeline", path="perhaps"
    )
    revision: str | None = option(None, "revision of the base pipeline on the hub")
    variant: str | None = option(None, "file variant of the base pipeline, for example fp16")
    single_file_config: str | None = option(
        None, "folder or hub id of a pipeline with the configs for a single file", path="perhaps"
    )
    base_precision: Literal["full", "fp8", "int8", "nf4"] = option(
        "full", "how the weights of the denoiser are stored; fp8 by layerwise casting, int8 and nf4 by bitsandbytes"
    )
    mixed_precision: Literal["no", "fp16", "bf16"] | None = option(
        None, "precision of the base model and the forward pass; default: the setting of accelerate"
    )
    helper_adapter: str | None = option(
        None, "adapter that is active and frozen during training, and left out of the result", path="perhaps"
    )


@dataclass(kw_only=True)
class DataOptions:
    """The pictures and their captions."""

    instance_data_dir: str | None = option(None, "folder of training pictures; sub-folders belong to it", path="always")
    instance_prompt: str | None = option(None, "caption of all pictures without one of their own")
    folders: list[FolderOptions] = option(  # noqa: RUF009
        [], "several folders instead of instance_data_dir: tables with path, prompt, repeats, weight, control"
    )
    control_data_dir: str | None = option(
        None, "pictures to edit, under the same names, for edit models", path="always"
    )
    caption_column: str = option("text", "column or key of the captions in metadata.csv and metadata.jsonl")
    trigger_word: str | None = option(None, "word for the subject: replaces [trigger], or starts captions without it")
    shuffle_tags: bool = option(False, "shuffle the comma-separated tags of a caption each time")
    keep_tags: int = option(0, "how many tags at the start are neither shuffled nor dropped")
    tag_dropout: float = option(0.0, "probability that a tag is left out")
    caption_dropout: float = option(0.0, "probability that a picture is trained without its caption")
    max_sequence_length: int | None = option(
        None, "how many tokens of a caption the text encoder keeps, padding included; default: as when drawing"
    )
    resolution: int | None = option(None, "side of square pictures in pixels; default: the pipeline's own")
    aspect_ratio_buckets: bool = option(False, "keep aspect ratios, at about the area of resolution squared")
    allow_upscaling: bool = option(False, "enlarge pictures that are smaller than their bucket")
    random_flip: bool = option(False, "mirror each picture with a probability of one half")
    random_crop: bool = option(False, "crop at a random position instead of the centre")
    background: str = option("white", "colour behind transparent pictures")
    masked_loss: bool = option(False, "train only on what masks (name-masklabel.png, or the alpha channel) cover")
    unmasked_weight: float = option(0.0, "weight in the loss of what masks do not cover")
    held_out_pictures: int = option(0, "how many pictures are not trained on, but measured at fixed noise")
    cache_latents: bool = option(False, "encode every picture once and keep the result on disk")
    cache_text: bool = option(True, "encode every caption once, unless text encoders are trained")
    cache_dir: str | None = option(None, "folder of the caches; default: cache in output_dir", path="always")
    dataloader_num_workers: int = option(0, "number of background processes that read pictures")
    dry_run: bool = option(False, "check the data, write a report and a contact sheet, and do not train")


@dataclass(kw_only=True)
class PriorOptions:
    """What keeps the base model's other abilities."""

    with_prior_preservation: bool = option(False, "also train on the class, so that it is not forgotten")
    prior_source: Literal["pictures", "base"] = option(
        "pictures", "learn from pictures of the class, or from the base model's own prediction for class_prompt"
    )
    class_data_dir: str | None = option(None, "folder of class pictures; missing ones are generated", path="always")
    class_prompt: str | None = option(
        None, "prompt of the class pictures, or a text file with one prompt per line", path="perhaps"
    )
    num_class_images: int = option(100, "minimum number of class pictures")
    class_guidance_scale: float | None = option(None, "guidance scale for class pictures; default: the pipeline's own")
    sample_batch_size: int = option(4, "how many class pictures to generate at once")
    prior_loss_weight: float = option(1.0, "weight of the class in the loss")


@dataclass(kw_only=True)
class AdapterOptions:
    """The adapter."""

    adapter_type: str = option("lora", "adapter type to train: lora, dora, loha, lokr, oft, boft, ia3, full, ...")
    adapter_args: dict[str, Any] = option({}, "further settings of the adapter type: name=value ...")  # noqa: RUF009
    rank: int = option(4, "rank of the adapter, for types with a rank")
    lora_alpha: float | None = option(None, "alpha of the adapter, which is scaled by alpha / rank; default: the rank")
    lora_dropout: float = option(0.0, "dropout on the input of the adapter, or on the blocks of oft and boft")
    lokr_factor: int = option(-1, "size of the smaller factor of lokr; -1 for factors as square as possible")
    block_size: int = option(4, "size of the rotated blocks of oft and boft")
    lora_layers: str | None = option(
        None,
        "layers of the denoiser to adapt: all-linear, all-conv, all, attention, b-lora-content, b-lora-style, or path "
        "endings separated by commas; default: those usual for the family",
    )
    train_text_encoder: bool = option(False, "also train an adapter on the text encoders")
    new_words: dict[str, Any] = option(  # noqa: RUF009
        {}, "words to learn (textual inversion): word=start, a word or a number of vectors"
    )
    token_lr: float | None = option(None, "learning rate of the vectors of new words; default: 10 times learning_rate")
    init_adapter: str | None = option(None, "adapter file to continue from", path="perhaps")


@dataclass(kw_only=True)
class StepOptions:
    """Steps, noise and loss."""

    max_train_steps: int = option(500, "number of optimizer steps")
    num_train_epochs: int | None = option(None, "number of passes over the pictures, instead of max_train_steps")
    train_batch_size: int = option(4, "pictures per batch and device; with class pictures, as many of those are added")
    gradient_accumulation_steps: int = option(1, "batches per optimizer step")
    gradient_checkpointing: bool = option(False, "recompute activations in the backward pass: less memory, more time")
    compile: bool = option(False, "compile the repeated blocks of the denoiser")
    timestep_sampling: Literal["family", "uniform", "logit_normal", "mode"] = option(
        "family", "distribution of noise levels; default: the usual one of the family"
    )
    logit_mean: float = option(0.0, "mean of logit_normal; above 0 favours noise")
    logit_std: float = option(1.0, "standard deviation of logit_normal")
    shift: float | None = option(None, "shift of noise levels of flow models; default: that of the family")
    min_noise: float = option(0.0, "lowest noise level to train, from 0 (clean) to 1 (noise)")
    max_noise: float = option(1.0, "highest noise level to train")
    guidance: float | None = option(None, "guidance that a guidance-distilled model is told; default: of the family")
    loss_weighting: Literal["none", "min_snr", "debiased", "cosmap", "sigma_sqrt"] | None = option(
        None, "weighting of the loss over noise levels; default: none, or min_snr if snr_gamma is given"
    )
    snr_gamma: float | None = option(None, "gamma of Min-SNR loss weighting; 5.0 is usual", ["--min_snr_gamma"])
    seed: int = option(0, "seed of everything random; the same seed repeats the run")


@dataclass(kw_only=True)
class OptimizerOptions:
    """The optimizer and its schedule."""

    learning_rate: float = option(1e-4, "learning rate of the denoiser's adapter")
    text_encoder_lr: float | None = option(None, "learning rate of the text encoders' adapters; default: learning_rate")
    optimizer: str = option(
        "adamw", "adamw, adamw_fused, adamw8bit, prodigy, schedulefree, lion, came, adafactor, ... or module.Class"
    )
    optimizer_args: dict[str, Any] = option({}, "further arguments of the optimizer: name=value ...")  # noqa: RUF009
    loraplus_lr_ratio: float | None = option(None, "learning rate of the up matrix relative to the down matrix (LoRA+)")
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
    ema_decay: float | None = option(
        None, "decay of an average of the weights, which is saved instead of the last ones"
    )


@dataclass(kw_only=True)
class OutputOptions:
    """What is written, and when."""

    output_dir: str = option("dreambooth-lora", "folder to write weights, checkpoints and pictures to", path="always")
    checkpointing_steps: int = option(500, "save a checkpoint every this many steps")
    checkpoints_total_limit: int | None = option(None, "how many checkpoints to keep; default: all")
    resume_from_checkpoint: str | None = option(
        None, 'folder of the checkpoint to continue from, or "latest" for the newest one in output_dir'
    )
    accept_changes: list[str] = option(  # noqa: RUF009
        [], "options that may differ from those of the checkpoint on resume; all for any of them"
    )
    validation_prompt: str | None = option(None, "prompt to draw during training")
    validation_steps: int = option(100, "draw the validation prompt every this many steps, and at the end")
    num_validation_images: int = option(4, "number of pictures to draw of the validation prompt")
    validation_guidance_scale: float | None = option(None, "guidance scale to draw with; default: the pipeline's own")
    validation_inference_steps: int | None = option(None, "denoising steps to draw with; default: the pipeline's own")
    save_format: Literal["diffusers", "kohya", "peft", "comfy", "onetrainer"] | None = option(
        None,
        "format of the saved file; default: diffusers for lora and dora, kohya for types that diffusers cannot read",
    )
    save_precision: Literal["fp32", "fp16", "bf16"] = option("fp32", "dtype of the saved tensors")
    report_to: str | None = option(None, "tracker: tensorboard, wandb, ..., none; default: tensorboard if installed")


def _folder(entry: Any) -> FolderOptions:
    """Return the options of a folder, which is a table in a config file, and may be a path in Python."""
    if isinstance(entry, (str, os.PathLike)):
        return FolderOptions(path=os.fspath(cast("str | os.PathLike[str]", entry)))
    return FolderOptions(**entry) if isinstance(entry, dict) else entry


@dataclass(kw_only=True)
class TrainingOptions(
    OutputOptions, OptimizerOptions, StepOptions, AdapterOptions, PriorOptions, DataOptions, BaseOptions
):
    """Every option of a training run; see the help text of each, or `diffadapt train --help`."""

    def __post_init__(self) -> None:
        self.folders = [_folder(entry) for entry in self.folders]

    @property
    def folder_options(self) -> list[FolderOptions]:
        """The folders of training pictures: `folders`, or the one of `instance_data_dir`."""
        own = (
            []
            if self.instance_data_dir is None
            else [FolderOptions(path=self.instance_data_dir, control=self.control_data_dir)]
        )
        return own + self.folders


def default_of(name: str) -> Any:
    """Return the default value of an option."""
    found = next(entry for entry in dataclasses.fields(TrainingOptions) if entry.name == name)
    return found.default if found.default_factory is dataclasses.MISSING else found.default_factory()
