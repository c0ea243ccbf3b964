"""From a file in one format to a file in another, without a pipeline."""

import os
from pathlib import Path

from diffadapt import families
from diffadapt.errors import AdapterError
from diffadapt.families.published import published
from diffadapt.files.checkpoint import Checkpoint, Location, Source
from diffadapt.files.read import read
from diffadapt.files.write import write
from diffadapt.formats import writer
from diffadapt.formats.document import AdapterState
from diffadapt.loading.build import ForWriting
from diffadapt.loading.plan import Plan, plan


def convert(
    source: Source,
    target: str | os.PathLike[str],
    format: str = "diffusers",
    *,
    family: str | None = None,
    source_format: str | None = None,
    weight_name: str | None = None,
    subfolder: str | None = None,
) -> Path:
    """Write what is in a file in another format; names are those of the family's models.

    Tensors keep their dtype. A change that has to be multiplied out, as a LoKr on a layer that is three of the model,
    is computed in float32 and rounded to the file's dtype, as a trainer that saves in it would have done; it stays
    float32 where that loses more than rounding, since products of small numbers vanish in float16.

    Args:
        source: as for `pipe.load_adapter`.
        target: as for `pipe.adapters.save`.
        format: likewise.
        family: of the models that the file is for ("sdxl", "flux", ...); default what its names and shapes tell.
        source_format: of the file; default what its names tell.

    Returns:
        The file written.

    Raises:
        AdapterError: the file's model family cannot be told or is not known here, a tensor cannot be used, or the
            format cannot express what is in the file. Nothing has been written then.
    """
    chosen = writer(format)
    checkpoint = read(source, Location(weight_name, subfolder))
    family = family or families.of_file((key, tuple(tensor.shape)) for key, tensor in checkpoint.tensors.items())
    if family is None:
        raise AdapterError(
            f"{checkpoint.origin}: its names do not tell for which models it is; pass family=, or load it into a "
            "pipeline and save it from there"
        )
    planned = planned_on(checkpoint, family, "whole" if chosen.original(family) else "split", source_format)
    planned.refuse_faults(strict=True)
    layers = {
        component: {path: layer.state for path, layer in found.items()} for component, found in planned.layers.items()
    }
    layouts = {component: families.layout(planned.targets[component]) for component in layers}
    embeddings = {key: vectors for tokens in planned.tokens.values() for key, vectors in tokens.state.items()}
    assert chosen.dump is not None
    state = AdapterState(layers, checkpoint.header.metadata, family, layouts, embeddings)
    return write(target, chosen.dump(state))


def planned_on(
    checkpoint: Checkpoint, family: str, for_writing: ForWriting | None = None, format: str | None = None
) -> Plan:
    """The file on the first of the family's models that has all its layers, or on the one that has most of them."""
    best: Plan | None = None
    for models in published(family):
        planned = plan(checkpoint, models, for_writing=for_writing, format=format)
        if (planned.layers or planned.tokens) and not planned.faults:
            return planned
        if best is None or len(planned.faults) < len(best.faults):
            best = planned
    assert best is not None
    return best
