"""LoRA that starts with a part of the base weight, and whose change is the difference to that start.

With the start `B0 A0` (PiSSA, OLoRA; see `starts.py`), which training begins with,

    W' = W + scale * (B A - B0 A0) = W + scale * [B - B0, B0] [A; A - A0]

The papers subtract the start from the base weight instead, which comes to the same. Here the base stays as it is, and
several such adapters can be on one layer. Both blocks of the second form are exactly zero at the start. A file has that
form, a plain LoRA of twice the rank, which any program reads.

| tensor | shape |
|---|---|
| `lora_down` | (rank, in, *kernel) |
| `lora_up` | (out, rank) |
| `lora_bias` | (out) |
| `start_down`, not trained | as `lora_down` |
| `start_up`, not trained | as `lora_up` |
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from diffadapt.errors import AdapterError
from diffadapt.types import lora
from diffadapt.types.adapter_type import AdapterType, Surroundings, Tensors
from diffadapt.types.data_starts import SUBTRACTED
from diffadapt.types.layer_spec import LayerSpec
from diffadapt.types.layer_state import LayerState
from diffadapt.types.lora import LoraConfig, start_from_data
from diffadapt.types.starts import is_start, start_of_weight

_DOWN, _UP = "start_down", "start_up"


def fit(tensors: Tensors, spec: LayerSpec) -> dict[str, Tensor]:
    """Check the trained factors and the start as those of a LoRA, and return them."""
    start = {"lora_down": tensors[_DOWN], "lora_up": tensors[_UP]}
    fitted = lora.fit({name: tensor for name, tensor in tensors.items() if name not in (_DOWN, _UP)}, spec)
    fitted_start = lora.fit(start, spec)
    return {**fitted, _DOWN: fitted_start["lora_down"], _UP: fitted_start["lora_up"]}


def init(
    spec: LayerSpec, config: LoraConfig, *, generator: torch.Generator, weight: Callable[[], Tensor]
) -> dict[str, Tensor]:
    """Return the start twice: as the factors to train, and as what is subtracted."""
    if spec.groups > 1 or config.use_tucker:
        what = "a grouped convolution" if spec.groups > 1 else "a Tucker core"
        raise AdapterError(f"init={config.init!r} has no meaning for {what}; exclude the layer, or use init=True")
    if config.init in SUBTRACTED:
        return _with_start(spec, config, *start_from_data(config, spec))
    matrix = weight().flatten(1)
    most = min(matrix.shape)
    if config.rank > most:
        raise AdapterError(
            f"rank is {config.rank}, expected at most {most}, the rank of the weight, with init={config.init!r}"
        )
    scale = (config.alpha_of() or float(config.rank)) / config.rank
    if scale < 0:
        raise AdapterError(f"alpha is {config.alpha}, expected a positive number with init={config.init!r}")
    matrix = matrix if matrix.dtype == torch.float64 else matrix.float()
    down, up = start_of_weight(str(config.init), matrix, config.rank, scale, generator)
    return _with_start(spec, config, down.reshape(config.rank, *spec.weight_shape[1:]).float(), up.float())


def _with_start(spec: LayerSpec, config: LoraConfig, down: Tensor, up: Tensor) -> dict[str, Tensor]:
    tensors = {"lora_down": down.contiguous(), "lora_up": up.contiguous(), _DOWN: down.clone(), _UP: up.clone()}
    if config.bias:
        if spec.kind == "embedding":
            raise AdapterError("an embedding has no bias; set bias=False or exclude it")
        tensors["lora_bias"] = torch.zeros(spec.out_features)
    return tensors


def prepare(tensors: Tensors, spec: LayerSpec, surroundings: Surroundings) -> dict[str, Tensor]:
    """Return the difference to the start as the tensors of a LoRA of twice the rank."""
    down, up, start_down, start_up = (tensors[name] for name in ("lora_down", "lora_up", _DOWN, _UP))
    factors = {
        "lora_down": torch.cat([down, down - start_down]),
        "lora_up": torch.cat([up - start_up, start_up], dim=1),
    }
    return factors if "lora_bias" not in tensors else {**factors, "lora_bias": tensors["lora_bias"]}


def rows(tensors: Tensors, spec: LayerSpec, rows: Sequence[range]) -> dict[str, Tensor] | None:
    """Return the given rows of both `up` factors and of the bias."""
    return {
        name: torch.cat([tensor[part.start : part.stop] for part in rows])
        if name in (_UP, "lora_up", "lora_bias")
        else tensor
        for name, tensor in tensors.items()
    }


def stored_as(state: LayerState) -> LayerState:
    """Return the content of a layer as a plain LoRA of twice the rank, with the same scale."""
    surroundings = Surroundings(state.settings, state.scale, lambda: torch.empty(0))
    tensors = prepare(state.tensors, LayerSpec("linear", 0, 0), surroundings)
    return replace(
        state,
        type="lora",
        tensors={name: tensor.detach() for name, tensor in tensors.items()},
        alpha=None if state.alpha is None else 2 * state.alpha,
        rank=None if state.rank is None else 2 * state.rank,
    )


STARTED_LORA = AdapterType(
    name="started_lora",
    tensors=("lora_down", "lora_up", "lora_bias", _DOWN, _UP),
    identified_by=frozenset({_DOWN, _UP}),
    config=LoraConfig,
    selects=lambda config: is_start(config.init) or config.init in SUBTRACTED,
    stored_as=stored_as,
    fixed=frozenset({_DOWN, _UP}),
    fit=fit,
    init=init,
    rank=lora.rank,
    geometry=lora.geometry,
    prepare=prepare,
    delta_weight=lora.delta_weight,
    delta_bias=lora.delta_bias,
    delta_output=lora.delta_output,
    as_low_rank=lora.as_low_rank,
    rows=rows,
    columns={"lora_down": 1, _DOWN: 1},
)
