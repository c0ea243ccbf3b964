"""Adapters for diffusers pipelines.

After `import diffadapt` every pipeline has `pipe.load_adapter("anything.safetensors")` and `pipe.adapters`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from diffadapt.pipelines.installation import install

if TYPE_CHECKING:
    from diffadapt.errors import AdapterError, Diverged, LoadError, UsageError
    from diffadapt.files.pickles import read_pickle
    from diffadapt.loading.conversion import convert
    from diffadapt.loading.plan import Plan
    from diffadapt.loading.report import Report
    from diffadapt.management.calibration import calibrated
    from diffadapt.management.creation import add_adapter
    from diffadapt.management.manager import Adapters
    from diffadapt.management.parameter_groups import lora_fa_, lora_plus_groups
    from diffadapt.management.pool import AdapterPool
    from diffadapt.management.rank_allocation import RankAllocator
    from diffadapt.management.reserving import Reserved
    from diffadapt.management.snapshot import LoadedAdapter
    from diffadapt.management.upcoming import UpcomingAdapter
    from diffadapt.on_disk.derived_loras import combine_files, resize
    from diffadapt.on_disk.extraction import Extraction, extract
    from diffadapt.on_disk.merged_models import merge_files
    from diffadapt.pipelines.entry import adapters_of as adapters
    from diffadapt.pipelines.entry import load_adapter_into_model as load_adapter
    from diffadapt.pipelines.inspection import inspect
    from diffadapt.pipelines.new_words import add_tokens
    from diffadapt.runtime.adapter import Adapter
    from diffadapt.strengths.block_lists import block_weights
    from diffadapt.strengths.prompt_tags import parse_prompt
    from diffadapt.strengths.schedules import Cosine, Linear, Piecewise, Schedule
    from diffadapt.to_lora.combine import Combination
    from diffadapt.to_lora.report import Conversion
    from diffadapt.training.options import TrainingOptions
    from diffadapt.training.run import train
    from diffadapt.types.adalora import AdaLoraConfig
    from diffadapt.types.adamss import AdaMSSConfig
    from diffadapt.types.boft import BOFTConfig
    from diffadapt.types.c3a import C3AConfig
    from diffadapt.types.config import AdapterConfig
    from diffadapt.types.deft import DEFTConfig
    from diffadapt.types.delora import DeLoRAConfig
    from diffadapt.types.dylora import DyLoRAConfig
    from diffadapt.types.fourierft import FourierFTConfig
    from diffadapt.types.frod import FRoDConfig
    from diffadapt.types.full import FullConfig
    from diffadapt.types.glora import GLoRAConfig
    from diffadapt.types.glora_peft import GLoRAPEFTConfig
    from diffadapt.types.gralora import GraLoRAConfig
    from diffadapt.types.hira import HiRAConfig
    from diffadapt.types.hra import HRAConfig
    from diffadapt.types.ia3 import IA3Config
    from diffadapt.types.loha import LoHaConfig
    from diffadapt.types.lokr import LoKrConfig
    from diffadapt.types.lora import LoraConfig
    from diffadapt.types.miss import MiSSConfig
    from diffadapt.types.oft import OFTConfig
    from diffadapt.types.peanut import PEANuTConfig
    from diffadapt.types.psoft import PSOFTConfig
    from diffadapt.types.randlora import RandLoraConfig
    from diffadapt.types.road import RoAdConfig
    from diffadapt.types.shira import SHiRAConfig
    from diffadapt.types.singular import OSFConfig, TLoRAConfig
    from diffadapt.types.supertuning import SuperTuningConfig
    from diffadapt.types.tinylora import TinyLoRAConfig
    from diffadapt.types.tokens import TokensConfig
    from diffadapt.types.unilora import UniLoraConfig
    from diffadapt.types.vblora import VBLoRAConfig
    from diffadapt.types.vera import PVeRAConfig, VeRAConfig
    from diffadapt.types.waveft import WaveFTConfig

__version__ = "0.1.0"
__all__ = [
    "AdaLoraConfig",
    "AdaMSSConfig",
    "Adapter",
    "AdapterConfig",
    "AdapterError",
    "AdapterPool",
    "Adapters",
    "BOFTConfig",
    "C3AConfig",
    "Combination",
    "Conversion",
    "Cosine",
    "DEFTConfig",
    "DeLoRAConfig",
    "Diverged",
    "DyLoRAConfig",
    "Extraction",
    "FRoDConfig",
    "FourierFTConfig",
    "FullConfig",
    "GLoRAConfig",
    "GLoRAPEFTConfig",
    "GraLoRAConfig",
    "HRAConfig",
    "HiRAConfig",
    "IA3Config",
    "Linear",
    "LoHaConfig",
    "LoKrConfig",
    "LoadError",
    "LoadedAdapter",
    "LoraConfig",
    "MiSSConfig",
    "OFTConfig",
    "OSFConfig",
    "PEANuTConfig",
    "PSOFTConfig",
    "PVeRAConfig",
    "Piecewise",
    "Plan",
    "RandLoraConfig",
    "RankAllocator",
    "Report",
    "Reserved",
    "RoAdConfig",
    "SHiRAConfig",
    "Schedule",
    "SuperTuningConfig",
    "TLoRAConfig",
    "TinyLoRAConfig",
    "TokensConfig",
    "TrainingOptions",
    "UniLoraConfig",
    "UpcomingAdapter",
    "UsageError",
    "VBLoRAConfig",
    "VeRAConfig",
    "WaveFTConfig",
    "adapters",
    "add_adapter",
    "add_tokens",
    "block_weights",
    "calibrated",
    "combine_files",
    "convert",
    "extract",
    "inspect",
    "load_adapter",
    "lora_fa_",
    "lora_plus_groups",
    "merge_files",
    "parse_prompt",
    "read_pickle",
    "resize",
    "train",
]

# torch takes a second to import, which the command line need not wait for.
_ORIGINS = {
    "AdaLoraConfig": ("diffadapt.types.adalora", "AdaLoraConfig"),
    "AdaMSSConfig": ("diffadapt.types.adamss", "AdaMSSConfig"),
    "Adapter": ("diffadapt.runtime.adapter", "Adapter"),
    "AdapterConfig": ("diffadapt.types.config", "AdapterConfig"),
    "AdapterError": ("diffadapt.errors", "AdapterError"),
    "AdapterPool": ("diffadapt.management.pool", "AdapterPool"),
    "Adapters": ("diffadapt.management.manager", "Adapters"),
    "BOFTConfig": ("diffadapt.types.boft", "BOFTConfig"),
    "C3AConfig": ("diffadapt.types.c3a", "C3AConfig"),
    "Combination": ("diffadapt.to_lora.combine", "Combination"),
    "Conversion": ("diffadapt.to_lora.report", "Conversion"),
    "Cosine": ("diffadapt.strengths.schedules", "Cosine"),
    "DEFTConfig": ("diffadapt.types.deft", "DEFTConfig"),
    "DeLoRAConfig": ("diffadapt.types.delora", "DeLoRAConfig"),
    "Diverged": ("diffadapt.errors", "Diverged"),
    "DyLoRAConfig": ("diffadapt.types.dylora", "DyLoRAConfig"),
    "Extraction": ("diffadapt.on_disk.extraction", "Extraction"),
    "FRoDConfig": ("diffadapt.types.frod", "FRoDConfig"),
    "FourierFTConfig": ("diffadapt.types.fourierft", "FourierFTConfig"),
    "FullConfig": ("diffadapt.types.full", "FullConfig"),
    "GLoRAConfig": ("diffadapt.types.glora", "GLoRAConfig"),
    "GLoRAPEFTConfig": ("diffadapt.types.glora_peft", "GLoRAPEFTConfig"),
    "GraLoRAConfig": ("diffadapt.types.gralora", "GraLoRAConfig"),
    "HRAConfig": ("diffadapt.types.hra", "HRAConfig"),
    "HiRAConfig": ("diffadapt.types.hira", "HiRAConfig"),
    "IA3Config": ("diffadapt.types.ia3", "IA3Config"),
    "Linear": ("diffadapt.strengths.schedules", "Linear"),
    "LoHaConfig": ("diffadapt.types.loha", "LoHaConfig"),
    "LoKrConfig": ("diffadapt.types.lokr", "LoKrConfig"),
    "LoadError": ("diffadapt.errors", "LoadError"),
    "LoadedAdapter": ("diffadapt.management.snapshot", "LoadedAdapter"),
    "LoraConfig": ("diffadapt.types.lora", "LoraConfig"),
    "MiSSConfig": ("diffadapt.types.miss", "MiSSConfig"),
    "OFTConfig": ("diffadapt.types.oft", "OFTConfig"),
    "OSFConfig": ("diffadapt.types.singular", "OSFConfig"),
    "PEANuTConfig": ("diffadapt.types.peanut", "PEANuTConfig"),
    "PSOFTConfig": ("diffadapt.types.psoft", "PSOFTConfig"),
    "PVeRAConfig": ("diffadapt.types.vera", "PVeRAConfig"),
    "Piecewise": ("diffadapt.strengths.schedules", "Piecewise"),
    "Plan": ("diffadapt.loading.plan", "Plan"),
    "RandLoraConfig": ("diffadapt.types.randlora", "RandLoraConfig"),
    "RankAllocator": ("diffadapt.management.rank_allocation", "RankAllocator"),
    "Report": ("diffadapt.loading.report", "Report"),
    "Reserved": ("diffadapt.management.reserving", "Reserved"),
    "RoAdConfig": ("diffadapt.types.road", "RoAdConfig"),
    "SHiRAConfig": ("diffadapt.types.shira", "SHiRAConfig"),
    "Schedule": ("diffadapt.strengths.schedules", "Schedule"),
    "SuperTuningConfig": ("diffadapt.types.supertuning", "SuperTuningConfig"),
    "TLoRAConfig": ("diffadapt.types.singular", "TLoRAConfig"),
    "TinyLoRAConfig": ("diffadapt.types.tinylora", "TinyLoRAConfig"),
    "TokensConfig": ("diffadapt.types.tokens", "TokensConfig"),
    "TrainingOptions": ("diffadapt.training.options", "TrainingOptions"),
    "UniLoraConfig": ("diffadapt.types.unilora", "UniLoraConfig"),
    "UpcomingAdapter": ("diffadapt.management.upcoming", "UpcomingAdapter"),
    "UsageError": ("diffadapt.errors", "UsageError"),
    "VBLoRAConfig": ("diffadapt.types.vblora", "VBLoRAConfig"),
    "VeRAConfig": ("diffadapt.types.vera", "VeRAConfig"),
    "WaveFTConfig": ("diffadapt.types.waveft", "WaveFTConfig"),
    "adapters": ("diffadapt.pipelines.entry", "adapters_of"),
    "add_adapter": ("diffadapt.management.creation", "add_adapter"),
    "add_tokens": ("diffadapt.pipelines.new_words", "add_tokens"),
    "block_weights": ("diffadapt.strengths.block_lists", "block_weights"),
    "calibrated": ("diffadapt.management.calibration", "calibrated"),
    "combine_files": ("diffadapt.on_disk.derived_loras", "combine_files"),
    "convert": ("diffadapt.loading.conversion", "convert"),
    "extract": ("diffadapt.on_disk.extraction", "extract"),
    "inspect": ("diffadapt.pipelines.inspection", "inspect"),
    "load_adapter": ("diffadapt.pipelines.entry", "load_adapter_into_model"),
    "lora_fa_": ("diffadapt.management.parameter_groups", "lora_fa_"),
    "lora_plus_groups": ("diffadapt.management.parameter_groups", "lora_plus_groups"),
    "merge_files": ("diffadapt.on_disk.merged_models", "merge_files"),
    "parse_prompt": ("diffadapt.strengths.prompt_tags", "parse_prompt"),
    "read_pickle": ("diffadapt.files.pickles", "read_pickle"),
    "resize": ("diffadapt.on_disk.derived_loras", "resize"),
    "train": ("diffadapt.training.run", "train"),
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
