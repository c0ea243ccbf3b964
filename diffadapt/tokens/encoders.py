"""The text encoders of a pipeline: which one a file means, and where it looks tokens up."""

from collections.abc import Mapping

from torch import Tensor, nn

from diffadapt.errors import AdapterError
from diffadapt.runtime.components import is_text_encoder

_MODEL_TYPES = {"clip": "clip", "t5": "t5", "t5xxl": "t5", "llama": "llama", "gemma": "gemma", "qwen": "qwen"}
"""First part of what files call a text encoder -> what transformers has in the `model_type` of its config."""


def text_encoders(models: Mapping[str, nn.Module] | None) -> dict[str, nn.Module] | None:
    """The text encoders among the models, by component."""
    return None if models is None else {name: models[name] for name in sorted(models) if is_text_encoder(name)}


def component_meant(written: str, vectors: Tensor, encoders: Mapping[str, nn.Module]) -> str:
    """The text encoder that a file means: by its name there or, where it has none, by the width of the vectors."""
    width = vectors.shape[1]
    widths = {component: token_embedding(model).embedding_dim for component, model in encoders.items()}
    present = ", ".join(f"{c} ({_model_type(m)}, width {widths[c]})" for c, m in encoders.items()) or "none"
    model_type = _MODEL_TYPES.get(written.partition("_")[0])
    if model_type is None:
        fitting = [component for component in encoders if widths[component] == width]
        if not fitting:
            raise AdapterError(f"vectors of width {width} fit no text encoder; there are {present}")
        return fitting[0]
    alike = [component for component, model in encoders.items() if model_type in _model_type(model)]
    if not alike:
        raise AdapterError(f"there is no text encoder {written!r}; there are {present}")
    component = alike[1] if written == "clip_g" and len(alike) > 1 else alike[0]
    if widths[component] != width:
        raise AdapterError(f"vectors of width {width} do not fit {component}, which has {widths[component]}")
    return component


def _model_type(model: nn.Module) -> str:
    return getattr(getattr(model, "config", None), "model_type", "")


def token_embedding(model: nn.Module) -> nn.Embedding:
    """The embedding of a text encoder's tokens."""
    try:
        embedding = model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        embedding = None
    if not isinstance(embedding, nn.Embedding):
        raise AdapterError(f"a {type(model).__name__} has no token embedding that could look up further tokens")
    return embedding


def embedding_hosts(model: nn.Module) -> list[nn.Module]:
    """The layers that look tokens up: the embedding, and those that share its weight (T5 calls one of them only).

    Told by their size, as offloading unties weights.
    """
    embedding = token_embedding(model)
    size = (embedding.num_embeddings, embedding.embedding_dim)
    return [
        module
        for module in model.modules()
        if isinstance(module, nn.Embedding) and (module.num_embeddings, module.embedding_dim) == size
    ]
