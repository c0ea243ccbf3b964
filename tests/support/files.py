"""Adapter files made in memory: random factors for real layers, spelled the way each program spells them."""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import DiffusionPipeline, ModularPipeline
from safetensors.torch import save_file
from torch import Tensor, nn

FIXTURES = Path(__file__).parents[1] / "fixtures"
ATTENTION = r"(to_[qkv]|to_out\.0|[qkv]_proj|out_proj)"


P = TypeVar("P", DiffusionPipeline, ModularPipeline)


@dataclass(frozen=True)
class Factors:
    """LoRA of one layer: `down` (rank, in, *kernel), `up` (out, rank), and alpha; `None` means the rank."""

    down: Tensor
    up: Tensor
    alpha: float | None = None

    @property
    def delta(self) -> Tensor:
        rank = self.down.shape[0]
        scale = 1.0 if self.alpha is None else self.alpha / rank
        product = self.up.double() @ self.down.double().flatten(1)
        return scale * product.view(self.up.shape[0], *self.down.shape[1:])


Layer = nn.Linear | nn.Conv2d
Parts = Mapping[str, Mapping[str, Factors]]
"""component -> module path -> factors."""


def factors_for(
    layers: Mapping[str, Layer], rank: int = 4, alpha: Callable[[int], float | None] = lambda index: None
) -> dict[str, Factors]:
    """Random factors for layers by path, large enough to change what a pipeline draws.

    Args:
        alpha: of the n-th layer.
    """
    generator = torch.Generator().manual_seed(2)
    made: dict[str, Factors] = {}
    for index, (path, layer) in enumerate(layers.items()):
        out, *fan_in = layer.weight.shape
        down = torch.randn(rank, *fan_in, generator=generator) * 0.3
        made[path] = Factors(down, torch.randn(out, rank, generator=generator) * 0.3, alpha(index))
    return made


def layers_of(model: nn.Module, pattern: str = ATTENTION) -> dict[str, Layer]:
    """Linear layers and convolutions whose path ends in `pattern`, a regular expression for whole names."""
    expression = re.compile(rf"(?:.*\.)?(?:{pattern})")
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, Layer) and expression.fullmatch(path)
    }


def parts_for(
    pipe: DiffusionPipeline | ModularPipeline,
    components: tuple[str, ...] = ("unet", "text_encoder"),
    pattern: str = ATTENTION,
    rank: int = 4,
    alpha: Callable[[int], float | None] = lambda index: None,
) -> dict[str, dict[str, Factors]]:
    """Factors for the layers of several components of a pipeline."""
    return {name: factors_for(layers_of(getattr(pipe, name), pattern), rank, alpha) for name in components}


def bake(pipe: P, parts: Parts, strength: float | Mapping[str, float] = 1.0) -> P:
    """Add the deltas to the weights of `pipe` themselves: what an adapter has to come out equal to."""
    for component, layers in parts.items():
        amount = strength[component] if isinstance(strength, Mapping) else strength
        for path, factors in layers.items():
            weight = getattr(pipe, component).get_submodule(path).weight
            delta = amount * factors.delta
            weight.data.add_(delta.reshape(weight.shape).to(weight.dtype))
    return pipe


def _up(factors: Factors) -> Tensor:
    return factors.up.view(*factors.up.shape, *(1,) * (factors.down.ndim - 2))


def peft_names(parts: Parts, prefix: str = "{component}.") -> dict[str, Tensor]:
    """`unet.<path>.lora_A.weight`: diffusers since 0.20, without alpha."""
    tensors: dict[str, Tensor] = {}
    for component, layers in parts.items():
        for path, factors in layers.items():
            stem = prefix.format(component=component) + path
            tensors[f"{stem}.lora_A.weight"] = factors.down
            tensors[f"{stem}.lora_B.weight"] = _up(factors)
    return tensors


def old_names(parts: Parts) -> dict[str, Tensor]:
    """`unet.<path>.lora.down.weight`, and `lora_linear_layer` in text encoders: diffusers 0.17 to 0.20."""
    tensors: dict[str, Tensor] = {}
    for component, layers in parts.items():
        infix = "lora_linear_layer" if component.startswith("text_encoder") else "lora"
        for path, factors in layers.items():
            stem = f"{component}.{_transformers4(component, path)}.{infix}"
            tensors[f"{stem}.down.weight"] = factors.down
            tensors[f"{stem}.up.weight"] = _up(factors)
    return tensors


def processor_names(layers: Mapping[str, Factors], prefix: str = "") -> dict[str, Tensor]:
    """`<attention>.processor.to_q_lora.down.weight`: diffusers before 0.17, attention only."""
    tensors: dict[str, Tensor] = {}
    for path, factors in layers.items():
        attention, name = re.fullmatch(r"(.*)\.(to_[qkv]|to_out)(?:\.0)?", path).groups()
        stem = f"{prefix}{attention}.processor.{name}_lora"
        tensors[f"{stem}.down.weight"] = factors.down
        tensors[f"{stem}.up.weight"] = factors.up
    return tensors


SD_PREFIXES = {"unet": "lora_unet", "text_encoder": "lora_te"}
SDXL_PREFIXES = {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}


def kohya_names(
    parts: Parts, prefixes: Mapping[str, str] = SD_PREFIXES, renamed: Mapping[str, str] | None = None
) -> dict[str, Tensor]:
    """`lora_unet_<flat path>.lora_down.weight` with an alpha tensor for every layer that has one.

    Args:
        renamed: other dotted names of the denoiser's layers (those of the original latent-diffusion UNet).
    """
    tensors: dict[str, Tensor] = {}
    for component, layers in parts.items():
        for path, factors in layers.items():
            name = (renamed or {}).get(path, path) if component == "unet" else _transformers4(component, path)
            stem = f"{prefixes[component]}_{name}".replace(".", "_")
            tensors[f"{stem}.lora_down.weight"] = factors.down
            tensors[f"{stem}.lora_up.weight"] = _up(factors)
            if factors.alpha is not None:
                tensors[f"{stem}.alpha"] = torch.tensor(factors.alpha)
    return tensors


def _transformers4(component: str, path: str) -> str:
    """CLIP's paths have had a `text_model` level until transformers 5, and files still do."""
    is_clip = component.startswith("text_encoder") and path.startswith("encoder.layers.")
    return f"text_model.{path}" if is_clip else path


def alpha_metadata(parts: Parts) -> dict[str, str]:
    """The header entry in which diffusers keeps alpha, with a pattern for each layer unlike the first."""
    config: dict[str, Any] = {}
    for component, layers in parts.items():
        first = next(iter(layers.values()))
        config[f"{component}.r"] = first.down.shape[0]
        config[f"{component}.lora_alpha"] = first.alpha
        config[f"{component}.rank_pattern"] = {}
        config[f"{component}.alpha_pattern"] = {
            f"^{path}": factors.alpha for path, factors in layers.items() if factors.alpha != first.alpha
        }
        config[f"{component}.target_modules"] = list(layers)
    return {"format": "pt", "lora_adapter_metadata": json.dumps(config)}


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(
        {key: tensor.contiguous() for key, tensor in tensors.items()},
        path,
        metadata=dict(metadata or {"format": "pt"}),
    )
    return path


def fixture(name: str) -> dict[str, Any]:
    """A list of names from `fixtures/`, with its source."""
    return json.loads((FIXTURES / f"{name}.json").read_text())


def shapes_of(content: Mapping[str, Any], rank: int = 4) -> dict[str, tuple[int, ...] | None]:
    """Keys and shapes of a real file from a list of names, `None` for a shape that is not known.

    Some lists have whole keys, some the layers and what each of them has, some the layers and the shapes of the base
    model's weights.
    """
    if "keys" in content:
        return {key: None if shape is None else tuple(shape) for key, shape in content["keys"].items()}
    if "modules" in content:
        return {f"{module}.{tensor}": None for module in content["modules"] for tensor in content["tensors"]}
    shapes: dict[str, tuple[int, ...] | None] = {}
    for module, (out, *fan_in) in content["base_weights"].items():
        shapes[f"{module}.lora_down.weight"] = (rank, *fan_in)
        shapes[f"{module}.lora_up.weight"] = (out, rank, *(1 for _ in fan_in[1:]))
        shapes[f"{module}.alpha"] = ()
    return shapes


def placeholders(name: str, rank: int = 4) -> dict[str, Tensor]:
    """The tensors of a real file on the meta device: names and shapes only; alphas have a value in some lists."""
    content = fixture(f"keys/{name}")
    alpha = torch.tensor(float(rank)) if "base_weights" in content else torch.empty((), device="meta")
    shapes = shapes_of(content, rank)
    return {key: torch.empty(shape, device="meta") if shape else alpha for key, shape in shapes.items()}
