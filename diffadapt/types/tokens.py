"""Retrained rows of an embedding: `W'[ids] = rows`, all other rows as they are.

This is PEFT's `TrainableTokensConfig` and `trainable_token_indices` (PEFT 0.21.2 `tuners/trainable_tokens/layer.py`):
the tokens that a tokenizer knows already get new vectors. The change `rows - W[ids]` is additive, so strength m means
`W + m (W' - W)`, several adapters on different rows act together, and on the same row their changes add up.

| tensor | shape | |
|---|---|---|
| `token_rows` | (n, width) | the new rows of the weight as the layer stores it, before the layer scales its output |
| `token_ids` | (n) | which rows, int64, each once |

A linear layer that stores its weight as an embedding does, `(vocabulary, width)`, can have new rows, too: the output
layer of a language model, whose rows are the outputs.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from diffadapt.errors import AdapterError
from diffadapt.types.adapter_type import AdapterType, Surroundings, Tensors
from diffadapt.types.config import AdapterConfig
from diffadapt.types.layer_spec import LayerSpec
from diffadapt.types.tensor_ops import add, scaled, shape_of

_SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class TokensConfig(AdapterConfig):
    """Settings of new vectors for tokens that a tokenizer knows already (PEFT's `TrainableTokensConfig`).

    Attributes:
        token_indices: the ids of the tokens, or embedding -> ids. The names of embeddings are path endings, as in
            `target_modules`, which may be left out then.
        target_modules: the embeddings; defaults to the names in `token_indices` or else to the input embedding of the
            model.
        init: with `True` the vectors start as they are in the model, with `False` they are random.
    """

    token_indices: Sequence[int] | Mapping[str, Sequence[int]]

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dropout:
            raise AdapterError("dropout has no effect on the ids of tokens; use module_dropout")
        by_name = self.token_indices if isinstance(self.token_indices, Mapping) else {"": self.token_indices}
        for name, ids in by_name.items():
            _refuse_ids(ids, f"token_indices[{name!r}]" if name else "token_indices")
        if isinstance(self.token_indices, Mapping):
            if not self.token_indices:
                raise AdapterError("token_indices is empty: name at least one embedding with its ids")
            if not self.target_modules:
                object.__setattr__(self, "target_modules", list(self.token_indices))

    def at(self, path: str) -> "TokensConfig":
        """Return the settings of the embedding at `path`, with the ids that it gets."""
        if not isinstance(self.token_indices, Mapping):
            return self
        found = [name for name in self.token_indices if f".{path}".endswith(f".{name}")]
        if not found:
            raise AdapterError(f"{path}: token_indices has no ids for it; it has {', '.join(self.token_indices)}")
        return replace(self, token_indices=list(self.token_indices[max(found, key=len)]))

    def refuse_idle(self, specs: Mapping[str, LayerSpec]) -> None:
        """Raise `AdapterError` if `token_indices` has ids for an embedding that is not among `specs`."""
        names = self.token_indices if isinstance(self.token_indices, Mapping) else ()
        idle = [name for name in names if not any(f".{path}".endswith(f".{name}") for path in specs)]
        if idle:
            raise AdapterError(f"token_indices: {', '.join(map(repr, idle))} is none of {', '.join(specs)}")

    @property
    def _needs_targets(self) -> bool:
        return False


def fit(tensors: Tensors, spec: LayerSpec) -> dict[str, Tensor]:
    """Check the tensors of a file against the vocabulary and the width of the layer."""
    missing = [name for name in ("token_rows", "token_ids") if name not in tensors]
    if missing:
        raise AdapterError(
            f"{missing[0]} is missing: the ids of retrained tokens are in adapter_config.json (token_indices or "
            "trainable_token_indices), which belongs to the file"
            if missing[0] == "token_ids"
            else "token_rows is missing, only token_ids found"
        )
    count, width = _size(spec)
    rows, ids = tensors["token_rows"], tensors["token_ids"]
    if ids.ndim != 1 or ids.is_floating_point() or ids.is_complex() or not len(ids):
        raise AdapterError(f"token_ids has shape {shape_of(ids)} and dtype {ids.dtype}, expected ids (n)")
    if rows.shape != (len(ids), width):
        raise AdapterError(
            f"token_rows has shape {shape_of(rows)}, expected ({len(ids)}, {width}): {len(ids)} ids of this width"
        )
    if not ids.is_meta:
        _refuse_ids(ids.tolist(), "token_ids")
        _refuse_beyond(ids, count)
    return {"token_rows": rows, "token_ids": ids.long()}


def geometry(tensors: Tensors) -> LayerSpec:
    """Return the spec of an embedding that has the ids and the width of the rows."""
    rows, ids = tensors.get("token_rows"), tensors.get("token_ids")
    if rows is None or rows.ndim != 2:
        return LayerSpec("embedding", 0, 0, transposed=True)
    count = len(rows) if ids is None or ids.is_meta or not ids.numel() else int(ids.max()) + 1
    return LayerSpec("embedding", rows.shape[1], count, transposed=True)


def init(
    spec: LayerSpec, config: TokensConfig, *, generator: torch.Generator, weight: Callable[[], Tensor]
) -> dict[str, Tensor]:
    """Return the rows of the base weight, or random ones."""
    count, width = _size(spec)
    assert not isinstance(config.token_indices, Mapping)
    ids = torch.tensor(list(config.token_indices))
    _refuse_beyond(ids, count)
    rows = _base_rows(weight, spec, ids) if config.init else torch.randn(len(ids), width, generator=generator)
    return {"token_rows": rows.clone(), "token_ids": ids}


def prepare(tensors: Tensors, spec: LayerSpec, surroundings: Surroundings) -> Tensors:
    """Return `change`, which is `rows - W[ids]`, and `token_ids`."""
    rows, ids = tensors["token_rows"], tensors["token_ids"].long()
    promoted = rows.to(torch.promote_types(rows.dtype, torch.float32))
    base = _base_rows(surroundings.weight, spec, ids)
    return {"change": promoted - base.to(promoted), "token_ids": ids}


def delta_weight(tensors: Tensors, spec: LayerSpec) -> Tensor:
    """Return zeros with the change of the retrained rows."""
    change = tensors["change"]
    stored = change.new_zeros(_size(spec)).index_copy(0, tensors["token_ids"], change)
    return spec.to_stored(stored)


def delta_output(
    tensors: Tensors, spec: LayerSpec, *, input: Tensor, gate: Tensor, onto: Tensor | None = None
) -> Tensor:
    """Return `onto` plus the gated change at the retrained ids: of the input, or of the output of a linear layer."""
    change, ids = tensors["change"], tensors["token_ids"]
    if spec.kind == "linear":
        logits = scaled(F.linear(input, change.to(input.dtype)), gate)
        total = logits.new_zeros(*input.shape[:-1], spec.out_features) if onto is None else onto
        in_place = not torch.is_grad_enabled() and total.is_contiguous()
        add_at = total.index_add_ if in_place else total.index_add
        return add_at(total.ndim - 1, ids, logits.to(total.dtype))
    is_one = input.unsqueeze(-1) == ids
    looked_up = F.embedding(is_one.int().argmax(-1), change)
    looked_up = scaled(looked_up if spec.output_scale == 1.0 else looked_up * spec.output_scale, gate)
    product = torch.where(is_one.any(-1, keepdim=True), looked_up, 0.0)
    return product if onto is None else add(product, onto)


def as_low_rank(tensors: Tensors, spec: LayerSpec) -> tuple[Tensor, Tensor]:
    """Return the change and a matrix that has a one for each id, as `down` and `up` of a linear layer, or reversed."""
    change, ids = tensors["change"], tensors["token_ids"]
    ones = change.new_zeros(len(ids), _size(spec)[0]).scatter(1, ids.unsqueeze(1), 1.0)
    return (change, ones.t()) if spec.kind == "linear" else (ones, change.t())


def _size(spec: LayerSpec) -> tuple[int, int]:
    """Return the number of rows and columns of the weight as the layer stores it."""
    if spec.kind == "linear":
        if spec.transposed:
            raise AdapterError("it stores its weight as (in, out), so that tokens are no rows of it")
        return spec.out_features, spec.in_features
    return spec.in_features, spec.out_features


def _base_rows(weight: Callable[[], Tensor], spec: LayerSpec, ids: Tensor) -> Tensor:
    """Return rows of the base weight. Other rows are read only if `weight` cannot tell them apart."""
    by_row: Any = getattr(weight, "rows", None)
    return by_row(ids) if by_row is not None else spec.to_stored(weight())[ids]


def _refuse_ids(ids: Sequence[int], name: str) -> None:
    """Raise `AdapterError` unless these are whole numbers from 0 on, at least one and each only once."""
    if isinstance(ids, str) or not isinstance(ids, Sequence) or not ids:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise AdapterError(f"{name} is {ids!r}, expected a list of at least one token id")
    for index in ids:
        if isinstance(index, bool) or not isinstance(index, int) or index < 0:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise AdapterError(f"{name} has {index!r}, expected ids of tokens: whole numbers from 0 on")
    twice = sorted({index for index in ids if ids.count(index) > 1}) if len(set(ids)) < len(ids) else []
    if twice:
        raise AdapterError(f"{name} has {', '.join(map(str, twice[:_SHOWN]))} more than once; every id has one vector")


def _refuse_beyond(ids: Tensor, count: int) -> None:
    """Raise `AdapterError` if there are ids that the weight has no row for."""
    beyond = ids[ids >= count].tolist()
    if beyond:
        raise AdapterError(
            f"{', '.join(map(str, beyond[:_SHOWN]))} is beyond the embedding, which has {count} rows; new words get "
            "vectors with add_tokens()"
        )


TOKENS = AdapterType(
    name="tokens",
    tensors=("token_rows", "token_ids"),
    identified_by=frozenset({"token_rows", "token_ids"}),
    fixed=frozenset({"token_ids"}),
    config=TokensConfig,
    fit=fit,
    init=init,
    geometry=geometry,
    prepare=prepare,
    reads_weight=lambda tensors: True,
    is_stored=True,
    delta_weight=delta_weight,
    delta_output=delta_output,
    as_low_rank=as_low_rank,
    layers=frozenset({"linear", "embedding"}),
)
