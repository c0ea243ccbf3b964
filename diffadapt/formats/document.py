"""An adapter without a model, as writers get it, and the files that they make of it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from diffadapt.families.family import Layout
from diffadapt.types.layer_state import LayerState


@dataclass(frozen=True)
class Document:
    """What a writer puts into one folder: the tensors and metadata of one file, and PEFT's config beside it."""

    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]
    config: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class AdapterState:
    """An adapter without a model.

    Attributes:
        layouts: component -> the original layout of that model, where it has one.
        embeddings: learned vectors (count, width), by token and by what files call the text encoder.
    """

    layers: Mapping[str, Mapping[str, LayerState]]
    metadata: Mapping[str, str] = field(default_factory=dict[str, str])
    family: str | None = None
    layouts: Mapping[str, Layout] = field(default_factory=dict[str, Layout])
    embeddings: Mapping[tuple[str, str], Tensor] = field(default_factory=dict[tuple[str, str], Tensor])
