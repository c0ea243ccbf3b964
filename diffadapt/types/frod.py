"""FRoD: layers of the same role share a basis, in which each weight is changed by a diagonal and a sparse matrix.

"FRoD: Full-Rank Efficient Fine-Tuning with Rotational Degrees" (doi 10.1609/aaai.v40i31.39813), as in PEFT 0.21.2
`tuners/frod/layer.py` and `model.py`. With V the basis, and U and L0 such that `W = U diag(L0) V'`,

    W' = U (S + diag(L)) V' = W + U (S + diag(L - L0)) V'

S is sparse, with zeros on its diagonal. V follows from the base weights of all layers with a role, U and L0 from the
weight of the layer and V, and the places of S from a seed. There is no alpha. The role of a layer is the end of its
path; see `category`. Here, layers with the same role and different numbers of inputs have different bases.

| tensor | shape |
|---|---|
| `frod_lambda_l`, L | (in / groups x kernel) |
| `frod_lambda_s_values`, the elements of S | (count) |
| `frod_V`, shared by the layers with a role, not trained | (in, in) |
| `frod_s_indices`, shared by them, not trained | (2, count), rows and columns of S |
| `frod_s_size`, shared by them, not trained | (2), the shape of S |
| `frod_U`, not trained | (out, in / groups x kernel) |
| `frod_start`, L0, not trained | (in / groups x kernel) |

PEFT does not store the last two. A folder has a tensor that is shared by a role once, as `base_model.frod_V.attn_to_q`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from diffadapt.errors import AdapterError
from diffadapt.types.adapter_type import AdapterType, Surroundings, Tensors, Unfinished
from diffadapt.types.config import AdapterConfig, refuse_unless_whole
from diffadapt.types.formulas import rank_of, unified_in
from diffadapt.types.layer_spec import LayerSpec
from diffadapt.types.sparse import are_places, scattered, sparse_product
from diffadapt.types.tensor_ops import promoted, scaled, shape_of

_L, _VALUES, _V, _INDICES, _SIZE, _U, _START = (
    "frod_lambda_l",
    "frod_lambda_s_values",
    "frod_V",
    "frod_s_indices",
    "frod_s_size",
    "frod_U",
    "frod_start",
)
_DIAGONAL, _ROWS, _COLUMNS, _DELTA = "frod_diagonal", "frod_rows", "frod_columns", "frod_delta"
_NEGLIGIBLE = 1e-12
_Roles: TypeAlias = Mapping[tuple[str, int], Mapping[str, Unfinished]]
"""(category, number of inputs) -> the layers, by path."""


@dataclass(frozen=True, kw_only=True)
class FRoDConfig(AdapterConfig):
    """Settings of a new FRoD (doi 10.1609/aaai.v40i31.39813).

    Attributes:
        density: the share of elements of the sparse matrix that are trained (`sparse_rate` in PEFT).
        ridge: what is added to the diagonal of matrices before they are inverted (`regularization_alpha` in PEFT).
        seed: the seed of the places of these elements (`projection_prng_key` in PEFT).
    """

    density: float = 0.01
    ridge: float = 1e-3
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_unless_whole("seed", self.seed, least=0)
        if not 0 < self.density <= 1:
            raise AdapterError(f"density is {self.density}, expected more than 0 and at most 1")
        if not self.ridge > 0:
            raise AdapterError(f"ridge is {self.ridge}, expected more than 0")

    @property
    def settings(self) -> dict[str, float]:
        """What the basis and the places follow from."""
        return {"ridge": float(self.ridge), "seed": float(self.seed)}


def category(path: str) -> str:
    """Return the role of a layer: the last two parts of its path, or the last one after a number.

    BERT's `attention.output.dense` has a name of its own, as in PEFT, because `output.dense` is another role.
    """
    parts = path.split(".")
    if len(parts) == 1 or parts[-2].isdigit():
        return parts[-1]
    found = f"{parts[-2]}_{parts[-1]}"
    return "attention_output" if found == "output_dense" and parts[-3:-2] == ["attention"] else found


def groups(paths: Sequence[str], settings: Mapping[str, float]) -> list[str]:
    """Return the role of each of the layers."""
    return list(map(category, paths))


def fit(tensors: Tensors, spec: LayerSpec) -> dict[str, Tensor]:
    """Check the tensors of a file and return them in the shapes of the table above."""
    size, count = spec.fan_in, rank_of(tensors, _VALUES, 0)
    shapes = {_L: (size,), _VALUES: (count,), _V: (size, size), _INDICES: (2, count), _SIZE: (2,)}
    shapes |= {_U: (spec.out_features, size), _START: (size,)}
    missing = [name for name in (_L, _VALUES) if name not in tensors]
    if missing:
        raise AdapterError(f"{', '.join(missing)} missing, only {', '.join(sorted(tensors))} found")
    found = {name: tensors[name] for name in shapes if name in tensors}
    for name, tensor in found.items():
        if shape_of(tensor) != shapes[name]:
            raise AdapterError(f"{name} has shape {shape_of(tensor)}, expected {shapes[name]}")
    if _INDICES in found and not are_places(found[_INDICES], size, size):
        raise AdapterError(f"{_INDICES} are not all in a matrix of shape ({size}, {size})")
    return found


def init(
    spec: LayerSpec, config: FRoDConfig, *, generator: torch.Generator, weight: Callable[[], Tensor]
) -> dict[str, Tensor]:
    """Return zeros for the sparse matrix, and nothing or a random vector for the diagonal; see `complete`."""
    size = spec.fan_in
    count = min(max(1, int(size * size * config.density)), size * (size - 1))
    if config.init:
        return {_VALUES: torch.zeros(count)}
    return {
        _VALUES: torch.randn(count, generator=generator) * 0.1,
        _L: torch.randn(size, generator=generator),
    }


def complete(layers: Mapping[str, Unfinished]) -> Mapping[str, Tensors]:
    """Return the tensors with the basis of every role, the places, and U and L0 of every layer."""
    roles: dict[tuple[str, int], dict[str, Unfinished]] = {}
    for path, layer in layers.items():
        roles.setdefault((category(path), layer.spec.fan_in), {})[path] = layer
    shared = _bases_and_places(roles, {path: number for number, path in enumerate(layers)})
    found: dict[str, Unfinished] = {}
    for (role, size), members in roles.items():
        for path, layer in members.items():
            tensors: dict[str, Tensor] = {**shared[role, size], **layer.tensors}
            if _U not in tensors or _START not in tensors:
                tensors[_U], tensors[_START] = _coordinates(tensors[_V], layer.weight().flatten(1), tensors[_VALUES])
            found[path] = layer._replace(tensors={_L: tensors[_START].clone(), **tensors})
    return unified_in(
        {path: found[path] for path in layers},
        (_V, _INDICES, _SIZE),
        {path: category(path) for path in layers},
    )


def prepare(tensors: Tensors, spec: LayerSpec, surroundings: Surroundings) -> Tensors:
    """Return the change of the weight; in training on a linear layer, its three factors."""
    values, diagonal = promoted(tensors[_VALUES]), promoted(tensors[_L]) - promoted(tensors[_START])
    if spec.kind == "linear" and torch.is_grad_enabled() and values.requires_grad:
        rows, columns = tensors[_INDICES]
        return {_U: tensors[_U], _V: tensors[_V], _DIAGONAL: diagonal, _VALUES: values, _ROWS: rows, _COLUMNS: columns}
    middle = _middle(tensors[_INDICES], values, diagonal)
    delta = promoted(tensors[_U]) @ middle @ promoted(tensors[_V]).t()
    return {_DELTA: delta.view(spec.weight_shape).to(tensors[_L].dtype)}


def delta_weight(tensors: Tensors, spec: LayerSpec) -> Tensor:
    """Return the change in the canonical weight shape."""
    if _DELTA in tensors:
        return tensors[_DELTA]
    places = torch.stack([tensors[_ROWS], tensors[_COLUMNS]])
    middle = _middle(places, tensors[_VALUES], tensors[_DIAGONAL])
    return (tensors[_U].to(middle) @ middle @ tensors[_V].to(middle).t()).view(spec.weight_shape)


def delta_output(
    tensors: Tensors, spec: LayerSpec, *, input: Tensor, gate: Tensor, onto: Tensor | None = None
) -> Tensor:
    """Return `onto` plus the gated change."""
    if _DELTA in tensors:
        return spec.dense(input, tensors[_DELTA], gate, onto)
    hidden = input @ tensors[_V]
    sparse = sparse_product(hidden, tensors[_ROWS], tensors[_COLUMNS], tensors[_VALUES].to(hidden), spec.fan_in)
    hidden = sparse + hidden * tensors[_DIAGONAL].to(hidden)
    return spec.expand(scaled(hidden, gate), tensors[_U], onto)


def _middle(places: Tensor, values: Tensor, diagonal: Tensor) -> Tensor:
    size = len(diagonal)
    return scattered(places[0], places[1], values, (size, size)) + torch.diag(diagonal)


def _coordinates(basis: Tensor, weight: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return U, with columns of length 1 or 0, and L0, such that `weight = U diag(L0) basis'`."""
    if weight.is_meta or basis.is_meta:
        return torch.empty(weight.shape, device="meta"), torch.empty(weight.shape[1], device="meta")
    basis, matrix = basis.double(), weight.to(basis.device).double()
    try:
        product = torch.linalg.solve(basis, matrix.t()).t()
    except RuntimeError:
        product = matrix @ torch.linalg.pinv(basis, rtol=1e-6).t()
    lengths = product.norm(dim=0)
    columns = torch.where(lengths > _NEGLIGIBLE, product / lengths.clamp_min(_NEGLIGIBLE), 0.0)
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return columns.to(dtype).contiguous(), lengths.to(dtype)


def _bases_and_places(roles: _Roles, numbers: Mapping[str, int]) -> dict[tuple[str, int], dict[str, Tensor]]:
    """Return the basis and the places of every role, as far as its layers lack them.

    Places are drawn for the roles in alphabetical order, as PEFT does.
    """
    found: dict[tuple[str, int], dict[str, Tensor]] = {}
    first = next(iter(next(iter(roles.values())).values()))
    generator = torch.Generator().manual_seed(int(first.settings["seed"]))
    for role in sorted(roles):
        members, size = roles[role], role[1]
        layer = next(iter(members.values()))
        count, device = layer.tensors[_VALUES].numel(), layer.tensors[_VALUES].device
        found[role] = {_SIZE: torch.tensor([size, size], device=device)}
        if any(_INDICES not in member.tensors for member in members.values()):
            found[role][_INDICES] = _places(size, count, generator, device)
        if any(_V not in member.tensors for member in members.values()):
            found[role][_V] = _basis(members, numbers).to(device)
    return found


def _places(size: int, count: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """Return `count` places off the diagonal of a square matrix, drawn as PEFT draws them."""
    if device.type == "meta":
        return torch.empty(2, count, dtype=torch.int64, device=device)
    drawn = torch.randperm(size * (size - 1), generator=generator)[:count]
    # Row by row, without the diagonal.
    rows, columns = drawn // (size - 1), drawn % (size - 1)
    return torch.stack([rows, columns + (columns >= rows)]).to(device)


def _basis(members: Mapping[str, Unfinished], numbers: Mapping[str, int]) -> Tensor:
    """Return V, (in, in): a basis for the rows of all weights, by a generalised singular value decomposition."""
    by_block: dict[int, Unfinished] = {}
    for path, layer in members.items():
        # PEFT takes one layer from each block, the last one.
        by_block[_block(path, numbers[path])] = layer
    weights = [by_block[block].weight().flatten(1).float() for block in sorted(by_block)]
    stacked = torch.cat(weights)
    if stacked.is_meta:
        return stacked.new_empty(stacked.shape[1], stacked.shape[1])
    if stacked.shape[0] < stacked.shape[1]:
        return torch.linalg.svd(stacked, full_matrices=True)[2].t().contiguous()
    q, r = torch.linalg.qr(stacked)
    ridge = next(iter(members.values())).settings["ridge"] * torch.eye(len(r)).to(r)
    inverses = [torch.linalg.inv(part.t() @ part + ridge) for part in q.split([len(weight) for weight in weights])]
    total = torch.zeros_like(r)
    for inverse in inverses:
        total += inverse
    return r.t() @ torch.linalg.eigh(total / len(inverses))[1]


def _block(path: str, otherwise: int) -> int:
    """Return the number of a layer's block, by its path: after `layers`, or else the first number."""
    parts = path.split(".")
    after = parts[parts.index("layers") + 1 :][:1] if "layers" in parts else []
    numbers = [part for part in (*after, *parts) if part.isdigit()]
    return int(numbers[0]) if numbers else otherwise


FROD = AdapterType(
    name="frod",
    tensors=(_L, _VALUES, _V, _INDICES, _SIZE, _U, _START),
    identified_by=frozenset({_VALUES}),
    config=FRoDConfig,
    layers=frozenset({"linear", "conv"}),
    settings={"ridge": 1e-3, "seed": 0.0},
    fixed=frozenset({_V, _INDICES, _SIZE, _U, _START}),
    shared=frozenset({_V, _INDICES, _SIZE}),
    fit=fit,
    init=init,
    complete=complete,
    prepare=prepare,
    delta_weight=delta_weight,
    delta_output=delta_output,
    in_weight=lambda tensors, spec: True,
)
