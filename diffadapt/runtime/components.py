"""What the name of a pipeline's component says about it."""

TEXT_ENCODER = "text_encoder"


def is_text_encoder(component: str) -> bool:
    """Return whether the component is a text encoder: `text_encoder`, `text_encoder_2`, `prior_text_encoder`, ..."""
    return TEXT_ENCODER in component


def text_encoder_number(component: str) -> str:
    """Return the number at the end of a text encoder's name, or "" if it has none."""
    return component.rpartition(TEXT_ENCODER)[2].lstrip("_")
