"""What the name of a pipeline's component says about it, and the model inside its wrappers."""

from torch import nn

TEXT_ENCODER = "text_encoder"


def is_text_encoder(component: str) -> bool:
    """Return whether the component is a text encoder: `text_encoder`, `text_encoder_2`, `prior_text_encoder`, ..."""
    return TEXT_ENCODER in component


def text_encoder_number(component: str) -> str:
    """Return the number at the end of a text encoder's name, or "" if it has none."""
    return component.rpartition(TEXT_ENCODER)[2].lstrip("_")


def unwrapped(model: nn.Module) -> nn.Module:
    """Return a model without wrappers: those of `torch.compile`, data parallelism, FSDP1, DeepSpeed and the like.

    A wrapper has no parameters of its own and one child, the model, as its attribute `module`.
    """
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and not any(parameter is not None for parameter in model._parameters.values()):
            children = list(model.children())
            inner = getattr(model, "module", None) if len(children) == 1 else None
            if not isinstance(inner, nn.Module) or inner is not children[0] or not inner._modules:
                return model
        if not isinstance(inner, nn.Module):
            return model
        model = inner
