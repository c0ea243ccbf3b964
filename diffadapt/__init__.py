"""Adapters for diffusers pipelines.

After `import diffadapt` every pipeline has `pipe.load_adapter("anything.safetensors")` and `pipe.adapters`.
"""

from diffadapt.errors import AdapterError, LoadError
from diffadapt.files.pickles import read_pickle
from diffadapt.loading.conversion import convert
from diffadapt.loading.plan import Plan
from diffadapt.loading.report import Report
from diffadapt.management.creation import add_adapter
from diffadapt.management.manager import Adapters
from diffadapt.management.pool import AdapterPool
from diffadapt.management.reserving import Reserved
from diffadapt.management.snapshot import LoadedAdapter
from diffadapt.pipelines.entry import adapters_of as adapters
from diffadapt.pipelines.entry import load_adapter_into_model as load_adapter
from diffadapt.pipelines.inspection import inspect
from diffadapt.pipelines.installation import install
from diffadapt.runtime.adapter import Adapter
from diffadapt.strengths.block_lists import block_weights
from diffadapt.strengths.prompt_tags import parse_prompt
from diffadapt.strengths.schedules import Cosine, Linear, Piecewise, Schedule
from diffadapt.to_lora.combine import Combination
from diffadapt.to_lora.report import Conversion
from diffadapt.types.boft import BOFTConfig
from diffadapt.types.config import AdapterConfig
from diffadapt.types.full import FullConfig
from diffadapt.types.glora import GLoRAConfig
from diffadapt.types.ia3 import IA3Config
from diffadapt.types.loha import LoHaConfig
from diffadapt.types.lokr import LoKrConfig
from diffadapt.types.lora import LoraConfig
from diffadapt.types.oft import OFTConfig

__version__ = "0.1.0"
__all__ = [
    "Adapter",
    "AdapterConfig",
    "AdapterError",
    "AdapterPool",
    "Adapters",
    "BOFTConfig",
    "Combination",
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
    "Plan",
    "Report",
    "Reserved",
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
