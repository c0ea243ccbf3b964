"""The models of a saved pipeline without their weights, for code that needs layers only."""

import json
import os
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffadapt.errors import AdapterError
from diffadapt.files.folder import read_config


def models_of(folder: str | os.PathLike[str]) -> dict[str, nn.Module]:
    """Return component -> model on the meta device, made from the configs in the folder of a saved pipeline.

    Raises:
        AdapterError: the folder holds no pipeline, or none of its models can be made.
    """
    path = Path(folder).expanduser()
    index = read_config(path / "model_index.json")
    if index is None:
        raise AdapterError(f"{path}: no saved pipeline there, expected a folder with a model_index.json")
    found: dict[str, nn.Module] = {}
    for component, entry in index.items():
        config = read_config(path / component / "config.json")
        if isinstance(entry, list) and len(entry) == 2 and config is not None:  # type: ignore[arg-type]
            model = _model(str(entry[0]), str(entry[1]), config)  # type: ignore[index]
            if model is not None:
                found[component] = model
    if not found:
        raise AdapterError(f"{path}: none of its components is a model that can be made from its config")
    return found


def model_of(folder: str | os.PathLike[str]) -> nn.Module | None:
    """Return the model on the meta device that the `config.json` in a folder describes; `None` if there is none."""
    config = read_config(Path(folder).expanduser() / "config.json")
    if config is None:
        return None
    if "_class_name" in config:
        return _model("diffusers", str(config["_class_name"]), config)
    classes = config.get("architectures") or [""]
    return _model("transformers", str(classes[0]), config)


def _model(library: str, name: str, config: Mapping[str, Any]) -> nn.Module | None:
    """Return a model without weights, or `None` if the class is no model of diffusers or transformers."""
    if library not in ("diffusers", "transformers"):
        return None
    model_class = getattr(import_module(library), name, None)
    if not isinstance(model_class, type) or not issubclass(model_class, nn.Module):
        return None
    with torch.device("meta"):
        if library == "diffusers":
            return model_class.from_config(dict(config))  # type: ignore[attr-defined]
        settings = model_class.config_class.from_dict(json.loads(json.dumps(dict(config))))  # type: ignore[attr-defined]
        return model_class(settings)
