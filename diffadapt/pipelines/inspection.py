"""Explain an adapter file without loading it."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from diffadapt.files.checkpoint import Location, Source
from diffadapt.files.read import read
from diffadapt.loading.conversion import planned_on
from diffadapt.loading.plan import plan
from diffadapt.loading.report import Report
from diffadapt.pipelines.components import components_of, empty_components_of


def inspect(
    source: Source,
    target: Any = None,
    *,
    format: str | None = None,
    family: str | None = None,
    weight_name: str | None = None,
    subfolder: str | None = None,
) -> Report:
    """Explain what is in an adapter file and where it would go. Only headers are read, and no model is changed.

    Args:
        source: path of a file or folder, hub id, or a state dict.
        target: the models the file would be loaded into: a pipeline, or component name -> model, also on the meta
            device. Defaults to `None`: the report goes by the names in the file.
        format: format of the file ("kohya", "diffusers", ...); recognised by default.
        family: without a target, resolve the file against the published models of this family ("sdxl", "flux", ...).
        weight_name: name of the file in a folder or hub repository.
        subfolder: folder of the file in a hub repository or local folder.

    Returns:
        The format, family, adapter types and layers, and why tensors could not be used.

    Raises:
        AdapterError: the source cannot be read, is in no known format, or `family` is unknown.
    """
    models: Mapping[str, nn.Module] | None = None
    empty: Sequence[str] = ()
    if target is not None:
        is_mapping = isinstance(target, Mapping)
        models, empty = (target, ()) if is_mapping else (components_of(target), empty_components_of(target))
    checkpoint = read(source, Location(weight_name, subfolder), headers_only=True)
    if models is None and family is not None:
        planned = planned_on(checkpoint, family, format=format)
    else:
        planned = plan(checkpoint, models, format=format, empty=empty)
    return planned.report(checkpoint.name or "default_0")
