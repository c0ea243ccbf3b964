"""Conversion of a file from one format to another, without a pipeline."""

import os
from collections.abc import Mapping
from pathlib import Path

from torch import nn

from diffadapt import families
from diffadapt.errors import AdapterError
from diffadapt.families.published import published
from diffadapt.files.checkpoint import Checkpoint, Location, Source
from diffadapt.files.read import read
from diffadapt.files.write import write
from diffadapt.formats import writer
from diffadapt.formats.document import AdapterState
from diffadapt.formats.header_options import is_tied, marked
from diffadapt.loading.build import ForWriting
from diffadapt.loading.plan import Plan, plan


def convert(
    source: Source,
    target: str | os.PathLike[str],
    format: str = "diffusers",
    *,
    family: str | None = None,
    models: Mapping[str, nn.Module] | None = None,
    source_format: str | None = None,
    weight_name: str | None = None,
    subfolder: str | None = None,
) -> Path:
    """Write the content of a file in another format, with the layer names of its family's models.

    Tensors keep their dtype. A change that has to be multiplied out, such as a LoKr on a layer that is three in the
    model, is computed in float32 and rounded to the file's dtype, as a trainer that saves in that dtype would do.
    It stays in float32 if it would lose more than rounding does, since products of small numbers vanish in float16.

    Args:
        source: the file, folder, hub id or state dict to read, as for `pipe.load_adapter`.
        target: the file or folder to write, as for `pipe.adapters.save`.
        format: the format to write, as for `pipe.adapters.save`.
        family: the family of the models that the file is for ("sdxl", "flux", ...); defaults to the one recognised from
            its names and shapes.
        models: the models that the file is for, by component, also on the meta device; defaults to the published ones
            of the family.
        source_format: the format of the file; defaults to the one that its names match.
        weight_name: the name of the file in a folder or on the hub, as for `pipe.load_adapter`.
        subfolder: the subfolder that the file is in, as for `pipe.load_adapter`.

    Returns:
        The path of the file written.

    Raises:
        AdapterError: the family is unknown, a tensor cannot be used, or the format cannot express the content of the
            file. Nothing has been written then.
    """
    chosen = writer(format)
    checkpoint = read(source, Location(weight_name, subfolder))
    if models is not None:
        family = families.of_models(models)
    else:
        family = family or families.of_file((key, tuple(tensor.shape)) for key, tensor in checkpoint.tensors.items())
    if family is None:
        raise AdapterError(
            f"{checkpoint.origin}: its names do not tell for which models it is; pass family=, or load it into a "
            "pipeline and save it from there"
        )
    for_writing: ForWriting = "whole" if chosen.original(family) else "split"
    if models is None:
        planned = planned_on(checkpoint, family, for_writing, source_format)
    else:
        planned = plan(checkpoint, models, for_writing=for_writing, format=source_format)
    planned.refuse_faults(strict=True, for_writing=True)
    layers = {
        component: {path: found[path].state for path in planned.targets[component].in_order(found)}
        for component, found in planned.layers.items()
    }
    layouts, fused = (
        {component: find(planned.targets[component]) for component in layers}
        for find in (families.written_layout, families.fused_layout)
    )
    embeddings = {key: vectors for tokens in planned.tokens.values() for key, vectors in tokens.state.items()}
    assert chosen.dump is not None
    name = Path(target).expanduser().stem
    state = AdapterState(layers, checkpoint.header.metadata, family, layouts, embeddings, name=name, fused=fused)
    return write(target, marked(chosen.dump(state), is_tied(checkpoint.header)))


def planned_on(
    checkpoint: Checkpoint, family: str, for_writing: ForWriting | None = None, format: str | None = None
) -> Plan:
    """Return the plan for the published models of a family: the first without faults, or else the one with the fewest.

    Args:
        checkpoint: the content of the file.
        family: the name of the family.
        for_writing, format: see `plan`.
    """
    best: Plan | None = None
    for models in published(family):
        planned = plan(checkpoint, models, for_writing=for_writing, format=format)
        if (planned.layers or planned.tokens) and not planned.faults and not planned.lost:
            return planned
        if best is None or (len(planned.faults), len(planned.lost)) < (len(best.faults), len(best.lost)):
            best = planned
    assert best is not None
    return best
