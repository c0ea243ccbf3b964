"""The verdicts of a format on the keys of a file: the layer or token that each is for, or why it is unused."""

from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from diffadapt.families.fused_parts import FusedPart

BESIDE = ("alpha", "reshape_weight", "set_bias", "bias_indices", "bias_values", "bias_size", "scaled_oft")
"""Tensors that files have for a layer next to those of the adapter type:

* `alpha`;
* `reshape_weight`: the shape that ComfyUI pads the weight to;
* `set_bias`: a new bias of the layer;
* `bias_indices`, `bias_values`, `bias_size`: the remainder of a weight change, as a sparse matrix, that LyCORIS keeps
  when it extracts a LoRA from a model;
* `scaled_oft`: OneTrainer's marker of a scaled OFT.
"""


class Place(NamedTuple):
    """The place of a tensor: a layer, and the tensor's name there.

    Attributes:
        component: name of the pipeline component.
        path: path of the layer in that component; without a model to resolve it against, the path in the file.
        name: canonical name of the tensor, or one of `BESIDE`. It ends in a number (`oft_blocks.0`) where the file has
            a tensor for each of several parts of the layer.
        written: the path before it was resolved against the model, which patterns in the file's metadata refer to.
        parts: the model's layers that the file's layer consists of, in the order of its outputs; empty if `path` is a
            layer of the model.
        ids: the rows of the layer's weight that the tensor has, if the file's header says so.
    """

    component: str
    path: str
    name: str
    written: str
    parts: tuple[FusedPart, ...] = ()
    ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Unused:
    """A tensor that has no place.

    Attributes:
        reason: why it has none.
        component: the component that its key names, if any.
        harmless: whether the models get all that they have a place for without this tensor, as with a trainer's
            bookkeeping.
        lost: whether a harmless tensor changes other models or programs, so that a converted file needs it.
    """

    reason: str
    component: str | None = None
    harmless: bool = False
    lost: bool = False


@dataclass(frozen=True, slots=True)
class Vectors:
    """The learned vectors of a token (a textual inversion).

    Attributes:
        token: the word to use in prompts; `None` if it is the name of the file.
        written: the text encoder as files spell it ("clip_l"), or what they have in its place if they name none.
        apart: whether every row is a token of its own: `<s0>`, `<s1>` and so on.
        output: whether the vectors replace the output of the text encoder for the token, rather than its input.
    """

    token: str | None
    written: str
    apart: bool = False
    output: bool = False


@dataclass(frozen=True, slots=True)
class OwnWeight:
    """The weight that a layer has without the adapter, which PEFT stores next to the adapter's tensors.

    Attributes:
        component: name of the pipeline component.
        path: path of the layer in that component.
    """

    component: str
    path: str


@dataclass(frozen=True, slots=True)
class Shared:
    """A tensor that all layers of a component have in common, which PEFT stores once for the whole model.

    Attributes:
        component: name of the pipeline component.
        name: canonical name of the tensor.
        paths: the layers that have it, if the file has no other tensors for them.
        group: the layers that have it, if only some of those in the file do.
    """

    component: str
    name: str
    paths: tuple[str, ...] = ()
    group: frozenset[str] | None = None


Verdict: TypeAlias = Place | Vectors | OwnWeight | Shared | Unused
