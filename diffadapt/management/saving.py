"""Save a loaded adapter to a file."""

import os
from pathlib import Path

from diffadapt import families
from diffadapt.files.write import write
from diffadapt.formats import writer
from diffadapt.formats.document import AdapterState
from diffadapt.formats.header_options import marked
from diffadapt.management.owner import Owner
from diffadapt.runtime.targets import Targets
from diffadapt.runtime.ties import is_tied, untied_paths


def save_adapter(owner: Owner, name: str, path: str | os.PathLike[str], format: str) -> Path:
    """Write adapter `name` to a file in `format` and return the path; see `Adapters.save`."""
    loaded, models = owner.snapshot()[name], owner.models()
    dump = writer(format).dump
    assert dump is not None
    targets = {component: Targets(models[component]) for component, one in loaded.components.items() if one.layers}
    adapters = {component: loaded.components[component].layers for component in targets}
    state = AdapterState(
        {
            component: {
                at: layers[at].state for at in targets[component].in_order(layers) if layers[at].twin_of is None
            }
            for component, layers in adapters.items()
        },
        loaded.metadata,
        families.of_models(models),
        {component: families.written_layout(found) for component, found in targets.items()},
        {key: vectors for learned in loaded.learned for key, vectors in learned.state.items()},
        any(map(is_tied, adapters.values())),
        frozenset(f"{c}.{at}" for c, found in targets.items() for at in untied_paths(found, adapters[c])),
        {
            component: {
                at: (list(layer.host._parameters).index(layer.parameter), layer.spec.inputs_first)
                for at, layer in layers.items()
                if layer.spec.kind == "parameter"
            }
            for component, layers in adapters.items()
        },
        Path(path).expanduser().stem,
        {component: families.fused_layout(found) for component, found in targets.items()},
    )
    return write(path, marked(dump(state), state.is_tied))
