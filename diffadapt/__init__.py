"""Adapters for diffusers pipelines.

After `import diffadapt` every pipeline has `pipe.load_adapter("anything.safetensors")` and `pipe.adapters`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from diffadapt.pipelines.installation import install

if TYPE_CHECKING:
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

# torch takes a second to import, which the command line need not wait for.
_ORIGINS = {
    "Adapter": ("diffadapt.runtime.adapter", "Adapter"),
    "AdapterConfig": ("diffadapt.types.config", "AdapterConfig"),
    "AdapterError": ("diffadapt.errors", "AdapterError"),
    "AdapterPool": ("diffadapt.management.pool", "AdapterPool"),
    "Adapters": ("diffadapt.management.manager", "Adapters"),
    "BOFTConfig": ("diffadapt.types.boft", "BOFTConfig"),
    "Combination": ("diffadapt.to_lora.combine", "Combination"),
    "Conversion": ("diffadapt.to_lora.report", "Conversion"),
    "Cosine": ("diffadapt.strengths.schedules", "Cosine"),
    "FullConfig": ("diffadapt.types.full", "FullConfig"),
    "GLoRAConfig": ("diffadapt.types.glora", "GLoRAConfig"),
    "IA3Config": ("diffadapt.types.ia3", "IA3Config"),
    "Linear": ("diffadapt.strengths.schedules", "Linear"),
    "LoHaConfig": ("diffadapt.types.loha", "LoHaConfig"),
    "LoKrConfig": ("diffadapt.types.lokr", "LoKrConfig"),
    "LoadError": ("diffadapt.errors", "LoadError"),
    "LoadedAdapter": ("diffadapt.management.snapshot", "LoadedAdapter"),
    "LoraConfig": ("diffadapt.types.lora", "LoraConfig"),
    "OFTConfig": ("diffadapt.types.oft", "OFTConfig"),
    "Piecewise": ("diffadapt.strengths.schedules", "Piecewise"),
    "Plan": ("diffadapt.loading.plan", "Plan"),
    "Report": ("diffadapt.loading.report", "Report"),
    "Reserved": ("diffadapt.management.reserving", "Reserved"),
    "Schedule": ("diffadapt.strengths.schedules", "Schedule"),
    "adapters": ("diffadapt.pipelines.entry", "adapters_of"),
    "add_adapter": ("diffadapt.management.creation", "add_adapter"),
    "block_weights": ("diffadapt.strengths.block_lists", "block_weights"),
    "convert": ("diffadapt.loading.conversion", "convert"),
    "inspect": ("diffadapt.pipelines.inspection", "inspect"),
    "load_adapter": ("diffadapt.pipelines.entry", "load_adapter_into_model"),
    "parse_prompt": ("diffadapt.strengths.prompt_tags", "parse_prompt"),
    "read_pickle": ("diffadapt.files.pickles", "read_pickle"),
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name not in _ORIGINS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, own = _ORIGINS[name]
    value = globals()[name] = getattr(import_module(module), own)
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


install()
