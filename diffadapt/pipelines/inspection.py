"""Explain a file without loading it."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from diffadapt.files.checkpoint import Location, Source
from diffadapt.files.read import read
from diffadapt.loading.conversion import planned_on
from diffadapt.loading.plan import plan
from diffadapt.loading.report import Report
from diffadapt.pipelines.components import components_of


def inspect(
    source: Source,
    target: Any = None,
    *,
    format: str | None = None,
    family: str | None = None,
    weight_name: str | None = None,
    subfolder: str | None = None,
) -> Report:
    """What is in a file and where it would go. Reads headers only and touches no model.

    Args:
        source: as for `pipe.load_adapter`.
        target: a pipeline, or `{component: model}`, also on the meta device; `None` to go by the names alone.

        format: of the file; default what its names tell.
        family: without a target, say where the file would go on the published models of this family ("sdxl", ...).

    Raises:
        AdapterError: the source cannot be read or is in no known format.
    """
    models: Mapping[str, nn.Module] | None = None
    if target is not None:
        models = target if isinstance(target, Mapping) else components_of(target)
    checkpoint = read(source, Location(weight_name, subfolder), headers_only=True)
    if models is None and family is not None:
        planned = planned_on(checkpoint, family, format=format)
    else:
        planned = plan(checkpoint, models, format=format)
    return planned.report(checkpoint.name or "default_0")
