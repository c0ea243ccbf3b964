"""What a user passes as the source of an adapter, resolved against the models of an owner."""

from collections.abc import Iterable
from dataclasses import replace

import torch

from diffadapt.errors import AdapterError
from diffadapt.files.checkpoint import Checkpoint, Location, Source
from diffadapt.files.read import read
from diffadapt.loading.plan import Plan, plan
from diffadapt.management.owner import Owner
from diffadapt.runtime.bank import bank_of

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
) -> tuple[Checkpoint, Plan]:
    """Read a source and plan it for the present models of `owner`; a finished plan is checked against them.

    Args:
        where: where the file is in a folder or repository.
        components, dtype, device, format: see `loading.plan.plan`.
        name: the name of tokens that have none in the file.
        leaving: the adapter whose place the new one will take.

    Raises:
        AdapterError: a component does not exist, the source cannot be read, `dtype` is not one that adapters compute
            in, or a finished plan is for other models or is loaded already.
    """
    models = owner.models()
    if components is not None:
        components = [components] if isinstance(components, str) else list(components)
        unknown = [component for component in components if component not in models]
        if unknown:
            raise AdapterError(f"components: no {', '.join(unknown)}; the pipeline has {', '.join(models)}")
    if isinstance(source, Plan):
        if components is not None or dtype is not None:
            raise AdapterError("components and dtype were settled by prefetch(); pass them there")
        for component, adapter in source.adapters.items():
            if source.targets[component].model is not models.get(component):
                raise AdapterError(f"it was prefetched for another {component}; call prefetch() on this pipeline")
            bank = bank_of(models[component])
            names = [other for other, loaded in bank.adapters.items() if loaded is adapter] if bank else []
            if names:
                raise AdapterError(f"it is loaded already, as {names[0]!r}; remove that first")
        if not source.tokens:
            return source.checkpoint, source
        # Which tokens are free may have changed.
        checkpoint = source.checkpoint
    else:
        checkpoint = read(source, where)
        if name is not None:
            checkpoint = replace(checkpoint, name=name)
    if dtype is not None and dtype not in _DTYPES:
        raise AdapterError(f"dtype is {dtype}; adapters compute in float16, bfloat16, float32 or float64")
    return checkpoint, plan(
        checkpoint,
        models,
        components=components,
        dtype=dtype,
        device=device,
        tokenizers=owner.tokenizers(),
        leaving=leaving,
        format=format,
    )
