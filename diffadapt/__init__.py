"""Adapters for diffusers pipelines: `import diffadapt`, then `pipe.load_adapter("anything.safetensors")`."""

from diffadapt.config import LoraConfig, add_adapter
from diffadapt.errors import AdapterError, LoadError
from diffadapt.inspection import inspect
from diffadapt.io import read_pickle
from diffadapt.manager import Adapters, LoadedAdapter
from diffadapt.pipeline import adapters_of as adapters
from diffadapt.pipeline import install
from diffadapt.pipeline import load_adapter_into_model as load_adapter
from diffadapt.report import Report

__version__ = "0.1.0"
__all__ = [
    "AdapterError",
    "Adapters",
    "LoadError",
    "LoadedAdapter",
    "LoraConfig",
    "Report",
    "adapters",
    "add_adapter",
    "inspect",
    "load_adapter",
    "read_pickle",
]

install()
