"""TinyLoRA: a few numbers, which layers may share, move the principal subspace of each weight.

"Learning to Reason in 13 Parameters", arXiv 2602.04118, as in PEFT 0.21.2 `tuners/tinylora/layer.py`:

    W' = W + B R A        R = sum over i of v[i] P[i]

A and B are the principal singular vectors of the base weight, each times the root of its singular value. P is random
and follows from a seed and the number of the layer in the model. Embeddings are decomposed as they are stored, so that
R is transposed there. There is no alpha.

| tensor | linear layer and convolution | embedding |
|---|---|---|
| `tinylora_v`, shared by a group of layers | (length) | (length) |
| `tinylora_A`, not trained | (rank, in / groups x kernel) | (rank, dimension) |
| `tinylora_B`, not trained | (out, rank) | (embeddings, rank) |
| `tinylora_P`, not trained | (length, rank, rank) | (length, rank, rank) |

A PEFT folder has `tinylora_v` once for each group, as `base_model.tinylora_v.0` and so on.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffadapt.errors import AdapterError
from diffadapt.types.adapter_type import AdapterType, Tensors, Unfinished
from diffadapt.types.config import AdapterConfig, refuse_unless_whole
from diffadapt.types.decomposition import principal
from diffadapt.types.formulas import checked, flat, rank_of, unified_in
from diffadapt.types.layer_spec import LayerSpec
from diffadapt.types.tensor_ops import add, along, scaled, shape_of

_V, _A, _B, _P = "tinylora_v", "tinylora_A", "tinylora_B", "tinylora_P"
_BOUND = 0.02


@dataclass(frozen=True, kw_only=True)
class TinyLoRAConfig(AdapterConfig):
    """Settings of a new TinyLoRA (arXiv 2602.04118).

    Attributes:
        rank: the number of singular vectors; smaller layers have as many as they can.
        length: the number of trained numbers in each group of layers (`u` in PEFT).
        tying: how many layers share their numbers, from 0 (none) to 1 (all; `weight_tying` in PEFT).
        seed: the seed of the random matrices (`projection_seed` in PEFT).
        init: with `True`, the numbers are zeros. With "uniform" they are random within 0.02, as with that option of
            PEFT, which has an effect from the start, as has the start of `False`.
    """

    rank: int = 2
    length: int = 64
    tying: float = 0.0
    seed: int = 42

    def _inits(self) -> tuple[bool | str, ...]:
        return (True, "uniform", False)

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_unless_whole("rank", self.rank)
        refuse_unless_whole("length", self.length)
        refuse_unless_whole("seed", self.seed, least=0)
        if not 0 <= self.tying <= 1:
            raise AdapterError(f"tying is {self.tying}, expected 0 to 1")

    @property
    def settings(self) -> dict[str, float]:
        """The rank, the share of layers that have their numbers in common, and the seed."""
        return {"rank": float(self.rank), "tying": float(self.tying), "seed": float(self.seed)}


def groups(paths: Sequence[str], settings: Mapping[str, float]) -> list[str]:
    """Return the name of the group that each of the layers, given in the order of the model, belongs to."""
    number = max(1, round(len(paths) * (1.0 - settings["tying"])))
    size = max(1, len(paths) // number)
    return [str(min(index // size, number - 1)) for index in range(len(paths))]


def fit(tensors: Tensors, spec: LayerSpec) -> dict[str, Tensor]:
    """Check the tensors of a file and return them in the shapes of the table above."""
    length, rank = rank_of(tensors, _V, 0), rank_of(tensors, _A, 0) or rank_of(tensors, _P, 1)
    rows, columns = _sides(spec)
    shapes = {_V: (length,), _A: (rank, columns), _B: (rows, rank), _P: (length, rank, rank)}
    return checked(tensors, shapes, optional=(_A, _B, _P))


def init(
    spec: LayerSpec, config: TinyLoRAConfig, *, generator: torch.Generator, weight: Callable[[], Tensor]
) -> dict[str, Tensor]:
    """Return zeros. The layers of a group all get those of the first one; see `complete`."""
    if config.init is True:
        return {_V: torch.zeros(config.length)}
    bound = _BOUND if config.init == "uniform" else 1.0
    return {_V: torch.empty(config.length).uniform_(-bound, bound, generator=generator)}


def complete(layers: Mapping[str, Unfinished]) -> Mapping[str, Tensors]:
    """Return the tensors with the singular vectors of the base weights and the random matrices."""
    members = dict(zip(layers, groups(list(layers), next(iter(layers.values())).settings), strict=True))
    drawn: dict[str, Tensor] = {}
    found: dict[str, Unfinished] = {}
    for number, (path, layer) in enumerate(layers.items()):
        tensors = dict(layer.tensors)
        if tensors.keys() == {_V}:
            # A new adapter: the layers of a group begin with the same numbers.
            tensors[_V] = drawn.setdefault(members[path], tensors[_V])
        if _A not in tensors or _B not in tensors:
            matrix = weight_as_stored(layer)
            rank = min(tensors[_P].shape[1] if _P in tensors else int(layer.settings["rank"]), *matrix.shape)
            left, values, right = principal(matrix, rank)
            tensors |= {_A: values.sqrt().unsqueeze(1) * right, _B: left * values.sqrt()}
        if _P not in tensors:
            seed = int(layer.settings["seed"]) + number
            tensors[_P] = _random_matrices(tensors[_V], tensors[_A].shape[0], seed)
        found[path] = layer._replace(tensors=tensors)
    return unified_in(found, (_V,), members)


def weight_as_stored(layer: Unfinished) -> Tensor:
    """Return the base weight as a matrix, embeddings in the orientation that PEFT decomposes."""
    matrix = layer.weight().flatten(1).float()
    return matrix.t() if layer.spec.kind == "embedding" else matrix


def as_low_rank(tensors: Tensors, spec: LayerSpec) -> tuple[Tensor, Tensor]:
    """Return `down` and `up`."""
    down, middle, up = _factors(tensors, spec)
    return flat(down, spec), up @ middle


def delta_weight(tensors: Tensors, spec: LayerSpec) -> Tensor:
    """Return the change in the canonical weight shape."""
    return spec.product(*as_low_rank(tensors, spec))


def delta_output(
    tensors: Tensors, spec: LayerSpec, *, input: Tensor, gate: Tensor, onto: Tensor | None = None
) -> Tensor:
    """Return `onto` plus the gated change."""
    if not torch.is_grad_enabled() or spec.groups > 1:
        return spec.low_rank(input, *as_low_rank(tensors, spec), gate, onto)
    # The matrix acts on activations here, so that no gradients of the size of the factors are computed.
    down, middle, up = _factors(tensors, spec)
    hidden = along(spec.op(input, flat(down, spec)), middle, spec.channel_axis)
    product = spec.expand(scaled(hidden, gate), up)
    return product if onto is None else add(product, onto)


def _factors(tensors: Tensors, spec: LayerSpec) -> tuple[Tensor, Tensor, Tensor]:
    """Return the rows over the inputs, the matrix between them and the outputs, and the columns over the outputs."""
    projections = tensors[_P]
    middle = (tensors[_V] @ projections.flatten(1)).view(shape_of(projections)[1:])
    if spec.kind == "embedding":
        return tensors[_B].t(), middle.t(), tensors[_A].t()
    return tensors[_A], middle, tensors[_B]


def _random_matrices(like: Tensor, rank: int, seed: int) -> Tensor:
    """Return the matrices that PEFT draws from a seed, one for each of the numbers `like`."""
    shape = (like.shape[0], rank, rank)
    if like.is_meta:
        return torch.empty(shape, device="meta")
    drawn = torch.normal(mean=0.0, std=1 / rank**0.5, size=shape, generator=torch.Generator().manual_seed(seed))
    return drawn.to(like.device)


def _sides(spec: LayerSpec) -> tuple[int, int]:
    """Return the rows and columns of the matrix that is decomposed."""
    if spec.kind == "embedding":
        return spec.fan_in, spec.out_features
    return spec.out_features, spec.fan_in


TINYLORA = AdapterType(
    name="tinylora",
    tensors=(_V, _A, _B, _P),
    identified_by=frozenset({_V}),
    config=TinyLoRAConfig,
    settings={"rank": 2.0, "tying": 0.0, "seed": 42.0},
    fixed=frozenset({_A, _B, _P}),
    shared=frozenset({_V}),
    fit=fit,
    init=init,
    complete=complete,
    as_low_rank=as_low_rank,
    delta_weight=delta_weight,
    delta_output=delta_output,
)
