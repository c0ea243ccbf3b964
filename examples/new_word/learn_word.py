"""Teach the embedded pipeline a creature as a new word of two vectors: alone, and together with a LoRA.

    python examples/new_word/learn_word.py --output critter-word.safetensors --picture words.png
    python examples/new_word/learn_word.py --rank 8 --steps 300 --output critter.safetensors --picture words.png

Alone, the two vectors (128 numbers) are all that is trained: the model draws what it can already, and the word finds
the closest. With a LoRA (pivotal tuning), the word and the model learn together, and one file holds both.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, StableDiffusionPipeline
from PIL import Image
from torch import Tensor

import diffadapt

ROOT = Path(__file__).parents[2]
WORD, NAME = "<critter>", "critter"
ZOOM = 3
PROMPTS = ("yellow", "white", "blue", "black")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pipeline", default=ROOT / "examples" / "tiny_pipeline", type=Path)
    parser.add_argument("--pictures", default=ROOT / "examples" / "dreambooth" / "data" / "critter", type=Path)
    parser.add_argument("--vectors", type=int, default=2, help="vectors of the word (default: %(default)s)")
    parser.add_argument("--rank", type=int, default=0, help="rank of a LoRA on the denoiser; 0 for none")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--word_rate", type=float, default=5e-3, help="learning rate of the vectors")
    parser.add_argument("--lora_rate", type=float, default=2e-3, help="learning rate of the LoRA")
    parser.add_argument("--output", type=Path, default=Path("critter.safetensors"))
    parser.add_argument("--picture", type=Path, help="file for four pictures of the word")
    options = parser.parse_args()

    pipe = StableDiffusionPipeline.from_pretrained(options.pipeline, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    for model in (pipe.unet, pipe.vae, pipe.text_encoder):
        model.requires_grad_(False)
    words = diffadapt.add_tokens(pipe, {WORD: (options.vectors, "monster")}, name=NAME)
    groups = [{"params": list(words.parameters()), "lr": options.word_rate, "weight_decay": 0.0}]
    if options.rank:
        config = diffadapt.LoraConfig(
            rank=options.rank, target_modules=".*", exclude_modules="conv_in|conv_out|.*norm.*"
        )
        lora = diffadapt.add_adapter(pipe.unet, config, name=NAME)
        groups.append({"params": list(lora.parameters()), "lr": options.lora_rate})
    train(pipe, groups, options.pictures, options.steps, options.batch)
    print(pipe.adapters.save(NAME, options.output, format="onetrainer"))
    if options.picture:
        draw(pipe).save(options.picture)


def train(pipe: Any, groups: list[dict[str, Any]], folder: Path, steps: int, batch: int) -> None:
    """Train the parameters in `groups` on the captioned pictures in `folder`."""
    latents, captions = read(pipe, folder)
    schedule = DDPMScheduler.from_config(pipe.scheduler.config)
    optimizer = torch.optim.AdamW(groups)
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 + 0.5 * math.cos(math.pi * step / steps))
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        chosen = torch.randint(len(captions), (batch,), generator=generator).tolist()
        tokens = pipe.tokenizer(
            [captions[number] for number in chosen], padding="max_length", truncation=True, return_tensors="pt"
        )
        prompts = pipe.text_encoder(tokens.input_ids).last_hidden_state
        noise = torch.randn(latents[chosen].shape, generator=generator)
        time = torch.randint(schedule.config.num_train_timesteps, (batch,), generator=generator)
        noisy = schedule.add_noise(latents[chosen], noise, time)
        predicted = pipe.unet(noisy, time, prompts).sample
        loss = F.mse_loss(predicted, schedule.get_velocity(latents[chosen], noise, time))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        rates.step()
        if step % 50 == 0 or step + 1 == steps:
            print(f"step {step}: loss {loss.item():.4f}", flush=True)


def read(pipe: Any, folder: Path) -> tuple[Tensor, list[str]]:
    """Return the latents of the pictures, and their captions with the new word in the place of the creature's name."""
    lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    pictures = [np.asarray(Image.open(folder / line["file_name"]).convert("RGB")) for line in lines]
    pixels = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        latents = pipe.vae.encode(pixels).latent_dist.mean * pipe.vae.config.scaling_factor
    return latents, [line["text"].replace("sks critter", WORD) for line in lines]


def draw(pipe: Any) -> Image.Image:
    """Return pictures of the new word on four backgrounds, side by side."""
    prompts = [f"a {WORD} on a {colour} background" for colour in PROMPTS]
    seeds = [torch.Generator().manual_seed(seed) for seed in range(len(prompts))]
    with torch.no_grad():
        images = pipe(prompts, generator=seeds, num_inference_steps=20, guidance_scale=3.0).images
    size = images[0].width * ZOOM
    row = Image.new("RGB", (size * len(images), size))
    for number, image in enumerate(images):
        row.paste(image.resize((size, size), Image.Resampling.LANCZOS), (number * size, 0))
    return row


if __name__ == "__main__":
    main()
