"""Plan what users pass as the source of an adapter for the models of an owner."""

from collections.abc import Iterable
from dataclasses import replace

import torch

from diffadapt.errors import AdapterError
from diffadapt.files.checkpoint import Location, Source
from diffadapt.files.read import read
from diffadapt.loading.plan import Plan, plan
from diffadapt.management.owner import Owner
from diffadapt.runtime.bank import bank_of
from diffadapt.runtime.inference_mode import ordinary_tensors

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def plan_source(
    owner: Owner,
    source: Source | Plan,
    *,
    where: Location | None = None,
    components: str | Iterable[str] | None = None,
    dtype: torch.dtype | None = None,
    name: str | None = None,
    device: torch.device | None = None,
    leaving: str | None = None,
    format: str | None = None,
) -> Plan:
    """Read a source and plan it for the present models of `owner`. A finished plan is checked against the models.

    Args:
        where: where the file is in its folder or repository.
        components: use these components only and ignore the rest of the file; `None` for all.
        dtype: dtype of the adapter's parameters; `None` for the dtype each model computes in.
        name: the name of a learned token for which the file has none.
        device: device of the adapter's parameters; `None` for where each model computes.
        leaving: the loaded adapter that the new one will replace.
        format: format of the file; `None` to recognise it.

    Raises:
        AdapterError: a component does not exist, the source cannot be read, adapters cannot compute in `dtype`, or a
            finished plan is for other models or is loaded already.
    """
    models = owner.models()
    if components is not None:
        components = [components] if isinstance(components, str) else list(components)
        unknown = [component for component in components if component not in models]
        if unknown:
            raise AdapterError(f"components: no {', '.join(unknown)}; the pipeline has {', '.join(models)}")
    if isinstance(source, Plan):
        if components is not None or dtype is not None:
            raise AdapterError("components and dtype of a prefetched adapter are fixed; pass them to prefetch()")
        _refuse_unusable(owner, source)
        if not source.tokens:
            return source
        # Plan again: other tokens may be free in the tokenizers now.
        checkpoint = source.checkpoint
    else:
        checkpoint = read(source, where)
        if name is not None:
            checkpoint = replace(checkpoint, name=name)
    if dtype is not None and dtype not in _DTYPES:
        raise AdapterError(f"dtype is {dtype}; adapters compute in float16, bfloat16, float32 or float64")
    planned = plan(
        checkpoint,
        models,
        components=components,
        dtype=dtype,
        device=device,
        tokenizers=owner.tokenizers(),
        leaving=leaving,
        format=format,
        empty=owner.empty(),
    )
    if not owner.feeds_control and any(layer.widens for found in planned.layers.values() for layer in found.values()):
        raise AdapterError(
            f"{checkpoint.origin}: a control LoRA, which reads a control image that this pipeline does not feed; load "
            "it into a control pipeline: diffusers.FluxControlPipeline.from_pipe(pipe)"
        )
    return planned


def prefetch_source(
    owner: Owner,
    source: Source | Plan,
    *,
    where: Location | None,
    components: Iterable[str] | None,
    strict: bool,
    dtype: torch.dtype | None,
    format: str | None = None,
) -> Plan:
    """Read a source and plan it in CPU memory; see `Adapters.prefetch`."""
    cpu = torch.device("cpu")
    with ordinary_tensors():
        planned = plan_source(owner, source, where=where, components=components, dtype=dtype, device=cpu, format=format)
    planned.refuse_faults(strict)
    for component, adapter in planned.adapters.items():
        adapter.train(planned.targets[component].model.training)
    return planned


def located(where: Location | None, weight_name: str | None, subfolder: str | None) -> Location:
    """Return where a file is; `weight_name` and `subfolder` take precedence over those of `where`."""
    found = where or Location()
    return replace(found, weight_name=weight_name or found.weight_name, subfolder=subfolder or found.subfolder)


def _refuse_unusable(owner: Owner, planned: Plan) -> None:
    """Raise `AdapterError` if a finished plan is for other models than those of `owner`, or is loaded already."""
    models = owner.models()
    for component, adapter in planned.adapters.items():
        if planned.targets[component].model is not models.get(component):
            raise AdapterError(f"the adapter was prefetched for another {component}; call prefetch() on this pipeline")
        bank = bank_of(models[component])
        names = [name for name, attached in bank.adapters.items() if attached is adapter] if bank else []
        if names:
            raise AdapterError(f"the prefetched adapter is loaded already, as {names[0]!r}; remove that first")
