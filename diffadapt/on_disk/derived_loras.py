"""Plain LoRAs made from adapter files: smaller ones, and several in one."""

import os
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from diffadapt import families
from diffadapt.errors import AdapterError
from diffadapt.files.checkpoint import Source
from diffadapt.files.read import read
from diffadapt.files.write import write
from diffadapt.formats import writer
from diffadapt.formats.document import AdapterState
from diffadapt.loading.conversion import planned_on
from diffadapt.loading.plan import Plan, plan
from diffadapt.on_disk.extraction import layer_state
from diffadapt.runtime.adapter import Adapter
from diffadapt.to_lora.change import WeightedLayer
from diffadapt.to_lora.combine import Combination
from diffadapt.to_lora.derive import Maker, conversion, stored_loras
from diffadapt.to_lora.report import Conversion


def resize(
    source: Source,
    target: str | os.PathLike[str],
    *,
    rank: int | None = None,
    energy: float | None = None,
    format: str = "diffusers",
    family: str | None = None,
    models: Mapping[str, nn.Module] | None = None,
) -> Conversion:
    """Write an adapter as a plain LoRA of a smaller rank, as close to it as that rank allows.

    Args:
        source: the adapter: a file, folder, hub id or state dict.
        target: the file to write.
        rank: the largest rank of a layer.
        energy: share of the squared Frobenius norm of each layer's change to keep, in (0, 1]. Without `rank` and
            `energy`, the LoRA is exact.
        format: the format to write, as for `pipe.adapters.save`.
        family: the family of the models; defaults to the one recognised from the names.
        models: component -> model that the file is for, also on the meta device; defaults to the published ones.

    Returns:
        The account of what was kept.

    Raises:
        AdapterError: as `convert`; the change of an adapter depends on the base weight (DoRA, OFT, ...), which a file
            does not have; or a layer cannot be a LoRA. Nothing is written then.
    """
    return _derive([(source, 1.0)], target, conversion(rank, energy), format, family, models)


def combine_files(
    sources: Sequence[tuple[Source, float]],
    target: str | os.PathLike[str],
    combination: Combination | None = None,
    *,
    format: str = "diffusers",
    family: str | None = None,
    models: Mapping[str, nn.Module] | None = None,
) -> Conversion:
    """Write one plain LoRA made from several adapters, as `pipe.adapters.combine` makes it.

    Args:
        sources: pairs of an adapter (a file, folder, hub id or state dict) and its weight.
        target: the file to write.
        combination: the method; defaults to the weighted sum, truncated to the largest rank of an adapter on a layer.
        format, family, models: as for `resize`.

    Returns:
        The account of what was kept.

    Raises:
        AdapterError: see `resize`.
    """
    return _derive(sources, target, combination or Combination(), format, family, models)


@torch.no_grad()
def _derive(
    sources: Sequence[tuple[Source, float]],
    target: str | os.PathLike[str],
    method: Maker | Combination,
    format: str,
    family: str | None,
    models: Mapping[str, nn.Module] | None,
) -> Conversion:
    dump = writer(format).dump
    assert dump is not None
    if not sources:
        raise AdapterError("no adapters to combine; pass at least one pair of a file and a weight")
    plans = [(_planned(source, family, models), weight) for source, weight in sources]
    named = sorted({planned.family or "unknown models" for planned, _ in plans})
    if len(named) > 1:
        raise AdapterError(
            f"the files are for {' and '.join(named)}; only adapters for the same models can be combined"
        )
    by_layer: dict[str, dict[str, list[WeightedLayer]]] = {}
    for planned, weight in plans:
        if weight == 0:
            continue
        for component, layers in planned.layers.items():
            # An adapter gives its layers their gates.
            for path, layer in Adapter(layers).layers.items():
                weighted = WeightedLayer(layer, float(weight), {})
                if weighted.reads_base:
                    raise AdapterError(
                        f"{planned.checkpoint.origin}: what a {layer.adapter_type.name} changes at {component}.{path} "
                        "depends on the weight of the model; load the file into a pipeline and use its "
                        "adapters.to_lora() or combine()"
                    )
                by_layer.setdefault(component, {}).setdefault(path, []).append(weighted)
    make = method.maker(by_layer) if isinstance(method, Combination) else method
    loras, rows = stored_loras(by_layer, make)
    found = {
        component: {
            path: layer_state("lora", tensors, tensors["lora_down"].shape[0], spec)
            for path, (spec, tensors) in layers.items()
        }
        for component, layers in loras.items()
    }
    if not found:
        raise AdapterError("the adapters change no layer, so there is no LoRA to write")
    first = plans[0][0]
    layouts = {component: families.layout(first.targets[component]) for component in found}
    written = write(target, dump(AdapterState(found, {}, first.family, layouts)))
    return Conversion(written.name, rows)


def _planned(source: Source, family: str | None, models: Mapping[str, nn.Module] | None) -> Plan:
    """Return the plan of an adapter file, complete and without learned tokens."""
    checkpoint = read(source)
    if models is not None:
        planned = plan(checkpoint, models, for_writing="split")
    else:
        family = family or families.of_file((key, tuple(tensor.shape)) for key, tensor in checkpoint.tensors.items())
        if family is None:
            raise AdapterError(
                f"{checkpoint.origin}: its names do not tell for which models it is; pass family= or models="
            )
        planned = planned_on(checkpoint, family, "split")
    planned.refuse_faults(strict=True, for_writing=True)
    if planned.tokens:
        raise AdapterError(f"{checkpoint.origin}: learned tokens cannot be in a plain LoRA; save them on their own")
    return planned
