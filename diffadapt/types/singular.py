"""OSF and T-LoRA: singular components of the base weight are trained, and what they were at the start is taken out.

With the trained components `P diag(s) Q` and those of the base weight, `P0 diag(s0) Q0`,

    W' = W + scale * (P diag(s) Q - P0 diag(s0) Q0)

OSF (Nayak et al., "Sculpting Subspaces: Constrained Full Fine-Tuning in LLMs for Continual Learning", arXiv
2504.07097, as in PEFT 0.21.2 `tuners/osf/layer.py`) trains all but the largest components. Gradients are projected so
that the trained vectors stay orthogonal to those that are kept. There is no alpha.

T-LoRA (Soboleva et al., "T-LoRA: Single Image Diffusion Model Customization Without Overfitting", arXiv 2507.05964, as
in LyCORIS 4.1.3 `modules/tlora.py`) trains a few components. The noisier a picture is, the fewer of them may act: at
timestep t from 0 to 1000 the first `min_rank + floor((1 - t / 1000)^alpha_rank_scale (rank - min_rank))`. In LyCORIS a
trainer computes that (`compute_timestep_mask`), and its files say nothing of it. Here it is a tensor of the file, or
follows from `min_rank` and `alpha_rank_scale` in a header's `ss_network_args`. Without either, all components act at
any timestep, as they do in a model that is not told one, such as a text encoder. LyCORIS has pointwise convolutions
only, because it ignores the kernel.

| tensor | OSF | T-LoRA |
|---|---|---|
| P | `osf_U` (out, rank) | `p_layer` (out, rank) |
| s | `osf_S` (rank) | `lambda_layer` (1, rank) |
| Q | `osf_V` (rank, in / groups x kernel) | `q_layer` (rank, in / groups, *kernel) |
| P0, s0, Q0, not trained | `osf_U_start`, ... | `p_start`, ... |
| the last timestep at which a component acts, not trained | | `acts_until` (rank), optional |
| kept vectors, not trained | `osf_U_kept` (out, kept) if out > in, `osf_V_kept` (kept, in) if in > out | |

Neither library stores P0, s0 and Q0; they follow from the base weight. LyCORIS takes the largest components for every
file, even if training began with others. Here the header of the file decides, if it says so.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor

from diffadapt.errors import AdapterError
from diffadapt.types.adapter_type import (
    MOST_NOISE,
    UNTIL,
    AdapterType,
    Surroundings,
    Tensors,
    Unfinished,
    refuse_weightless,
)
from diffadapt.types.config import AdapterConfig, RankedConfig, refuse_unless_whole
from diffadapt.types.decomposition import decomposed
from diffadapt.types.formulas import checked, flat, rank_of
from diffadapt.types.layer_spec import LayerSpec
from diffadapt.types.layer_state import LayerState
from diffadapt.types.tensor_ops import promoted

_U, _S, _V = "osf_U", "osf_S", "osf_V"
_U_START, _S_START, _V_START = "osf_U_start", "osf_S_start", "osf_V_start"
_U_KEPT, _V_KEPT = "osf_U_kept", "osf_V_kept"
_P, _LAMBDA, _Q = "p_layer", "lambda_layer", "q_layer"
_P_START, _LAMBDA_START, _Q_START = "p_start", "lambda_start", "q_start"
_DOWN, _UP, _DELTA = "singular_down", "singular_up", "singular_delta"
STARTS = ("principal", "middle", "last", "random")
"""The components that a T-LoRA starts from: of the base weight, or of a random matrix."""
_ALWAYS = 2 * MOST_NOISE
_NEGLIGIBLE = 1e-6
"""The singular value that LyCORIS gives components beyond those of the weight."""


@dataclass(frozen=True, kw_only=True)
class OSFConfig(AdapterConfig):
    """Settings of a new OSF (Nayak et al., arXiv 2504.07097).

    Attributes:
        kept: the components that stay as they are (`effective_rank` in PEFT): a number, or a share of all below 1.
            Training changes all others.
    """

    kept: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.kept > 0 or (self.kept >= 1 and self.kept != int(self.kept)):
            raise AdapterError(f"kept is {self.kept}, expected a share between 0 and 1 or a whole number")

    def trained(self, spec: LayerSpec) -> int:
        """Return the number of components of a layer that are trained."""
        all_components = min(spec.out_features, spec.fan_in)
        kept = int(all_components * self.kept) if self.kept < 1 else int(self.kept)
        if kept >= all_components:
            raise AdapterError(f"kept is {kept}, expected less than {all_components}, the rank of the weight")
        return all_components - kept


@dataclass(frozen=True, kw_only=True)
class TLoRAConfig(RankedConfig):
    """Settings of a new T-LoRA (Soboleva et al., arXiv 2507.05964).

    Attributes:
        vectors: the components to start from: those of the largest, the "middle" or the smallest ("last") singular
            values (`sig_type` in LyCORIS).
        from_weight: whether they are those of the base weight (`use_data_init` in LyCORIS); if not, those of a random
            matrix.
        min_rank: the number of components that act on pure noise. The fewer noise is left, the more act. By default,
            all of them always do, and only then can the adapter be merged or converted.
        alpha_rank_scale: the exponent of that rule; with numbers above 1, most components act on the last steps alone.
    """

    vectors: Literal["principal", "middle", "last"] = "principal"
    from_weight: bool = True
    min_rank: int | None = None
    alpha_rank_scale: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.min_rank is not None:
            refuse_unless_whole("min_rank", self.min_rank, least=0)
        if self.alpha_rank_scale <= 0 or (self.min_rank is None and self.alpha_rank_scale != 1):
            raise AdapterError(
                f"alpha_rank_scale is {self.alpha_rank_scale}, expected a number above 0, and it needs min_rank"
            )
        if self.vectors not in ("principal", "middle", "last"):
            raise AdapterError(f"vectors is {self.vectors!r}, expected 'principal', 'middle' or 'last'")
        if self.use_dora:
            raise AdapterError("use_dora: a T-LoRA has no DoRA")


def fit_osf(tensors: Tensors, spec: LayerSpec) -> dict[str, Tensor]:
    """Check the tensors of a file and return them in the shapes of the table above."""
    rank, out, columns = rank_of(tensors, _S, 0), spec.out_features, spec.fan_in
    kept = min(out, columns) - rank
    if rank and kept < 0:
        raise AdapterError(f"{_S} has {rank} elements, expected at most {min(out, columns)}, the rank of the weight")
    own = {_U: (out, rank), _S: (rank,), _V: (rank, columns)}
    start = {_U_START: (out, rank), _S_START: (rank,), _V_START: (rank, columns)}
    further = {_U_KEPT: (out, kept), _V_KEPT: (kept, columns)}
    return checked(tensors, {**own, **start, **further}, optional=(*start, *further))


def init_osf(
    spec: LayerSpec, config: OSFConfig, *, generator: torch.Generator, weight: Callable[[], Tensor]
) -> dict[str, Tensor]:
    """Return the smallest components of the base weight, twice: to train, and to take out."""
    fixed = _osf_start(weight().flatten(1), config.trained(spec))
    own = {_U: fixed[_U_START], _S: fixed[_S_START], _V: fixed[_V_START]}
    if not config.init:
        own = {name: torch.randn(tensor.shape, generator=generator) for name, tensor in own.items()}
    return {**{name: tensor.clone() for name, tensor in own.items()}, **fixed}


def complete_osf(layers: Mapping[str, Unfinished]) -> dict[str, Tensors]:
    """Return the tensors with the components of the base weight."""
    found: dict[str, Tensors] = {}
    for path, (tensors, spec, _, weight, *_) in layers.items():
        kept = {_U_KEPT} if spec.out_features > spec.fan_in else {_V_KEPT}
        rank = tensors[_S].numel()
        if rank == min(spec.out_features, spec.fan_in) or spec.out_features == spec.fan_in:
            kept = set()
        is_whole = {_U_START, _S_START, _V_START, *kept} <= tensors.keys()
        found[path] = tensors if is_whole else {**_osf_start(weight().flatten(1).float(), rank), **tensors}
    return found


def _osf_start(matrix: Tensor, rank: int) -> dict[str, Tensor]:
    """Return the tensors of OSF that are not trained: the `rank` smallest components, and vectors of all others."""
    left, values, right = decomposed(matrix)
    kept = len(values) - rank
    found = {_U_START: left[:, kept:], _S_START: values[kept:], _V_START: right[kept:]}
    # In a square factor, what is orthogonal to the kept vectors is the span of the others.
    if left.shape[0] > left.shape[1] and kept:
        found[_U_KEPT] = left[:, :kept]
    if right.shape[1] > right.shape[0] and kept:
        found[_V_KEPT] = right[:kept]
    return {name: tensor.contiguous() for name, tensor in found.items()}


def prepare_osf(tensors: Tensors, spec: LayerSpec, surroundings: Surroundings) -> Tensors:
    """Return the change as two factors, or as a matrix if that is cheaper."""
    u, v = promoted(tensors[_U]), promoted(tensors[_V])
    start = tuple(promoted(tensors[name]) for name in (_U_START, _S_START, _V_START))
    if torch.is_grad_enabled() and u.requires_grad:
        u = _projected(u.t(), tensors.get(_U_KEPT), start[0]).t()
        v = _projected(v, _transposed(tensors.get(_V_KEPT)), start[2].t())
    left, left_start = u * promoted(tensors[_S]), start[0] * start[1]
    parts = (left - left_start, left_start), (v, v - start[2])
    dtype = tensors[_U].dtype
    if is_matrix(tensors, spec):
        delta = torch.addmm(parts[0][0] @ parts[1][0], parts[0][1], parts[1][1])
        return {_DELTA: delta.view(spec.weight_shape).to(dtype)}
    return {_UP: torch.cat(parts[0], 1).to(dtype), _DOWN: flat(torch.cat(parts[1]).to(dtype), spec)}


def is_matrix(tensors: Tensors, spec: LayerSpec) -> bool:
    """Return whether the change of an OSF is cheaper as a matrix than as two factors."""
    return 2 * tensors[_S].numel() * (spec.out_features + spec.fan_in) >= spec.out_features * spec.fan_in


def _transposed(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.t()


def _projected(rows: Tensor, kept: Tensor | None, start: Tensor) -> Tensor:
    """Return the rows unchanged, with gradients that are orthogonal to the kept vectors.

    Args:
        rows: the vectors that are trained, (rank, n).
        kept: the vectors that are kept, (n, kept); `None` if `start` and they span everything.
        start: the initial values of `rows`, (n, rank).
    """
    basis = start if kept is None else kept.to(start)
    return cast(Tensor, _Projected.apply(rows, basis, kept is None))


class _Projected(torch.autograd.Function):
    """The identity, with gradients projected into the span of a basis or out of it."""

    @staticmethod
    def forward(rows: Tensor, basis: Tensor, inside: bool) -> Tensor:
        """Return the rows."""
        return rows.view_as(rows)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Save the basis for `backward`."""
        _, basis, ctx.inside = inputs
        ctx.save_for_backward(basis)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        """Return the projected gradient."""
        (grad,), (basis,) = grad_outputs, ctx.saved_tensors
        inside = grad @ basis @ basis.t()
        return inside if ctx.inside else grad - inside, None, None


def fit_tlora(tensors: Tensors, spec: LayerSpec) -> dict[str, Tensor]:
    """Check the tensors of a file and return them in the shapes of the table above."""
    rank = rank_of(tensors, _Q, 0)
    shapes = {_P: (spec.out_features, rank), _LAMBDA: (1, rank), _Q: (rank, *spec.weight_shape[1:])}
    start = dict(zip((_P_START, _LAMBDA_START, _Q_START), shapes.values(), strict=True))
    found = checked(tensors, {**shapes, **start, UNTIL: (rank,)}, optional=(*start, UNTIL))
    if UNTIL in found and found[UNTIL].is_floating_point():
        raise AdapterError(f"{UNTIL} has the dtype {found[UNTIL].dtype}, expected whole timesteps")
    return found


def init_tlora(
    spec: LayerSpec, config: TLoRAConfig, *, generator: torch.Generator, weight: Callable[[], Tensor]
) -> dict[str, Tensor]:
    """Return components of the base weight or of a random matrix, twice: to train, and to take out."""
    shape, rank = (spec.out_features, spec.fan_in), config.rank
    if rank > min(shape):
        raise AdapterError(f"rank is {rank}, expected at most {min(shape)}, the rank of the weight")
    matrix = weight().flatten(1) if config.from_weight else torch.randn(shape, generator=generator) / rank
    start = _tlora_start(matrix, spec, rank, config.vectors)
    own = dict(zip((_P, _LAMBDA, _Q), start.values(), strict=True))
    if not config.init:
        own = {name: torch.randn(tensor.shape, generator=generator) for name, tensor in own.items()}
    if config.min_rank is not None:
        if config.min_rank > rank:
            raise AdapterError(f"min_rank is {config.min_rank}, expected at most {rank}, the rank")
        start[UNTIL] = acts_until(rank, config.min_rank, config.alpha_rank_scale)
    return {**{name: tensor.clone() for name, tensor in own.items()}, **start}


def acts_until(rank: int, min_rank: int, exponent: float) -> Tensor:
    """Return the last timestep at which every component acts, (rank,); a number above 1000 if it always does."""
    last = [_ALWAYS if number < min_rank else -1 for number in range(rank)]
    for timestep in range(MOST_NOISE + 1):
        count = int(((MOST_NOISE - timestep) / MOST_NOISE) ** exponent * (rank - min_rank)) + min_rank
        last[min_rank:count] = [timestep] * (count - min_rank)
    return torch.tensor(last, dtype=torch.int32)


def complete_tlora(layers: Mapping[str, Unfinished]) -> dict[str, Tensors]:
    """Return the tensors with components of the base weight: the largest ones, unless a header says otherwise."""
    found: dict[str, Tensors] = {}
    for path, (tensors, spec, settings, weight, *_) in layers.items():
        start, rank, least = STARTS[int(settings["start"])], tensors[_Q].shape[0], int(settings["min_rank"])
        if UNTIL not in tensors and least >= 0:
            until = acts_until(rank, min(least, rank), settings["alpha_rank_scale"])
            tensors = {**tensors, UNTIL: until.to(tensors[_Q].device)}
        found[path] = tensors
        if {_P_START, _LAMBDA_START, _Q_START} <= tensors.keys():
            continue
        if start == "random":
            raise AdapterError(
                "a T-LoRA that was trained with use_data_init=False, whose start is not in the file; it cannot be "
                "loaded, and LyCORIS would take it for one that started from the base weight"
            )
        matrix = weight().flatten(1).float()
        found[path] = {**tensors, **_tlora_start(matrix, spec, rank, start)}
    return found


def stored_tlora(state: LayerState) -> LayerState:
    """Return the content without the settings from which other tensors of it followed."""
    return replace(state, settings={})


def _tlora_start(matrix: Tensor, spec: LayerSpec, rank: int, start: str) -> dict[str, Tensor]:
    """Return the tensors of T-LoRA that are not trained: `rank` components of a matrix.

    Components beyond those of the matrix are zero.
    """
    free = max(0, min(matrix.shape) - rank)
    first = {"middle": free // 2, "last": free}.get(start, 0)
    left, values, right = (
        part.narrow(axis, first, min(rank, part.shape[axis] - first))
        for part, axis in zip(decomposed(matrix), (1, 0, 0), strict=True)
    )
    missing = rank - len(values)
    if missing:
        left, right = torch.nn.functional.pad(left, (0, missing)), torch.nn.functional.pad(right, (0, 0, 0, missing))
        values = torch.nn.functional.pad(values, (0, missing), value=_NEGLIGIBLE)
    return {
        _P_START: left.contiguous(),
        _LAMBDA_START: values.unsqueeze(0).contiguous(),
        _Q_START: flat(right.contiguous(), spec),
    }


def prepare_tlora(tensors: Tensors, spec: LayerSpec, surroundings: Surroundings) -> Tensors:
    """Return the change as two factors."""
    p, p_start = promoted(tensors[_P]), promoted(tensors[_P_START])
    q, q_start = (
        promoted(tensors[values]).t() * promoted(tensors[name]).flatten(1)
        for values, name in ((_LAMBDA, _Q), (_LAMBDA_START, _Q_START))
    )
    up, down = torch.cat([p - p_start, p_start], 1), torch.cat([q, q - q_start])
    dtype = tensors[_P].dtype
    prepared = {_UP: up.to(dtype), _DOWN: flat(down.to(dtype), spec)}
    # Every component is two ranks of the factors.
    return prepared if UNTIL not in tensors else {**prepared, UNTIL: tensors[UNTIL].repeat(2)}


def weightless_tlora(tensors: Tensors) -> str | None:
    """Return why a T-LoRA whose components depend on the timestep changes no weight."""
    return "which of its components act depends on the timestep (min_rank)" if UNTIL in tensors else None


def as_low_rank(tensors: Tensors, spec: LayerSpec) -> tuple[Tensor, Tensor] | None:
    """Return `down` and `up`; `None` for a change that is cheaper as a matrix, or depends on the timestep."""
    return None if _DELTA in tensors or UNTIL in tensors else (tensors[_DOWN], tensors[_UP])


def delta_weight(tensors: Tensors, spec: LayerSpec) -> Tensor:
    """Return the change in the canonical weight shape."""
    refuse_weightless(TLORA, tensors)
    return tensors[_DELTA] if _DELTA in tensors else spec.product(tensors[_DOWN], tensors[_UP])


def delta_output(
    tensors: Tensors, spec: LayerSpec, *, input: Tensor, gate: Tensor, onto: Tensor | None = None
) -> Tensor:
    """Return `onto` plus the gated change."""
    if _DELTA in tensors:
        return spec.dense(input, tensors[_DELTA], gate, onto)
    return spec.low_rank(input, tensors[_DOWN], tensors[_UP], gate, onto)


OSF = AdapterType(
    name="osf",
    tensors=(_U, _S, _V, _U_START, _S_START, _V_START, _U_KEPT, _V_KEPT),
    identified_by=frozenset({_U, _V}),
    config=OSFConfig,
    fixed=frozenset({_U_START, _S_START, _V_START, _U_KEPT, _V_KEPT}),
    fit=fit_osf,
    init=init_osf,
    complete=complete_osf,
    prepare=prepare_osf,
    as_low_rank=as_low_rank,
    delta_weight=delta_weight,
    delta_output=delta_output,
    in_weight=lambda tensors, spec: _DELTA in tensors or (_S in tensors and is_matrix(tensors, spec)),
)

TLORA = AdapterType(
    name="tlora",
    tensors=(_Q, _P, _LAMBDA, _Q_START, _P_START, _LAMBDA_START, UNTIL),
    identified_by=frozenset({_LAMBDA}),
    config=TLoRAConfig,
    settings={"start": 0.0, "min_rank": -1.0, "alpha_rank_scale": 1.0},
    stored_as=stored_tlora,
    fixed=frozenset({_Q_START, _P_START, _LAMBDA_START, UNTIL}),
    weightless=weightless_tlora,
    fit=fit_tlora,
    init=init_tlora,
    complete=complete_tlora,
    rank=lambda tensors: tensors[_Q].shape[0],
    prepare=prepare_tlora,
    as_low_rank=as_low_rank,
    delta_weight=delta_weight,
    delta_output=delta_output,
)
