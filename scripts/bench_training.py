"""Benchmark whole training steps, from the picture to the optimiser, against the training scripts of diffusers.

Both train LoRA of rank 16 on the same layers in float32, batch 1, on the same base: an SD-sized pipeline (UNet of
138 M parameters, CLIP-L with a small vocabulary, a VAE of the published size) and a Flux-shaped one (transformer of
about 100 M). The scripts of diffusers are not in its package; pass the folder `examples/dreambooth` of a checkout. They
run as they are, with a stand-in for the few transforms of torchvision that they use.

Every run is a process of its own, on one thread. A step is the CPU time between two optimizer steps: the median,
without the first two. `MiB` is the peak resident memory minus that before the first model is loaded, when everything is
imported. Speed and memory are relative to the script of diffusers as it runs.

    python scripts/bench_training.py --diffusers CHECKOUT/examples/dreambooth [--steps 8] [--resolution 256] [--only sd]
"""

import argparse
import json
import os
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
import types
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.optim.optimizer import register_optimizer_step_post_hook

ROOT = Path(__file__).parents[1]
PICTURES = ROOT / "examples" / "dreambooth" / "data" / "critter"
RESULT = "DIFFADAPT_BENCH_RESULT"
UNCOUNTED = 2


# Bases


def build_sd(folder: Path) -> None:
    """Save a pipeline of SD 1.x with a UNet of 138 M parameters."""
    from bench_train import SHAPE
    from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    StableDiffusionPipeline(
        vae=AutoencoderKL(**_vae(4)),
        text_encoder=_clip(),
        tokenizer=_tokenizer(),
        unet=UNet2DConditionModel(**SHAPE),
        scheduler=DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
        safety_checker=None,
        feature_extractor=None,  # type: ignore[arg-type]
        requires_safety_checker=False,
    ).save_pretrained(folder)


def build_flux(folder: Path) -> None:
    """Save a pipeline of Flux.1 with a transformer of about 100 M parameters."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import T5Config, T5EncoderModel

    sys.path.append(str(ROOT))
    from tests.support.models import t5_tokenizer

    transformer = FluxTransformer2DModel(
        in_channels=64,
        num_layers=4,
        num_single_layers=8,
        attention_head_dim=64,
        num_attention_heads=10,
        joint_attention_dim=512,
        pooled_projection_dim=768,
        guidance_embeds=True,
        axes_dims_rope=(8, 28, 28),
    )
    tokenizer = t5_tokenizer()
    text = T5Config(vocab_size=32, d_model=512, d_kv=64, d_ff=1024, num_layers=12, num_heads=8)
    FluxPipeline(
        vae=AutoencoderKL(**_vae(16), shift_factor=0.1159),
        text_encoder=_clip(),
        tokenizer=_tokenizer(),
        text_encoder_2=T5EncoderModel(text),
        tokenizer_2=tokenizer,  # type: ignore[arg-type]
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
    ).save_pretrained(folder)


def _vae(channels: int) -> dict[str, Any]:
    return {
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "layers_per_block": 2,
        "latent_channels": channels,
        "sample_size": 256,
    }


def _tokenizer() -> Any:
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(ROOT / "examples" / "tiny_pipeline" / "tokenizer")


def _clip() -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel

    tokenizer = _tokenizer()
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=768,
            intermediate_size=3072,
            num_hidden_layers=12,
            num_attention_heads=12,
            projection_dim=768,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


_FLUX_LAYERS = ("attn.to_k", "attn.to_q", "attn.to_v", "attn.to_out.0", "attn.add_k_proj", "attn.add_q_proj",
                "attn.add_v_proj", "attn.to_add_out", "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj",
                "ff_context.net.2")  # fmt: skip
LAYERS = {"sd": "to_k,to_q,to_v,to_out.0", "flux": ",".join(_FLUX_LAYERS)}
"""The layers that the scripts of diffusers adapt."""


# What is measured, in a process of its own


class Meter:
    """Takes the time of every optimizer step, and the memory at the start and at the end."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.start = 0.0
        register_optimizer_step_post_hook(lambda *_: self.times.append(time.process_time()))
        import accelerate

        make = accelerate.Accelerator.__init__

        def measured(accelerator: Any, *args: Any, **kwargs: Any) -> None:
            self.start = self.start or _memory("VmRSS")
            make(accelerator, *args, **kwargs)

        accelerate.Accelerator.__init__ = measured

    def result(self) -> dict[str, float]:
        steps = [after - before for before, after in zip(self.times, self.times[1:], strict=False)][UNCOUNTED - 1 :]
        return {"ms": 1000 * statistics.median(steps), "mib": _memory("VmHWM") - self.start}


def _memory(name: str) -> float:
    return int(Path("/proc/self/status").read_text().split(f"{name}:")[1].split()[0]) / 2**10


def stand_in_for_torchvision() -> None:
    """Put the transforms that the scripts use in the place of torchvision, which a CPU build of torch may lack."""
    import importlib.machinery
    import importlib.util

    import numpy as np

    if importlib.util.find_spec("torchvision"):
        return

    def resize(size: int, interpolation: Any = None) -> Callable[[Image.Image], Image.Image]:
        def run(image: Image.Image) -> Image.Image:
            scale = size / min(image.size)
            return image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BILINEAR)

        return run

    def centre_crop(size: int) -> Callable[[Image.Image], Image.Image]:
        def run(image: Image.Image) -> Image.Image:
            left, top = (image.width - size) // 2, (image.height - size) // 2
            return image.crop((left, top, left + size, top + size))

        return run

    def compose(parts: list[Callable[[Any], Any]]) -> Callable[[Any], Any]:
        def run(value: Any) -> Any:
            for part in parts:
                value = part(value)
            return value

        return run

    modes = types.SimpleNamespace(BILINEAR="bilinear", LANCZOS="lanczos")
    found: dict[str, Any] = {
        "Resize": resize,
        "CenterCrop": centre_crop,
        "RandomCrop": centre_crop,
        "RandomHorizontalFlip": lambda p: lambda image: image,
        "ToTensor": lambda: lambda image: torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255,
        "Normalize": lambda mean, std: lambda pixels: (pixels - mean[0]) / std[0],
        "Compose": compose,
        "InterpolationMode": modes,
    }
    library, transforms = types.ModuleType("torchvision"), types.ModuleType("torchvision.transforms")
    functional = types.ModuleType("torchvision.transforms.functional")
    vars(transforms).update(found, functional=functional)
    vars(functional)["crop"] = lambda image, top, left, height, width: image.crop(
        (left, top, left + width, top + height)
    )
    vars(library)["transforms"] = transforms
    for module in (library, transforms, functional):
        module.__dict__.setdefault("__path__", [])
        module.__spec__ = importlib.machinery.ModuleSpec(module.__name__, None)
        sys.modules[module.__name__] = module


def run_ours(base: Path, output: Path, steps: int, resolution: int, cached: bool, cache: Path) -> None:
    """Train with this library, in this process."""
    import diffusers

    import diffadapt

    _ = diffusers.StableDiffusionPipeline, diffusers.FluxPipeline, diffadapt.train
    meter = Meter()
    diffadapt.train(
        diffadapt.TrainingOptions(
            pretrained_model_name_or_path=str(base),
            instance_data_dir=str(PICTURES),
            output_dir=str(output),
            resolution=resolution,
            rank=16,
            lora_layers=LAYERS[base.name],
            train_batch_size=1,
            max_train_steps=steps,
            cache_latents=cached,
            cache_text=cached,
            cache_dir=str(cache),
            report_to="none",
        )
    )
    print(RESULT + json.dumps(meter.result()))


def run_theirs(script: Path, base: Path, output: Path, steps: int, resolution: int, extra: list[str]) -> None:
    """Train with a script of diffusers, in this process."""
    import diffusers
    import diffusers.utils
    import peft
    import transformers

    diffusers.utils.check_min_version = lambda *_: None
    # These have to find out that there is no torchvision before the stand-in is there.
    _ = diffusers.StableDiffusionPipeline, diffusers.FluxPipeline, transformers.CLIPTextModel, peft.LoraConfig
    stand_in_for_torchvision()
    meter = Meter()
    pictures = output / "pictures"
    pictures.mkdir(parents=True)
    for file in PICTURES.glob("*.png"):
        (pictures / file.name).write_bytes(file.read_bytes())
    options = {
        "pretrained_model_name_or_path": base,
        "instance_data_dir": pictures,
        "instance_prompt": "a sks critter",
        "output_dir": output,
        "resolution": resolution,
        "rank": 16,
        "train_batch_size": 1,
        "max_train_steps": steps,
        "learning_rate": 1e-4,
        "lr_warmup_steps": 0,
        "seed": 0,
    }
    sys.argv = [str(script), *(f"--{name}={value}" for name, value in options.items()), *extra]
    runpy.run_path(str(script), run_name="__main__")
    print(RESULT + json.dumps(meter.result()))


# The comparison


def measure(arguments: list[str]) -> dict[str, float]:
    """Run this script in a fresh process and return what it measured."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, __file__, *arguments]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    lines = [line for line in done.stdout.splitlines() if line.startswith(RESULT)]
    if not lines:
        raise SystemExit(f"{' '.join(arguments)} failed:\n{done.stderr[-4000:]}")
    return json.loads(lines[-1].removeprefix(RESULT))


FAMILIES: dict[str, tuple[Callable[[Path], None], str, list[tuple[str, list[str]]]]] = {
    "sd": (
        build_sd,
        "train_dreambooth_lora.py",
        [("as it runs", []), ("text cached", ["--pre_compute_text_embeddings"])],
    ),
    "flux": (build_flux, "train_dreambooth_lora_flux.py", [("text and latents cached", ["--cache_latents"])]),
}
"""Family -> how its base is made, diffusers' script, and the variants of that script."""


def compare(name: str, scripts: Path | None, steps: int, resolution: int, work: Path) -> None:
    """Print the rows of a family."""
    build, script, variants = FAMILIES[name]
    base, cache = work / name, work / f"{name}-cache"
    build(base)
    rows: list[tuple[str, dict[str, float]]] = []
    common = ["--base", str(base), "--cache", str(cache), "--work", str(work), "--resolution", str(resolution)]
    # Fills the caches.
    measure(["--run", "cached", "--steps", str(UNCOUNTED + 1), *common])
    common += ["--steps", str(steps)]
    for label, how in (("ours, caches warm", "cached"), ("ours, no caches", "uncached")):
        rows.append((label, measure(["--run", how, *common])))
    for label, extra in variants if scripts else []:
        assert scripts is not None
        options = ["--run", "theirs", "--script", str(scripts / script), *common]
        rows.append((f"diffusers, {label}", measure([*options, *(f"--extra={option}" for option in extra)])))
    for label, found in rows:
        ratios = "| "
        if scripts:
            theirs = rows[2][1]
            ratios = f"{theirs['ms'] / found['ms']:.2f} x | {found['mib'] / theirs['mib']:.2f} x"
        print(f"| {name}: {label} | {found['ms']:.0f} | {found['mib']:.0f} | {ratios} |", flush=True)


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--diffusers", type=Path, help="folder examples/dreambooth of a checkout of diffusers")
    parser.add_argument("--steps", type=int, default=8, help="steps of each run (default: %(default)s)")
    parser.add_argument("--resolution", type=int, default=256, help="side of the pictures (default: %(default)s)")
    parser.add_argument("--only", choices=list(FAMILIES), help="measure only this family")
    for name in ("run", "script", "base", "cache", "work"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    parser.add_argument("--extra", action="append", default=[], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        warnings.simplefilter("ignore")
        output = Path(tempfile.mkdtemp(dir=options.work))
        if options.run == "theirs":
            run_theirs(
                Path(options.script), Path(options.base), output, options.steps, options.resolution, options.extra
            )
        else:
            run_ours(
                Path(options.base),
                output,
                options.steps,
                options.resolution,
                options.run == "cached",
                Path(options.cache),
            )
        return
    if options.diffusers is None:
        print("without --diffusers, only this library is measured")
    elif not options.diffusers.is_dir():
        parser.error("--diffusers: pass the folder examples/dreambooth of a checkout of diffusers")
    packages = ("torch", "diffusers", "peft", "transformers")
    print(
        ", ".join(f"{name} {version(name)}" for name in packages),
        f"{options.steps} steps, {options.resolution} pixels, 1 thread",
        sep="; ",
    )
    print("\n| | CPU ms per step | MiB | speed | memory |\n|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as work:
        for name in [options.only] if options.only else FAMILIES:
            compare(name, options.diffusers, options.steps, options.resolution, Path(work))


if __name__ == "__main__":
    main()
