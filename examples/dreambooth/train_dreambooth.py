"""Train an adapter on a few pictures of a subject or a style, for Stable Diffusion 1.x, 2.x and XL.

    python train_dreambooth.py --pretrained_model_name_or_path FOLDER_OR_HUB_ID \
        --instance_data_dir pictures/ --instance_prompt "a photo of sks dog" --output_dir sks-dog

With `--resume_from_checkpoint latest` an interrupted run continues exactly from its last checkpoint.
Start the script with `accelerate launch` to use several devices.
"""

import math
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, set_seed
from diffusers import DDPMScheduler
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.optimization import get_scheduler
from dreambooth_args import (
    TRAINING_STATE_FILE,
    Arguments,
    check_arguments,
    checkpoint_step,
    find_checkpoint,
    list_checkpoints,
)
from dreambooth_data import (
    Batch,
    EndlessBatches,
    Pictures,
    UsageError,
    labelled_sheet,
    load_batches,
    read_folder,
)
from dreambooth_pipeline import (
    Pipeline,
    draw,
    encode_captions,
    ensure_class_pictures,
    load_pipeline,
    training_resolution,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import HfArgumentParser

import diffadapt
from diffadapt.runtime.adapter import Adapter

ADAPTER = "dreambooth"
WEIGHTS_FILE = "pytorch_lora_weights.safetensors"
UNET_LAYERS = ("to_q", "to_k", "to_v", "to_out.0")
TEXT_ENCODER_LAYERS = ("q_proj", "k_proj", "v_proj", "out_proj")
SAVE_PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
DIVERGED_ADVICE = "lower --learning_rate, or train with --mixed_precision bf16 or no instead of fp16"


class Diverged(RuntimeError):
    """The loss is not finite."""


def add_adapters(args: Arguments, pipe: Pipeline) -> dict[str, Adapter]:
    """Add an adapter to the UNet and, if asked for, to every text encoder; return them by component name."""
    layers: str | list[str] = list(UNET_LAYERS)
    text_layers: str | list[str] = list(TEXT_ENCODER_LAYERS)
    if args.lora_layers == "all":
        layers, text_layers = ".+", "all-linear"
    elif args.lora_layers in ("all-linear", "all-conv"):
        layers, text_layers = args.lora_layers, "all-linear"
    elif args.lora_layers:
        layers = [name.strip() for name in args.lora_layers.split(",")]
    targets = {"unet": layers}
    if args.train_text_encoder:
        encoders = [name for name in ("text_encoder", "text_encoder_2") if name in pipe.components]
        targets |= dict.fromkeys(encoders, text_layers)
    generator = torch.Generator().manual_seed(args.seed)
    adapters: dict[str, Adapter] = {}
    for component, wanted in targets.items():
        config = adapter_config(args, wanted, generator)
        adapters[component] = diffadapt.add_adapter(getattr(pipe, component), config, name=ADAPTER)
        if args.instance_prompt:
            adapters[component].metadata["modelspec.trigger_phrase"] = args.instance_prompt
    if args.gradient_checkpointing:
        pipe.unet.enable_gradient_checkpointing()  # activations of text encoders are small in comparison
    return adapters


def adapter_config(
    args: Arguments, target_modules: str | list[str], generator: torch.Generator
) -> diffadapt.AdapterConfig:
    """Return the settings of the adapter for `--adapter_type` and its options."""
    common: dict[str, Any] = {"target_modules": target_modules, "dropout": args.lora_dropout, "generator": generator}
    if args.adapter_type in ("oft", "boft"):
        config_class = {"oft": diffadapt.OFTConfig, "boft": diffadapt.BOFTConfig}[args.adapter_type]
        # Rotations of the outputs have a file format that other tools read.
        return config_class(block_size=args.block_size, side="output", **common)
    common |= {"rank": args.rank, "alpha": args.lora_alpha}
    if args.adapter_type == "loha":
        return diffadapt.LoHaConfig(**common)
    if args.adapter_type == "lokr":
        return diffadapt.LoKrConfig(factor=args.lokr_factor, **common)
    return diffadapt.LoraConfig(use_dora=args.adapter_type == "dora", **common)


class Objective(nn.Module):
    """A module that computes the loss from latents and captions.

    It contains every model that is trained, so that a step is one forward of one module, as DDP and gradient
    accumulation need it, with or without text encoders.
    """

    def __init__(self, args: Arguments, pipe: Pipeline, adapters: Mapping[str, Adapter], resolution: int) -> None:
        super().__init__()
        self.args = args
        self.pipe = pipe
        self.adapters = dict(adapters)
        self.trained = nn.ModuleDict({component: getattr(pipe, component) for component in adapters})
        self.resolution = resolution
        self.schedule = DDPMScheduler.from_config(pipe.scheduler.config)
        self.predicts_velocity = self.schedule.config.prediction_type == "v_prediction"
        # The size conditions of SDXL: original size, top left corner of the crop, target size.
        self.time_ids = [resolution, resolution, 0, 0, resolution, resolution]
        self._encode_frozen = lru_cache(maxsize=1024)(self._encode_one)

    def forward(self, moments: Tensor, captions: Sequence[str]) -> Tensor:
        """Return the loss, for random noise and timesteps.

        Args:
            moments: moments of the pictures' latent distributions, see `encode`.
            captions: one caption per picture.
        """
        latents = DiagonalGaussianDistribution(moments).sample() * self.pipe.vae.config.scaling_factor
        noise = torch.randn_like(latents)
        steps = self.schedule.config.num_train_timesteps
        timesteps = torch.randint(steps, (len(latents),), device=latents.device)
        prediction = self._predict(self.schedule.add_noise(latents, noise, timesteps), timesteps, captions)
        target = self.schedule.get_velocity(latents, noise, timesteps) if self.predicts_velocity else noise
        losses = F.mse_loss(prediction.float(), target, reduction="none").mean(dim=(1, 2, 3))
        if self.args.snr_gamma is not None:
            losses = losses * self._snr_weights(timesteps, self.args.snr_gamma)
        if not self.args.with_prior_preservation:
            return losses.mean()
        instance, prior = losses.chunk(2)
        return instance.mean() + self.args.prior_loss_weight * prior.mean()

    @torch.no_grad()
    def encode(self, pictures: Tensor) -> Tensor:
        """Return the moments (mean and log variance) of the pictures' latent distributions."""
        return self.pipe.vae.encode(pictures.to(self.pipe.vae.device)).latent_dist.parameters

    def _predict(self, noisy: Tensor, timesteps: Tensor, captions: Sequence[str]) -> Tensor:
        hidden, pooled = self._encode(captions, noisy.device)
        conditions: dict[str, Any] = {"encoder_hidden_states": hidden}
        if pooled is not None:
            time_ids = torch.tensor([self.time_ids] * len(captions), device=noisy.device, dtype=pooled.dtype)
            conditions["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": time_ids}
        return self.pipe.unet(noisy.to(self.pipe.unet.dtype), timesteps, **conditions).sample

    def _encode(self, captions: Sequence[str], device: torch.device) -> tuple[Tensor, Tensor | None]:
        if len(self.trained) > 1:
            return encode_captions(self.pipe, captions, device)
        hidden, pooled = zip(*(self._encode_frozen(caption, device) for caption in captions), strict=True)
        return torch.cat(hidden), None if pooled[0] is None else torch.cat(pooled)

    @torch.no_grad()
    def _encode_one(self, caption: str, device: torch.device) -> tuple[Tensor, Tensor | None]:
        return encode_captions(self.pipe, [caption], device)

    def _snr_weights(self, timesteps: Tensor, gamma: float) -> Tensor:
        """Return the Min-SNR weights (Hang et al., arXiv 2303.09556) for the kind of prediction the model makes."""
        alphas = self.schedule.alphas_cumprod.to(timesteps.device)[timesteps]
        snr = alphas / (1 - alphas)
        return snr.clamp(max=gamma) / (snr + 1) if self.predicts_velocity else (gamma / snr).clamp(max=1)


def build_optimizer(args: Arguments, adapters: Mapping[str, Adapter]) -> torch.optim.Optimizer:
    """Return an AdamW optimiser with separate learning rates for the UNet and the text encoders."""
    text_lr = args.learning_rate if args.text_encoder_lr is None else args.text_encoder_lr
    groups = [
        {"params": list(adapter.parameters()), "lr": args.learning_rate if component == "unet" else text_lr}
        for component, adapter in adapters.items()
    ]
    betas = (args.adam_beta1, args.adam_beta2)
    return torch.optim.AdamW(groups, betas=betas, weight_decay=args.adam_weight_decay, eps=args.adam_epsilon)


# --- files -------------------------------------------------------------------------------------------------


def save_adapters(args: Arguments, objective: Objective, folder: Path) -> None:
    """Write the adapters to `folder`, as the file that `pipe.load_adapter` reads."""
    default = "diffusers" if args.adapter_type in ("lora", "dora") else "kohya"
    objective.pipe.adapters.save(ADAPTER, folder / WEIGHTS_FILE, format=args.save_format or default)


def checkpoint_adapters_only(args: Arguments, accelerator: Accelerator, objective: Objective) -> None:
    """Make accelerate's checkpoints contain the adapters instead of the base weights, which never change."""
    adapters = nn.ModuleDict(objective.adapters)

    def save(models: list[nn.Module], weights: list[dict[str, Tensor]], folder: str) -> None:
        weights.clear()
        if accelerator.is_main_process:
            save_file(adapters.state_dict(), Path(folder) / TRAINING_STATE_FILE)
            save_adapters(args, objective, Path(folder))

    def load(models: list[nn.Module], folder: str) -> None:
        models.clear()
        try:
            adapters.load_state_dict(load_file(Path(folder) / TRAINING_STATE_FILE))
        except RuntimeError as error:
            raise UsageError(f"{folder} was made with other layers or another rank: {error}") from error

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def save_checkpoint(args: Arguments, accelerator: Accelerator, step: int) -> None:
    """Save everything needed to continue from `step`. An incomplete checkpoint is never found by "latest"."""
    folder = Path(args.output_dir)
    complete, partial = folder / f"checkpoint-{step}", folder / f"partial-checkpoint-{step}"
    accelerator.save_state(str(partial))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        if complete.exists():
            shutil.rmtree(complete)
        partial.rename(complete)
        if args.checkpoints_total_limit is not None:
            for outdated in list_checkpoints(folder)[: -args.checkpoints_total_limit]:
                shutil.rmtree(outdated)


def validate(args: Arguments, objective: Objective, step: int) -> None:
    """Draw the validation prompt with the same seeds every time, so that steps can be compared."""
    assert args.validation_prompt is not None
    seeds = [args.seed + number for number in range(args.num_validation_images)]
    objective.eval()
    draw_with = partial(draw, resolution=objective.resolution, guidance=args.validation_guidance_scale)
    images = [draw_with(objective.pipe, [args.validation_prompt], [seed])[0] for seed in seeds]
    objective.train()
    labels = [f"seed {seed}" for seed in seeds]
    sheet = labelled_sheet(images, labels, f"step {step}: {args.validation_prompt}")
    sheet.save(Path(args.output_dir) / f"validation-{step:06d}.png")


# --- the run -----------------------------------------------------------------------------------------------


class Loop:
    """The training loop: optimizer steps, with checkpoints and validation pictures in between."""

    def __init__(self, args: Arguments, accelerator: Accelerator, objective: Objective, pictures: Pictures) -> None:
        self.args = args
        self.accelerator = accelerator
        self.objective = objective
        self.pictures = pictures
        optimizer = build_optimizer(args, objective.adapters)
        # accelerate advances a schedule by one step per process.
        processes = accelerator.num_processes
        schedule = get_scheduler(
            args.lr_scheduler,
            optimizer,
            num_warmup_steps=args.lr_warmup_steps * processes,
            num_training_steps=args.max_train_steps * processes,
            num_cycles=args.lr_num_cycles,
            power=args.lr_power,
        )
        self.model, self.optimizer, self.lr_schedule = accelerator.prepare(objective, optimizer, schedule)
        self.parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def run(self, first: int) -> None:
        """Train until `max_train_steps`; `first` steps are done already."""
        args, accelerator = self.args, self.accelerator
        quiet = not accelerator.is_local_main_process
        with tqdm(initial=first, total=args.max_train_steps, desc="train", disable=quiet) as progress:
            step, batches = first, iter(self._batches(first))
            while step < args.max_train_steps:
                loss = self._accumulate(next(batches))
                if not math.isfinite(loss):
                    raise Diverged(f"the loss is {loss} in step {step + 1}: {DIVERGED_ADVICE}")
                progress.set_postfix(loss=f"{loss:.4f}", lr=f"{self.lr_schedule.get_last_lr()[0]:.2e}")
                if accelerator.sync_gradients:
                    step += 1
                    progress.update()
                    self._after_step(step)

    def _accumulate(self, batch: Batch) -> float:
        with self.accelerator.accumulate(self.model):
            moments = batch.pictures if self.args.cache_latents else self.objective.encode(batch.pictures)
            loss = self.model(moments.to(self.accelerator.device), batch.captions)
            self.accelerator.backward(loss)
            if self.accelerator.sync_gradients:
                self.accelerator.clip_grad_norm_(self.parameters, self.args.max_grad_norm)
            self.optimizer.step()
            self.lr_schedule.step()
            self.optimizer.zero_grad()
        return loss.item()

    def _after_step(self, step: int) -> None:
        args, is_last = self.args, step == self.args.max_train_steps
        if step % args.checkpointing_steps == 0:
            save_checkpoint(args, self.accelerator, step)
        if args.validation_prompt and (step % args.validation_steps == 0 or is_last):
            if self.accelerator.is_main_process:
                validate(args, self.objective, step)

    def _batches(self, first: int) -> Iterable[Batch]:
        args, processes = self.args, self.accelerator.num_processes
        batches = EndlessBatches(
            self.pictures.group_sizes,
            args.train_batch_size,
            seed=args.seed,
            flip=args.random_flip,
            caption_dropout=args.caption_dropout,
            first=first * args.gradient_accumulation_steps * processes + self.accelerator.process_index,
            stride=processes,
        )
        return load_batches(self.pictures, batches, args.dataloader_num_workers)


def train(args: Arguments) -> Path:
    """Train and save an adapter; return the path of its file.

    Raises:
        UsageError: an option or a file has to be changed.
        Diverged: the loss is not finite.
    """
    check_arguments(args)
    groups = [read_folder(Path(args.instance_data_dir), args.instance_prompt)]
    checkpoint = find_checkpoint(args)
    Path(args.output_dir).mkdir(parents=True, exist_ok=True)

    # The last layer of SDXL's first text encoder does not take part in the loss, which DDP has to know.
    ddp = DistributedDataParallelKwargs(find_unused_parameters=args.train_text_encoder)
    accelerator = Accelerator(
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        mixed_precision=args.mixed_precision,
        kwargs_handlers=[ddp],
    )
    pipe = load_pipeline(args, accelerator)
    resolution = training_resolution(args, pipe)
    if args.with_prior_preservation:
        groups.append(ensure_class_pictures(args, pipe, accelerator, resolution))
    pictures = Pictures(groups, resolution)
    objective = Objective(args, pipe, add_adapters(args, pipe), resolution).train()
    if args.cache_latents:
        quiet = not accelerator.is_local_main_process
        pictures.cache_latents(objective.encode, flips=args.random_flip, quiet=quiet)
    loop = Loop(args, accelerator, objective, pictures)
    checkpoint_adapters_only(args, accelerator, objective)

    set_seed(args.seed, device_specific=True)  # each process draws its own noise
    first = 0
    if checkpoint is not None:
        accelerator.load_state(str(checkpoint))
        first = checkpoint_step(checkpoint)
        accelerator.print(f"resuming from {checkpoint}")
    elif args.resume_from_checkpoint:
        accelerator.print(f"no checkpoint in {args.output_dir} yet: starting from the first step")
    loop.run(first)

    accelerator.wait_for_everyone()
    path = Path(args.output_dir) / WEIGHTS_FILE
    if accelerator.is_main_process:
        for adapter in objective.adapters.values():
            adapter.to(SAVE_PRECISIONS[args.save_precision])
        save_adapters(args, objective, Path(args.output_dir))
        print(f"saved {path}")
    accelerator.end_training()
    return path


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and train; return the exit status."""
    parser = HfArgumentParser(Arguments, description=(__doc__ or "").splitlines()[0])
    (args,) = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    try:
        train(args)
    except (UsageError, diffadapt.AdapterError) as error:
        parser.error(str(error))
    except Diverged as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
