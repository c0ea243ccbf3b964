"""Compare adapter types on the embedded pipeline: the same subject and the same style, trained with each of them.

Every type is trained twice, with the parameter budget of a LoRA of rank 8 and with settings of its own, on a subject
(the critter, 8 pictures) and on a style (ink, 24 pictures), with several seeds. All runs have the same steps, batches
and noise. Measured are:

* similarity: the mean cosine of the judge's features between drawn pictures and the closest training picture;
* drift: one minus the mean cosine between pictures with and without the adapter, for prompts without the subject (a
  style changes every picture by intention, so its drift is that of the shapes and colours that the judge reads);
* steps per second, the bytes that a training step allocates at its peak, and the size of the saved file.

Every result is a line of `results.jsonl` in the work folder; a run that was interrupted continues with the missing
ones. Run it in the background, it takes hours:

    python scripts/compare_methods.py [--steps 120] [--seeds 3] [--only lora,vera] [--work .cache/compare_methods]
    python scripts/compare_methods.py --report          # docs/methods.md and docs/methods.png, from the results
"""

import argparse
import contextlib
import functools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import tiny_judge
import torch
import torch.nn.functional as F
from diffusers import StableDiffusionPipeline
from PIL import Image, ImageDraw
from tiny_world import to_image
from torch import Tensor

import diffadapt
from diffadapt import AdapterConfig

ROOT = Path(__file__).resolve().parent.parent
PIPELINE, DATA = ROOT / "examples" / "tiny_pipeline", ROOT / "examples" / "dreambooth" / "data"
PAGE, PICTURE = ROOT / "docs" / "methods.md", ROOT / "docs" / "methods.png"
START, END = "<!-- figures: scripts/compare_methods.py -->", "<!-- end of figures -->"
PICTURE_LINE = "![The subject and the style as every type draws them](methods.png)"
LAYERS = r".*\.(to_q|to_k|to_v|to_out\.0|net\.0\.proj|net\.2)"
UNRELATED = [
    "a red star on a blue background",
    "a small green circle on a white background",
    "a yellow square on a black background",
    "a large purple heart on a green background",
]
PROMPTS = {
    "critter": [
        "a sks critter on a yellow background",
        "a sks critter on a blue background",
        "a sks critter on a green background",
        "a sks critter on a white background",
    ],
    "ink": UNRELATED,
}
BATCH = 4


@dataclass(frozen=True)
class Method:
    """An adapter type in the comparison.

    Attributes:
        make: The settings class.
        sizes: The options of which the largest that fits the parameter budget is taken, from small to large.
        default: The options of the type's own settings.
        rate: The learning rate.
    """

    make: Callable[..., AdapterConfig]
    sizes: list[dict[str, Any]]
    default: dict[str, Any]
    rate: float = 2e-3


def ranks(*numbers: int, name: str = "rank", **options: Any) -> list[dict[str, Any]]:
    """Return options with these ranks, or with these values of another option."""
    return [{name: number, **options} for number in numbers]


METHODS: dict[str, Method] = {
    "LoRA": Method(diffadapt.LoraConfig, ranks(4, 8), {"rank": 16}),
    "DoRA": Method(diffadapt.LoraConfig, ranks(4, 7, use_dora=True), {"rank": 16, "use_dora": True}),
    "LoHa": Method(diffadapt.LoHaConfig, ranks(2, 4), {"rank": 4}),
    "LoKr": Method(diffadapt.LoKrConfig, ranks(4, 8, 16, factor=4), {"rank": 8}),
    "OFT": Method(diffadapt.OFTConfig, ranks(2, 4, 8, 16, 32, name="block_size"), {"block_size": 8}),
    "BOFT": Method(diffadapt.BOFTConfig, ranks(2, 4, 8, 16, 32, name="block_size"), {"block_size": 8}),
    "HRA": Method(diffadapt.HRAConfig, ranks(4, 8, 16), {"rank": 8}),
    "MiSS": Method(diffadapt.MiSSConfig, ranks(4, 8, 16), {"rank": 16}, 1e-3),
    "GraLoRA": Method(diffadapt.GraLoRAConfig, ranks(4, 8), {"rank": 16}),
    "DeLoRA": Method(diffadapt.DeLoRAConfig, ranks(4, 8, strength=4.0), {"rank": 8, "strength": 4.0}),
    "HiRA": Method(diffadapt.HiRAConfig, ranks(4, 8), {"rank": 16}, 5e-3),
    "DEFT": Method(diffadapt.DEFTConfig, ranks(4, 8), {"rank": 8}),
    "AdaLoRA": Method(diffadapt.AdaLoraConfig, ranks(4, 8, target_rank=4), {"rank": 12, "target_rank": 8}, 1e-2),
    "DyLoRA": Method(diffadapt.DyLoRAConfig, ranks(4, 8, block_size=1), {"rank": 8, "block_size": 1}, 5e-3),
    "T-LoRA": Method(diffadapt.TLoRAConfig, ranks(4, 8), {"rank": 16}, 1e-3),
    "OSF": Method(diffadapt.OSFConfig, ranks(0.97, 0.93, 0.9, 0.85, name="kept"), {"kept": 0.5}, 1e-2),
    "AdaMSS": Method(diffadapt.AdaMSSConfig, ranks(1, 2, 4, 8, name="cluster_rank", rank=32), {"rank": 32}),
    "TinyLoRA": Method(diffadapt.TinyLoRAConfig, ranks(64, 256, 1024, name="length"), {}, 1e-4),
    "FRoD": Method(diffadapt.FRoDConfig, ranks(0.01, 0.02, 0.05, 0.1, name="density"), {}, 2e-3),
    "PSOFT": Method(diffadapt.PSOFTConfig, ranks(8, 16, 24, 32), {"rank": 24}),
    "C3A": Method(diffadapt.C3AConfig, ranks(32, 16, 8, name="block_size"), {"block_size": 16}, 1e-1),
    "FourierFT": Method(
        diffadapt.FourierFTConfig, ranks(200, 500, 1000, name="frequencies"), {"frequencies": 1000}, 3e-3
    ),
    "WaveFT": Method(diffadapt.WaveFTConfig, ranks(200, 500, 1000, name="frequencies"), {"frequencies": 1000}, 3e-4),
    "SHiRA": Method(diffadapt.SHiRAConfig, ranks(2, 4, 8), {"rank": 4}),
    "VeRA": Method(diffadapt.VeRAConfig, ranks(64, 256, 1024), {"rank": 256}, 2e-2),
    "PVeRA": Method(diffadapt.PVeRAConfig, ranks(64, 256, 1024), {"rank": 256}, 2e-2),
    "RandLora": Method(diffadapt.RandLoraConfig, ranks(32, 16, 8), {"rank": 8}, 1e-3),
    "VB-LoRA": Method(diffadapt.VBLoRAConfig, ranks(2, 4, vectors=64, length=16), {"length": 16, "vectors": 64}, 1e-2),
    "UniLora": Method(diffadapt.UniLoraConfig, ranks(2000, 8000, 20000, name="length"), {"length": 2000}, 1e-2),
    "RoAd": Method(diffadapt.RoAdConfig, ranks(1, 2, 4, name="variant", group_size=2), {"group_size": 2}, 1e-2),
    "IA3": Method(diffadapt.IA3Config, [{}], {}, 1e-2),
    "GLoRA": Method(diffadapt.GLoRAConfig, ranks(1, 2, 4), {"rank": 4}, 1e-3),
    "GLoRA of PEFT": Method(diffadapt.GLoRAPEFTConfig, ranks(1, 2, 4), {"rank": 4}, 1e-3),
    "PEANuT": Method(diffadapt.PEANuTConfig, ranks(4, 8), {"rank": 8}),
    "SuperTuning": Method(diffadapt.SuperTuningConfig, ranks(0.97, 0.95, 0.9, name="sparsity"), {}),
    "full": Method(diffadapt.FullConfig, [{}], {}, 2e-4),
}


def pictures_of(task: str) -> tuple[Tensor, list[str]]:
    """Return the training pictures of a task, (N, 3, 64, 64) in [0, 1], and their captions."""
    lines = (DATA / task / "metadata.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    images = [Image.open(DATA / task / entry["file_name"]).convert("RGB") for entry in entries]
    return torch.stack([torch.from_numpy(numpy.array(i)).permute(2, 0, 1) for i in images]) / 255, [
        entry["text"] for entry in entries
    ]


@functools.cache
def load_pipeline() -> StableDiffusionPipeline:
    """Load the embedded pipeline without progress bars, once: removing an adapter restores every bit of it."""
    pipe = StableDiffusionPipeline.from_pretrained(PIPELINE, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    pipe.unet.requires_grad_(False)
    return pipe


@torch.no_grad()
def drawn(pipe: StableDiffusionPipeline, prompts: list[str], seed: int) -> Tensor:
    """Return a picture for each prompt, (N, 3, 64, 64)."""
    generators = [torch.Generator().manual_seed(seed + number) for number in range(len(prompts))]
    options: dict[str, Any] = {"num_inference_steps": 15, "guidance_scale": 2.5, "output_type": "pt"}
    images: Any = pipe(prompts, generator=generators, **options).images
    return images


def trainable(adapter: diffadapt.Adapter) -> list[torch.nn.Parameter]:
    """Return the parameters of an adapter that training changes."""
    return [parameter for parameter in adapter.parameters() if parameter.requires_grad]


@functools.cache
def settings(name: str, kind: str) -> AdapterConfig:
    """Return a method's own settings, or its largest ones that have no more parameters than a LoRA of rank 8.

    If even the smallest settings have more parameters, they are taken.
    """
    method = METHODS[name]
    if kind == "default":
        return method.make(target_modules=LAYERS, **method.default)
    configs = [method.make(target_modules=LAYERS, **options) for options in method.sizes]
    budget = size(diffadapt.LoraConfig(rank=8, target_modules=LAYERS))
    return next((config for config in reversed(configs[1:]) if size(config) <= budget), configs[0])


def size(config: AdapterConfig) -> int:
    """Return how many parameters are trained with these settings."""
    pipe = load_pipeline()
    count = sum(p.numel() for p in trainable(diffadapt.add_adapter(pipe.unet, config, "count")))
    pipe.adapters.remove("count")
    return count


def train(
    pipe: StableDiffusionPipeline, adapter: diffadapt.Adapter, task: str, seed: int, steps: int, rate: float
) -> float:
    """Train an adapter to predict noise, and return the steps per second."""
    pictures, captions = pictures_of(task)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        latents = pipe.vae.encode(pictures * 2 - 1).latent_dist.mean * pipe.vae.config.scaling_factor
        tokens = pipe.tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
        texts = pipe.text_encoder(tokens)[0]
    scheduler, parameters = pipe.scheduler, trainable(adapter)
    optimizer = torch.optim.AdamW(parameters, lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    adapter.train()
    start = time.process_time()
    for _ in range(steps):
        chosen = torch.randint(len(latents), (BATCH,), generator=generator)
        noise = torch.randn(latents[chosen].shape, generator=generator)
        times = torch.randint(scheduler.config.num_train_timesteps, (BATCH,), generator=generator)
        noisy = scheduler.add_noise(latents[chosen], noise, times)
        is_velocity = scheduler.config.prediction_type == "v_prediction"
        target = scheduler.get_velocity(latents[chosen], noise, times) if is_velocity else noise
        loss = F.mse_loss(pipe.unet(noisy, times, texts[chosen]).sample, target)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
    adapter.eval()
    return steps / (time.process_time() - start)


def peak_of_step(pipe: StableDiffusionPipeline) -> int:
    """Return the bytes that a forward and backward pass allocate at their peak."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        texts = torch.zeros(BATCH, 77, pipe.unet.config.cross_attention_dim)
        noisy = torch.zeros(BATCH, pipe.unet.config.in_channels, 16, 16)
        pipe.unet(noisy, torch.zeros(BATCH), texts).sample.sum().backward()
    total = peak = 0
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        total += event.nbytes()
        peak = max(peak, total)
    return peak


def run(name: str, kind: str, task: str, seed: int, steps: int, work: Path, judge_steps: int = 800) -> dict[str, Any]:
    """Train one adapter and return its figures."""
    pipe, judge = load_pipeline(), tiny_judge.load_judge(work, steps=judge_steps)
    config = settings(name, kind)
    torch.manual_seed(seed)
    before = drawn(pipe, UNRELATED, seed)
    adapter = diffadapt.add_adapter(pipe.unet, config, "mine")
    try:
        parameters = sum(p.numel() for p in trainable(adapter))
        peak = peak_of_step(pipe)
        for parameter in trainable(adapter):
            parameter.grad = None
        speed = train(pipe, adapter, task, seed, steps, METHODS[name].rate)
        pictures, unrelated = drawn(pipe, PROMPTS[task], seed), drawn(pipe, UNRELATED, seed)
        file_size = smallest_file(pipe, work / "files" / f"{name}-{kind}-{task}-{seed}")
    finally:
        pipe.adapters.remove("mine")
    with torch.no_grad():
        wanted = pictures_of(task)[0]
        mine, wanted, after, plain = (
            F.normalize(judge.features(p * 2 - 1), dim=1) for p in (pictures, wanted, unrelated, before)
        )
    sample = work / "pictures" / f"{name}-{kind}-{task}-{seed}.png"
    sample.parent.mkdir(parents=True, exist_ok=True)
    to_image(pictures[0]).save(sample)
    return {
        "method": name,
        "kind": kind,
        "task": task,
        "seed": seed,
        "steps": steps,
        "parameters": parameters,
        "similarity": (mine @ wanted.t()).max(1).values.mean().item(),
        "drift": 1 - (after * plain).sum(1).mean().item(),
        "speed": speed,
        "peak": peak,
        "bytes": file_size,
    }


def smallest_file(pipe: StableDiffusionPipeline, path: Path) -> int:
    """Save the adapter in the formats that hold it, and return the size of the smallest in bytes.

    A kohya file has the projections that layers share once for every layer, and a PEFT folder once.
    """
    sizes: list[int] = []
    for format, name in (("kohya", path.with_name(path.name + ".safetensors")), ("peft", path)):
        with contextlib.suppress(diffadapt.AdapterError):
            saved = Path(pipe.adapters.save("mine", name, format=format))
            sizes.append(sum(file.stat().st_size for file in ([saved] if saved.is_file() else saved.rglob("*.*"))))
    return min(sizes)


def results(work: Path) -> list[dict[str, Any]]:
    """Return the results so far."""
    file = work / "results.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def missing(work: Path, names: list[str], seeds: int, steps: int) -> Iterator[tuple[str, str, str, int]]:
    """Yield the runs without a result: method, kind of settings, task and seed."""
    done = {(r["method"], r["kind"], r["task"], r["seed"]) for r in results(work) if r["steps"] == steps}
    for kind in ("budget", "default"):
        for seed in range(seeds):
            for task in PROMPTS:
                for name in names:
                    if (name, kind, task, seed) not in done:
                        yield name, kind, task, seed


def same_run(work: Path, name: str, kind: str, task: str, seed: int, steps: int) -> dict[str, Any] | None:
    """Return the result of the run with the other kind of settings, if both kinds are the same settings."""
    if settings(name, "budget") != settings(name, "default"):
        return None
    wanted = {"method": name, "task": task, "seed": seed, "steps": steps}
    return next(({**r, "kind": kind} for r in results(work) if wanted.items() <= r.items()), None)


def spread(values: list[float], digits: int = 3) -> str:
    """Return the mean of the seeds and, in brackets, the standard deviation."""
    deviation = f" ({statistics.stdev(values):.{digits}f})" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}"


def report(work: Path) -> None:
    """Write the table into the page, and the picture."""
    found = results(work)
    lines = [
        "| type | settings | parameters | subject: similarity | drift | style: similarity | steps/s | MiB | file |"
    ]
    lines.append("|---" * 9 + "|")
    for name in METHODS:
        for kind in ("budget", "default"):
            own = [r for r in found if r["method"] == name and r["kind"] == kind]
            tasks = {task: [r for r in own if r["task"] == task] for task in PROMPTS}
            if not all(tasks.values()):
                continue
            subject, style = tasks["critter"], tasks["ink"]
            cells = [
                name,
                {"budget": "equal budget", "default": "own"}[kind],
                f"{own[0]['parameters']:,}",
                spread([r["similarity"] for r in subject]),
                spread([r["drift"] for r in subject]),
                spread([r["similarity"] for r in style]),
                spread([r["speed"] for r in own], 2),
                f"{own[0]['peak'] / 2**20:.0f}",
                f"{own[0]['bytes'] / 2**10:.0f} KiB",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    seeds = min(len({r["seed"] for r in found if r["method"] == name}) for name in {r["method"] for r in found})
    setup = f"Steps per run: {found[0]['steps']}; pictures per step: {BATCH}; seeds per figure: at least {seeds}."
    lines[:0] = [setup, ""]
    text = PAGE.read_text()
    start, end = text.index(START) + len(START), text.index(END)
    PAGE.write_text(f"{text[:start]}\n\n" + "\n".join([*lines, "", PICTURE_LINE]) + f"\n\n{text[end:]}")
    sheet(work)


def sheet(work: Path, columns: int = 9, side: int = 96) -> None:
    """Write one picture of the subject and one of the style for every method."""

    def picture(name: str, task: str) -> Path:
        return work / "pictures" / f"{name}-budget-{task}-0.png"

    names = [name for name in METHODS if all(picture(name, task).exists() for task in PROMPTS)]
    height = 2 * side + 20
    canvas = Image.new("RGB", (columns * (side + 6), -(-len(names) // columns) * height), "white")
    pen = ImageDraw.Draw(canvas)
    for number, name in enumerate(names):
        left, top = number % columns * (side + 6), number // columns * height
        pen.text((left + 2, top), name, fill="black")
        for row, task in enumerate(PROMPTS):
            image = Image.open(picture(name, task))
            canvas.paste(image.resize((side, side), Image.Resampling.NEAREST), (left, top + 14 + row * side))
    canvas.save(PICTURE)


def main() -> None:
    """Run what is missing, or write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=120, help="training steps of every run (default: %(default)s)")
    parser.add_argument("--judge_steps", type=int, default=800, help="training steps of the judge, the first time")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds (default: %(default)s)")
    parser.add_argument("--only", default="", help="names of the methods to run, separated by commas")
    parser.add_argument("--work", type=Path, default=ROOT / ".cache" / "compare_methods", help="folder of the results")
    parser.add_argument("--report", action="store_true", help="write docs/methods.md and docs/methods.png")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.report:
        report(options.work)
        return
    (options.work / "files").mkdir(parents=True, exist_ok=True)
    wanted = [name.lower() for name in options.only.split(",") if name]
    names = [name for name in METHODS if not wanted or name.lower() in wanted]
    for name, kind, task, seed in list(missing(options.work, names, options.seeds, options.steps)):
        figures = same_run(options.work, name, kind, task, seed, options.steps)
        figures = figures or run(name, kind, task, seed, options.steps, options.work, options.judge_steps)
        with (options.work / "results.jsonl").open("a") as file:
            file.write(json.dumps(figures) + "\n")
        print(f"{name} {kind} {task} {seed}: similarity {figures['similarity']:.3f}, drift {figures['drift']:.3f}")


if __name__ == "__main__":
    main()
