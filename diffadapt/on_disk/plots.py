"""A picture of where an adapter file acts."""

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from diffadapt import families
from diffadapt.errors import AdapterError
from diffadapt.files.checkpoint import Location, Source
from diffadapt.files.read import read
from diffadapt.loading.conversion import planned_on
from diffadapt.loading.heat_map import HeatMap
from diffadapt.loading.plan import plan
from diffadapt.to_lora.sizes import change_sizes


def plot_sizes(
    source: Source,
    target: str | os.PathLike[str],
    *,
    family: str | None = None,
    models: Mapping[str, nn.Module] | None = None,
    weight_name: str | None = None,
    subfolder: str | None = None,
) -> Path:
    """Draw the size of an adapter's change by block and projection as a picture, and return its path.

    Sizes are root mean squares of the change of a weight, since a file does not have the weights themselves.

    Args:
        source: the adapter: a file, folder, hub id or state dict.
        target: the picture to write; its suffix says the format (.png, .svg, .pdf).
        family, models, weight_name, subfolder: as for `convert`.

    Raises:
        AdapterError: matplotlib is not installed, the source cannot be read, or the change of all of its layers depends
            on the weights of the model.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise AdapterError("a plot needs matplotlib; pip install matplotlib, or diffadapt[plot]") from error
    checkpoint = read(source, Location(weight_name, subfolder))
    family = family or families.of_file((key, tuple(tensor.shape)) for key, tensor in checkpoint.tensors.items())
    if models is None and family is not None:
        planned = planned_on(checkpoint, family, "split")
    else:
        planned = plan(checkpoint, models, for_writing="split")
    planned.refuse_faults(strict=False)
    sizes = change_sizes(planned.adapters)
    if not sizes.by_layer:
        raise AdapterError(
            f"{checkpoint.origin}: what its layers change depends on the weights of the model; load it into a pipeline "
            "and show pipe.adapters in a notebook"
        )
    found = HeatMap.of(sizes.by_layer, "root mean square of the change")
    values = torch.full((len(found.rows), len(found.columns)), torch.nan)
    for row, name in enumerate(found.rows):
        for column, projection in enumerate(found.columns):
            values[row, column] = found.values.get((name, projection), torch.nan)
    figure = Figure(figsize=(3 + 0.45 * len(found.columns), 2 + 0.22 * len(found.rows)), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(values.numpy(), cmap="Blues", aspect="auto", vmin=0)
    axes.set_xticks(range(len(found.columns)), found.columns, rotation=90)
    axes.set_yticks(range(len(found.rows)), found.rows)
    axes.set_title(checkpoint.name or "state dict")
    figure.colorbar(image, label=found.caption)
    path = Path(target).expanduser()
    try:
        figure.savefig(path)
    except ValueError as error:
        raise AdapterError(f"{path}: {error}") from error
    return path
