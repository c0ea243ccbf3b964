"""The models of a pipeline, and what files call them."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from diffadapt.errors import AdapterError
from diffadapt.runtime.components import is_text_encoder


def components_of(pipe: Any) -> dict[str, nn.Module]:
    """The models of a pipeline by component name, out of the wrappers of `torch.compile` and data parallelism."""
    found: dict[str, nn.Module] = {}
    for name, component in pipe.components.items():
        if isinstance(component, nn.Module):
            model = unwrapped(component)
            if all(model is not other for other in found.values()):
                found[name] = model
    return found


def tokenizers_of(pipe: Any) -> dict[str, Any]:
    """The tokenizers of a pipeline by their text encoders."""
    parts: Mapping[str, Any] = pipe.components
    paired = {name: parts.get(name.replace("text_encoder", "tokenizer")) for name in parts if is_text_encoder(name)}
    return {name: tokenizer for name, tokenizer in paired.items() if hasattr(tokenizer, "add_tokens")}


def unwrapped(model: nn.Module) -> nn.Module:
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def role_of(model: nn.Module) -> str:
    """The component name that files use for a model of this class."""
    class_name = type(unwrapped(model)).__name__
    if class_name.startswith("UNet"):
        return "unet"
    if "Transformer" in class_name:
        return "transformer"
    if "CLIPTextModelWithProjection" in class_name:
        raise AdapterError(f"{class_name} is text_encoder_2 of SDXL and text_encoder of SD3: pass component=")
    return "text_encoder" if type(unwrapped(model)).__module__.startswith("transformers.") else "model"
