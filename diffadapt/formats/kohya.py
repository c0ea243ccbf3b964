"""kohya-ss/sd-scripts files for SD 1.x, SD 2.x and SDXL: flattened names with an alpha for every layer.

`lora_unet_<path with "_" for ".">.lora_down.weight`, text encoders under `lora_te_` (SD) or `lora_te1_`, `lora_te2_`
(SDXL). UNet names are those of diffusers or of the original latent-diffusion UNet. Flattening loses information, so
names are looked up in a table built from the model's own paths. Source: sd-scripts 48d368f `networks/lora.py`.
"""

import re
from collections.abc import Iterator

import torch
from torch import Tensor

from diffadapt.errors import AdapterError
from diffadapt.formats import suffixes
from diffadapt.formats.format import Alphas, Format, Header, Names, Unused, Verdict
from diffadapt.formats.original import original
from diffadapt.state import AdapterState, Document, LayerState
from diffadapt.types import named

_PREFIX = re.compile(r"lora_(unet|te\d?)_")
_COMPONENTS = {
    "te": "text_encoder",
    "te1": "text_encoder",
    "te2": "text_encoder_2",
    "te3": "text_encoder_3",
}
_SPELLINGS = {
    "lora_down": "lora_down.weight",
    "lora_up": "lora_up.weight",
    "lora_mid": "lora_mid.weight",
    "lora_bias": "lora_up.bias",
    "glora_a1": "a1.weight",
    "glora_a2": "a2.weight",
    "glora_b1": "b1.weight",
    "glora_b2": "b2.weight",
    "ia3_w": "weight",
}
_NORM_SPELLINGS = {"diff": "w_norm", "diff_b": "b_norm"}
_POINTWISE = frozenset({"lora_up", "dora_scale", "glora_a1", "glora_a2", "glora_b1"})
_PEFT_ONLY = frozenset({"boft_R", "ia3_l"})


def _matches(header: Header) -> bool:
    return any(_PREFIX.match(key) for key in header.keys)


def _locate(header: Header, names: Names) -> dict[str, Verdict]:
    denoiser = names.denoiser()
    keys = set(header.keys)
    verdicts: dict[str, Verdict] = {}
    for key in header.keys:
        module, _, suffix = key.partition(".")
        prefix = _PREFIX.match(module)
        # Of all bare weights only those with LyCORIS' flag beside them are an adapter's.
        name = "ia3_w" if suffix == "weight" and f"{module}.on_input" in keys else suffixes.canonical(suffix)
        if prefix is None or name is None:
            verdicts[key] = Unused("not the name of an adapter tensor")
            continue
        verdicts[key] = names.flat([_COMPONENTS.get(prefix[1], denoiser)], module[prefix.end() :], name)
    return verdicts


def _alphas(header: Header) -> Alphas:
    # ss_network_alpha is one number for files that have one per layer; the alpha tensors are the truth.
    return lambda component, path, rank: None


def _dump(state: AdapterState) -> dict[str, Document]:
    numbered = len(_text_encoders(state)) > 1 or state.family not in ("sd", "sd2", None)
    tensors: dict[str, Tensor] = {}
    for component, layers in state.layers.items():
        prefix = _prefix(component, numbered)
        if _is_original(state.family):
            layers = original(layers, state.layouts.get(component, {}))
        for path, layer in layers.items():
            # sd-scripts' CLIP has the `text_model` level that transformers 5 dropped.
            level = "text_model." if path.startswith("encoder.layers.") else ""
            module = f"{prefix}_{level}{path}".replace(".", "_")
            for spelling, tensor in _spelled(f"{component}.{path}", layer):
                tensors[f"{module}.{spelling}"] = tensor
            alpha = _alpha(f"{component}.{path}", layer)
            if alpha is not None:
                tensors[f"{module}.alpha"] = torch.tensor(alpha)
    every = [layer for layers in state.layers.values() for layer in layers.values()]
    ranks = {layer.rank for layer in every}
    metadata = {
        "ss_network_module": "networks.lora" if {layer.type for layer in every} <= {"lora"} else "lycoris.kohya",
        "ss_network_dim": str(max(rank or 0 for rank in ranks)) if len(ranks) == 1 else "Dynamic",
        **state.metadata,
        "format": "pt",
    }
    metadata.pop("lora_adapter_metadata", None)
    return {"": Document(tensors, metadata)}


def _spelled(where: str, layer: LayerState) -> Iterator[tuple[str, Tensor]]:
    """A layer's tensors by sd-scripts' and LyCORIS' names and in their shapes."""
    ones = (1,) * layer.kernel_dims
    for name, tensor in layer.tensors.items():
        if name in _PEFT_ONLY:
            raise AdapterError(f"{where}: format='kohya' has no place for {name}; use 'peft', or to_lora()")
        if name in _POINTWISE:
            tensor = tensor.view(*tensor.shape, *ones)
        elif name == "rescale":
            tensor = tensor.view(-1, 1, *ones)
        elif name == "lokr_w1" and layer.rank is None:
            # Readers ignore alpha where both factors are whole; PEFT's scale has to go into one of them.
            tensor = tensor * layer.scale
        elif name == "ia3_w":
            yield "on_input", torch.tensor(int(tensor.shape[1] > 1))
            tensor = tensor.view(1, -1, *ones) if ones else tensor.view(-1)
        spelling = _SPELLINGS.get(name, name)
        if "diff" in layer.tensors and layer.tensors["diff"].ndim == 1:
            spelling = _NORM_SPELLINGS[name]
        yield spelling, tensor


def _alpha(where: str, layer: LayerState) -> float | None:
    """The alpha tensor of a layer, which some types use for a setting of theirs. Others have no place here."""
    kind = named(layer.type)
    for name, value in layer.settings.items():
        if name not in (kind.alpha_is, "rank") and value != kind.settings[name]:
            raise AdapterError(f"{where}: format='kohya' has no place for {name}={value:g}; use 'peft', or to_lora()")
    if kind.alpha_is is not None:
        return float(layer.settings[kind.alpha_is])
    if layer.rank is None:
        # LyCORIS reads one for every LoKr, also where it means nothing.
        return 1.0 if "lokr_w1" in layer.tensors else None
    return float(layer.rank if layer.alpha is None else layer.alpha)


def _is_original(family: str | None) -> bool:
    """sd-scripts names the Stable Diffusion UNets as diffusers does, and every newer model as its authors do."""
    return family not in ("sd", "sd2", "sdxl", None)


def _text_encoders(state: AdapterState) -> list[str]:
    return [component for component in state.layers if component.startswith("text_encoder")]


def _prefix(component: str, numbered: bool) -> str:
    if not component.startswith("text_encoder"):
        return "lora_unet"
    number = component.removeprefix("text_encoder").lstrip("_") or "1"
    return f"lora_te{number}" if numbered else "lora_te"


KOHYA = Format("kohya", _matches, _locate, _alphas, _dump, original=_is_original)
