"""From a file in one format to a file in another, without a pipeline."""

import os
from pathlib import Path

from diffadapt import families
from diffadapt.errors import AdapterError
from diffadapt.families.published import models_of
from diffadapt.formats import writer
from diffadapt.io import Location, Source, read, write
from diffadapt.load import plan
from diffadapt.state import AdapterState
from diffadapt.targets import Targets


def convert(
    source: Source,
    target: str | os.PathLike[str],
    format: str = "diffusers",
    *,
    weight_name: str | None = None,
    subfolder: str | None = None,
) -> Path:
    """Write what is in a file in another format. Tensors keep their dtype; names are those of the family's models.

    Args:
        source: as for `pipe.load_adapter`.
        target: as for `pipe.adapters.save`.
        format: likewise.

    Returns:
        The file written.

    Raises:
        AdapterError: the file's model family cannot be told or is not known here, a tensor cannot be used, or the
            format cannot express what is in the file. Nothing has been written then.
    """
    chosen = writer(format)
    checkpoint = read(source, Location(weight_name, subfolder))
    family = families.of_file((key, tuple(tensor.shape)) for key, tensor in checkpoint.tensors.items())
    if family is None:
        raise AdapterError(
            f"{checkpoint.origin}: its names do not tell for which models it is; load it into a pipeline and save it "
            "from there"
        )
    models = models_of(family)
    planned = plan(checkpoint, models, for_writing="whole" if chosen.original(family) else "split")
    planned.refuse_faults(strict=True)
    layers = {
        component: {path: layer.state for path, layer in found.items()} for component, found in planned.layers.items()
    }
    layouts = {component: families.layout(Targets(models[component])) for component in layers}
    embeddings = {key: vectors for tokens in planned.tokens.values() for key, vectors in tokens.state.items()}
    assert chosen.dump is not None
    state = AdapterState(layers, checkpoint.header.metadata, family, layouts, embeddings)
    return write(target, chosen.dump(state))
