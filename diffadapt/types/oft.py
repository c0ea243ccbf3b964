"""OFT: rotations of blocks of a layer's inputs or outputs.

Qiu et al., "Controlling Text-to-Image Diffusion by Orthogonal Finetuning", arXiv 2306.07280. The input side and the
Neumann series are as in "OFTv2", arXiv 2506.19847. Two families of files share the name; their tensors differ:

| tensor | shape | effect | as in |
|---|---|---|---|
| `oft_R` | (blocks, b (b - 1) / 2), or (1, ...) if shared | rotates inputs or patches | PEFT 0.21, OneTrainer |
| `oft_blocks` | (blocks, b, b) | rotates outputs | LyCORIS f49d30d, sd-scripts 48d368f |
| `oft_diag` | (blocks, b, b), the rotations themselves | rotates outputs | LyCORIS before 2.0 |
| `rescale` | (out), with `oft_blocks` | one factor per output | LyCORIS |
| `dora_scale`, `initial_norm` | (out, 1), with `oft_R` | `dora_scale / initial_norm` per output | forks of OneTrainer |

Every block has a skew-symmetric matrix Q. `oft_R` contains its upper triangle; for a block B of `oft_blocks` it is
`B - B'`. The rotation maps a row vector v to `v R`, with R equal to

    (I - Q) (I + Q)^-1                            oft_R, exact
    I + 2 Q + 2 Q^2 + ... + 2 Q^(n-2) + Q^(n-1)   oft_R, n terms of the Neumann series, in the opposite direction
    (I + Q) (I - Q)^-1                            oft_blocks

The tensors are the same for the first two; the config of the file tells which one applies. PEFT rotates the inputs of
every layer, so its weight is `W R'`. OneTrainer and ComfyUI-OFTv2 do so for linear layers, but multiply the flattened
weight of a 2-d convolution from the other side: `W R`. Adapter layers have PEFT's meaning; since `R(-Q) = R(Q)'`,
`of_other_program` translates it exactly. OneTrainer marks a scaled OFT, in which `oft_R` is divided by `2 sqrt(b - 1)`,
with a tensor `scaled_oft` (OneTrainer, `modules/module/oft_utils.py`). Since a rotation preserves the norm of a row, a
DoRA on top of it needs only the norm of the base weight, which is in the file.

An alpha next to `oft_blocks` limits the norm of all blocks of a layer together, as a fraction of the number of outputs.
In LyCORIS, 0 means no limit. sd-scripts always applies the limit, as `Q (min(|Q|, c) + e) / (|Q| + e)`, where e is its
`constraint_eps`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from diffadapt.errors import AdapterError
from diffadapt.types.adapter_type import AdapterType, Stage, Surroundings, Tensors
from diffadapt.types.config import AdapterConfig, refuse_unless_whole
from diffadapt.types.layer_spec import LayerSpec, plain_spec
from diffadapt.types.tensor_ops import apply_blocks, promoted, recomputed, shape_of, take_rows

_ROTATION, _GAIN = "oft_rotation", "oft_gain"
_NORMS = frozenset({"dora_scale", "initial_norm"})
_OLD = "oft_r"


@dataclass(frozen=True, kw_only=True)
class RotationConfig(AdapterConfig):
    """Settings that OFT and BOFT have in common. Dropout replaces whole blocks by the identity.

    Attributes:
        block_size: the number of channels that a block rotates; it has to divide the number of channels. Set either
            this or `num_blocks`.
        num_blocks: the number of blocks per layer; it has to divide the number of channels.
        side: "input" to rotate the inputs of a layer, as in PEFT; "output" to rotate its outputs, as in LyCORIS.
        constraint: the largest norm of all blocks of a layer together, as a fraction of the number of outputs; 0 for no
            limit. For the output side only.
        rescale: whether to train a factor per output, too. For the output side only (on the input side, BOFT always has
            these factors and OFT never).
    """

    block_size: int = 0
    num_blocks: int = 0
    side: Literal["input", "output"] = "input"
    constraint: float = 0.0
    rescale: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("block_size", "num_blocks"):
            refuse_unless_whole(name, getattr(self, name), least=0)
        if (self.block_size > 0) == (self.num_blocks > 0):
            raise AdapterError(
                f"block_size is {self.block_size} and num_blocks is {self.num_blocks}, expected exactly one of them"
            )
        if self.side not in ("input", "output"):
            raise AdapterError(f"side is {self.side!r}, expected 'input' or 'output'")
        if self.constraint < 0:
            raise AdapterError(f"constraint is {self.constraint}, expected at least 0")
        if self.side == "input":
            self._refuse("constraint", "rescale")

    def _refuse(self, *names: str) -> None:
        """Raise `AdapterError` if one of the named settings is set, because it has no effect on the chosen side."""
        for name in names:
            if getattr(self, name):
                raise AdapterError(f"{name} has no effect with side={self.side!r}")

    def split(self, channels: int) -> tuple[int, int]:
        """Return the number and the size of the blocks for a number of channels.

        Raises:
            AdapterError: the channels cannot be divided into such blocks.
        """
        given = self.block_size or self.num_blocks
        if channels % given:
            name = "block_size" if self.block_size else "num_blocks"
            raise AdapterError(f"{name} is {given}, which does not divide the {channels} channels to rotate")
        return (channels // given, given) if self.block_size else (given, channels // given)


@dataclass(frozen=True, kw_only=True)
class OFTConfig(RotationConfig):
    """Settings of a new OFT (Qiu et al., arXiv 2306.07280).

    Attributes:
        neumann_terms: the number of terms of the Neumann series; 0 for the exact inverse. Defaults to 5. For the input
            side only.
        block_share: whether all blocks of a layer share one rotation. For the input side only.
        coft_eps: the radius of constrained OFT (PEFT's `coft` and `eps`); 0 for no limit. For the input side only.
        scaled: whether to divide the parameters by `2 sqrt(block_size - 1)`, as in OneTrainer's scaled OFT. For the
            input side only.
    """

    neumann_terms: int | None = None
    block_share: bool = False
    coft_eps: float = 0.0
    scaled: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.side == "output":
            self._refuse("neumann_terms", "block_share", "coft_eps", "scaled")
        if self.coft_eps < 0:
            raise AdapterError(f"coft_eps is {self.coft_eps}, expected at least 0")
        if self.neumann_terms is not None and (self.neumann_terms < 0 or self.neumann_terms == 1):
            raise AdapterError(f"neumann_terms is {self.neumann_terms}, expected 0 or at least 2")

    @property
    def settings(self) -> dict[str, float]:
        """The settings that apply to the chosen side; see `AdapterType.settings`."""
        if self.side == "output":
            return {"constraint": self.constraint}
        terms = 5 if self.neumann_terms is None else self.neumann_terms
        return {"neumann_terms": terms, "coft_eps": self.coft_eps, "scaled_oft": float(self.scaled)}


def fit(tensors: Tensors, spec: LayerSpec) -> dict[str, Tensor]:
    """Check that the blocks in a file cover the channels, and return the tensors in the shapes of the table above."""
    if _OLD in tensors:
        raise AdapterError(
            f"{_OLD} is the layout of PEFT before 0.14, which has another formula; train the adapter again"
        )
    _refuse_groups(spec)
    names = [name for name in ("oft_R", "oft_blocks", "oft_diag") if name in tensors]
    if len(names) != 1:
        raise AdapterError(f"one of oft_R, oft_blocks and oft_diag expected, {', '.join(sorted(tensors))} found")
    blocks, channels = tensors[names[0]], _rotated_channels(names[0], spec)
    shape = shape_of(blocks)
    if names[0] == "oft_R":
        size = block_size(blocks)
        fits = len(shape) == 2 and 0 not in shape and size * (size - 1) // 2 == shape[1]
        fits = fits and (shape[0] * size == channels or (shape[0] == 1 and channels % size == 0))
        expected = "(blocks, b (b - 1) / 2)"
    else:
        fits = len(shape) == 3 and shape[1] == shape[2] and shape[0] * shape[1] == channels
        expected = "(blocks, b, b)"
    if not fits:
        raise AdapterError(f"{names[0]} has shape {shape}, expected {expected} for {channels} channels")
    fitted = {names[0]: blocks}
    if "rescale" in tensors:
        if names[0] == "oft_R" or tensors["rescale"].numel() != spec.out_features:
            raise AdapterError(f"rescale has shape {shape_of(tensors['rescale'])}, expected ({spec.out_features},)")
        fitted["rescale"] = tensors["rescale"].reshape(spec.out_features)
    for name in _NORMS & tensors.keys():
        if names[0] != "oft_R" or "dora_scale" not in tensors or tensors[name].numel() != spec.out_features:
            raise AdapterError(
                f"{name} has shape {shape_of(tensors[name])}, expected ({spec.out_features}, 1), with oft_R and "
                "dora_scale"
            )
        fitted[name] = tensors[name].reshape(spec.out_features, 1)
    return fitted


def geometry(tensors: Tensors) -> LayerSpec:
    """Return the spec of a linear layer with as many channels as the blocks cover."""
    if "oft_R" in tensors:
        triangle, magnitude = tensors["oft_R"], tensors.get("dora_scale")
        return plain_spec(0 if magnitude is None else magnitude.numel(), triangle.shape[0] * block_size(triangle))
    blocks = tensors.get("oft_blocks", tensors.get("oft_diag"))
    return plain_spec(0 if blocks is None else blocks.shape[0] * blocks.shape[-1], 0)


def init(
    spec: LayerSpec, config: OFTConfig, *, generator: torch.Generator, weight: Callable[[], Tensor]
) -> dict[str, Tensor]:
    """Return zero blocks, for which every rotation is the identity, and factors of 1."""
    _refuse_groups(spec)
    deviation = 0.0 if config.init else 0.1
    name = "oft_R" if config.side == "input" else "oft_blocks"
    number, size = config.split(_rotated_channels(name, spec))
    if size == 1:
        raise AdapterError("blocks of one channel cannot be rotated")
    if name == "oft_R":
        shape = 1 if config.block_share else number, size * (size - 1) // 2
        return {name: torch.randn(shape, generator=generator) * deviation}
    tensors = {name: torch.randn(number, size, size, generator=generator) * deviation}
    if config.rescale:
        tensors["rescale"] = 1 + torch.randn(spec.out_features, generator=generator) * deviation
    return tensors


def stages(tensors: Tensors, spec: LayerSpec) -> tuple[Stage, ...]:
    """Return "output", or "input" ("patch" for a layer with a kernel), and "gain" with a DoRA."""
    if "oft_R" not in tensors or spec.kind == "embedding":
        return ("output",)
    side: Stage = "patch" if spec.has_kernel else "input"
    return (side, "gain") if "dora_scale" in tensors else (side,)


def prepare(tensors: Tensors, spec: LayerSpec, surroundings: Surroundings) -> Tensors:
    """Return `R - I` for every block, with `rescale` folded in, and the gain of a DoRA, in float32 or wider."""
    settings = surroundings.settings
    if "oft_diag" in tensors:
        rotation = promoted(tensors["oft_diag"])
        return {_ROTATION: rotation - torch.eye(rotation.shape[-1]).to(rotation)}
    if "oft_R" in tensors:
        rotation = recomputed(lambda triangle: _rotation(triangle, settings), tensors["oft_R"])
        size = rotation.shape[-1]
        prepared = {_ROTATION: rotation.expand(_rotated_channels("oft_R", spec) // size, size, size)}
        if "dora_scale" in tensors:
            norm = tensors.get("initial_norm")
            norm = surroundings.weight().flatten(1).norm(dim=1, keepdim=True) if norm is None else norm
            prepared[_GAIN] = (promoted(tensors["dora_scale"]) / promoted(norm).clamp_min(1e-12)).view(-1) - 1
        return prepared
    blocks = promoted(tensors["oft_blocks"])
    skew = blocks - blocks.transpose(-1, -2)
    limited = constrained(skew, settings["constraint"], spec, settings["constraint_eps"])
    return {_ROTATION: rescaled(cayley(limited), tensors.get("rescale"))}


def _rotation(triangle: Tensor, settings: Mapping[str, float]) -> Tensor:
    """Return `R - I` for every block of an `oft_R`."""
    skew = skew_symmetric(promoted(triangle))
    if settings["scaled_oft"]:
        skew = skew / scaled_oft_divisor(skew.shape[-1])
    if settings["coft_eps"]:
        skew = _within(skew, settings["coft_eps"] / math.sqrt(skew.shape[0]), (1, 2))
    terms = int(settings["neumann_terms"])
    return neumann(skew, terms) if terms else cayley(-skew)


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
    """Return `onto` plus the gated change that the rotations make to `vectors` along an axis."""
    blocks = tensors[_ROTATION].mT if transposed else tensors[_ROTATION]
    return apply_blocks(vectors, blocks.mul(gate).to(vectors.dtype), axis, onto)


def gain(tensors: Tensors) -> Tensor:
    """Return `dora_scale / initial_norm - 1`."""
    return tensors[_GAIN]


def rows(tensors: Tensors, spec: LayerSpec, rows: Sequence[range]) -> dict[str, Tensor] | None:
    """Return the tensors for the given rows; `None` if these cut a block of a rotation of the outputs.

    A rotation of the inputs is the same for all rows.
    """
    if stages(tensors, spec) != ("output",):
        return {name: take_rows(tensor, rows) if name in _NORMS else tensor for name, tensor in tensors.items()}
    name = next(name for name in ("oft_R", "oft_blocks", "oft_diag") if name in tensors)
    blocks = tensors[name]
    size = block_size(blocks) if name == "oft_R" else blocks.shape[-1]
    if any(part.start % size or part.stop % size for part in rows):
        return None
    cut = dict(tensors)
    if blocks.shape[0] * size == spec.out_features:
        cut[name] = take_rows(blocks, [range(part.start // size, part.stop // size) for part in rows])
    if "rescale" in tensors:
        cut["rescale"] = take_rows(tensors["rescale"], rows)
    return cut


def unlimited(tensors: Tensors, spec: LayerSpec, settings: Mapping[str, float]) -> tuple[Tensors, Mapping[str, float]]:
    """Return blocks that are within the constraint, in float32 or wider, and settings without a constraint."""
    if "oft_blocks" not in tensors or not settings["constraint"]:
        return tensors, settings
    blocks = promoted(tensors["oft_blocks"])
    skew = blocks - blocks.mT
    norm = torch.linalg.vector_norm(skew)
    limited = constrained(skew, settings["constraint"], spec, settings.get("constraint_eps", 0.0))
    factor = torch.linalg.vector_norm(limited) / norm.clamp_min(1e-30)
    free = {name: 0.0 for name in ("constraint", "constraint_eps") if name in settings}
    return {**tensors, "oft_blocks": blocks * torch.where(norm > 0, factor, 1.0)}, {**settings, **free}


def block_size(triangle: Tensor) -> int:
    """Return b for an `oft_R` of shape (blocks, b (b - 1) / 2)."""
    return (1 + math.isqrt(1 + 8 * triangle.shape[-1])) // 2 if triangle.ndim else 0


def of_other_program(tensors: Tensors, kernel: Sequence[int]) -> dict[str, Tensor]:
    """Return tensors of PEFT as OneTrainer and ComfyUI-OFTv2 have them, or the other way round.

    Args:
        tensors: the tensors of an OFT.
        kernel: spatial kernel size of the layer if it is a convolution.
    """
    if len(kernel) != 2 or "oft_R" not in tensors:
        return dict(tensors)
    return {**tensors, "oft_R": -tensors["oft_R"]}


def scaled_oft_divisor(size: int) -> float:
    """Return the number by which OneTrainer's scaled OFT divides the parameters of blocks of the given size."""
    return 2 * math.sqrt(size - 1)


def cayley(skew: Tensor) -> Tensor:
    """Return `(I + Q) (I - Q)^-1 - I = 2 Q (I - Q)^-1` for skew-symmetric blocks Q (the Cayley transform)."""
    identity = torch.eye(skew.shape[-1]).to(skew)
    return torch.linalg.solve(identity - skew, 2 * skew, left=False)


def constrained(skew: Tensor, constraint: float, spec: LayerSpec, eps: float = 0.0) -> Tensor:
    """Scale all blocks of a layer so that their joint norm is at most `constraint * out + eps`, unless that is 0."""
    radius = constraint * spec.out_features + eps
    return _within(skew, radius, None) if radius > 0 else skew


def rescaled(rotation: Tensor, rescale: Tensor | None) -> Tensor:
    """Return `R diag(s) - I`, computed from `R - I`. The factor s of an output applies after the rotation."""
    if rescale is None:
        return rotation
    factors = rescale.to(rotation.dtype).view(rotation.shape[0], 1, rotation.shape[-1])
    return rotation * factors + torch.diag_embed(factors.squeeze(1) - 1)


def neumann(skew: Tensor, terms: int) -> Tensor:
    """Return the Neumann series without I. As in PEFT, the last power has no factor 2, and 3 terms are as good as 4."""
    if terms == 2:
        return 2 * skew
    # By Horner's scheme in Q^2, which takes half as many products as one for each power.
    degree, square = max(terms - 1, 3), skew @ skew
    total = torch.add(skew @ square, square, alpha=2) if degree % 2 else square
    for _ in range(degree // 2 - 1):
        total = torch.add((total + 2 * skew) @ square, square, alpha=2)
    return torch.add(total, skew, alpha=2)


def _within(skew: Tensor, radius: float, axes: tuple[int, ...] | None) -> Tensor:
    """Scale blocks down to a Frobenius norm of at most `radius`, each (`axes` given) or all together."""
    norm = torch.linalg.vector_norm(skew, dim=axes, keepdim=True) + 1e-8
    return torch.where(norm > radius, skew * (radius / norm), skew)


def skew_symmetric(triangle: Tensor) -> Tensor:
    """Return the skew-symmetric blocks (blocks, b, b) with the given upper triangles (blocks, b (b - 1) / 2)."""
    size = block_size(triangle)
    rows, columns = torch.triu_indices(size, size, 1, device=triangle.device)
    upper = triangle.new_zeros(triangle.shape[0], size, size)
    upper[:, rows, columns] = triangle
    return upper - upper.transpose(1, 2)


def _rotated_channels(name: str, spec: LayerSpec) -> int:
    return spec.fan_in if name == "oft_R" and spec.kind != "embedding" else spec.out_features


def _refuse_groups(spec: LayerSpec) -> None:
    if spec.groups > 1:
        raise AdapterError(f"the layer has {spec.groups} groups; a rotation would mix them")


OFT = AdapterType(
    name="oft",
    tensors=("oft_R", "oft_blocks", "oft_diag", "rescale", "dora_scale", "initial_norm", _OLD),
    identified_by=frozenset({"oft_R", "oft_blocks", "oft_diag", _OLD}),
    claims=lambda tensors: "oft_blocks" not in tensors or tensors["oft_blocks"].ndim != 4,
    config=OFTConfig,
    fit=fit,
    init=init,
    geometry=geometry,
    stages=stages,
    prepare=prepare,
    reads_weight=lambda tensors: "dora_scale" in tensors and "initial_norm" not in tensors,
    rows=rows,
    apply_map=apply_map,
    gain=gain,
    settings={"neumann_terms": 5, "coft_eps": 0.0, "scaled_oft": 0.0, "constraint": 0.0, "constraint_eps": 0.0},
    marks=frozenset({"scaled_oft"}),
    alpha_is="constraint",
    unlimited=unlimited,
    orthogonal=True,
    blocks={_ROTATION: 0},
)
