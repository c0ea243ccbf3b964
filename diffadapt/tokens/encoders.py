"""The text encoders of a pipeline: which of them a file means, and the layers that look up their tokens."""

from collections.abc import Mapping

from torch import Tensor, nn

from diffadapt.errors import AdapterError
from diffadapt.runtime.components import is_text_encoder

_MODEL_TYPES = {"clip": "clip", "t5": "t5", "t5xxl": "t5", "llama": "llama", "gemma": "gemma", "qwen": "qwen"}
"""First part of a text encoder's name in files -> part of the `model_type` in its transformers config."""


class NoTextEncoder(AdapterError):
    """No text encoder of the pipeline is the one that vectors of a file are for."""


def text_encoders(models: Mapping[str, nn.Module] | None) -> dict[str, nn.Module] | None:
    """Return the text encoders among `models`, sorted by component; `None` if `models` is `None`."""
    return None if models is None else {name: models[name] for name in sorted(models) if is_text_encoder(name)}


def component_for(written: str, vectors: Tensor, encoders: Mapping[str, nn.Module]) -> str:
    """Return the component of the text encoder that vectors of a file are for.

    Args:
        written: the name of the text encoder in the file, such as "clip_l". If it is unknown, the vectors are for the
            first text encoder with embeddings of their width.
        vectors: the vectors, of shape (count, width).
        encoders: the text encoders of the pipeline, by component.

    Raises:
        NoTextEncoder: the pipeline has no such text encoder.
        AdapterError: its embeddings are of another width.
    """
    width = vectors.shape[1]
    widths = {component: token_embedding(model).embedding_dim for component, model in encoders.items()}
    present = ", ".join(f"{c} ({_model_type(m)}, width {widths[c]})" for c, m in encoders.items()) or "none"
    model_type = _MODEL_TYPES.get(written.partition("_")[0])
    if model_type is None:
        fitting = [component for component in encoders if widths[component] == width]
        if not fitting:
            raise NoTextEncoder(f"vectors of width {width} fit no text encoder; there are {present}")
        return fitting[0]
    alike = [component for component, model in encoders.items() if model_type in _model_type(model)]
    if not alike:
        raise NoTextEncoder(f"there is no text encoder {written!r}; there are {present}")
    component = alike[1] if written == "clip_g" and len(alike) > 1 else alike[0]
    if widths[component] != width:
        raise AdapterError(f"vectors of width {width} do not fit {component}, which has {widths[component]}")
    return component


def names_in_files(encoders: Mapping[str, nn.Module]) -> dict[str, str]:
    """Return component -> what files call the text encoder, such that `component_for` finds it again."""
    found: dict[str, str] = {}
    for component, model in encoders.items():
        model_type = _model_type(model)
        known = next((written for written, part in _MODEL_TYPES.items() if part in model_type), model_type or component)
        if known == "clip":
            known = "clip_g" if "clip_l" in found.values() else "clip_l"
        found[component] = known
    return found


def token_embedding(model: nn.Module) -> nn.Embedding:
    """Return the token embedding of a text encoder. Raise `AdapterError` if it has none that can be extended."""
    try:
        embedding = model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        embedding = None
    if not isinstance(embedding, nn.Embedding):
        raise AdapterError(f"a {type(model).__name__} has no token embedding that can be extended by further tokens")
    return embedding


def embedding_hosts(model: nn.Module) -> list[nn.Module]:
    """Return the layers that look up tokens: the token embedding, and those that share its weight.

    T5 has two such layers and calls only one of them. They are recognised by their size, since offloading unties
    weights.
    """
    embedding = token_embedding(model)
    size = (embedding.num_embeddings, embedding.embedding_dim)
    return [
        module
        for module in model.modules()
        if isinstance(module, nn.Embedding) and (module.num_embeddings, module.embedding_dim) == size
    ]


def _model_type(model: nn.Module) -> str:
    return getattr(getattr(model, "config", None), "model_type", "")
