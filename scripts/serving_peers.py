"""The systems that `bench_serving` compares: this library's engine, and diffusers with peft.

A system draws a list of requests. The peers draw one request after the other, since diffusers has one set of adapters
for a whole pipeline.
"""

import copy
import gc
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from numpy.typing import NDArray
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import nn

from examples.serving.engine import Engine, Request
from scripts.serving_adapters import PIPELINE

Picture = NDArray[np.int16]


class System(Protocol):
    """What clients send requests to.

    Attributes:
        batch: largest number of requests that are drawn at once.
    """

    batch: int

    def draw(self, requests: Sequence[Request]) -> list[Picture]:
        """Return a picture for every request, `(height, width, 3)` in 0..255."""
        ...

    def close(self) -> None:
        """Free the memory."""
        ...


class Ours:
    """The engine of examples/serving."""

    def __init__(self, adapters: Path, *, batch: int, pool_bytes: int, compiled: bool | str = False) -> None:
        """
        Args:
            adapters: folder with the files of the adapters.
            batch: rows of a batch, and adapters in it.
            pool_bytes: bytes of adapters to keep in memory.
            compiled: as for `Engine`.
        """
        self.batch = batch
        self.engine = Engine(PIPELINE, adapters, slots=batch, samples=batch, pool_bytes=pool_bytes, compiled=compiled)

    def draw(self, requests: Sequence[Request]) -> list[Picture]:
        """Draw the requests in one batch; raise the first error."""
        pictures = self.engine.draw(requests)
        for picture in pictures:
            if isinstance(picture, Exception):
                raise picture
        return [np.asarray(picture, np.int16) for picture in pictures]

    def close(self) -> None:
        """Drop the adapters."""
        self.engine.close()
        gc.collect()


class Resident:
    """diffusers with peft: all adapters stay in the UNet, and every request calls `set_adapters`."""

    batch = 1

    def __init__(self, adapters: Path, names: Sequence[str]) -> None:
        """
        Args:
            adapters: folder with LoRAs that diffusers loads.
            names: adapters to keep in the UNet.
        """
        self.pipe = plain_pipeline()
        first, *others = names
        self.pipe.load_lora_weights(adapters / f"{first}.safetensors", adapter_name=first)
        layers = {path: module for path, module in self.pipe.unet.named_modules() if isinstance(module, LoraLayer)}
        for name in others:
            # As `load_lora_weights` leaves them, which takes seconds for each when there are a hundred.
            self.pipe.unet.peft_config[name] = copy.copy(self.pipe.unet.peft_config[first])
            add_to_layers(layers, load_file(adapters / f"{name}.safetensors"), first, name)

    def draw(self, requests: Sequence[Request]) -> list[Picture]:
        """Activate the adapters of each request and draw it."""
        return [self._draw(request) for request in requests]

    def _draw(self, request: Request) -> Picture:
        self.pipe.set_adapters(list(request.adapters), list(request.adapters.values()))
        return drawn(self.pipe, request)

    def close(self) -> None:
        """Drop the pipeline."""
        del self.pipe
        gc.collect()


class Loading:
    """diffusers with peft: a request loads its adapters from their files, and the least recently used are deleted."""

    batch = 1

    def __init__(self, adapters: Path, pool_bytes: int) -> None:
        """
        Args:
            adapters: folder with LoRAs that diffusers loads.
            pool_bytes: bytes of adapters to keep in the UNet.
        """
        self.pipe = plain_pipeline()
        self.adapters = adapters
        self.pool_bytes = pool_bytes
        self.sizes: OrderedDict[str, int] = OrderedDict()

    def draw(self, requests: Sequence[Request]) -> list[Picture]:
        """Load and activate the adapters of each request and draw it."""
        return [self._draw(request) for request in requests]

    def _draw(self, request: Request) -> Picture:
        for name in request.adapters:
            if name not in self.sizes:
                file = self.adapters / f"{name}.safetensors"
                self.pipe.load_lora_weights(file, adapter_name=name)
                # In float32, the dtype of the UNet; the files are in float16.
                self.sizes[name] = 2 * file.stat().st_size
            self.sizes.move_to_end(name)
        self.pipe.set_adapters(list(request.adapters), list(request.adapters.values()))
        while sum(self.sizes.values()) > self.pool_bytes and len(self.sizes) > len(request.adapters):
            self.pipe.delete_adapters(self.sizes.popitem(last=False)[0])
        return drawn(self.pipe, request)

    def close(self) -> None:
        """Drop the pipeline."""
        del self.pipe
        gc.collect()


def plain_pipeline() -> Any:
    """Return the embedded pipeline."""
    pipe = StableDiffusionPipeline.from_pretrained(PIPELINE, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn(pipe: Any, request: Request) -> Picture:
    """Return the picture of one request, `(height, width, 3)` in 0..255."""
    result = pipe(
        request.prompt,
        generator=torch.Generator().manual_seed(request.seed),
        num_inference_steps=request.steps,
        guidance_scale=request.guidance_scale,
        output_type="np",
    )
    return (result.images[0] * 255).round().astype(np.int16)


def add_to_layers(layers: Mapping[str, nn.Module], tensors: Mapping[str, torch.Tensor], first: str, name: str) -> None:
    """Give every layer of peft one more adapter like `first`, with the tensors of a file with kohya's names."""
    for path, layer in layers.items():
        for known in (*vars(layer).values(), *layer._modules.values()):
            if isinstance(known, (dict, nn.ModuleDict)) and first in known:
                known[name] = copy.deepcopy(known[first])
        flat = f"lora_unet_{path.replace('.', '_')}"
        for part, suffix in ((layer.lora_A, "lora_down"), (layer.lora_B, "lora_up")):
            part[name].requires_grad_(False)
            part[name].weight.copy_(tensors[f"{flat}.{suffix}.weight"])
