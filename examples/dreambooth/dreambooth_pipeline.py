"""Load the frozen base pipeline, encode captions as it does, and draw with it."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from dreambooth_args import Arguments, class_prompts
from dreambooth_data import Example, UsageError, append_captions, list_pictures, read_captions, read_folder
from PIL import Image
from torch import Tensor, nn
from tqdm.auto import tqdm

Pipeline: TypeAlias = StableDiffusionPipeline | StableDiffusionXLPipeline

PRECISIONS = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def load_pipeline(args: Arguments, accelerator: Accelerator) -> Pipeline:
    """Load the base pipeline, frozen, in the dtype of the mixed precision. The VAE stays float32, since in float16 that
    of SDXL overflows.

    Raises:
        UsageError: this script cannot train the pipeline.
    """
    pipe = DiffusionPipeline.from_pretrained(
        args.pretrained_model_name_or_path, revision=args.revision, variant=args.variant
    )
    if not isinstance(pipe, (StableDiffusionPipeline, StableDiffusionXLPipeline)):
        raise UsageError(
            f"{args.pretrained_model_name_or_path} is a {type(pipe).__name__}; "
            "this script trains StableDiffusionPipeline and StableDiffusionXLPipeline"
        )
    if pipe.unet.config.in_channels != pipe.vae.config.latent_channels:
        raise UsageError(f"the UNet takes {pipe.unet.config.in_channels} channels: it is not a text-to-image model")
    if pipe.scheduler.config.get("prediction_type") not in ("epsilon", "v_prediction"):
        raise UsageError(f"cannot train for the scheduler {type(pipe.scheduler).__name__} of this pipeline")
    if getattr(pipe.vae.config, "latents_mean", None) is not None:
        raise UsageError("pipelines whose VAE normalises latents by mean and deviation are not supported")
    if isinstance(pipe, StableDiffusionPipeline):
        pipe.register_modules(safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    for name, component in pipe.components.items():
        if isinstance(component, nn.Module):
            component.requires_grad_(False)
            component.to(accelerator.device)
            dtype = torch.float32 if name == "vae" else PRECISIONS[accelerator.mixed_precision]
            if component.dtype != dtype:
                component.to(dtype)
    return pipe


def training_resolution(args: Arguments, pipe: Pipeline) -> int:
    """Return the resolution of `args`, or the default one of the pipeline."""
    sample_size = pipe.unet.config.sample_size
    longest = max(sample_size) if isinstance(sample_size, (list, tuple)) else sample_size
    resolution = args.resolution or longest * pipe.vae_scale_factor
    if resolution % pipe.vae_scale_factor:
        raise UsageError(f"--resolution must be a multiple of {pipe.vae_scale_factor} for this pipeline")
    return resolution


def encode_captions(pipe: Pipeline, captions: Sequence[str], device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Return hidden states, and for SDXL pooled ones, just as the pipeline computes them for drawing."""
    if isinstance(pipe, StableDiffusionPipeline):
        hidden, _ = pipe.encode_prompt(list(captions), device, 1, do_classifier_free_guidance=False)
        return hidden, None
    hidden, _, pooled, _ = pipe.encode_prompt(list(captions), device=device, do_classifier_free_guidance=False)
    if pipe.config.force_zeros_for_empty_prompt:
        is_given = torch.tensor([[caption != ""] for caption in captions], device=device)
        hidden, pooled = hidden * is_given[..., None], pooled * is_given
    return hidden, pooled


@torch.no_grad()
def draw(
    pipe: Pipeline, prompts: list[str], seeds: Sequence[int], resolution: int, guidance: float | None
) -> list[Image.Image]:
    """Draw one picture per prompt and seed. A picture does not depend on the others in the batch."""
    latents = pipe(
        prompts,
        height=resolution,
        width=resolution,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        output_type="latent",
        **({} if guidance is None else {"guidance_scale": guidance}),
    ).images
    pixels = pipe.vae.decode(latents.float() / pipe.vae.config.scaling_factor).sample
    images = pipe.image_processor.postprocess(pixels)
    assert isinstance(images, list)
    return images


def ensure_class_pictures(args: Arguments, pipe: Pipeline, accelerator: Accelerator, resolution: int) -> list[Example]:
    """Return the class pictures. Missing ones are drawn with the base pipeline, distributed over all processes."""
    assert args.class_data_dir is not None
    folder = Path(args.class_data_dir)
    folder.mkdir(parents=True, exist_ok=True)
    prompts = class_prompts(args)

    def path_of(number: int) -> Path:
        return folder / f"class-{number:05d}.png"

    lacking = max(0, args.num_class_images - len(list_pictures(folder)))
    missing = list(itertools.islice((n for n in itertools.count() if not path_of(n).exists()), lacking))
    accelerator.wait_for_everyone()  # no process may draw before all have found out what is missing
    mine = missing[accelerator.process_index :: accelerator.num_processes]
    size = args.sample_batch_size
    batches = [mine[first : first + size] for first in range(0, len(mine), size)]
    quiet = not (batches and accelerator.is_local_main_process)
    for batch in tqdm(batches, "class pictures", disable=quiet):
        chosen = [prompts[number % len(prompts)] for number in batch]
        seeds = [args.seed + number for number in batch]
        images = draw(pipe, chosen, seeds, resolution, args.class_guidance_scale)
        for number, image in zip(batch, images, strict=True):
            image.save(path_of(number))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        # This includes pictures of an earlier run that was interrupted before it wrote their captions.
        drawn = [number for number in range(args.num_class_images) if path_of(number).exists()]
        captions = {path_of(number).name: prompts[number % len(prompts)] for number in drawn}
        known = read_captions(folder)
        append_captions(folder, {name: captions[name] for name in captions.keys() - known.keys()})
    accelerator.wait_for_everyone()
    return read_folder(folder, prompts[0])
