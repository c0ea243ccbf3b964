"""What a format says of each key of a file."""

from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from diffadapt.families.fused_parts import FusedPart

BESIDE = ("alpha", "reshape_weight", "set_bias", "bias_indices", "bias_values", "bias_size", "scaled_oft")
"""What files have beside a type's tensors: alpha; ComfyUI's word for the shape that the weight is filled up to; a new
bias; the rest of the weight's change that LyCORIS keeps as a sparse matrix when it extracts a LoRA from a model; the
mark of OneTrainer's scaled OFT."""


class Place(NamedTuple):
    """Where a tensor belongs.

    Attributes:
        component: of the pipeline.
        path: of the layer in that component (as the file spells it when there is no model to ask).
        name: canonical tensor name, or one of `BESIDE`; with a number at the end (`oft_blocks.0`) where the file has
            one for each of the `parts`.
        written: the path before it was resolved against the model; what patterns in the file's metadata speak of.
        pieces: the model's layers that the file's layer consists of, in the order of its outputs; none where `path` is
            a layer of the model.
    """

    component: str
    path: str
    name: str
    written: str
    parts: tuple[FusedPart, ...] = ()


@dataclass(frozen=True, slots=True)
class Unused:
    """A tensor that belongs nowhere, and why.

    Attributes:
        component: that the name speaks of, where it does.
        harmless: bookkeeping, which does not make a file faulty.
    """

    reason: str
    component: str | None = None
    harmless: bool = False


@dataclass(frozen=True, slots=True)
class Vectors:
    """Learned vectors of a token: a textual inversion.

    Attributes:
        token: the word for the prompt; `None` where it is the file's name.
        written: for which text encoder, as files spell it ("clip_l"), or what they spell where they do not say.
        apart: every row is a token of its own, `<s0>`, `<s1>` and so on.
        output: they replace what the text encoder gives for the token, and not what it reads.
    """

    token: str | None
    written: str
    apart: bool = False
    output: bool = False


Verdict: TypeAlias = Place | Vectors | Unused
