"""BOFT: a rotation of a layer's inputs or outputs as a product of sparse factors.

The factors are connected like the butterflies of a fast Fourier transform; with one factor, BOFT is OFT. Liu et al.,
"Parameter-Efficient Orthogonal Finetuning via Butterfly Factorization", arXiv 2311.06243. The tensor layouts are those
in huggingface/peft 0.21.2 `tuners/boft/layer.py` and KohakuBlueleaf/LyCORIS f49d30d `lycoris/functional/boft.py`.

| tensor | shape | effect | as in |
|---|---|---|---|
| `boft_R` | (factors, blocks, b, b) | rotates inputs or patches | PEFT |
| `boft_s` | (out, 1), or (1, out) for a convolution | one factor per output, not applied to the bias | PEFT |
| `oft_blocks` | (factors, blocks, b, b) | rotates outputs | LyCORIS |
| `rescale` | (out), with `oft_blocks` | one factor per output, after the rotation | LyCORIS |

The rotation of a block A is R = (I - Q) (I + Q)^-1 with Q = (A - A') / 2 for `boft_R`, and R = (I + Q) (I - Q)^-1 with
Q = A - A' for `oft_blocks`. Factor i (from 0) splits the channels into segments of 2^i b channels, and each half of a
segment into half-blocks of b / 2 channels. Half-block c of the first half and half-block c of the second half form a
pair, which is rotated by its own block. B_i is the matrix of factor i:

    W' = diag(s) W (B_(m-1) ... B_0)'        boft_R
    W' = diag(rescale) B_(m-1) ... B_0 W     oft_blocks

PEFT stores the two half-blocks of a pair one after the other. LyCORIS interleaves them; `prepare` reorders those. On
the input side, a strength m interpolates the rotation and `boft_s` separately; on the output side, it interpolates W'.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffadapt.errors import AdapterError
from diffadapt.types.adapter_type import AdapterType, Stage, Surroundings, Tensors
from diffadapt.types.layer_spec import LayerSpec, plain_spec
from diffadapt.types.oft import RotationConfig, cayley, constrained, rescaled, unlimited
from diffadapt.types.tensor_ops import apply_blocks, promoted, scaled, shape_of, take_rows

_ON_INPUT, _ON_OUTPUT = "boft_on_input", "boft_on_output"


@dataclass(frozen=True, kw_only=True)
class BOFTConfig(RotationConfig):
    """Settings of a new BOFT (Liu et al., arXiv 2311.06243).

    Attributes:
        butterfly_factors: the number m of factors; `2^(m-1)` has to divide the number of blocks. Defaults to 1 on the
            input side, as in PEFT, and to the largest possible number on the output side, as in LyCORIS.
    """

    butterfly_factors: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.butterfly_factors is not None and self.butterfly_factors < 1:
            raise AdapterError(f"butterfly_factors is {self.butterfly_factors}, expected at least 1")

    @property
    def settings(self) -> dict[str, float]:
        """The settings that apply to the chosen side; see `AdapterType.settings`."""
        return {"constraint": self.constraint} if self.side == "output" else {}

    def blocks(self, channels: int) -> tuple[int, int, int]:
        """Return the number of factors, and the number and the size of the blocks of each, for a number of channels.

        Raises:
            AdapterError: the channels cannot be divided into such blocks.
        """
        number, size = self.split(channels)
        most = 1
        while number % 2**most == 0:
            most += 1
        if self.butterfly_factors is not None:
            return self.butterfly_factors, number, size
        return 1 if self.side == "input" else most, number, size


def fit(tensors: Tensors, spec: LayerSpec) -> dict[str, Tensor]:
    """Check that the blocks in a file cover the channels in complete pairs, and return the tensors.

    `boft_s` and `rescale` get the shape (out, 1).
    """
    name, other = ("boft_R", "boft_s") if "boft_R" in tensors else ("oft_blocks", "rescale")
    if name not in tensors or not set(tensors) <= {name, other} or (name == "boft_R" and other not in tensors):
        raise AdapterError(
            f"boft_R and boft_s, or oft_blocks with or without rescale expected, {', '.join(sorted(tensors))} found"
        )
    channels, shape = _rotated_channels(name, spec), shape_of(tensors[name])
    if len(shape) != 4 or shape[2] != shape[3] or shape[1] * shape[2] != channels or not shape[0]:
        raise AdapterError(f"{name} has shape {shape}, expected (factors, blocks, b, b) for {channels} channels")
    _refuse_unpaired(name, *shape[:3])
    fitted = {name: tensors[name]}
    if other in tensors:
        if tensors[other].numel() != spec.out_features:
            raise AdapterError(f"{other} has shape {shape_of(tensors[other])}, expected ({spec.out_features}, 1)")
        fitted[other] = tensors[other].reshape(spec.out_features, 1)
    return fitted


def geometry(tensors: Tensors) -> LayerSpec:
    """Return the spec of a linear layer with as many channels as the blocks cover."""
    blocks = tensors.get("boft_R", tensors.get("oft_blocks"))
    channels = 0 if blocks is None or blocks.ndim != 4 else blocks.shape[1] * blocks.shape[2]
    if "oft_blocks" in tensors:
        return plain_spec(channels, 0)
    return plain_spec(tensors["boft_s"].numel() if "boft_s" in tensors else 0, channels)


def init(
    spec: LayerSpec, config: BOFTConfig, *, generator: torch.Generator, weight: Callable[[], Tensor]
) -> dict[str, Tensor]:
    """Return zero blocks, for which every rotation is the identity, and factors of 1."""
    name, other = ("boft_R", "boft_s") if config.side == "input" else ("oft_blocks", "rescale")
    factors, number, size = config.blocks(_rotated_channels(name, spec))
    if size == 1:
        raise AdapterError("blocks of one channel cannot be rotated")
    _refuse_unpaired(name, factors, number, size)
    deviation = 0.0 if config.init else 0.1
    tensors = {name: torch.randn(factors, number, size, size, generator=generator) * deviation}
    if config.rescale or config.side == "input":
        tensors[other] = 1 + torch.randn(spec.out_features, 1, generator=generator) * deviation
    return tensors


def stages(tensors: Tensors, spec: LayerSpec) -> tuple[Stage, ...]:
    """Return "output", or "input" ("patch" for a layer with a kernel) and "gain"."""
    if "boft_R" not in tensors:
        return ("output",)
    return ("patch" if spec.has_kernel else "input", "gain")


def prepare(tensors: Tensors, spec: LayerSpec, surroundings: Surroundings) -> Tensors:
    """Return `R - I` for all blocks of all factors, to be applied to row vectors v as `v R`, in float32 or wider."""
    values = {name: promoted(tensor) for name, tensor in tensors.items()}
    if "boft_R" in values:
        rotation = cayley((values["boft_R"].mT - values["boft_R"]) / 2)
        return {_ON_INPUT: rotation.flatten(0, 1), "boft_s": values["boft_s"]}
    blocks = _deinterleaved(values["oft_blocks"])
    # LyCORIS rotates column vectors, and here the blocks rotate row vectors, so the sign of Q is reversed.
    rotation = cayley(constrained(blocks.mT - blocks, surroundings.settings["constraint"], spec))
    rescale = values.get("rescale")
    if rescale is not None:
        last = rescaled(rotation[-1], _paired(rescale.view(-1), 0, len(rotation) - 1, rotation.shape[-1] // 2))
        rotation = torch.cat((rotation[:-1], last.unsqueeze(0)))
    return {_ON_OUTPUT: rotation.flatten(0, 1)}


def apply_map(
    tensors: Tensors,
    spec: LayerSpec,
    *,
    vectors: Tensor,
    axis: int,
    gate: Tensor,
    transposed: bool = False,
    onto: Tensor | None = None,
) -> Tensor:
    """Return `onto` plus the gated change that the factors, one after the other, make to `vectors` along an axis."""
    on_input = _ON_INPUT in tensors
    blocks = tensors[_ON_INPUT if on_input else _ON_OUTPUT]
    axis %= vectors.ndim
    factors = blocks.unflatten(0, (-1, vectors.shape[axis] // blocks.shape[-1]))
    if transposed:
        factors = factors.mT
    if len(factors) == 1:
        return apply_blocks(vectors, factors[0].mul(gate).to(vectors.dtype), axis, onto)
    order = list(range(len(factors)))
    if on_input != transposed:
        order.reverse()
    # The change is summed separately from the vectors, because added to them in half precision it would be lost.
    change = torch.zeros_like(vectors)
    half = blocks.shape[-1] // 2
    for index in order:
        pairs = _paired(vectors + change, axis, index, half)
        step = apply_blocks(pairs, factors[index].to(vectors.dtype), axis)
        change = change + _unpaired(step, axis, index, half)
    change = scaled(change, gate)
    return change if onto is None else onto + change


def gain(tensors: Tensors) -> Tensor:
    """Return `boft_s - 1`."""
    return tensors["boft_s"].view(-1) - 1


def rows(tensors: Tensors, spec: LayerSpec, rows: Sequence[range]) -> dict[str, Tensor] | None:
    """Return the tensors for the given rows; `None` if these cut a segment of a rotation of the outputs.

    The segments of the last factor are the largest and contain those of the other factors. A rotation of the inputs is
    the same for all rows.
    """
    if "boft_R" in tensors:
        return {**tensors, "boft_s": take_rows(tensors["boft_s"], rows)}
    blocks = tensors["oft_blocks"]
    size = blocks.shape[-1]
    segment = size * 2 ** (blocks.shape[0] - 1)
    if any(part.start % segment or part.stop % segment for part in rows):
        return None
    wanted = [range(part.start // size, part.stop // size) for part in rows]
    cut = {**tensors, "oft_blocks": take_rows(blocks.transpose(0, 1), wanted).transpose(0, 1)}
    if "rescale" in tensors:
        cut["rescale"] = take_rows(tensors["rescale"], rows)
    return cut


def _paired(vectors: Tensor, axis: int, index: int, half: int) -> Tensor:
    """Reorder half-blocks of `half` channels along an axis so that the pairs of factor `index` are adjacent."""
    segments = vectors.unflatten(axis, (-1, 2, 2**index, half))
    return segments.transpose(axis + 1, axis + 2).flatten(axis, axis + 3) if index else vectors


def _unpaired(pairs: Tensor, axis: int, index: int, half: int) -> Tensor:
    """Undo `_paired`."""
    segments = pairs.unflatten(axis, (-1, 2**index, 2, half))
    return segments.transpose(axis + 1, axis + 2).flatten(axis, axis + 3) if index else pairs


def _deinterleaved(blocks: Tensor) -> Tensor:
    """Reorder the rows and columns of LyCORIS' blocks so that the half-blocks of a pair follow each other."""
    for axis in (-1, -2):
        pairs = blocks.unflatten(axis, (-1, 2))
        blocks = pairs.transpose(axis, axis - 1).flatten(axis - 1, axis)
    return blocks


def _rotated_channels(name: str, spec: LayerSpec) -> int:
    if spec.groups > 1:
        raise AdapterError(f"the layer has {spec.groups} groups; a rotation would mix them")
    if name == "boft_R" and spec.kind == "embedding":
        raise AdapterError("an embedding has no input to rotate; use side='output' or exclude it")
    return spec.fan_in if name == "boft_R" else spec.out_features


def _refuse_unpaired(name: str, factors: int, number: int, size: int) -> None:
    """Raise `AdapterError` for blocks of odd size, which have no halves, and for too few blocks to form all pairs.

    Factor i needs a multiple of 2^i blocks.
    """
    if (factors > 1 or name == "oft_blocks") and size % 2:
        raise AdapterError(f"blocks of {size} channels have no halves; expected an even block size")
    # Limit the exponent: a file may claim any number of factors, and no layer has 2^64 blocks.
    least = 2 ** min(factors - 1, 64)
    if number % least:
        raise AdapterError(f"{factors} butterfly factors of {number} blocks, expected a multiple of {least} blocks")


BOFT = AdapterType(
    name="boft",
    tensors=("boft_R", "boft_s", "oft_blocks", "rescale"),
    identified_by=frozenset({"boft_R", "boft_s", "oft_blocks"}),
    claims=lambda tensors: "oft_blocks" not in tensors or tensors["oft_blocks"].ndim == 4,
    config=BOFTConfig,
    fit=fit,
    init=init,
    geometry=geometry,
    stages=stages,
    prepare=prepare,
    rows=rows,
    apply_map=apply_map,
    gain=gain,
    settings={"constraint": 0.0},
    alpha_is="constraint",
    unlimited=unlimited,
    orthogonal=True,
    blocks={_ON_INPUT: 0, _ON_OUTPUT: 0},
)
