"""BOFT: rotate a layer's inputs or outputs by a few sparse factors, joined like the butterflies of a fast Fourier
transform.

Liu et al., "Parameter-Efficient Orthogonal Finetuning via Butterfly Factorization", arXiv 2311.06243. With one factor
it is OFT. Tensor layouts: huggingface/peft 0.21.2 `tuners/boft/layer.py`, KohakuBlueleaf/LyCORIS f49d30d
`lycoris/functional/boft.py`.

| tensor | shape | acts on | as in |
|---|---|---|---|
| `boft_R` | (factors, blocks, b, b) | inputs, or patches | PEFT |
| `boft_s` | (out, 1), or (1, out) of a convolution | outputs: a factor for each, not on the bias | PEFT |
| `oft_blocks` | (factors, blocks, b, b) | outputs | LyCORIS |
| `rescale` | (out), with `oft_blocks` | outputs: a factor for each, after the rotation | LyCORIS |

With R = (I - Q) (I + Q)^-1 for every block, Q = (A - A') / 2 of `boft_R`, or R = (I + Q) (I - Q)^-1, Q = A - A' of
`oft_blocks`, factor i (from 0) splits the channels into stretches of 2^i b, pairs chunk c of b / 2 channels in the
first half of a stretch with chunk c in its second half, and turns every pair by a block of its own.

    W' = diag(s) W (B_(m-1) ... B_0)'        boft_R
    W' = diag(rescale) B_(m-1) ... B_0 W     oft_blocks

LyCORIS interleaves the two chunks of a pair, PEFT has them one after the other; `prepare` reorders the former. On the
input side a strength m interpolates rotation and `boft_s` one by one, on the output side W' as a whole.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffadapt.errors import AdapterError
from diffadapt.types.adapter_type import AdapterType, Stage, Surroundings, Tensors
from diffadapt.types.layer_spec import LayerSpec, layer_of
from diffadapt.types.oft import RotationConfig, cayley, constrained, rescaled
from diffadapt.types.tensor_ops import blockwise, pick, scaled, shape_of

_ON_INPUT, _ON_OUTPUT = "boft_on_input", "boft_on_output"


@dataclass(frozen=True, kw_only=True)
class BOFTConfig(RotationConfig):
    """BOFT for new adapters (Liu et al., arXiv 2311.06243).

    Attributes:
        butterfly_factors: m; `2^(m-1)` has to divide the number of blocks. Default 1 on the input side as in PEFT, as
            many as there can be on the output side as in LyCORIS.
    """

    butterfly_factors: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.butterfly_factors is not None and self.butterfly_factors < 1:
            raise AdapterError(f"butterfly_factors is {self.butterfly_factors}, expected at least 1")

    @property
    def settings(self) -> dict[str, float]:
        """Of the chosen side."""
        return {"constraint": self.constraint} if self.side == "output" else {}

    def blocks(self, channels: int) -> tuple[int, int, int]:
        """Number of factors, and number and size of their blocks, for so many channels."""
        number, size = self.split(channels)
        most = 1
        while number % 2**most == 0:
            most += 1
        if self.butterfly_factors is not None:
            return self.butterfly_factors, number, size
        return 1 if self.side == "input" else most, number, size


def fit(tensors: Tensors, spec: LayerSpec) -> dict[str, Tensor]:
    """Tensors of a file, checked: the blocks cover the channels, and every factor has its pairs."""
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
    """A linear layer with as many channels as the blocks cover."""
    blocks = tensors.get("boft_R", tensors.get("oft_blocks"))
    channels = 0 if blocks is None or blocks.ndim != 4 else blocks.shape[1] * blocks.shape[2]
    if "oft_blocks" in tensors:
        return layer_of(channels, 0)
    return layer_of(tensors["boft_s"].numel() if "boft_s" in tensors else 0, channels)


def init(
    spec: LayerSpec, config: BOFTConfig, *, generator: torch.Generator, weight: Callable[[], Tensor]
) -> dict[str, Tensor]:
    """Zero blocks, which are no rotation, and factors of one."""
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
    """On the output, or on the input of the layer (a kernel makes that the patch) and its output's scale."""
    if "boft_R" not in tensors:
        return ("output",)
    return ("patch" if any(size > 1 for size in spec.kernel) else "input", "gain")


def prepare(tensors: Tensors, spec: LayerSpec, surroundings: Surroundings) -> Tensors:
    """`R - I` of all blocks of all factors in float32 or wider, so that a row v of the channels becomes `v R`."""
    wide = {name: tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for name, tensor in tensors.items()}
    if "boft_R" in wide:
        rotation = cayley((wide["boft_R"].mT - wide["boft_R"]) / 2)
        return {_ON_INPUT: rotation.flatten(0, 1), "boft_s": wide["boft_s"]}
    blocks = _pair_by_pair(wide["oft_blocks"])
    # What turns a column there turns a row here, so the skew-symmetric matrix changes its sign.
    rotation = cayley(constrained(blocks.mT - blocks, surroundings.settings["constraint"], spec))
    rescale = wide.get("rescale")
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
    """The factors, one after the other, on their pairs of chunks along the axis."""
    on_input = _ON_INPUT in tensors
    blocks = tensors[_ON_INPUT if on_input else _ON_OUTPUT]
    axis %= vectors.ndim
    factors = blocks.unflatten(0, (-1, vectors.shape[axis] // blocks.shape[-1]))
    if transposed:
        factors = factors.mT
    if len(factors) == 1:
        return blockwise(vectors, factors[0].mul(gate).to(vectors.dtype), axis, onto)
    order = list(range(len(factors)))
    if on_input != transposed:
        order.reverse()
    # The changes are added up apart from the vectors, in which half precision would lose them.
    change = torch.zeros_like(vectors)
    half = blocks.shape[-1] // 2
    for level in order:
        pairs = _paired(vectors + change, axis, level, half)
        step = blockwise(pairs, factors[level].to(vectors.dtype), axis)
        change = change + _unpaired(step, axis, level, half)
    change = scaled(change, gate)
    return change if onto is None else onto + change


def gain(tensors: Tensors) -> Tensor:
    """`boft_s - 1`."""
    return tensors["boft_s"].view(-1) - 1


def rows(tensors: Tensors, spec: LayerSpec, rows: Sequence[range]) -> dict[str, Tensor] | None:
    """Blocks of whole stretches of the last factor, which pairs outputs farthest apart; `None` where some would be cut.

    All rows share a rotation of the inputs.
    """
    if "boft_R" in tensors:
        return {**tensors, "boft_s": pick(tensors["boft_s"], rows)}
    blocks = tensors["oft_blocks"]
    size = blocks.shape[-1]
    stretch = size * 2 ** (blocks.shape[0] - 1)
    if any(part.start % stretch or part.stop % stretch for part in rows):
        return None
    wanted = [range(part.start // size, part.stop // size) for part in rows]
    cut = {**tensors, "oft_blocks": pick(blocks.transpose(0, 1), wanted).transpose(0, 1)}
    if "rescale" in tensors:
        cut["rescale"] = pick(tensors["rescale"], rows)
    return cut


def _paired(vectors: Tensor, axis: int, level: int, half: int) -> Tensor:
    """Chunks of `half` numbers along the axis in the order in which factor `level` takes them."""
    chunks = vectors.unflatten(axis, (-1, 2, 2**level, half))
    return chunks.transpose(axis + 1, axis + 2).flatten(axis, axis + 3) if level else vectors


def _unpaired(pairs: Tensor, axis: int, level: int, half: int) -> Tensor:
    """The inverse of `_paired`."""
    chunks = pairs.unflatten(axis, (-1, 2**level, 2, half))
    return chunks.transpose(axis + 1, axis + 2).flatten(axis, axis + 3) if level else pairs


def _pair_by_pair(blocks: Tensor) -> Tensor:
    """Rows and columns of LyCORIS' blocks with the chunks of a pair one after the other."""
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
    """Chunks of half a block need blocks of even size, and factor i needs a multiple of 2^i blocks."""
    if (factors > 1 or name == "oft_blocks") and size % 2:
        raise AdapterError(f"blocks of {size} channels have no halves; expected an even block size")
    # A file may claim any number of factors, and nothing has 2^64 blocks.
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
    orthogonal=True,
    blocks={_ON_INPUT: 0, _ON_OUTPUT: 0},
)
