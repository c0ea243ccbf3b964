"""AdaMSS: the outputs of a layer are clustered, and each cluster gets a low-rank change of its own.

"AdaMSS: Adaptive Multi-Subspace Approach for Parameter-Efficient Fine-Tuning", NeurIPS 2025, as in PEFT 0.21.2
`tuners/adamss/layer.py`. With U and V the principal singular vectors of the weight, next to the bias as a last column,

    W'[outputs of cluster i] = W[outputs of cluster i] + B[i] A[i] V'

and the last column of the change is that of the bias. K-means groups the rows of U into the clusters, which only
differ in their outputs. There is no alpha.

| tensor | shape |
|---|---|
| `adamss_A_0`, ... | (rank of the cluster, r) |
| `adamss_B_0`, ... | (outputs of the cluster, rank of the cluster) |
| `adamss_newB`, V', not trained | (r, in / groups x kernel) |
| `adamss_column`, not trained | (r), the last column of V' if the layer has a bias; PEFT has it in `adamss_newB` |
| `adamss_places`, not trained | (out), the outputs of the first cluster, of the second, ... |

PEFT does not store the places. It decomposes the weight again whenever it loads an adapter, with random numbers from a
seed, and so does `complete`, which makes sure that V is the one in the file: on another device or another base model,
the clusters would be others.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy
import torch
from torch import Tensor

from diffadapt.errors import AdapterError
from diffadapt.types.adapter_type import AdapterType, Surroundings, Tensors, Unfinished
from diffadapt.types.config import AdapterConfig, refuse_unless_whole
from diffadapt.types.decomposition import principal, randomised_principal
from diffadapt.types.formulas import checked, flat, rank_of
from diffadapt.types.layer_spec import LayerSpec
from diffadapt.types.tensor_ops import promoted, scaled

MOST_CLUSTERS = 64
_A, _B = (tuple(f"adamss_{side}_{number}" for number in range(MOST_CLUSTERS)) for side in "AB")
_V, _COLUMN, _PLACES = "adamss_newB", "adamss_column", "adamss_places"
_DOWN, _UP, _BIAS = "adamss_down", "adamss_up", "adamss_bias"

# As in PEFT, whose settings do not include these.
_ITERATIONS_OF_DECOMPOSITION, _ITERATIONS_OF_CLUSTERING, _SEED_OF_CLUSTERING = 2, 10, 123456789
_TOLERANCE = 1e-4
_CLOSE = 0.02
"""How far, relative to its largest element, the V of a file may be from the one computed: as far as rounding goes."""


@dataclass(frozen=True, kw_only=True)
class AdaMSSConfig(AdapterConfig):
    """Settings of a new AdaMSS (NeurIPS 2025).

    Attributes:
        rank: r, the number of singular vectors; smaller layers have as many as they can.
        clusters: the number of clusters of outputs (`num_subspaces` in PEFT), at most 64.
        cluster_rank: the rank of the change of one cluster (`subspace_rank` in PEFT).
        seed: the seed of the decomposition (`random_seed` in PEFT).
    """

    rank: int = 100
    clusters: int = 5
    cluster_rank: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in (("rank", self.rank), ("clusters", self.clusters), ("cluster_rank", self.cluster_rank)):
            refuse_unless_whole(name, value)
        refuse_unless_whole("seed", self.seed, least=0)
        if self.clusters > MOST_CLUSTERS:
            raise AdapterError(f"clusters is {self.clusters}, expected at most {MOST_CLUSTERS}")

    @property
    def settings(self) -> dict[str, float]:
        """What a new adapter is computed from."""
        return {
            "rank": float(self.rank),
            "clusters": float(self.clusters),
            "cluster_rank": float(self.cluster_rank),
            "seed": float(self.seed),
        }


def fit(tensors: Tensors, spec: LayerSpec) -> dict[str, Tensor]:
    """Check the tensors of a file and return them in the shapes of the table above."""
    count = sum(name in tensors for name in _A)
    size = rank_of(tensors, _V, 0)
    if rank_of(tensors, _V, 1) == spec.fan_in + 1 and _COLUMN not in tensors:
        tensors = {**tensors, _V: tensors[_V][:, :-1], _COLUMN: tensors[_V][:, -1]}
    outputs = [rank_of(tensors, name, 0) for name in _B[:count]]
    if sum(outputs) != spec.out_features:
        raise AdapterError(f"the clusters have {sum(outputs)} outputs together, expected {spec.out_features}")
    shapes = {_V: (size, spec.fan_in), _COLUMN: (size,), _PLACES: (spec.out_features,)}
    for a, b, rows in zip(_A[:count], _B[:count], outputs, strict=True):
        rank = rank_of(tensors, a, 0)
        shapes |= {a: (rank, size), b: (rows, rank)}
    found = checked(tensors, shapes, optional=(_COLUMN, _PLACES))
    places = found.get(_PLACES)
    if (
        places is not None
        and not places.is_meta
        and not torch.equal(places.long().sort().values, torch.arange(spec.out_features, device=places.device))
    ):
        raise AdapterError(f"{_PLACES} are not all {spec.out_features} outputs, each of them once")
    return found


def init(
    spec: LayerSpec, config: AdaMSSConfig, *, generator: torch.Generator, weight: Callable[[], Tensor]
) -> dict[str, Tensor]:
    """Return nothing, since everything follows from the weight and the bias, or a random `B`; see `complete`."""
    if config.init:
        return {}
    return {_B[0]: torch.randn(spec.out_features, config.cluster_rank, generator=generator)}


def complete(layers: Mapping[str, Unfinished]) -> dict[str, Tensors]:
    """Return the tensors with the places and, for a new adapter, V, A and B."""
    return {
        path: layer.tensors if _PLACES in layer.tensors else _of_file(layer) if _V in layer.tensors else _new(layer)
        for path, layer in layers.items()
    }


def prepare(tensors: Tensors, spec: LayerSpec, surroundings: Surroundings) -> Tensors:
    """Return the change as two factors, whose rank is that of all clusters together, and the change of the bias."""
    count = sum(name in tensors for name in _A)
    left = torch.block_diag(*(promoted(tensors[name]) for name in _B[:count]))
    up = torch.zeros_like(left).index_copy(0, tensors[_PLACES].long(), left)
    middle, dtype = torch.cat([promoted(tensors[name]) for name in _A[:count]]), tensors[_V].dtype
    prepared = {_UP: up.to(dtype), _DOWN: flat((middle @ promoted(tensors[_V])).to(dtype), spec)}
    if _COLUMN in tensors:
        prepared[_BIAS] = (up @ (middle @ promoted(tensors[_COLUMN]))).to(dtype)
    return prepared


def as_low_rank(tensors: Tensors, spec: LayerSpec) -> tuple[Tensor, Tensor]:
    """Return `down` and `up`."""
    return tensors[_DOWN], tensors[_UP]


def delta_weight(tensors: Tensors, spec: LayerSpec) -> Tensor:
    """Return the change in the canonical weight shape."""
    return spec.product(tensors[_DOWN], tensors[_UP])


def delta_bias(tensors: Tensors) -> Tensor | None:
    """Return the prepared change of the bias; of unprepared tensors, the one that changes it. `None` if none does."""
    return tensors.get(_BIAS, tensors.get(_COLUMN))


def delta_output(
    tensors: Tensors, spec: LayerSpec, *, input: Tensor, gate: Tensor, onto: Tensor | None = None
) -> Tensor:
    """Return `onto` plus the gated change of the weight and of the bias."""
    output = spec.low_rank(input, tensors[_DOWN], tensors[_UP], gate, onto)
    if _BIAS not in tensors:
        return output
    return output + spec.along_channels(scaled(tensors[_BIAS], gate).to(output.dtype), output.ndim)


def _of_file(layer: Unfinished) -> dict[str, Tensor]:
    """Return the tensors of a file with the places, which follow from the base weight.

    Raises:
        AdapterError: the weight has other singular vectors than the file.
    """
    tensors = dict(layer.tensors)
    count, size = sum(name in tensors for name in _A), tensors[_V].shape[0]
    matrix = _with_bias(layer, _COLUMN in tensors)
    if matrix.is_meta or tensors[_V].is_meta:
        return {**tensors, _PLACES: torch.empty(layer.spec.out_features, dtype=torch.int64, device="meta")}
    left, right = _vectors(matrix, size, int(layer.settings["seed"]))
    given = torch.cat([tensors[_V], *([tensors[_COLUMN].unsqueeze(1)] if _COLUMN in tensors else [])], 1).to(right)
    clusters = _clustered(left, count)
    sizes = [tensors[name].shape[0] for name in _B[:count]]
    is_other = bool((given - right).abs().max() > _CLOSE * right.abs().max())
    if is_other or list(map(len, clusters)) != sizes or (size >= layer.spec.out_features and count > 1):
        why = (
            "its singular vectors are not those of the layer's weight, so it was made with another base model or on "
            "another kind of device"
            if is_other
            else "its clusters depend on rounding, because it has as many singular vectors as the layer has outputs"
        )
        raise AdapterError(
            f"an AdaMSS of PEFT does not say which outputs its clusters have, and {why}; load it with PEFT where it "
            "was trained, and merge it there"
        )
    return {**tensors, _PLACES: torch.cat(clusters).to(tensors[_V].device)}


def _new(layer: Unfinished) -> dict[str, Tensor]:
    """Return the tensors of a new adapter: B is zero, unless the layer has one for all of its outputs."""
    settings, spec = layer.settings, layer.spec
    matrix = _with_bias(layer, layer.bias() is not None)
    rank = min(int(settings["rank"]), *matrix.shape)
    count = min(int(settings["clusters"]), spec.out_features)
    if matrix.is_meta:
        _, right = _vectors(matrix, rank, 0)
        left = torch.zeros(spec.out_features, rank)
        clusters = list(torch.arange(spec.out_features).tensor_split(count))
    else:
        left, right = _vectors(matrix, rank, int(settings["seed"]))
        clusters = _clustered(left, count)
    columns = spec.fan_in
    found = {_V: right[:, :columns].contiguous(), _PLACES: torch.cat(clusters)}
    if right.shape[1] > columns:
        found[_COLUMN] = right[:, -1].contiguous()
    given = layer.tensors.get(_B[0])
    for a, b, outputs in zip(_A, _B, clusters, strict=False):
        size = min(len(outputs), int(settings["cluster_rank"]), rank)
        # The Gram matrix that PEFT decomposes has these vectors, too.
        found[a] = principal(left[outputs], size)[2].contiguous()
        found[b] = torch.zeros(len(outputs), size) if given is None else given[outputs, :size]
    return {name: tensor.to(matrix.device) for name, tensor in found.items()}


def _with_bias(layer: Unfinished, with_bias: bool) -> Tensor:
    """Return the base weight as a matrix, with the bias as a last column."""
    matrix = layer.weight().flatten(1).float()
    if not with_bias:
        return matrix
    bias = layer.bias()
    if bias is None:
        if not matrix.is_meta:
            raise AdapterError("the file is for a layer with a bias, and this one has none")
        bias = matrix.new_empty(len(matrix))
    return torch.cat([matrix, bias.detach().to(matrix).unsqueeze(1)], 1)


def _vectors(matrix: Tensor, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return U (out, rank) and V' (rank, columns)."""
    left, _, right = randomised_principal(matrix, rank, _ITERATIONS_OF_DECOMPOSITION, seed)
    return left.cpu() if not left.is_meta else left, right


def _clustered(rows: Tensor, count: int) -> list[Tensor]:
    """Return the numbers of the rows in each of `count` clusters: Lloyd's K-means as in scikit-learn.

    The initial centres are rows drawn from a seed. A cluster that becomes empty gets the row that is farthest from its
    centre.
    """
    data = rows.detach().cpu().float().numpy()
    limit = _TOLERANCE * float(numpy.mean(numpy.var(data, axis=0)))
    data = data - data.mean(axis=0)
    chosen = numpy.random.RandomState(_SEED_OF_CLUSTERING).choice(
        len(data), size=count, replace=False, p=numpy.full(len(data), 1 / len(data), dtype=numpy.float32)
    )
    centres, labels = data[chosen], numpy.full(len(data), -1)
    for _ in range(_ITERATIONS_OF_CLUSTERING):
        found = _nearest(data, centres)
        is_stable = numpy.array_equal(found, labels)
        moved = _centres(data, found, centres)
        shift = float(((moved - centres) ** 2).sum())
        labels, centres = found, moved
        if is_stable or shift <= limit:
            break
    else:
        is_stable = False
    if not is_stable:
        labels = _nearest(data, centres)
    return [torch.from_numpy(numpy.flatnonzero(labels == number)) for number in range(count)]


def _nearest(data: numpy.ndarray, centres: numpy.ndarray) -> numpy.ndarray:
    """Return the number of the nearest centre for each row."""
    return ((centres**2).sum(axis=1) - 2 * data @ centres.T).argmin(axis=1)


def _centres(data: numpy.ndarray, labels: numpy.ndarray, before: numpy.ndarray) -> numpy.ndarray:
    """Return the means of the clusters."""
    sums, sizes = numpy.zeros_like(before), numpy.bincount(labels, minlength=len(before))
    numpy.add.at(sums, labels, data)
    empty = numpy.flatnonzero(sizes == 0)
    if len(empty):
        distances = ((data - before[labels]) ** 2).sum(axis=1)
        farthest = numpy.argpartition(distances, -len(empty))[: -len(empty) - 1 : -1]
        for new, row in zip(empty, farthest, strict=True):
            sums[labels[row]] -= data[row]
            sums[new] = data[row]
            sizes[labels[row]] -= 1
            sizes[new] = 1
    return sums * (1 / numpy.maximum(sizes, 1)).astype(data.dtype)[:, None]


ADAMSS = AdapterType(
    name="adamss",
    tensors=(*_A, *_B, _V, _COLUMN, _PLACES),
    identified_by=frozenset({_V}),
    config=AdaMSSConfig,
    settings={"rank": 100.0, "clusters": 5.0, "cluster_rank": 1.0, "seed": 0.0},
    fixed=frozenset({_V, _COLUMN, _PLACES}),
    fit=fit,
    init=init,
    complete=complete,
    prepare=prepare,
    as_low_rank=as_low_rank,
    delta_weight=delta_weight,
    delta_bias=delta_bias,
    delta_output=delta_output,
)
