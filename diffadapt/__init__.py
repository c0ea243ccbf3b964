"""Adapters for diffusers pipelines: `import diffadapt`, then `pipe.load_adapter("anything.safetensors")`."""

from diffadapt.block_weights import block_weights
from diffadapt.config import AdapterConfig
from diffadapt.convert import convert
from diffadapt.create import add_adapter
from diffadapt.errors import AdapterError, LoadError
from diffadapt.inspection import inspect
from diffadapt.io import read_pickle
from diffadapt.loaded import LoadedAdapter
from diffadapt.lowrank import Conversion
from diffadapt.manager import Adapters
from diffadapt.pipeline import adapters_of as adapters
from diffadapt.pipeline import install
from diffadapt.pipeline import load_adapter_into_model as load_adapter
from diffadapt.pool import AdapterPool
from diffadapt.prompt_tags import parse_prompt
from diffadapt.report import Report
from diffadapt.schedules import Cosine, Linear, Piecewise, Schedule
from diffadapt.types.boft import BOFTConfig
from diffadapt.types.full import FullConfig
from diffadapt.types.glora import GLoRAConfig
from diffadapt.types.ia3 import IA3Config
from diffadapt.types.loha import LoHaConfig
from diffadapt.types.lokr import LoKrConfig
from diffadapt.types.lora import LoraConfig
from diffadapt.types.oft import OFTConfig

__version__ = "0.1.0"
__all__ = [
    "AdapterConfig",
    "AdapterError",
    "AdapterPool",
    "Adapters",
    "BOFTConfig",
    "Conversion",
    "Cosine",
    "FullConfig",
    "GLoRAConfig",
    "IA3Config",
    "Linear",
    "LoHaConfig",
    "LoKrConfig",
    "LoadError",
    "LoadedAdapter",
    "LoraConfig",
    "OFTConfig",
    "Piecewise",
    "Report",
    "Schedule",
    "adapters",
    "add_adapter",
    "block_weights",
    "convert",
    "inspect",
    "load_adapter",
    "parse_prompt",
    "read_pickle",
]

install()
