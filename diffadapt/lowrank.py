"""Any adapters as one plain LoRA: exactly where their change has low rank, else as near as a rank allows.

The change of a layer is `W' - W` of `compose.weight`, as a matrix of shape (out, in / groups x kernel). Of all matrices
of rank r its truncated singular value decomposition is the nearest in the Frobenius norm (Eckart and Young, 1936).

| change | decomposition |
|---|---|
| given as factors (LoRA, LoHa, some LoKr, sums of such) | the factors as they are; to cut them, QR and a small SVD |
| small, or grouped | SVD |
| large | randomised SVD with power iterations: Halko, Martinsson and Tropp, arXiv 0909.4061, 4.4 and 5.1 |

A grouped convolution is a batch of such matrices, one per group, all cut to the same rank. That is the layout PEFT has
for LoRA on it, and here "rank" means that of one group; the LoRA has `rank x groups` rows.

On a CPU everything is computed in float64, elsewhere in float32 (float64 for float64 adapters). Random numbers come
from a generator of their own: the same adapters always give the same LoRA.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from diffadapt import compose
from diffadapt.adapter import Adapter, AdapterLayer, Ready
from diffadapt.attach import attach_, bank_of, detach_
from diffadapt.errors import AdapterError, naming
from diffadapt.hooks import decoded, resting_tensor
from diffadapt.layer import LayerSpec
from diffadapt.types.lora import LORA

_SMALL = 512  # Up to here a whole decomposition takes a fraction of a second.
_FIRST_RANK, _OVERSAMPLING, _POWER_ITERATIONS = 64, 16, 4
_ROUNDING = 8  # A change is known to so many units in the last place.
_SHOWN = 10


class Factors(NamedTuple):
    """A change as the product `up @ down` of every group.

    Attributes:
        up: (groups, out / groups, rank).
        down: (groups, rank, in / groups x kernel).
    """

    up: Tensor
    down: Tensor

    @property
    def rank(self) -> int:
        """Rank of one group."""
        return self.up.shape[2]

    def decomposed(self) -> tuple[Tensor, Tensor, Tensor]:
        """Singular value decomposition `u, s, v'` at the cost of the factors."""
        up, inner_up = torch.linalg.qr(self.up)
        down, inner_down = torch.linalg.qr(self.down.mT)
        u, s, vh = torch.linalg.svd(inner_up @ inner_down.mT, full_matrices=False)
        return up @ u, s, vh @ down.mT

    def norm(self) -> float:
        """Frobenius norm of the product."""
        inner_up, inner_down = torch.linalg.qr(self.up).R, torch.linalg.qr(self.down.mT).R
        return float(torch.linalg.vector_norm(inner_up @ inner_down.mT))


@dataclass(frozen=True)
class Change:
    """What adapters change in one layer, in the wide dtype.

    Attributes:
        whole: the change: factors, or a tensor (groups, out / groups, in / groups x kernel).
        bias: change of the bias, or `None`.
        dtype: of the adapters it comes from; of several, one that holds them all.
        reference: Frobenius norm of what the change is a small difference of (the base weight, other changes).
    """

    spec: LayerSpec
    whole: Factors | Tensor
    bias: Tensor | None
    dtype: torch.dtype
    reference: float = 0.0

    @property
    def factors(self) -> Factors | None:
        """The change as factors, if it is known as such."""
        return self.whole if isinstance(self.whole, Factors) else None

    @property
    def dense(self) -> Tensor:
        """The change as one matrix per group."""
        return self.whole.up @ self.whole.down if isinstance(self.whole, Factors) else self.whole

    @functools.cached_property
    def norm(self) -> float:
        """Frobenius norm."""
        return self.whole.norm() if isinstance(self.whole, Factors) else float(torch.linalg.vector_norm(self.whole))

    @property
    def noise(self) -> float:
        """Frobenius norm of what rounding may have put into the change: less than this is nothing."""
        eps = torch.finfo(torch.promote_types(self.dtype, torch.float32)).eps
        terms = math.prod(float(torch.linalg.vector_norm(factor)) for factor in self.factors or ())
        return _ROUNDING * eps * (self.reference + (terms if self.factors else self.norm))

    def distance(self, factors: Factors) -> float:
        """Frobenius norm of the difference to a product."""
        if isinstance(self.whole, Factors):
            return joined([self.whole, Factors(-factors.up, factors.down)]).norm()
        return float(torch.linalg.vector_norm(self.whole - factors.up @ factors.down))


@dataclass(frozen=True)
class Part:
    """An adapter layer with a strength.

    Attributes:
        originals: `id` of a base tensor -> what gives its content before merging, see `Bank.ways`.
    """

    layer: AdapterLayer
    strength: float
    originals: Mapping[int, Callable[[], Tensor]]

    @property
    def dtype(self) -> torch.dtype:
        """Of the adapter's parameters."""
        return next(iter(self.layer.parameters())).dtype

    @property
    def reads_base(self) -> bool:
        """Whether the change depends on the base weight."""
        return not self.layer.is_additive or self.layer.kind.is_prepared

    def base(self, name: str) -> Tensor | None:
        """The layer's own weight or bias as it is without any adapter, or `None` if it has none."""
        tensor = resting_tensor(self.layer.host, name)
        if tensor is None:
            return None
        return self.originals[id(tensor)]() if id(tensor) in self.originals else decoded(self.layer.host, name)

    def ready(self, weight: Tensor) -> Ready:
        """As `compose.wide`, with this strength in place of the present one."""
        gate = torch.tensor(self.layer.scale * self.strength, dtype=torch.float64).to(weight)
        return compose.wide(self.layer, weight)._replace(gate=gate)


Sources: TypeAlias = Mapping[str, Mapping[str, Sequence[Part]]]
"""component -> module path -> the adapters there that take part."""


class Cut(NamedTuple):
    """Factors for a change, and whether nothing but rounding is missing."""

    factors: Factors
    exact: bool


Maker: TypeAlias = Callable[[Sequence[Part]], tuple[Change, Cut]]
"""Of the adapters on one layer: the change that is wanted, and the factors that stand for it."""


@dataclass(frozen=True)
class ConvertedLayer:
    """The account of one layer.

    Attributes:
        path: with the component in front.
        types: adapter types it was made from.
        rank: of the LoRA (of one group); 0 where the change is zero, and the layer is left out.
        exact: nothing but rounding is missing.
        error: Frobenius norm of what is missing, in parts of `norm`; measured on the tensors as they are stored.
        norm: Frobenius norm of the change that was asked for.
    """

    path: str
    types: tuple[str, ...]
    rank: int
    exact: bool
    error: float
    norm: float


@dataclass(frozen=True)
class Conversion:
    """The account of a LoRA made from other adapters; `print` gives a table, the worst layers first.

    Attributes:
        name: of the new adapter.
        layers: one entry for each layer of the adapters it was made from.
    """

    name: str
    layers: tuple[ConvertedLayer, ...]

    @property
    def error(self) -> float:
        """Frobenius norm of all that is missing, in parts of that of the whole change."""
        norm = math.hypot(*(layer.norm for layer in self.layers))
        return math.hypot(*(layer.error * layer.norm for layer in self.layers)) / norm if norm else 0.0

    @property
    def exact(self) -> bool:
        """Whether every layer is exact."""
        return all(layer.exact for layer in self.layers)

    def __str__(self) -> str:
        worst = sorted(self.layers, key=lambda layer: -layer.error)
        rows = [("layer", "from", "rank", "exact", "error")]
        rows += [
            (layer.path, ",".join(layer.types), str(layer.rank), "yes" if layer.exact else "no", f"{layer.error:.2%}")
            for layer in worst[:_SHOWN]
        ]
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        if len(worst) > _SHOWN:
            lines.append(f"... and {len(worst) - _SHOWN} more with smaller errors")
        exact, used = sum(layer.exact for layer in worst), sum(layer.rank > 0 for layer in worst)
        lines.append(
            f"{self.name}: {used} of {len(worst)} layers changed, {exact} exact, error {self.error:.2%} overall"
        )
        return "\n".join(lines)


def check(rank: object, energy: object) -> None:
    """Refuse what is no rank (at least 1) and no share of the energy (above 0, at most 1); `None` is no limit."""
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise AdapterError(f"rank is {rank!r}, expected a number of at least 1")
    if energy is not None and (isinstance(energy, bool) or not isinstance(energy, (int, float)) or not 0 < energy <= 1):
        raise AdapterError(f"energy is {energy!r}, expected 0 < energy <= 1")


def conversion(rank: int | None, energy: float | None) -> Maker:
    """What all adapters on a layer do together, as `compose.weight` has it, as one LoRA.

    Args:
        rank: the most a layer gets.
        energy: every layer gets the smallest rank that keeps this share of the squared Frobenius norm. Without
            either, the LoRA is exact, or `AdapterError` is raised where none is smaller than the weight.
    """
    check(rank, energy)

    def make(parts: Sequence[Part]) -> tuple[Change, Cut]:
        change = change_of(parts)
        return change, cut(change, rank, energy)

    return make


@torch.no_grad()
def derive_(
    models: Mapping[str, nn.Module],
    name: str,
    strengths: Mapping[str, Mapping[str, float | Sequence[float]]],
    maker: Callable[[Sources], Maker],
) -> Conversion:
    """Make a LoRA of adapters, layer by layer, and attach it to the models, inactive.

    Args:
        strengths: adapter -> component -> a strength, or one per layer; a layer with 0 does not take part.
        maker: gives what makes one layer.

    Raises:
        AdapterError: a layer cannot be turned into a LoRA (the error names it). Nothing is attached then.
    """
    adapters: dict[str, Adapter] = {}
    rows: list[ConvertedLayer] = []
    sources = _sources(models, strengths)
    make = maker(sources)
    for component, paths in sources.items():
        layers: dict[str, AdapterLayer] = {}
        for path, parts in paths.items():
            where = f"{component}.{path}"
            with naming(where):
                layer, row = _built(where, parts, make)
            rows.append(row)
            if layer is not None:
                layers[path] = layer
        if layers:
            adapters[component] = Adapter(layers)
    if not adapters:
        raise AdapterError(f"the adapters change no layer at these strengths, so there is no LoRA {name!r} to make")
    try:
        for component, adapter in adapters.items():
            bank = bank_of(models[component])
            assert bank is not None
            attach_(models[component], name, adapter, bank.hosts)
    except BaseException:
        for component in adapters:
            detach_(models[component], name)
        raise
    return Conversion(name, tuple(rows))


def change_of(parts: Sequence[Part]) -> Change:
    """What adapters on one layer change together."""
    spec = parts[0].layer.spec
    if spec.kind not in LORA.layers:
        raise AdapterError(f"a {spec.kind} cannot carry a LoRA; give the layer a strength of 0 to leave it out")
    dtype = functools.reduce(torch.promote_types, (part.dtype for part in parts))
    device = next(iter(parts[0].layer.parameters())).device
    wide = torch.float64 if device.type == "cpu" else torch.promote_types(dtype, torch.float32)
    weight = torch.zeros((), dtype=wide, device=device).expand(spec.weight_shape)
    reference = 0.0
    if any(part.reads_base for part in parts):
        stored = parts[0].base("weight")
        assert stored is not None
        weight = spec.to_stored(stored).to(weight)
        reference = float(torch.linalg.vector_norm(weight))
    ready = [part.ready(weight) for part in parts]
    factors = [_own_factors(r) for r in ready]
    known = [pair for pair in factors if pair is not None]
    if len(known) == len(ready):
        return Change(spec, joined(known), _bias_change(parts[0], ready, weight), dtype)
    change = compose.weight(ready, weight) - weight
    groups = change.reshape(spec.groups, spec.out_features // spec.groups, spec.fan_in)
    return Change(spec, groups, _bias_change(parts[0], ready, weight), dtype, reference)


def joined(pairs: Sequence[Factors]) -> Factors:
    """The sum of several products as one."""
    return Factors(torch.cat([pair.up for pair in pairs], 2), torch.cat([pair.down for pair in pairs], 1))


def cut(change: Change, rank: int | None, energy: float | None) -> Cut:
    """The smallest factors that keep `energy` of a change, of at most `rank`; see `conversion`."""
    _refuse_infinite(change)
    groups, rows, columns = change.spec.groups, change.spec.out_features // change.spec.groups, change.spec.fan_in
    largest = min(rows, columns)
    if change.norm <= change.noise:
        return Cut(_empty(change), True)
    given = change.factors
    keeps_all = energy is None or energy == 1
    if given is not None and keeps_all and given.rank <= (largest if rank is None else min(rank, largest)):
        return Cut(given, True)
    most = largest if rank is None else min(rank, largest)
    if rank is None and energy is None and given is None:
        most = (rows * columns - 1) // (rows + columns)
    # All in squares: of what may be lost, and of what is lost with the first so many singular values kept.
    allowed = max((1 - (1.0 if energy is None else energy)) * change.norm**2, change.noise**2)
    if given is not None:
        u, s, vh = given.decomposed()
        rest = 0.0
    else:
        u, s, vh, rest = _decomposed(change.dense, most, allowed, rank or _FIRST_RANK)
    lost = s.square().sum(0).flip(0).cumsum(0).flip(0) + rest
    kept = min(int((lost > allowed).sum()), most)
    missing = float(lost[kept]) if kept < len(lost) else rest
    exact = missing <= change.noise**2
    if rank is None and energy is None and not exact:
        weight = f"the ({groups * rows}, {columns}) weight itself"
        raise AdapterError(
            f"no LoRA that is smaller than {weight} has the same effect; pass rank= or energy= (1.0 to keep everything)"
        )
    root = s[:, :kept].sqrt()
    return Cut(Factors(u[:, :, :kept] * root.unsqueeze(1), root.unsqueeze(2) * vh[:, :kept]), exact)


def _sources(
    models: Mapping[str, nn.Module], strengths: Mapping[str, Mapping[str, float | Sequence[float]]]
) -> Sources:
    sources: dict[str, dict[str, list[Part]]] = {}
    for component, model in models.items():
        bank = bank_of(model)
        if bank is None:
            continue
        originals = {key: way.restored for key, way in bank.ways.items()}
        for name, by_component in strengths.items():
            layers = bank.adapters[name].layers if name in bank.adapters else {}
            given = by_component.get(component, 0.0)
            each = given if isinstance(given, Sequence) else [given] * len(layers)
            for (path, layer), strength in zip(layers.items(), each, strict=True):
                if strength:
                    sources.setdefault(component, {}).setdefault(path, []).append(Part(layer, strength, originals))
    return sources


def _built(where: str, parts: Sequence[Part], make: Maker) -> tuple[AdapterLayer | None, ConvertedLayer]:
    """The LoRA of one layer, its scale 1, and the account of it."""
    change, (factors, exact) = make(parts)
    spec, types = change.spec, tuple(sorted({part.layer.kind.name for part in parts}))
    if change.bias is not None and spec.kind == "embedding":
        raise AdapterError("the bias is changed, which a LoRA of an embedding cannot")
    if not factors.rank and change.bias is None:
        return None, ConvertedLayer(
            where, types, 0, exact, change.distance(factors) / (change.norm or 1.0), change.norm
        )
    if not factors.rank:
        factors = Factors(
            factors.up.new_zeros(*factors.up.shape[:2], 1), factors.down.new_zeros(spec.groups, 1, spec.fan_in)
        )
    tensors = {
        "lora_down": factors.down.reshape(-1, *spec.weight_shape[1:]),
        "lora_up": factors.up.reshape(spec.out_features, factors.rank),
        **({} if change.bias is None else {"lora_bias": change.bias}),
    }
    stored = {name: tensor.to(change.dtype).contiguous() for name, tensor in tensors.items()}
    if not all(tensor.isfinite().all() for tensor in stored.values()):
        raise AdapterError(f"the LoRA would have values that {change.dtype} cannot hold")
    layer = AdapterLayer(LORA, spec, stored, alpha=float(stored["lora_down"].shape[0]))
    rounded = Factors(*(stored[n].to(f).view_as(f) for n, f in zip(("lora_up", "lora_down"), factors, strict=True)))
    error = change.distance(rounded) / (change.norm or 1.0)
    return layer, ConvertedLayer(where, types, factors.rank, exact, error, change.norm)


def _own_factors(ready: Ready) -> Factors | None:
    """The change of one adapter as factors, gate included, if its type knows them."""
    layer, spec = ready.layer, ready.layer.spec
    found = layer.kind.as_low_rank(ready.tensors, spec) if layer.is_additive else None
    if found is None:
        return None
    down, up = spec._per_group(*found), found[1]
    return Factors(
        (up * ready.gate).reshape(spec.groups, spec.out_features // spec.groups, -1),
        down.reshape(spec.groups, -1, spec.fan_in),
    )


def _bias_change(part: Part, ready: Sequence[Ready], like: Tensor) -> Tensor | None:
    stored = part.base("bias") if any(r.layer.kind.gains_bias for r in ready) else None
    if not compose.changes_bias(((r.layer, r.tensors) for r in ready), stored is not None):
        return None
    bias = like.new_zeros(part.layer.spec.out_features) if stored is None else stored.to(like)
    return compose.bias(ready, bias) - bias


def _refuse_infinite(change: Change) -> None:
    whole = change.whole if isinstance(change.whole, Factors) else (change.whole,)
    bias = () if change.bias is None else (change.bias,)
    if not all(tensor.isfinite().all() for tensor in (*whole, *bias)):
        raise AdapterError("the change has NaN or infinite values")


def _empty(change: Change) -> Factors:
    spec, like = change.spec, change.whole[0]
    return Factors(
        like.new_zeros(spec.groups, spec.out_features // spec.groups, 0), like.new_zeros(spec.groups, 0, spec.fan_in)
    )


def _decomposed(matrices: Tensor, most: int, allowed: float, first: int) -> tuple[Tensor, Tensor, Tensor, float]:
    """Singular value decomposition, as far as `most` values, or as it takes to lose no more than `allowed`.

    Returns:
        `u, s, v'`, and the squared Frobenius norm of what they leave out.
    """
    size, rank = min(matrices.shape[1:]), min(first, most)
    while matrices.shape[0] == 1 and size > _SMALL and 2 * (rank + _OVERSAMPLING) < size:
        u, s, vh, rest = _sketched(matrices[0], rank + _OVERSAMPLING)
        if rest <= allowed or rank == most:
            return u.unsqueeze(0), s.unsqueeze(0), vh.unsqueeze(0), rest
        rank = min(2 * rank, most)
    return *torch.linalg.svd(matrices, full_matrices=False), 0.0


def _sketched(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor, float]:
    """The largest singular values, from the range of the matrix on random vectors."""
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(matrix.shape[1], rank, generator=generator, dtype=torch.float64).to(matrix)
    basis = torch.linalg.qr(matrix @ probe).Q
    for _ in range(_POWER_ITERATIONS):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.mT @ basis).Q).Q
    inner = basis.mT @ matrix
    rest = float(torch.linalg.vector_norm(torch.addmm(matrix, basis, inner, alpha=-1)))
    u, s, vh = torch.linalg.svd(inner, full_matrices=False)
    return basis @ u, s, vh, rest**2
