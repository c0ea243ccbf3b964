"""The models and tokenizers of a pipeline by component name, and the component name of a single model."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from diffadapt.errors import AdapterError
from diffadapt.runtime.components import is_text_encoder, unwrapped


def components_of(pipe: Any) -> dict[str, nn.Module]:
    """Return component name -> model of a pipeline, each model once and without its wrappers; see `unwrapped`."""
    found: dict[str, nn.Module] = {}
    for name, component in pipe.components.items():
        if isinstance(component, nn.Module):
            model = unwrapped(component)
            if all(model is not other for other in found.values()):
                found[name] = model
    return found


def empty_components_of(pipe: Any) -> list[str]:
    """Return the names of the components that a pipeline has room for, but that are not loaded (`None`)."""
    return [name for name, component in pipe.components.items() if component is None]


def feeds_control(pipe: Any) -> bool:
    """Return whether a pipeline is able to feed a control image next to the latents.

    Among diffusers' own pipelines for Flux.1, only some are. About other pipelines, nothing is known.
    """
    name = type(pipe).__name__
    is_known = type(pipe).__module__.startswith("diffusers.pipelines.flux.")
    return not is_known or (name.startswith("FluxControl") and "ControlNet" not in name)


def tokenizers_of(pipe: Any) -> dict[str, Any]:
    """Return the tokenizers of a pipeline by the component name of their text encoder."""
    components: Mapping[str, Any] = pipe.components
    encoders = filter(is_text_encoder, components)
    paired = {name: components.get(name.replace("text_encoder", "tokenizer")) for name in encoders}
    return {name: tokenizer for name, tokenizer in paired.items() if hasattr(tokenizer, "add_tokens")}


def role_of(model: nn.Module) -> str:
    """Return the component name that adapter files use for models of this class.

    Raises:
        AdapterError: the class is that of several components.
    """
    class_name = type(unwrapped(model)).__name__
    if class_name.startswith("UNet"):
        return "unet"
    if "Transformer" in class_name:
        return "transformer"
    if "CLIPTextModelWithProjection" in class_name:
        raise AdapterError(f"{class_name} is text_encoder_2 in SDXL and text_encoder in SD3: pass component=")
    return "text_encoder" if type(unwrapped(model)).__module__.startswith("transformers.") else "model"


def likely_role_of(model: nn.Module) -> str:
    """Return what `role_of` does, and for a class of several components the one that most pipelines have it as."""
    try:
        return role_of(model)
    except AdapterError:
        return "text_encoder_2"
