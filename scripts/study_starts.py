"""Compare the starts of a LoRA on the embedded pipeline: the loss by step for every `init`, and for LoRA+ and LoRA-FA.

All runs train the same LoRA on the same pictures with the same noise, order and learning rate; only the start differs.
The loss is measured on fixed noise that is never trained on. Results are appended to a file after every run, so an
interrupted study goes on where it was; the picture is drawn from that file.

    python scripts/study_starts.py [--steps 150] [--seeds 2] [--work FOLDER] [--output docs/starts.png]
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, StableDiffusionPipeline
from PIL import Image
from torch import Tensor, nn

import diffadapt

ROOT = Path(__file__).parents[1]
DATA = ROOT / "examples" / "dreambooth" / "data" / "ink"
RANK, BATCH, EVERY = 8, 4, 10
RATE = 1e-4
VARIANTS = {
    "init=True": {},
    "gaussian": {"init": "gaussian"},
    "orthogonal": {"init": "orthogonal"},
    "pissa": {"init": "pissa"},
    "olora": {"init": "olora"},
    "eva": {"init": "eva"},
    "corda": {"init": "corda"},
    "lora_ga": {"init": "lora_ga"},
    "LoRA+": {},
    "LoRA-FA": {},
}
"""Name in the picture -> settings."""


def training_data(pipe: Any) -> tuple[Tensor, Tensor]:
    """Return latents (pictures, 4, rows, columns) and text embeddings (pictures, tokens, width)."""
    entries = [json.loads(line) for line in (DATA / "metadata.jsonl").read_text().splitlines() if line.strip()]
    latents: list[Tensor] = []
    captions: list[str] = []
    for entry in entries:
        with Image.open(DATA / entry["file_name"]) as picture:
            pixels = torch.from_numpy(np.asarray(picture.convert("RGB"), dtype=np.float32)) / 127.5 - 1
        latents.append(pipe.vae.encode(pixels.permute(2, 0, 1).unsqueeze(0)).latent_dist.mode())
        captions.append(entry["text"])
    embeddings, _ = pipe.encode_prompt(captions, "cpu", 1, False)
    return torch.cat(latents) * pipe.vae.config.scaling_factor, embeddings


def run(name: str, seed: int, steps: int) -> list[float]:
    """Train one variant and return its loss on fixed noise, before the first step and after every `EVERY` steps."""
    torch.manual_seed(seed)
    pipe = StableDiffusionPipeline.from_pretrained(ROOT / "examples" / "tiny_pipeline")
    noise_schedule = DDPMScheduler.from_config(pipe.scheduler.config)
    unet = pipe.unet.requires_grad_(False).eval()
    with torch.no_grad():
        latents, embeddings = training_data(pipe)

    def loss_of(model: nn.Module, generator: torch.Generator, rows: Tensor) -> Tensor:
        noise = torch.randn(latents[rows].shape, generator=generator)
        levels = torch.randint(1000, (len(rows),), generator=generator)
        noisy = noise_schedule.add_noise(latents[rows], noise, levels)
        is_v = noise_schedule.config.prediction_type == "v_prediction"
        target = noise_schedule.get_velocity(latents[rows], noise, levels) if is_v else noise
        return F.mse_loss(model(noisy, levels, embeddings[rows]).sample, target)

    def draw(generator: torch.Generator) -> Tensor:
        return torch.randint(len(latents), (BATCH,), generator=generator)

    config = diffadapt.LoraConfig(rank=RANK, target_modules="all-linear", **VARIANTS[name])
    if config.init in ("eva", "corda", "lora_ga"):
        generator = torch.Generator().manual_seed(1000 + seed)
        config = diffadapt.calibrated(
            unet, config, range(8), run=lambda model, batch: loss_of(model, generator, draw(generator))
        )
    adapter = diffadapt.add_adapter(unet, config, "study")
    groups: Any = [p for p in adapter.parameters() if p.requires_grad]
    if name == "LoRA+":
        groups = diffadapt.lora_plus_groups(adapter, ratio=16)
    elif name == "LoRA-FA":
        groups = [p for p in diffadapt.lora_fa_(adapter).parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(groups, lr=RATE)
    generator = torch.Generator().manual_seed(seed)

    @torch.no_grad()
    def measured() -> float:
        fixed = torch.Generator().manual_seed(65535)
        return statistics.mean(float(loss_of(unet, fixed, torch.arange(len(latents)))) for _ in range(4))

    losses = [measured()]
    for step in range(1, steps + 1):
        loss_of(unet, generator, draw(generator)).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % EVERY == 0:
            losses.append(measured())
    return losses


def steps_to(target: float, losses: list[float]) -> int | None:
    """Return after how many steps the loss is at most `target`, or `None` if it never is."""
    return next((EVERY * index for index, loss in enumerate(losses) if loss <= target), None)


def picture(results: dict[str, list[list[float]]], output: Path) -> None:
    """Draw the mean loss of every variant over the steps, with the range over seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.add_subplot()
    for number, (name, runs) in enumerate(results.items()):
        by_step = list(zip(*runs, strict=True))
        steps = [EVERY * index for index in range(len(by_step))]
        style = {"color": f"C{number}", "linestyle": "--" if number > 7 else "-"}
        axes.plot(steps, [statistics.mean(step) for step in by_step], label=name, **style)
        axes.fill_between(steps, [min(s) for s in by_step], [max(s) for s in by_step], color=f"C{number}", alpha=0.12)
    axes.set_xlabel("step")
    axes.set_ylabel("loss on fixed noise")
    axes.legend(ncols=2)
    figure.savefig(output, dpi=110)


def main() -> None:
    """Run what is missing in the results, print a table and draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "study_starts")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "starts.png")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    file = options.work / f"losses-{options.steps}.json"
    done: dict[str, list[float]] = json.loads(file.read_text()) if file.exists() else {}
    for seed in range(options.seeds):
        for name in VARIANTS:
            if f"{name}/{seed}" not in done:
                done[f"{name}/{seed}"] = run(name, seed, options.steps)
                file.write_text(json.dumps(done))
                print(f"{name}, seed {seed}: {done[f'{name}/{seed}'][-1]:.4f}", flush=True)
    results = {name: [done[f"{name}/{seed}"] for seed in range(options.seeds)] for name in VARIANTS}
    target = statistics.mean(losses[-1] for losses in results["init=True"])
    print(f"\n| start | loss after {options.steps} steps | steps to {target:.4f} |\n|---|---|---|")
    for name, runs in results.items():
        last = [losses[-1] for losses in runs]
        reached = [steps_to(target, losses) for losses in runs]
        shown = " to ".join(
            str(n) if n else f"> {options.steps}" for n in dict.fromkeys(sorted(reached, key=lambda n: n or 10**9))
        )
        print(f"| {name} | {statistics.mean(last):.4f} ({min(last):.4f} to {max(last):.4f}) | {shown} |")
    picture(results, options.output)


if __name__ == "__main__":
    main()
