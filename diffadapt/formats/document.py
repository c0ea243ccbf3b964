"""What writers take and return: an adapter without its model, and the content of the files that represent it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from diffadapt.families.family import Layout
from diffadapt.types.layer_state import LayerState


@dataclass(frozen=True)
class Document:
    """The content of one folder that a writer produces.

    Attributes:
        tensors: the tensors of the safetensors file, by key.
        metadata: its metadata.
        config: the content of PEFT's `adapter_config.json` next to it; `None` for formats without one.
    """

    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]
    config: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class AdapterState:
    """The content of an adapter, independent of its model.

    Attributes:
        layers: component -> path of the model's layer -> content of the adapter layer.
        metadata: the metadata of the file that the adapter came from.
        family: name of the model family, if known.
        layouts: component -> the original layout of its model, if it has one.
        embeddings: (token, text encoder as files spell it) -> learned vectors (count, features).
        is_tied: whether layers that share a weight share the tensors of the adapter.
        owners: component -> path of a bare parameter -> its number among the parameters of the module that owns it, and
            whether the inputs of an expert come first there.
        untied: the layers, as "component.path", whose weight is also that of a layer without the adapter.
        name: the name of the file without its ending.
        fused: component -> the layers of its model that files may have as one, for layers that cannot be saved apart
            (`LayerState.group`).
    """

    layers: Mapping[str, Mapping[str, LayerState]]
    metadata: Mapping[str, str] = field(default_factory=dict[str, str])
    family: str | None = None
    layouts: Mapping[str, Layout] = field(default_factory=dict[str, Layout])
    embeddings: Mapping[tuple[str, str], Tensor] = field(default_factory=dict[tuple[str, str], Tensor])
    is_tied: bool = False
    untied: frozenset[str] = frozenset()
    owners: Mapping[str, Mapping[str, tuple[int, bool]]] = field(
        default_factory=dict[str, Mapping[str, tuple[int, bool]]]
    )
    name: str = ""
    fused: Mapping[str, Layout] = field(default_factory=dict[str, Layout])
