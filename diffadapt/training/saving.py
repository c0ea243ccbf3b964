"""The result of a run: the adapter file with metadata that other programs read, and a model card."""

import base64
import io
import json
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from diffadapt.errors import AdapterError, UsageError
from diffadapt.pipelines.entry import adapters_of
from diffadapt.runtime.adapter import Adapter
from diffadapt.training.data.samples import Samples
from diffadapt.training.families import Pipeline, TrainingFamily
from diffadapt.training.options import TrainingOptions

ADAPTER = "dreambooth"
WEIGHTS_FILE = "pytorch_lora_weights.safetensors"
CARD_FILE = "README.md"

_BASE_VERSIONS = {
    "sdxl": ("sdxl_base_v1-0", "stable-diffusion-xl-v1-base"),
    "sd3": ("sd3m", "stable-diffusion-3"),
    "flux": ("flux1", "flux-1-dev"),
    "flux2": ("flux2", "flux-2-dev"),
    "lumina2": ("lumina2", "lumina-2"),
}
"""Family -> kohya's name of the base version, and the architecture of the model specification."""


def save_format(options: TrainingOptions, pipe: Pipeline) -> str:
    """Return the format of the saved file: that of the options, or the first that can express the adapter.

    It is tried before training, so that nothing is trained that cannot be saved.

    Raises:
        UsageError: no format can.
    """
    plain = options.adapter_type in ("lora", "dora")
    wanted = [options.save_format] if options.save_format else (["diffusers"] if plain else []) + ["kohya", "peft"]
    reasons: list[str] = []
    for format in wanted:
        with tempfile.TemporaryDirectory() as folder:
            try:
                adapters_of(pipe).save(ADAPTER, folder, format)
            except AdapterError as error:
                reasons.append(f"{format}: {error}")
            else:
                return format
    raise UsageError("--save_format: the adapter could not be saved: " + "; ".join(reasons))


def add_metadata(
    adapters: Mapping[str, Adapter],
    options: TrainingOptions,
    pipe: Pipeline,
    family: TrainingFamily,
    samples: Samples,
    *,
    steps: int,
    resolution: int,
    started: float,
    thumbnail: Image.Image | None = None,
) -> None:
    """Add what other programs read to the metadata of the adapters.

    `ss_*` are the keys of kohya's sd-scripts, which the web UI of AUTOMATIC1111 shows; `modelspec.*` those of
    Stability's model specification 1.0.1.
    """
    found = {name: str(value) for name, value in _kohya(options, samples, pipe, family, steps, resolution).items()}
    found["ss_training_started_at"] = str(started)
    found |= {
        f"modelspec.{name}": str(value)
        for name, value in _specification(options, pipe, family, resolution, started, thumbnail).items()
        if value is not None
    }
    for adapter in adapters.values():
        adapter.metadata.update(found)


def write_card(
    folder: Path, options: TrainingOptions, file: Path, samples: Samples, steps: int, image: str | None
) -> None:
    """Write a model card to the output folder."""
    examples = next(iter(samples.streams.values())).examples
    prompt = options.validation_prompt or options.instance_prompt or examples[0].caption
    base = options.pretrained_model_name_or_path
    picture = "" if image is None else f"\n![{prompt}]({image})\n"
    lines = f"""---
base_model: {json.dumps(base)}
library_name: diffusers
tags: [{options.adapter_type}, text-to-image]
{"instance_prompt: " + json.dumps(trigger(options)) if trigger(options) else "instance_prompt: null"}
---

# {folder.resolve().name}
{picture}
A {options.adapter_type} adapter for `{base}`, trained with diffadapt on {len(examples)} pictures for {steps} steps.

```python
import diffadapt
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained({base!r})
pipe.load_adapter({str(file.name)!r})
image = pipe({prompt!r}).images[0]
```
"""
    (folder / CARD_FILE).write_text(lines, encoding="utf-8")


def trigger(options: TrainingOptions) -> str | None:
    """Return the word or prompt for what was trained."""
    return options.trigger_word or options.instance_prompt


def _kohya(
    options: TrainingOptions, samples: Samples, pipe: Pipeline, family: TrainingFamily, steps: int, resolution: int
) -> dict[str, Any]:
    examples = samples.streams["instance"].examples
    folders: dict[str, dict[str, int]] = {}
    tags: dict[str, Counter[str]] = {}
    for example in examples:
        name = f"{example.repeats}_{example.path.parent.name}"
        entry = folders.setdefault(name, {"n_repeats": example.repeats, "img_count": 0})
        entry["img_count"] += 1
        words = (tag.strip() for caption in example.captions for tag in caption.split(","))
        tags.setdefault(name, Counter()).update(tag for tag in words if tag)
    version, _ = _BASE_VERSIONS.get(family.name, (None, None))
    if family.name == "sd":
        version = "sd_v2" if pipe.unet.config.cross_attention_dim == 1024 else "sd_v1"
    return {
        "ss_base_model_version": version or family.name,
        "ss_sd_model_name": options.pretrained_model_name_or_path,
        "ss_v2": version == "sd_v2",
        "ss_output_name": Path(options.output_dir).resolve().name,
        "ss_network_dim": options.rank,
        "ss_network_alpha": options.rank if options.lora_alpha is None else options.lora_alpha,
        "ss_num_train_images": len(examples),
        "ss_num_reg_images": len(samples.streams["class"].examples) if "class" in samples.streams else 0,
        "ss_resolution": f"({resolution}, {resolution})",
        "ss_enable_bucket": options.aspect_ratio_buckets,
        "ss_batch_size_per_device": options.train_batch_size,
        "ss_gradient_accumulation_steps": options.gradient_accumulation_steps,
        "ss_max_train_steps": options.max_train_steps,
        "ss_steps": steps,
        "ss_learning_rate": options.learning_rate,
        "ss_unet_lr": options.learning_rate,
        "ss_text_encoder_lr": options.text_encoder_lr
        or (options.learning_rate if options.train_text_encoder else None),
        "ss_lr_scheduler": options.lr_scheduler,
        "ss_lr_warmup_steps": options.lr_warmup_steps,
        "ss_optimizer": options.optimizer,
        "ss_max_grad_norm": options.max_grad_norm,
        "ss_min_snr_gamma": options.snr_gamma,
        "ss_seed": options.seed,
        "ss_mixed_precision": options.mixed_precision,
        "ss_caption_dropout_rate": options.caption_dropout,
        "ss_shuffle_caption": options.shuffle_tags,
        "ss_keep_tokens": options.keep_tags,
        "ss_dataset_dirs": json.dumps(folders),
        "ss_tag_frequency": json.dumps({name: dict(counts.most_common(1000)) for name, counts in tags.items()}),
    }


def _specification(
    options: TrainingOptions,
    pipe: Pipeline,
    family: TrainingFamily,
    resolution: int,
    started: float,
    thumbnail: Image.Image | None,
) -> dict[str, Any]:
    _, architecture = _BASE_VERSIONS.get(family.name, (None, None))
    process = family.process(pipe)
    if family.name == "sd":
        second = pipe.unet.config.cross_attention_dim == 1024
        architecture = (
            f"stable-diffusion-v2-{'768-v' if process == 'v' else '512'}" if second else "stable-diffusion-v1"
        )
    return {
        "sai_model_spec": "1.0.1",
        "architecture": f"{architecture or family.name}/lora",
        "implementation": "diffusers",
        "title": Path(options.output_dir).resolve().name,
        "resolution": f"{resolution}x{resolution}",
        # Not the time of saving: what a run saves twice is the same file.
        "date": time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(started)),
        "trigger_phrase": trigger(options),
        "prediction_type": None if process == "flow" else process,
        "thumbnail": None if thumbnail is None else data_url(thumbnail, 256),
    }


def data_url(image: Image.Image, side: int | None = None) -> str:
    """Return a picture as a JPEG inside a URL, scaled down to fit into a square of `side` pixels."""
    small = image.convert("RGB")
    if side is not None:
        small.thumbnail((side, side))
    buffer = io.BytesIO()
    small.save(buffer, format="JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
