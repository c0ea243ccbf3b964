"""Save a loaded adapter to a file."""

import os
from pathlib import Path

from diffadapt import families
from diffadapt.files.write import write
from diffadapt.formats import writer
from diffadapt.formats.document import AdapterState
from diffadapt.management.owner import Owner
from diffadapt.runtime.targets import Targets


def save_adapter(owner: Owner, name: str, path: str | os.PathLike[str], format: str) -> Path:
    """Write adapter `name` to a file in `format` and return the path; see `Adapters.save`."""
    loaded, models = owner.snapshot()[name], owner.models()
    dump = writer(format).dump
    assert dump is not None
    layers = {
        component: {at: layer.state for at, layer in adapter.layers.items()}
        for component, adapter in loaded.components.items()
        if adapter.layers
    }
    embeddings = {key: vectors for learned in loaded.learned for key, vectors in learned.state.items()}
    layouts = {component: families.layout(Targets(models[component])) for component in layers}
    return write(path, dump(AdapterState(layers, loaded.metadata, families.of_models(models), layouts, embeddings)))
